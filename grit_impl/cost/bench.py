"""What GRIT costs, as ratios of things measured in turn in one process.

A machine's speed drifts, and a ratio of two medians taken minutes apart shows the drift. Here the things that are
compared take turns, one step each, and every round gives one ratio; the figure is the median over rounds, with a
distribution-free 95% interval (order statistics, from the binomial distribution with p = 1/2).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError

if TYPE_CHECKING:
    from grit_impl.method.manager import GRITManager

MAX_GRAD_NORM = 1.0
TARGETS = {"cpu step": 1.10, "gpu step": 1.03, "gpu memory": 1.01, "ledger": 1.03, "inversion of 448 factors, ms": 1.0}
# Steps after which kernels are compiled and GRIT has compared its statistics with the gradients.
SETTLED = 2
ENOUGH_RATIOS = 6
"""With fewer the median has no distribution-free 95% interval."""


@dataclass(frozen=True)
class Spread:
    """A median and its interval.

    Attributes:
        median: Of the values.
        low: Lower end of the 95% interval; the smallest value where there are fewer than six.
        high: Upper end.
        n: Number of values.
    """

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and distribution-free 95% interval of it."""
    ordered, n = sorted(values), len(values)
    # The k-th smallest and k-th largest cover the median with probability 1 - 2 P(X < k), X binomial (n, 1/2).
    k, below = 1, 0.5**n
    while k < n / 2 and below + math.comb(n, k) * 0.5**n <= 0.025:
        below += math.comb(n, k) * 0.5**n
        k += 1
    return Spread(statistics.median(ordered), ordered[k - 1], ordered[n - k], n)


def misses(measured: Spread, target: float) -> bool:
    """Whether the target is missed by more than the spread: even the interval's lower end lies above it."""
    return measured.low > target


@dataclass
class StepBench:
    """A model, an optimizer, and steps that can be taken with and without GRIT.

    Args:
        model: A PEFT model.
        optimizer: (parameters) -> optimizer.
        length: Tokens per sequence.
        batch: Sequences per micro-batch.
        accumulation: Micro-batches per step.
        autocast: Compute in bf16.
        config: GRIT's.
    """

    model: Any
    optimizer: Callable[[list[Any]], Any]
    length: int
    batch: int = 2
    accumulation: int = 4
    autocast: bool = False
    config: GRITConfig = field(default_factory=lambda: GRITConfig(kfac_update_freq=5))

    def __post_init__(self) -> None:
        import torch

        for name, p in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.01)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.inner = self.optimizer(self.parameters)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.batches = [
            torch.randint(3, vocabulary, (self.batch, self.length), generator=generator).to(self.device)
            for _ in range(8)
        ]
        self.masks = torch.ones_like(self.batches[0])
        self._step = 0

    @cached_property
    def manager(self) -> GRITManager:
        """Made when it is first needed, so that a plain step before that shows the memory of one without GRIT."""
        from grit_impl.method.manager import GRITManager

        return GRITManager(self.model, self.config)

    @cached_property
    def grit_optimizer(self) -> Any:
        """What a user's GRIT step is: around the same optimizer, or in its place where the update rule says so."""
        from grit_impl.method.optimizer import GRITOptimizer

        # A rule takes an optimizer's groups for its own; the plain steps keep theirs.
        inner = self.optimizer(self.parameters) if self.manager.rule.whole_step else self.inner
        return GRITOptimizer(inner, self.manager, MAX_GRAD_NORM)

    def wait(self) -> None:
        """Until the device has finished."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peaks(self, *, grit: bool = True) -> dict[bool, int]:
        """Peak bytes of allocated GPU memory without GRIT and, the key True, with it; 0 without a GPU.

        Of a settled step, which inverts, and of what a checkpoint asks for. Call it before any step with GRIT.

        Args:
            grit: False leaves the steps with GRIT out.
        """
        import torch

        found = {}
        for on in (False, True)[: 1 + grit]:
            for _ in range(SETTLED):
                self.step(grit=on)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if on:  # the next step inverts
                self.manager.step += -(self.manager.step + 1) % self.config.kfac_update_freq
            self.step(grit=on)
            (self.grit_optimizer if on else self.inner).state_dict()
            found[on] = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return found

    def backward(self) -> None:
        """All micro-batches of one step."""
        import torch

        for micro in range(self.accumulation):
            ids = self.batches[(self._step * self.accumulation + micro) % len(self.batches)]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = self.model(input_ids=ids, attention_mask=self.masks, labels=ids).loss / self.accumulation
            loss.backward()
        self._step += 1

    def step(self, *, grit: bool) -> float:
        """One optimizer step; returns its seconds, waiting for the device before and after."""
        import torch

        if grit:
            self.manager.attach()
        elif "manager" in vars(self):
            self.manager.detach()
        optimizer = self.grit_optimizer if grit else self.inner
        self.wait()
        began = time.perf_counter()
        self.backward()
        if not grit:  # GRIT's optimizer clips inside
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - began


def forget_grit(model: Any) -> None:
    """Take GRIT off a model and let go of its memory: the next bench's plain steps know nothing of it."""
    manager = None if model is None else vars(model).pop("_grit_manager", None)
    if manager is not None:
        manager.detach()
        del manager
        gc.collect()  # what stands for the adapters in Unsloth's functions is made of cycles, and holds copies of them


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Keep the garbage collector from walking through what exists already, for as long as this lasts.

    A large model and its libraries are a million objects, and a full collection falls into some step by chance. It
    stays on for what the steps make themselves.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def in_turn(
    arms: dict[str, Callable[[], float]], rounds: int, *, seconds: float = float("inf"), warm_up: int = 2
) -> dict[str, list[float]]:
    """Let the arms take turns.

    Args:
        arms: Name -> what takes one step and returns its seconds.
        rounds: At most.
        seconds: Budget of the rounds after the warm-up; at least two are made.
        warm_up: Rounds that are not counted.

    Returns:
        Name -> seconds per round.
    """
    taken: dict[str, list[float]] = {name: [] for name in arms}
    began = time.perf_counter()
    with frozen_objects():
        for round_ in range(-warm_up, rounds):
            if round_ == 0:
                began = time.perf_counter()
            # Every other round backwards: what comes first in a round has no advantage.
            for name in list(arms)[:: 1 if round_ % 2 else -1]:
                value = arms[name]()
                if round_ >= 0:
                    taken[name].append(value)
            if round_ >= 1 and time.perf_counter() - began > seconds:
                break
    return taken


def ratios(over: Sequence[float], under: Sequence[float], block: int = 1) -> list[float]:
    """One ratio per block of rounds: of the sums, so that what is done every few steps is in each."""
    count = min(len(over), len(under)) // block
    return [sum(over[i * block : (i + 1) * block]) / sum(under[i * block : (i + 1) * block]) for i in range(count)]


@dataclass(frozen=True)
class Growth:
    """What an exponent was fitted to.

    Attributes:
        what: What grows: `layers`, `tokens`, ...
        measure: What was measured at each size.
        unit: Of the values: `s` or `B`.
        sizes: (k,), ascending.
        values: (k, rounds), positive; round j of all sizes was measured in turn.
    """

    what: str
    measure: str
    unit: str
    sizes: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: What was measured.
        measured: A ratio, or an exponent.
        target: What it may be at most; None: told, not judged.
        growth: The points, where it is an exponent.
    """

    name: str
    measured: Spread
    target: float | None = None
    growth: Growth | None = None

    @property
    def verdict(self) -> str:
        """`met`, `within the spread` of the target, or `MISSED`."""
        if self.target is None:
            return "-"
        if misses(self.measured, self.target):
            return "MISSED"
        return "met" if self.measured.median <= self.target else "within the spread"


def exponent(sizes: Sequence[float], seconds: Sequence[Sequence[float]]) -> Spread:
    """p of seconds ~ size^p, a least-squares line through the logarithms in every round of measurements.

    Args:
        sizes: (k,).
        seconds: (k, rounds); round j of all sizes was measured in turn.
    """
    x = [math.log(size) for size in sizes]
    mean = statistics.fmean(x)
    slopes = []
    for round_ in zip(*seconds, strict=True):
        # Relative to the first: of equal values the exponent is 0, not a rounding error.
        y = [math.log(value / round_[0]) for value in round_]
        rise = sum((a - mean) * (b - statistics.fmean(y)) for a, b in zip(x, y, strict=True))
        slopes.append(rise / sum((a - mean) ** 2 for a in x))
    return spread(slopes)


def render(figures: Sequence[Figure]) -> str:
    """The table, in Markdown."""
    lines = ["| what | median [95% interval] | rounds | target | |", "|---|---|---|---|---|"]
    for f in figures:
        target = "-" if f.target is None else f"at most {f.target:g}"
        lines.append(f"| {f.name} | {f.measured} | {f.measured.n} | {target} | {f.verdict} |")
    return "\n".join(lines)


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a document.

    Raises:
        GRITError: the document has no such section.
    """
    document = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in document or end not in document:
        raise GRITError(f"{path} has no section {begin} ... {end}")
    head, rest = document.split(begin, 1)
    path.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")


def ledger_blocks(bench: StepBench, seconds: float, steps: int = 4) -> tuple[list[float], list[float]]:
    """GRIT steps with the ledger and without it, in blocks that take turns.

    The first five steps under a ledger are not counted: they look for hooks and write factor reports.

    Returns:
        Seconds per step with, and without, in the same order.
    """
    import tempfile

    from grit_impl.ledger.recorder import gradient_ledger

    with_: list[float] = []
    without: list[float] = []
    began, blocks = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder, frozen_objects():
        while blocks < 1 or (time.perf_counter() - began) * (blocks + 1) / blocks < seconds:
            without += [bench.step(grit=True) for _ in range(steps)]
            with gradient_ledger(bench.model, Path(folder, "ledger.jsonl.gz")):
                for _ in range(5):
                    bench.step(grit=True)
                with_ += [bench.step(grit=True) for _ in range(steps)]
            blocks += 1
    return with_, without
