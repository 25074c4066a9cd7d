"""GRIT's cost on the tiny model, as ratios of steps that take turns; each target stands beside its measurement."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from grit_impl.config import GRITConfig
from grit_impl.cost.bench import TARGETS, Growth, StepBench, exponent, in_turn, ledger_blocks, ratios, spread

# Collecting the suites imports no torch: each function imports what it measures.
if TYPE_CHECKING:
    import torch

# An inversion every five steps: a round is five steps, so that each holds one.
STEPS = 5
# The AQI sentences of the arms have about this many tokens.
LENGTH = 160


def adamw(parameters: list[Any]) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(parameters, lr=1e-5)


@pytest.fixture
def bench() -> Callable[..., StepBench]:
    """(rank, length, checkpointing, optimizer) -> a StepBench of the tiny base."""
    from grit_impl.recipes.bases import load_base
    from grit_impl.recipes.lora import LoRASettings, add_lora

    def build(
        rank: int = 16, length: int = LENGTH, *, checkpointing: bool = False, optimizer: Any = adamw
    ) -> StepBench:
        base, _ = load_base("tiny")
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.config.use_cache = False
        return StepBench(add_lora(base, LoRASettings(r=rank, alpha=rank), 3407), optimizer, length)

    return build


def take_turns(benchmark: Any, arms: dict[str, Callable[[], float]], rounds: int, steps: int = STEPS) -> dict[str, Any]:
    """pytest-benchmark times whole rounds; the seconds of the arms in them go to its `extra_info`."""
    taken: dict[str, list[float]] = {name: [] for name in arms}

    def one_round() -> None:
        # The other way round each time, also where a round is a single step.
        order = list(arms)[:: 1 if len(next(iter(taken.values()))) % 2 else -1]
        for name, values in in_turn({name: arms[name] for name in order}, steps, warm_up=0).items():
            taken[name].append(sum(values))

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
    counted = {name: values[-rounds:] for name, values in taken.items()}
    benchmark.extra_info.update(counted)
    return counted


@pytest.mark.parametrize(
    ("rank", "length", "checkpointing", "rounds", "steps"),
    [
        (16, LENGTH, False, 14, 5),
        (8, LENGTH, False, 8, 5),
        (64, LENGTH, False, 8, 5),
        (16, LENGTH, True, 6, 5),
        (16, 512, False, 8, 1),
    ],
)
def test_step(
    rank: int, length: int, checkpointing: bool, rounds: int, steps: int, bench: Any, benchmark: Any, judge: Any
) -> None:
    """Target: a GRIT step on the tiny model takes at most 1.10 plain LoRA steps."""
    made = bench(rank, length, checkpointing=checkpointing)
    arms = {"plain": lambda: made.step(grit=False), "grit": lambda: made.step(grit=True)}
    taken = take_turns(benchmark, arms, rounds, steps)
    name = f"step, GRIT over LoRA: r={rank}, 2 x {length} x 4 tokens" + (", checkpointing" if checkpointing else "")
    judge(name, spread(ratios(taken["grit"], taken["plain"])), TARGETS["cpu step"])


def test_ledger(bench: Any, benchmark: Any, judge: Any) -> None:
    """The ledger on a GRIT step; its target is set for an 8B step on a GPU, so here it is told."""
    made = bench()
    with_, without = benchmark.pedantic(lambda: ledger_blocks(made, 15), rounds=1)
    judge("step with the ledger over step without, r=16", spread(ratios(with_, without, block=4)))


def test_parts(bench: Any, benchmark: Any, judge: Any) -> None:
    """Statistics, inversion, preconditioning and reprojection, each on its own, over a plain step."""
    made = bench()
    manager = made.manager
    for _ in range(6):
        made.step(grit=True)

    def timed(work: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        return run

    def passes(grit: bool) -> Callable[[], float]:
        def run() -> float:
            manager.attach() if grit else manager.detach()
            made.inner.zero_grad()
            return timed(lambda: (made.backward(), manager.statistics.flush()))()

        return run

    def preconditioning() -> float:
        made.backward()  # or there would be no gradients to change
        return timed(manager._apply)()

    arms = {
        "plain": lambda: made.step(grit=False),
        "passes": passes(False),
        "with statistics": passes(True),
        "inversion": timed(manager.factors.invert),
        "preconditioning": preconditioning,
        "reprojection": timed(lambda: manager.reprojection.reproject(manager.step, made.inner)),
    }
    taken = take_turns(benchmark, arms, 12, 1)
    statistics = [b - a for a, b in zip(taken["passes"], taken["with statistics"], strict=True)]
    judge("statistics, every micro-step, over a plain step", spread(ratios(statistics, taken["plain"])))
    for name in ("inversion", "preconditioning", "reprojection"):
        judge(f"{name}, once, over a plain step", spread(ratios(taken[name], taken["plain"])))


def test_against_peft(bench: Any, benchmark: Any, judge: Any) -> None:
    """peft's Riemannian optimizer preconditions from the weights: no statistics, two inverses per layer and step."""
    import torch

    optimizers = pytest.importorskip("peft.optimizers", reason="this peft has no optimizers")
    if not hasattr(optimizers, "create_riemannian_optimizer"):
        pytest.skip("this peft has no Riemannian optimizer")
    made = bench()
    inner = {"grit": made.inner, "peft": optimizers.create_riemannian_optimizer(made.model, torch.optim.AdamW, lr=1e-5)}

    def arm(name: str) -> Callable[[], float]:
        def run() -> float:
            made.inner = inner[name]
            return made.step(grit=name == "grit")

        return run

    taken = take_turns(benchmark, {name: arm(name) for name in inner}, 6)
    judge("step, GRIT over peft's Riemannian optimizer, r=16", spread(ratios(taken["grit"], taken["peft"])))


def test_against_the_released_loop(bench: Any, benchmark: Any, judge: Any) -> None:
    """The same work layer by layer; told, not judged."""
    import torch

    spec = importlib.util.spec_from_file_location("released", Path(__file__).with_name("released.py"))
    assert spec is not None
    assert spec.loader is not None
    released = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(released)
    made = bench()
    pairs = [(x.module.lora_A[x.adapter], x.module.lora_B[x.adapter]) for x in made.manager.layers]
    loop = released.PerLayer(pairs)

    def by_layer() -> float:
        made.manager.detach()
        loop.attach()
        began = time.perf_counter()
        made.backward()
        loop.precondition()
        torch.nn.utils.clip_grad_norm_(made.parameters, 1.0)
        made.inner.step()
        made.inner.zero_grad()
        seconds = time.perf_counter() - began
        loop.detach()
        return seconds

    taken = take_turns(benchmark, {"grit": lambda: made.step(grit=True), "loop": by_layer}, 8)
    judge("step, GRIT over a per-layer loop as released, r=16", spread(ratios(taken["grit"], taken["loop"])))


def test_against_kronfluence(bench: Any, benchmark: Any, judge: Any, tmp_path: Any) -> None:
    """kronfluence has the same S_a and S_g, from lora_B's inputs and lora_A's outputs, and d x d factors besides."""
    pytest.importorskip("kronfluence", reason="kronfluence is not installed")
    import torch
    from datasets import Dataset
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    made, other = bench(), bench()

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [n for n, m in other.model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" in n]

    task = Language()
    model = prepare_model(other.model, task)
    analyzer = Analyzer("bench", model, task, cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    rows = Dataset.from_dict({"input_ids": torch.cat(made.batches[:4]).tolist()}).with_format("torch")
    options = FactorArguments(use_empirical_fisher=True)

    def theirs() -> float:
        began = time.perf_counter()
        analyzer.fit_covariance_matrices(
            "factors", rows, per_device_batch_size=2, factor_args=options, overwrite_output_dir=True
        )
        return time.perf_counter() - began

    def ours() -> float:
        made.manager.attach()
        began = time.perf_counter()
        made.backward()
        made.manager.statistics.flush()
        seconds = time.perf_counter() - began
        made.inner.zero_grad()
        return seconds

    taken = take_turns(benchmark, {"grit": ours, "kronfluence": theirs}, 6, 1)
    judge(
        "passes with statistics, GRIT over kronfluence, r=16", spread(ratios(taken["grit"], taken["kronfluence"])), 1.0
    )


# (what grows, sizes, largest exponent): tokens, layers and width linearly; r x r products per token, r^3 inversions.
GROWTH = [
    ("layers", (28, 56, 112, 224), 1.1),
    ("tokens", (512, 1024, 2048, 4096), 1.1),
    ("rank", (8, 16, 32, 64), 3.0),
    ("width", (512, 1024, 2048, 4096), 1.1),
]


@pytest.mark.parametrize(("what", "sizes", "limit"), GROWTH, ids=[g[0] for g in GROWTH])
def test_growth(what: str, sizes: tuple[int, ...], limit: float, benchmark: Any, judge: Any) -> None:
    """What GRIT adds: statistics of one pass, an inversion, all gradients. Nothing grows with width squared."""
    arms = {str(size): added_work(**{what: size}) for size in sizes}
    taken = take_turns(benchmark, arms, 9, 1)
    growth = Growth(what, "what GRIT adds", "s", sizes, tuple(tuple(taken[str(size)]) for size in sizes))
    judge(f"growth with {what}: exponent over {sizes}", exponent(sizes, growth.values), limit, growth)


def test_growth_with_processes(judge: Any, tmp_path: Path) -> None:
    """Each process hands as many bytes to the inversion's all-reduce whatever their number. The merge's time is told:
    more processes than cores wait for each other. A single process sends nothing and is left out."""
    sizes, out = (2, 4, 8), tmp_path / "processes.json"
    command = [sys.executable, str(Path(__file__).with_name("processes.py")), str(out), *map(str, sizes)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    found = json.loads(out.read_text()).values()
    most = tuple((max(sum(n for _, n in each["sent"].values()) for each in processes),) for processes in found)
    sent = Growth("processes", "sent per process and inversion", "B", sizes, most)
    judge(f"growth with processes: exponent of the bytes sent, over {sizes}", exponent(sizes, most), 0.0, sent)
    slowest = tuple(tuple(map(max, zip(*(each["merge"] for each in processes), strict=True))) for processes in found)
    merge = Growth("processes", "merge, slowest process", "s", sizes, slowest)
    judge(f"growth with processes: exponent of the merge's time, over {sizes}", exponent(sizes, slowest), None, merge)


def added_work(layers: int = 56, tokens: int = 512, rank: int = 16, width: int = 512) -> Callable[[], float]:
    """Seconds of what GRIT adds, on tensors of these sizes."""
    import torch

    from grit_impl.method.capture.rank_statistics import ForwardContext, RankStatistics
    from grit_impl.method.factors import KroneckerFactors
    from grit_impl.method.rules import rule_class

    def with_gradient(*shape: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.randn(shape))
        parameter.grad = torch.randn_like(parameter)
        return parameter

    statistics = RankStatistics(layers, rank, torch.device("cpu"))
    factors = KroneckerFactors([rank] * layers, GRITConfig(), torch.device("cpu"))
    pairs: Any = [SimpleNamespace(a=with_gradient(rank, width), b=with_gradient(width, rank)) for _ in range(layers)]
    rule = rule_class("precondition")(GRITConfig(), pairs, factors)
    a, g = torch.randn(tokens, rank), torch.randn(tokens, rank)

    def run() -> float:
        began = time.perf_counter()
        context = ForwardContext(torch.ones(1, tokens, dtype=torch.bool), tokens, torch.tensor(1.0))
        for i in range(layers):
            statistics.add(i, a, g, context)
        with torch.no_grad():
            factors.absorb(statistics)
            factors.invert()
            rule.update(warm=True, refresh=True)
        statistics.reset()
        return time.perf_counter() - began

    return run
