"""What `grit try` runs, and how long that takes: plans for the sweep's scheduler. Imports no torch.

Four arms with as many trials each, along the learning rate alone; everything else is the same for all of them. The
best opponent by its validation loss then meets GRIT on seeds that no tuning has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from grit_impl.config import PRESETS
from grit_impl.errors import GRITError
from grit_impl.sweep.plan import Plan

GRIT = "recommended"
METHODS = {"adamw": "adamw", "loraplus": "loraplus", "rslora": "rslora", GRIT: "grit"}
NAMES = {"adamw": "LoRA with AdamW", "loraplus": "LoRA+", "rslora": "rsLoRA", GRIT: "GRIT (recommended)"}
LORAPLUS_RATIO = 16
"""B's learning rate over A's, as its authors recommend (Hayou et al. 2024)."""
CENTRES = {"adamw": 1.0, "loraplus": 0.22, "rslora": 0.5, GRIT: 1.0}
"""Where an arm's range lies, over AdamW's: as in grit-vs-lora-tiny, whose best trials these were."""
NEAR, FAR = 1.5, 2.5
"""From one learning rate to the next, where the base's best is known from a sweep, and where it is a guess."""
# From what one would like to what still says something: optimizer steps, trials of an arm, seeds.
LADDER = ((200, 5, 6), (150, 5, 6), (100, 5, 6), (100, 4, 6), (60, 4, 6), (60, 3, 5), (40, 3, 4), (25, 3, 3))
EPOCHS = 4
"""Passes over the training rows, at most, where nobody asks for a number of steps."""
WIDENED = 2
"""Trials that every arm gets besides, at most, as long as any arm's best lies at an end of its range."""
PROBE_STEPS = 12
LIBRARIES = 2**29
"""Bytes that a process takes besides the base's weights, about."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    steps: int
    trials: int
    seeds: int

    @property
    def wider(self) -> int:
        """Trials that an arm may get besides: of fewer than three, both ends of the range say nothing."""
        return WIDENED if self.trials >= 3 else 0

    @property
    def runs(self) -> int:
        """Trainings, at most: of every trial, and of two arms per seed."""
        return len(METHODS) * (self.trials + self.wider) + 2 * self.seeds


@dataclass(frozen=True)
class Costs:
    """What a few steps have shown.

    Attributes:
        step: Seconds per optimizer step, by arm (AdamW's stands for all but GRIT).
        run: Seconds of a run besides its steps: loading, evaluation on the validation rows.
        answers: Seconds for the test rows' answers, after the last step.
    """

    step: Mapping[str, float]
    run: float
    answers: float

    def seconds(self, size: Size, jobs: int) -> float:
        """Of all runs, at most, with so many at a time."""
        tuning = sum((size.trials + size.wider) * (self.run + size.steps * self.of(arm)) for arm in METHODS)
        pair = 2 * (self.run + self.answers) + size.steps * (self.of(GRIT) + self.of("adamw"))
        return (tuning + size.seeds * pair) / jobs

    def of(self, arm: str) -> float:
        """Seconds per step of an arm."""
        return self.step.get(arm, self.step["adamw"])


def choose_size(
    costs: Costs, minutes: float, jobs: int, most_steps: int, asked: Mapping[str, int | None]
) -> tuple[Size, float]:
    """The largest size of the ladder that fits the time; what was asked for is kept.

    Args:
        costs: What `measure` found.
        minutes: For everything.
        jobs: Runs at a time.
        most_steps: Beyond which no steps are chosen.
        asked: `steps`, `trials`, `seeds`, as far as they were given.

    Returns:
        The size, and the seconds that it takes at most.

    Raises:
        GRITError: nothing fits.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    for steps, trials, seeds in LADDER:
        size = replace(Size(min(steps, most_steps), trials, seeds), **given)
        if (seconds := costs.seconds(size, jobs)) <= 60 * minutes:
            return size, seconds
    raise GRITError(
        f"--minutes {minutes:g} is too short: up to {size.runs} runs of {size.steps} steps take about "
        f"{math.ceil(seconds / 60)} minutes here"
    )


def jobs_that_fit(wanted: int, weights: int, free: int | None) -> int:
    """Runs at a time for which there is memory, at least one.

    Args:
        wanted: More are not run.
        weights: Bytes of the base's, as stored; 0: not known. In float32 they may be twice that.
        free: Bytes; None: not known.
    """
    if not weights or free is None:
        return wanted
    return max(1, min(wanted, free // (2 * weights + LIBRARIES)))


def rates(centre: float, arm: str, trials: int, spacing: float) -> list[float]:
    """The learning rates of an arm, ascending, its centre among them (two significant digits)."""
    first = CENTRES[arm] * centre * spacing ** -((trials - 1) // 2)
    return [float(f"{first * spacing**number:.2g}") for number in range(trials)]


def make_plan(
    base: str, task: str, common: Mapping[str, Any], size: Size, *, centre: float, spacing: float, seed: int
) -> Plan:
    """The plan of the tuning; `paired` makes the other half of it.

    Args:
        base, task: Names.
        common: Settings of every run but the learning rate.
        size: How much.
        centre: Of AdamW's learning rates.
        spacing: From one to the next.
        seed: Of the tuning; those of the evaluation are other ones.
    """
    settings = {**common, "steps": size.steps}
    trials = {arm: tuple({"lr": lr} for lr in rates(centre, arm, size.trials, spacing)) for arm in METHODS}
    return Plan(
        name="try",
        base=base,
        tasks=(task,),
        reference="adamw",
        common=settings,
        methods=dict(METHODS),
        fixed={"loraplus": {"ratio": LORAPLUS_RATIO}, GRIT: dict(PRESETS[GRIT])},
        trials=trials,
        tuning_seeds=(seed,),
        evaluation_seeds=(),
        ablations=(),
        every=size.steps,
    )


def at_an_end(rates: Sequence[float], chosen: float) -> bool:
    """Whether a better rate may lie beyond the range."""
    return chosen in (min(rates), max(rates))


def widen(plan: Plan, chosen: Mapping[str, float], spacing: float) -> Plan:
    """One more trial for every arm, beyond the end of its range that its best rate is nearer to.

    Args:
        plan: The tuning so far.
        chosen: By arm the best rate; an arm of which no trial came to an end goes lower.
        spacing: From one rate to the next.
    """
    trials = {}
    for arm, before in plan.trials.items():
        found = sorted(trial["lr"] for trial in before)
        upward = 2 * found.index(chosen[arm]) >= len(found) - 1 if arm in chosen else False
        rate = found[-1] * spacing if upward else found[0] / spacing
        trials[arm] = (*before, {"lr": float(f"{rate:.2g}")})
    return replace(plan, trials=trials)


def paired(plan: Plan, reference: str, seeds: int) -> Plan:
    """The best opponent and GRIT, each with what its tuning chose, on seeds that no tuning has seen."""
    arms = (reference, GRIT)
    return replace(
        plan,
        reference=reference,
        methods={arm: plan.methods[arm] for arm in arms},
        trials={arm: plan.trials[arm] for arm in arms},
        evaluation_seeds=tuple(plan.tuning_seeds[0] + 1 + number for number in range(seeds)),
    )


def probe(plan: Plan) -> Plan:
    """A few steps of two arms, to say how long everything takes."""
    arms = ("adamw", GRIT)
    return replace(
        plan,
        name="probe",
        common={**plan.common, "steps": PROBE_STEPS},
        methods={arm: plan.methods[arm] for arm in arms},
        trials={arm: plan.trials[arm][:1] for arm in arms},
        every=PROBE_STEPS // 2,
    )


def described(size: Size) -> dict[str, int]:
    """JSON values; `Size(**described(size))` is the size again."""
    return asdict(size)
