"""What a sweep runs: tuning trials, evaluation seeds and ablations, written down in a TOML file before any of it.

The order is seed by seed across tasks and arms, so that a sweep that ends early is smaller but still balanced.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.recipes.tasks import find_task
from grit_impl.record import fingerprint

PLANS = Path(__file__).parent / "plans"
BASE_ARM = "base"
"""The arm that trains nothing: what the base model can do already."""
METHODS = (
    *("adamw", "loraplus", "riemannian", "riemannian_after", "riemannian_sgd", "rslora"),
    *("muon", "lora_muon", "lora_rite", "grit", "none"),
)
# Of the settings of a run, those that are not options of GRITConfig.
TRAINING: dict[str, type] = {
    "lr": float,
    "warmup": int,
    "beta1": float,
    "beta2": float,
    "ratio": float,
    "reg": float,
    "rank": int,
    "alpha": float,
    "steps": int,
    "batch_size": int,
    "max_length": int,
}


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        phase: `tuning`, `evaluation` or `ablation`.
        base: What `load_base` takes.
        task: Name of a task.
        arm: Name of the arm in the plan.
        method: How the arm trains, one of `METHODS`.
        variant: Name of the ablation; empty otherwise.
        trial: Number of the tuning trial; None outside tuning, where the settings are the chosen trial's.
        seed: Of the adapters and of the training rows with their order.
        changes: Settings that hold whatever the tuning chose: the trial's, or the ablation's.
    """

    phase: str
    base: str
    task: str
    arm: str
    method: str
    seed: int
    variant: str = ""
    trial: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identifies the run in the results; what runs share is not in it (see `Plan.changed_since`)."""
        return fingerprint(dataclasses.asdict(self))[:16]

    @property
    def group(self) -> tuple[str, str]:
        """Task and arm: what is tuned together."""
        return self.task, self.arm


@dataclass(frozen=True)
class Ablation:
    """One change to tuned arms, everything else equal."""

    name: str
    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    changes: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        name: Of the plan.
        base: What `load_base` takes.
        tasks: Names of the tasks.
        reference: The arm that the others are compared with.
        common: Settings of every run, before the trial's.
        methods: Arm to method.
        fixed: Arm to the settings that all its trials share.
        trials: Arm to its tuning trials; all arms have equally many.
        tuning_seeds, evaluation_seeds: Disjoint.
        ablations: What is changed one at a time.
        every: Optimizer steps between two evaluations.
    """

    name: str
    base: str
    tasks: tuple[str, ...]
    reference: str
    common: dict[str, Any]
    methods: dict[str, str]
    fixed: dict[str, dict[str, Any]]
    trials: dict[str, tuple[dict[str, Any], ...]]
    tuning_seeds: tuple[int, ...]
    evaluation_seeds: tuple[int, ...]
    ablations: tuple[Ablation, ...]
    every: int

    def jobs(self) -> Iterator[PlannedRun]:
        """All runs in their order."""
        for seed in self.tuning_seeds:
            for trial in range(max(map(len, self.trials.values()))):
                for task in self.tasks:
                    for arm, trials in self.trials.items():
                        changes = trials[trial]
                        yield self._job("tuning", task, arm, seed, trial=trial, changes=changes)
        for task in self.tasks:
            yield PlannedRun("evaluation", self.base, task, BASE_ARM, "none", 0, changes={"steps": 0})
        for seed in self.evaluation_seeds:
            for task in self.tasks:
                for arm in self.trials:
                    yield self._job("evaluation", task, arm, seed)
        for seed in sorted({seed for ablation in self.ablations for seed in ablation.seeds}):
            for ablation in self.ablations:
                for task in ablation.tasks if seed in ablation.seeds else ():
                    for arm in ablation.arms:
                        changes = ablation.changes
                        yield self._job("ablation", task, arm, seed, variant=ablation.name, changes=changes)

    def only(self, tasks: Sequence[str] = (), seeds: Sequence[int] = ()) -> Plan:
        """The plan's runs on these tasks, and after tuning with these seeds; none given: all of them.

        Raises:
            GRITError: the plan has no such task or seed.
        """
        later = dict.fromkeys((*self.evaluation_seeds, *(seed for a in self.ablations for seed in a.seeds)))
        for kind, asked, known in (("task", tasks, self.tasks), ("seed after tuning", seeds, later)):
            if absent := [each for each in asked if each not in known]:
                raise GRITError(
                    f"plan {self.name} has no {kind} {absent[0]!r}: choose one of {', '.join(map(str, known))}"
                )
        tasks, seeds = tuple(dict.fromkeys(tasks)) or self.tasks, tuple(dict.fromkeys(seeds)) or tuple(later)
        kept = (
            dataclasses.replace(
                ablation,
                tasks=tuple(task for task in ablation.tasks if task in tasks),
                seeds=tuple(seed for seed in ablation.seeds if seed in seeds),
            )
            for ablation in self.ablations
        )
        evaluated = tuple(seed for seed in self.evaluation_seeds if seed in seeds)
        return dataclasses.replace(self, tasks=tasks, evaluation_seeds=evaluated, ablations=tuple(kept))

    def changed_since(self, before: Mapping[str, Any]) -> str:
        """What makes runs of an earlier plan others than this one's, though their keys may agree; empty: nothing.

        Tasks, arms, evaluation seeds and ablations may be added.

        Args:
            before: The earlier plan, as `dataclasses.asdict` and JSON made it.
        """
        now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for name in ("base", "common", "every", "tuning_seeds"):
            if now[name] != before[name]:
                return name
        arms = [arm for arm in now["methods"] if arm in before["methods"]]
        kinds = ("methods", "fixed", "trials")
        return next((f"arm {arm}" for arm in arms if any(now[k][arm] != before[k][arm] for k in kinds)), "")

    def _job(self, phase: str, task: str, arm: str, seed: int, **rest: Any) -> PlannedRun:
        return PlannedRun(phase, self.base, task, arm, self.methods[arm], seed, **rest)

    def settings(self, job: PlannedRun, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Everything a run needs besides the job: common settings, the chosen trial's, the job's own changes."""
        return {**self.common, **self.fixed.get(job.arm, {}), **chosen, **job.changes, "every": self.every}


def load_plan(name_or_path: str | Path) -> Plan:
    """Read a plan: one that comes with the project by name, or a TOML file.

    Raises:
        GRITError: no such plan, not TOML, or something in it that is unknown or impossible.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = PLANS / f"{name_or_path}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in PLANS.glob("*.toml")))
            raise GRITError(f"unknown plan {str(name_or_path)!r}: choose one of {known}, or give a .toml file")
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GRITError(f"cannot read plan {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GRITError(f"plan {path} is not TOML: {error}") from None
    try:
        return _plan(path.stem, value)
    except KeyError as error:
        raise GRITError(f"plan {path} lacks {error.args[0]}") from None
    except GRITError as error:
        raise GRITError(f"plan {path}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise GRITError(f"plan {path} has a value of the wrong kind: {error}") from None


def _plan(name: str, value: dict[str, Any]) -> Plan:
    arms = value["arms"]
    methods, fixed, trials = {}, {}, {}
    for arm, entry in arms.items():
        entry = dict(entry)
        methods[arm] = entry.pop("method")
        if methods[arm] not in METHODS:
            raise GRITError(f"arm {arm}: unknown method {methods[arm]!r}, choose one of {', '.join(METHODS)}")
        columns = entry.pop("trials")
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise GRITError(f"arm {arm}: the lists of its trials differ in length")
        trials[arm] = tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        fixed[arm] = entry
    if len({len(rows) for rows in trials.values()}) != 1:
        raise GRITError("the arms differ in their number of trials, so that the comparison would not be fair")
    tasks = tuple(value["tasks"])
    ablations = tuple(
        Ablation(
            entry["name"], tuple(entry["arms"]), tuple(entry["tasks"]), tuple(entry["seeds"]), dict(entry["changes"])
        )
        for entry in value.get("ablations", ())
    )
    plan = Plan(
        name=name,
        base=value["base"],
        tasks=tasks,
        reference=value["reference"],
        common=dict(value["common"]),
        methods=methods,
        fixed=fixed,
        trials=trials,
        tuning_seeds=tuple(value["tuning_seeds"]),
        evaluation_seeds=tuple(value["evaluation_seeds"]),
        ablations=ablations,
        every=value["every"],
    )
    _validate(plan)
    return plan


def _validate(plan: Plan) -> None:
    if plan.reference not in plan.methods:
        raise GRITError(f"the reference {plan.reference!r} is not an arm")
    shared = set(plan.tuning_seeds) & set(plan.evaluation_seeds)
    if shared:
        raise GRITError(f"seed {min(shared)} is used in tuning and in evaluation")
    for task in (*plan.tasks, *(task for ablation in plan.ablations for task in ablation.tasks)):
        find_task(task)
    for ablation in plan.ablations:
        for arm in ablation.arms:
            if arm not in plan.methods:
                raise GRITError(f"ablation {ablation.name!r}: unknown arm {arm!r}")
    for job in plan.jobs():
        split_settings(job.method, plan.settings(job, {}))


def split_settings(method: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], GRITConfig | None]:
    """Settings of the training loop, and GRIT's configuration for the method `grit`.

    Raises:
        GRITError: an option that the method does not have, or a value of the wrong kind.
    """
    training = {name: settings[name] for name in TRAINING if name in settings}
    for name, number in training.items():
        if isinstance(number, bool) or not isinstance(number, (int, TRAINING[name])):
            raise GRITError(f"{name} = {number!r}: expected {TRAINING[name].__name__}")
    rest = {name: option for name, option in settings.items() if name not in TRAINING and name != "every"}
    if method == "grit":
        preset = rest.pop("preset", None)
        return training, GRITConfig.from_dict(rest) if preset is None else GRITConfig.preset(preset, **rest)
    if rest:
        raise GRITError(f"method {method} has no option {next(iter(rest))!r}")
    return training, None
