"""Properties over shapes, ranks, dtypes and splits: whatever hypothesis thinks of, the invariants hold."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.method.capture.rank_statistics import ForwardContext, RankStatistics
from grit_impl.method.factors import READY, KroneckerFactors
from grit_impl.method.reprojection import rank_rule

# Sums of up to 60 products per entry in the accumulator's dtype; half precision inputs are exact in float32.
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
ranks = st.lists(st.integers(1, 9), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
tokens = st.integers(1, 60)
seeds = st.integers(0, 2**31 - 1)


def samples(seed: int, n: int, ranks: list[int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(n, r, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))  # type: ignore[misc]
        for r in ranks
    ]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def collected(data: list[tuple[Tensor, Tensor]], cuts: list[int], mask: Tensor, unit: float = 1.0) -> RankStatistics:
    """Statistics of the tokens cut into micro-batches at `cuts`."""
    dtype = accumulator(data[0][0].dtype)
    statistics = RankStatistics(len(data), max(a.shape[1] for a, _ in data), torch.device("cpu"), dtype)
    edges = [0, *sorted(cuts), len(mask)]
    for start, stop in itertools.pairwise(edges):
        context = ForwardContext(mask[start:stop], stop - start, torch.tensor(unit))
        for i, (a, g) in enumerate(data):
            statistics.add(i, a[start:stop], g[start:stop] / unit, context)
    return statistics


def close(value: Tensor, reference: Tensor, tolerance: float) -> bool:
    return bool((value - reference).abs().max() <= tolerance * (reference.abs().max() + 1e-30))


@quick
@given(seed=seeds, n=tokens, ranks=ranks, dtype=dtypes, data=st.data())
def test_statistics_are_sums_over_real_tokens(seed: int, n: int, ranks: list[int], dtype: Any, data: Any) -> None:
    """Oracle: one einsum per layer in float64 over the tokens whose mask is set, however they were cut and scaled."""
    values = samples(seed, n, ranks, dtype)
    cuts = data.draw(st.lists(st.integers(0, n), max_size=4))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    unit = data.draw(st.sampled_from([1.0, 0.25, 8.0]))
    # What padding computes may be anything.
    poisoned = [
        (torch.where(mask[:, None], a, float("nan")), torch.where(mask[:, None], g, float("nan"))) for a, g in values
    ]
    statistics = collected(poisoned, cuts, mask, unit)
    for i, (a, g) in enumerate(values):
        r = a.shape[1]
        for total, x in ((statistics.sum_a, a), (statistics.sum_g, g)):
            x = x.double()[mask]
            assert close(total[i, :r, :r].double(), torch.einsum("ti,tj->ij", x, x), ROUNDING[accumulator(dtype)])
            assert not total[i, r:].any()
            assert not total[i, :, r:].any()
    assert statistics.tokens.tolist() == [float(mask.sum())] * len(ranks)


def factors_of(statistics: RankStatistics, ranks: list[int], dtype: torch.dtype, **options: Any) -> KroneckerFactors:
    config = GRITConfig(**{"kfac_min_samples": 1, "kfac_damping": 0.01, **options})
    factors = KroneckerFactors(ranks, config, torch.device("cpu"), dtype)
    factors.absorb(statistics)
    return factors


@quick
@given(
    seed=seeds,
    n=tokens,
    ranks=ranks,
    dtype=dtypes,
    mode=st.sampled_from(["relative", "absolute"]),
    power=st.integers(-9, 9),
)
def test_inverses_are_inverses(seed: int, n: int, ranks: list[int], dtype: Any, mode: str, power: int) -> None:
    """Oracle: (S + d I) times its inverse is I in every layer's own block, at any scale of the gradients."""
    values = samples(seed, n, ranks, dtype)
    precision = accumulator(dtype)
    statistics = collected(values, [], torch.ones(n, dtype=torch.bool))
    statistics.sum_g.mul_(10.0**power)
    damping = 0.01 * 10.0**power if mode == "absolute" else 0.01
    factors = factors_of(statistics, ranks, precision, damping_mode=mode, kfac_damping=damping)
    factors.invert()
    s = factors.covariances()
    d = factors.damping(s)
    for i, r in enumerate(ranks):
        assert int(factors.status[1, i]) == READY
        inverse, eye = factors.inverse[1, i, :r, :r].double(), torch.eye(r, dtype=torch.float64)
        damped = s[1, i, :r, :r].double() + d[1, i].double() * eye
        condition = float(torch.linalg.cond(damped))
        error = float((damped @ inverse - eye).abs().max())
        assert error <= 20 * r * condition * torch.finfo(precision).eps
        if mode == "relative":
            assert condition <= r / 0.01 + 1.1


@quick
@given(seed=seeds, n=st.integers(20, 60), rank=st.integers(1, 6), scale=st.floats(0.1, 10))
def test_preconditioning_is_equivariant(seed: int, n: int, rank: int, scale: float) -> None:
    """Oracle b: a -> R^-1 a, g -> R' g takes S_g^-1 dA to R^-1 (S_g^-1 dA) and dB S_a^-1 to (dB S_a^-1) R."""
    generator = torch.Generator().manual_seed(seed)
    (a, g), (x, dy) = samples(seed, n, [rank, 4], torch.float64)
    r = scale * torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    r = r @ torch.diag(torch.linspace(0.5, 2, rank).double())
    mask = torch.ones(n, dtype=torch.bool)
    steps = []
    for each_a, each_g in ((a, g), (a @ torch.linalg.inv(r).T, g @ r)):
        factors = factors_of(collected([(each_a, each_g)], [], mask), [rank], torch.float64, kfac_damping=0.0)
        factors.invert()
        steps.append((factors.inverse[1, 0] @ each_g.T @ x, dy.T @ each_a @ factors.inverse[0, 0]))
    assert close(steps[1][0], torch.linalg.solve(r, steps[0][0]), 1e-8)
    assert close(steps[1][1], steps[0][1] @ r, 1e-8)


class Layer:
    """A and B with nothing around them."""

    def __init__(self, rank: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.rank = rank
        self.a = torch.randn(rank, 7, generator=generator, dtype=torch.float64).to(dtype)
        self.b = torch.randn(8, rank, generator=generator, dtype=torch.float64).to(dtype)


@quick
@given(seed=seeds, n=tokens, ranks=ranks, dtype=dtypes, k=st.integers(1, 9), two_sided=st.booleans())
def test_reprojection_properties(seed: int, n: int, ranks: list[int], dtype: Any, k: int, two_sided: bool) -> None:
    """Oracle d: ranks are min(k, r); projectors are symmetric, idempotent, of rank k and inside a layer's own block;
    k >= r changes nothing; the shrunk factors have the same product."""
    from grit_impl.method.reprojection import Reprojection, shrunk_factors

    precision = accumulator(dtype)
    values = samples(seed, n, ranks, dtype)
    options = {"reprojection_freq": 1, "reprojection_k": k, "use_two_sided_reprojection": two_sided}
    factors = factors_of(collected(values, [], torch.ones(n, dtype=torch.bool)), ranks, precision, **options)
    factors.invert()
    generator = torch.Generator().manual_seed(seed)
    layers: Any = [Layer(r, generator, dtype) for r in ranks]
    before = [(layer.a.clone(), layer.b.clone()) for layer in layers]
    reprojection = Reprojection(layers, factors.config, factors)
    reprojection.reproject(1, None)
    tolerance = 50 * ROUNDING[precision]
    for i, (layer, (a, b)) in enumerate(zip(layers, before, strict=True)):
        r = layer.rank
        assert reprojection.ranks[i] == min(k, r)
        for side in (0, 1):
            p = factors.projector[side, i]
            assert close(p @ p, p, tolerance)
            assert close(p, p.T, tolerance)
            assert round(float(p.trace()), 3) == min(k, r)
            assert not p[r:].any()
        directions = reprojection.directions[i]
        if k >= r:
            assert directions is None
            assert torch.equal(layer.a, a)
            assert torch.equal(layer.b, b)
        else:
            assert directions is not None
            small_a, small_b = shrunk_factors(layer, directions)
            assert small_a.shape == (k, 7)
            coarse = max(tolerance, 8 * torch.finfo(dtype).eps)
            assert close((small_b @ small_a).double(), (layer.b @ layer.a).double(), coarse * 4)


@quick
@given(
    spectrum=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=16),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    minimum=st.integers(1, 20),
)
def test_rank_rule_properties(spectrum: list[float], low: float, high: float, minimum: int) -> None:
    """Oracle g: within [min(r_min, r), r], monotone in tau, and the kept energy reaches tau."""
    low, high = sorted((low, high))
    values = torch.tensor(spectrum, dtype=torch.float64)
    r = len(spectrum)
    ks = [rank_rule(values, tau, minimum) for tau in (low, high)]
    assert min(minimum, r) <= ks[0] <= ks[1] <= r
    total = float(values.sum())
    if total > 1e-3:
        assert float(values.sort(descending=True).values[: ks[1]].sum()) / total >= high - 1e-8


@quick
@given(seed=seeds, n=st.integers(2, 60), ranks=ranks, dtype=dtypes, cut=st.integers(1, 59), decay=st.floats(0, 1))
def test_factors_do_not_depend_on_the_split(
    seed: int, n: int, ranks: list[int], dtype: Any, cut: int, decay: float
) -> None:
    """Oracle f: two micro-batches in one step are one batch; a second step averages tokens, not steps."""
    values, mask = samples(seed, n, ranks, dtype), torch.ones(n, dtype=torch.bool)
    precision = accumulator(dtype)
    options = {"factor_decay": decay}
    whole = factors_of(collected(values, [], mask), ranks, precision, **options)
    split = factors_of(collected(values, [min(cut, n)], mask), ranks, precision, **options)
    assert close(split.covariances(), whole.covariances(), ROUNDING[precision])
    # The same tokens again leave a mean as it is, whatever the decay.
    whole.absorb(collected(values, [], mask))
    assert close(whole.covariances(), split.covariances(), ROUNDING[precision])
