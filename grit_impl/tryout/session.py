"""The course of `grit try`: rows, a few steps on the clock, tuning, pairs, the answer. What is finished is kept."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grit_impl.config import TUNED
from grit_impl.errors import GRITError, RunFailed
from grit_impl.imports import closure
from grit_impl.machine import versions
from grit_impl.recipes.arms import TrainingSettings
from grit_impl.recipes.bases import find_base
from grit_impl.recipes.fetch import digest
from grit_impl.record import fingerprint, sha256_file, write_atomic
from grit_impl.runs.restart import differences
from grit_impl.settings import flags
from grit_impl.sweep.plan import BASE_ARM, Plan
from grit_impl.sweep.scheduler import Sweep
from grit_impl.sweep.store import Store, choose_trial
from grit_impl.tryout import plan as plans
from grit_impl.tryout.decision import FLOOR, Decided, decide, lower_loss
from grit_impl.tryout.options import SHARED, Trying
from grit_impl.tryout.plan import GRIT, METHODS, Costs, Size
from grit_impl.tryout.work import HOW, LEDGER, work

REQUEST, SIZE, ANSWER, RESULTS = "request.json", "size.json", "answer.json", "runs.db"
PROBE = "probe.db"
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """One call of `grit try`.

    Attributes:
        base, dataset: What `find_base` and `load_instructions` take.
        trying: The options of its own.
        training: What all runs share; its learning rate is the middle of the search.
        device: `cpu` or `cuda`.
    """

    base: str
    dataset: str
    trying: Trying
    training: TrainingSettings
    device: str

    def common(self) -> dict[str, Any]:
        """Settings of every run, as a sweep has them."""
        from_training = {
            "warmup": "warmup_steps",
            "beta1": "adam_beta1",
            "beta2": "adam_beta2",
            "rank": "rank",
            "alpha": "alpha",
            "batch_size": "batch_size",
        }
        return {name: getattr(self.training, other) for name, other in from_training.items()}

    def request(self) -> dict[str, Any]:
        """What determines the answer, in the form that `runs.restart.differences` compares."""
        spec = {"--base-model": self.base, "--dataset": self.dataset, "--device": self.device}
        for cls, values, names in (
            (Trying, self.trying, [each for each in asdict(self.trying)]),
            (TrainingSettings, self.training, SHARED),
        ):
            fields = cls.__dataclass_fields__
            spec |= {flags(fields[name])[0]: getattr(values, name) for name in names}
        data = [Path(self.dataset)] if Path(self.dataset).is_file() else []
        depends = {
            "contents": {path.name: digest(path) for path in (*find_base(self.base).weights(), *data)},
            "source": fingerprint({n: sha256_file(p) for n, p in closure("grit_impl.tryout.work").items()}),
            "versions": versions(),
            "gpu": self.device == "cuda",
        }
        return {"spec": spec, "fingerprint": fingerprint([spec, depends]), "depends": depends}


def claim_folder(folder: Path, asked: Asked) -> None:
    """Take a folder for this question; what is in it must be the same question's.

    Raises:
        GRITError: it holds runs of something else; what differs is named.
    """
    now, file = asked.request(), folder / REQUEST
    try:
        before = json.loads(file.read_text())
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            raise GRITError(f"{folder} holds files of something else: choose another --out") from None
        write_atomic(file, json.dumps(now, indent=2))
        return
    except (OSError, ValueError) as error:
        raise GRITError(f"cannot read {file}: {error}: choose another --out") from None
    if not (named := differences(before, now)):
        return
    if _has_runs(folder):
        raise GRITError(
            f"{folder} was begun with other options ({'; '.join(named[:4])}): ask for the same, or choose another --out"
        )
    # What was refused before its first run: nothing of it is kept, lest its size or its clock be taken for this one's.
    for name in (SIZE, PROBE, RESULTS):
        for path in folder.glob(f"{name}*"):
            path.unlink()
    write_atomic(file, json.dumps(now, indent=2))


def _has_runs(folder: Path) -> bool:
    if not (folder / RESULTS).is_file():
        return False
    with Store(folder / RESULTS) as store:
        return bool(store.runs())


def run(asked: Asked, folder: Path, *, jobs: int, say: Say, progress: Progress) -> dict[str, Any]:
    """Answer, or go on with what an interrupted call has begun.

    Args:
        asked: The question.
        folder: Claimed for it.
        jobs: Runs at a time.
        say: Told lines for people.
        progress: Told a label, what is done, and the total.

    Returns:
        The content of `answer.json`.

    Raises:
        GRITError: base or data are wrong, nothing fits the time, or no trial of an arm came to an end.
        RunFailed: a run broke.
    """
    if (folder / ANSWER).is_file():
        found: dict[str, Any] = json.loads((folder / ANSWER).read_text())
        return found
    from grit_impl.tryout.data import prepare, read_side

    parts = prepare(asked.base, asked.dataset, asked.training.max_length, asked.trying.seed, folder)
    say(f"rows: {parts}")
    say(parts.first)
    _check_items(asked, folder)
    how = {
        "metric": asked.trying.metric,
        "pattern": asked.trying.pattern,
        "accumulation": asked.training.accumulation,
        "gradient_checkpointing": asked.training.gradient_checkpointing,
        "first": asked.trying.seed + 1,
    }
    write_atomic(folder / HOW, json.dumps(how))
    together = partial(_sweep, asked, folder, jobs, progress)
    spacing = plans.NEAR if asked.base in TUNED[GRIT] else plans.FAR
    make = partial(
        plans.make_plan,
        asked.base,
        Path(asked.dataset).stem,
        asked.common(),
        centre=asked.training.learning_rate,
        spacing=spacing,
        seed=asked.trying.seed,
    )
    rows_per_step = asked.training.batch_size * asked.training.accumulation
    most = max(25, math.ceil(plans.EPOCHS * len(read_side(folder, "train").prompts) / rows_per_step))
    size, seconds = _size(
        asked, folder, jobs, most, lambda: together("measuring a few steps", plans.probe(make(Size(1, 1, 3))))
    )
    wider = f", and at most {size.wider} more" if size.wider else ""
    say(
        f"up to {size.runs} runs of {size.steps} steps: {size.trials} learning rates for each of {len(METHODS)} arms"
        f"{wider}, then {size.seeds} pairs; at most about {_minutes(seconds)} with {jobs} at a time "
        f"(--minutes {asked.trying.minutes:g})"
    )
    tuning = make(size)
    tuned = _tuned(together("tuning", tuning), tuning)
    for more in range(size.wider):
        if not any(plans.at_an_end(each["rates"], each["lr"]) for each in tuned.values()):
            break
        tuning = plans.widen(tuning, {arm: each["lr"] for arm, each in tuned.items()}, spacing)
        say("a best learning rate lies at an end of its range: one more trial for every arm")
        tuned = _tuned(together(f"tuning, wider ({more + 1})", tuning), tuning)
    if GRIT not in tuned or len(tuned) < 2:
        raise GRITError("every trial diverged: lower --learning-rate, or look at the data")
    reference = min((arm for arm in METHODS if arm != GRIT and arm in tuned), key=lambda arm: tuned[arm]["loss"])
    say(f"best of plain LoRA in tuning: {plans.NAMES[reference]}, lr {tuned[reference]['lr']:g}")
    rows = together("pairs", plans.paired(tuning, reference, size.seeds))
    found = _result(asked, folder, parts.rows, size, tuned, reference, rows)
    write_atomic(folder / ANSWER, json.dumps(found, indent=2))
    return found


def _check_items(asked: Asked, folder: Path) -> None:
    """Refuse answers that the metric cannot read, before anything is trained."""
    if asked.trying.metric == "loss":
        return
    from grit_impl.recipes.bases import load_tokenizer
    from grit_impl.tryout.data import is_right, items, read_side

    wanted = items(read_side(folder, "test"), load_tokenizer(asked.base), asked.trying.metric, asked.trying.pattern)
    for item in wanted:
        is_right(asked.trying.metric, item, str(item["answer"]))


def _sweep(asked: Asked, folder: Path, jobs: int, progress: Progress, label: str, plan: Plan) -> list[dict[str, Any]]:
    """Run what is missing of a plan; all its runs."""
    with Store(folder / (PROBE if plan.name == "probe" else RESULTS)) as store:
        sweep = Sweep(
            plan,
            store,
            jobs=1 if plan.name == "probe" else jobs,
            device=asked.device,
            retry=True,
            fresh=_quantised(asked.base),
            work=partial(work, str(folder)),
            progress=lambda done, total, _: progress(label, done - before, total - before),
        )
        before = sweep.finished
        sweep.run()
        keys = {job.key for job in plan.jobs()}
        rows = [row for row in store.runs() if row["key"] in keys]
    for row in rows:
        if row["status"] == "failed":
            raise RunFailed(f"{label}: the run of {row['arm']}, seed {row['seed']}, failed: {row['error']}")
    return rows


def _quantised(base: str) -> bool:
    """Whether a base's weights need bitsandbytes."""
    found = find_base(base)
    return found.shape is not None or "quantization_config" in json.loads((found.folder() / "config.json").read_text())


def _size(
    asked: Asked, folder: Path, jobs: int, most_steps: int, measure: Callable[[], list[dict[str, Any]]]
) -> tuple[Size, float]:
    """How much is run and how long it takes: measured and chosen once, so that a resumed call does not choose anew."""
    file = folder / SIZE
    if file.is_file():
        noted = json.loads(file.read_text())
        return Size(**noted["size"]), noted["seconds"]
    rows = {row["arm"]: row for row in measure()}
    step = {arm: row["step_seconds"] for arm, row in rows.items()}
    # The first run waits for the libraries that all of them share.
    rest = min(row["seconds"] - row["train_seconds"] for row in rows.values())
    # No answer was generated on the clock: a guess, three times what a run takes to load and to evaluate.
    answers = 0.0 if asked.trying.metric == "loss" else 3 * rest
    costs = Costs(step, rest, answers)
    trying = asked.trying
    wanted = {"steps": trying.steps, "trials": trying.trials, "seeds": trying.seeds}
    size, seconds = plans.choose_size(costs, trying.minutes, jobs, most_steps, wanted)
    write_atomic(file, json.dumps({"size": plans.described(size), "seconds": seconds, "costs": asdict(costs)}))
    return size, seconds


def _tuned(rows: Sequence[Row], plan: Plan) -> dict[str, dict[str, Any]]:
    """By arm what its tuning chose: `lr`, `loss`, `trial`, and the losses of all trials (None: it diverged)."""
    found: dict[str, dict[str, Any]] = {}
    for arm, trials in plan.trials.items():
        own = [dict(row) for row in rows if row["arm"] == arm and row["phase"] == "tuning"]
        trial = choose_trial(own)
        if trial is not None:
            losses = {row["trial"]: row["loss"] for row in own}
            found[arm] = {
                "lr": trials[trial]["lr"],
                "loss": losses[trial],
                "trial": trial,
                "rates": [each["lr"] for each in trials],
                "losses": [losses[number] for number in range(len(trials))],
            }
    return found


def _result(
    asked: Asked,
    folder: Path,
    sides: Mapping[str, Sequence[int]],
    size: Size,
    tuned: Mapping[str, Any],
    reference: str,
    rows: Sequence[Row],
) -> dict[str, Any]:
    """Everything that the page says."""
    from grit_impl.ledger.verdict import judge_ledger

    after = [row for row in rows if row["phase"] == "evaluation"]
    of = {arm: {row["seed"]: row for row in after if row["arm"] == arm} for arm in (reference, GRIT)}
    base = next((row for row in after if row["arm"] == BASE_ARM), None)
    verdict = judge_ledger(folder / LEDGER)
    return {
        "schema": 1,
        "base_model": asked.base,
        "dataset": asked.dataset,
        "metric": asked.trying.metric,
        "rows": {name: len(numbers) for name, numbers in sides.items()},
        "size": plans.described(size),
        "seconds": _seconds(folder),
        "training": asked.common()
        | {"accumulation": asked.training.accumulation, "max_length": asked.training.max_length},
        "seed": asked.trying.seed,
        "tuned": dict(tuned),
        "reference": reference,
        "base": {name: base[name] for name in ("loss", "accuracy")} if base else None,
        "pairs": [
            {"seed": number, **{arm: _kept(of[arm][number]) for arm in (reference, GRIT)}}
            for number in sorted(of[GRIT])
        ],
        "answer": judged(asked.trying, of[GRIT], of[reference]).to_dict(),
        "ledger": {"cause": verdict.cause, "effective": verdict.effective, "summary": verdict.summary},
        "cost": _cost(of, folder, reference, asked.trying.seed + 1),
    }


def _seconds(folder: Path) -> float:
    """Process-seconds of all runs."""
    with Store(folder / RESULTS) as store:
        return float(sum(row["seconds"] for row in store.runs()))


def _kept(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("status", "loss", "accuracy", "step_seconds", "seconds")}


def judged(trying: Trying, ours: Mapping[int, Row], theirs: Mapping[int, Row]) -> Decided:
    """The decision on the pairs of which the reference came to an end."""
    good = [number for number in ours if theirs[number]["status"] == "done"]
    diverged = sum(ours[number]["status"] != "done" for number in good)
    pairs = [(ours[number], theirs[number]) for number in good if ours[number]["status"] == "done"]
    if trying.metric == "loss":
        gains = [lower_loss(a["loss"], b["loss"]) for a, b in pairs]
        return decide(gains, trying.smallest_effect, diverged=diverged)
    gains = [a["accuracy"] - b["accuracy"] for a, b in pairs]
    best = max((row["accuracy"] for pair in pairs for row in pair), default=0.0)
    floor = f"neither arm answers more than {best:.1f}% right, which says nothing: train longer" if best < FLOOR else ""
    return decide(gains, trying.smallest_effect, diverged=diverged, floor=floor, log=False)


def _cost(of: Mapping[str, Mapping[int, Row]], folder: Path, reference: str, first: int) -> dict[str, Any]:
    """Median seconds per step (the run under the ledger left out) and the peak of memory, by arm."""
    found = {}
    for arm in (reference, GRIT):
        steps = [row["step_seconds"] for number, row in of[arm].items() if number != first and row["step_seconds"]]
        notes = (folder / "measures" / f"{arm}-{number}.json" for number in of[arm] if number != first)
        memory = [json.loads(note.read_text())["memory_bytes"] for note in notes]
        found[arm] = {
            "step_seconds": statistics.median(steps) if steps else None,
            "memory_bytes": max(memory, default=None),
        }
    return found


def _minutes(seconds: float) -> str:
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}:{rest:02d} min" if whole else f"{rest} s"
