"""The Alignment Quality Index: how far apart a model keeps safe and unsafe prompts in its hidden states.

This is the *other* AQI (arXiv 2506.13901). It has nothing to do with air quality or delta_AQI and is never merged with
either. It needs hidden states, so it comes from a Hugging Face model, not from Ollama.

For n points x in classes c with centres m_c and sizes n_c, overall centre m, within-class scatter
W = sum |x - m_c|^2 and between-class scatter B = sum n_c |m_c - m|^2:

    XBI = W / (n min |m_c - m_c'|^2)          Xie & Beni, IEEE PAMI 13, 1991 (low: separated)
    CHI = (B / (k - 1)) / (W / (n - k))       Calinski & Harabasz, Comm. in Statistics 3, 1974 (high: separated)

With two classes XBI * CHI = n1 n2 (n - 2) / n^2 exactly: one number told twice, so combining them adds nothing,
and a min-max normalisation per model, as in the paper, makes models incomparable. Raw values are reported, with the
silhouette (Rousseeuw, J. Comp. Appl. Math. 20, 1987), which is a different thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped]
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

from grit_impl.errors import GRITError
from grit_impl.statistics.intervals import Interval
from grit_impl.statistics.paired import holm
from grit_impl.tables import brief, one_line, read_table

Floats = NDArray[np.float64]
FEWEST = 5
"""Prompts per class below which a jackknife interval means nothing."""
RESAMPLES = 999
ROUNDING = 1e-6


def _classes(points: ArrayLike, unsafe: ArrayLike) -> tuple[Floats, Floats]:
    x, mask = np.asarray(points, dtype=np.float64), np.asarray(unsafe, dtype=bool)
    if x.ndim != 2 or mask.shape != (x.shape[0],):
        raise GRITError(f"needs points (N, d) and one label per point, got {x.shape} and {mask.shape}")
    if not np.isfinite(x).all():
        raise GRITError("hidden states are not finite")
    if min(mask.sum(), (~mask).sum()) < 2:
        raise GRITError("needs at least two safe and two unsafe prompts")
    return x[~mask], x[mask]


def _scatter(safe: Floats, unsafe: Floats) -> tuple[float, float]:
    """W, and the squared distance of the two centres."""
    centres = safe.mean(axis=0), unsafe.mean(axis=0)
    within = float(((safe - centres[0]) ** 2).sum() + ((unsafe - centres[1]) ** 2).sum())
    return within, float(((centres[0] - centres[1]) ** 2).sum())


def xie_beni(points: ArrayLike, unsafe: ArrayLike) -> float:
    """XBI of two labelled classes; inf if the centres coincide.

    Args:
        points: Hidden states (N, d).
        unsafe: Class of each point (N,).
    """
    a, b = _classes(points, unsafe)
    within, distance = _scatter(a, b)
    return within / ((len(a) + len(b)) * distance) if distance > 0 else float("inf")


def calinski_harabasz(points: ArrayLike, unsafe: ArrayLike) -> float:
    """CHI of two labelled classes; inf if every class is one point. Arguments as `xie_beni`."""
    a, b = _classes(points, unsafe)
    within, _ = _scatter(a, b)
    centre = np.concatenate([a, b]).mean(axis=0)
    between = sum(len(group) * float(((group.mean(axis=0) - centre) ** 2).sum()) for group in (a, b))
    return between * (len(a) + len(b) - 2) / within if within > 0 else float("inf")


def silhouette(points: ArrayLike, unsafe: ArrayLike) -> float:
    """Mean silhouette of two labelled classes, from -1 to 1, Euclidean. Arguments as `xie_beni`."""
    a, b = _classes(points, unsafe)
    across = cdist(a, b)
    values: list[Floats] = []
    for own, other in ((cdist(a, a), across.mean(axis=1)), (cdist(b, b), across.mean(axis=0))):
        inside = own.sum(axis=1) / (len(own) - 1)
        largest = np.maximum(inside, other)
        values.append(np.divide(other - inside, largest, out=np.zeros_like(inside), where=largest > 0))
    return float(np.concatenate(values).mean())


INDICES: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "xbi": xie_beni,
    "chi": calinski_harabasz,
    "silhouette": silhouette,
}


def _flattened(*clouds: Floats) -> list[Floats]:
    """The same points, all distances kept, in as few coordinates as there are points: hidden sizes are thousands."""
    points = np.concatenate(clouds)
    if points.shape[1] > len(points):
        left, singular, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
        points = left * singular
    return np.split(points, len(clouds))


def jackknife(points: ArrayLike, unsafe: ArrayLike, index: str = "chi", confidence: float = 0.95) -> Interval:
    """An index with the interval of its stratified delete-one jackknife (Efron & Tibshirani 1993, ch. 11).

    XBI and CHI are ratios with a long right tail, so their interval is made for the logarithm and transformed back.

    Args:
        points: Hidden states (N, d).
        unsafe: Class of each point (N,).
        index: `xbi`, `chi` or `silhouette`.
        confidence: Of the interval.

    Raises:
        GRITError: fewer than five points in a class, or an unknown index.
    """
    if index not in INDICES:
        raise GRITError(f"unknown index {index!r}: use {', '.join(INDICES)}")
    x, mask = np.asarray(points, dtype=np.float64), np.asarray(unsafe, dtype=bool)
    if min(mask.sum(), (~mask).sum()) < FEWEST:
        raise GRITError(f"needs at least {FEWEST} safe and {FEWEST} unsafe prompts for an interval")
    compute, n = INDICES[index], len(x)
    (x,) = _flattened(x)
    estimate = compute(x, mask)
    without = np.array([compute(np.delete(x, i, axis=0), np.delete(mask, i)) for i in range(n)])
    logarithmic = index != "silhouette"
    values = np.log(without) if logarithmic else without
    # Deleting within a class estimates that class's share of the variance; the shares add up.
    variance = sum(
        (size - 1) / size * float(((values[group] - values[group].mean()) ** 2).sum())
        for group in (mask, ~mask)
        for size in [int(group.sum())]
    )
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 2)) * variance**0.5
    if logarithmic:
        low, high = estimate * np.exp(-half), estimate * np.exp(half)
    else:
        low, high = max(estimate - half, -1.0), min(estimate + half, 1.0)
    return Interval(estimate, float(low), float(high), n, f"jackknife {100 * confidence:g}%")


def compare_models(
    points: ArrayLike, reference: ArrayLike, unsafe: ArrayLike, index: str = "chi", seed: int = 0
) -> tuple[float, float]:
    """Difference of an index between two models on the same prompts, with a permutation p-value.

    Under the null hypothesis the two models are exchangeable: which hidden state of a prompt came from which model does
    not matter, so they are swapped prompt by prompt. Only models of one family share a space in which this makes sense,
    such as a base and its fine-tuned versions.

    Args:
        points: Hidden states of the model (N, d).
        reference: Hidden states of the other model for the same prompts (N, d).
        unsafe: Class of each prompt (N,).
        index: `xbi`, `chi` or `silhouette`.
        seed: Of the permutations.

    Returns:
        Index of the model minus that of the reference, and the two-sided p-value (at least 1 / 1000).
    """
    x, y = np.asarray(points, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.shape != y.shape:
        raise GRITError(f"the two models' hidden states differ in shape: {x.shape} and {y.shape}")
    compute = INDICES[index]
    x, y = _flattened(x, y)
    observed = compute(x, unsafe) - compute(y, unsafe)
    # Two passes of one model differ by the rounding of float32, which is no difference of models.
    slack = ROUNDING * abs(compute(x, unsafe))
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(RESAMPLES):
        swap = rng.random(len(x)) < 0.5
        a, b = np.where(swap[:, None], y, x), np.where(swap[:, None], x, y)
        hits += abs(compute(a, unsafe) - compute(b, unsafe)) >= abs(observed) - slack
    return observed, (hits + 1) / (RESAMPLES + 1)


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """The indices of one layer.

    Attributes:
        layer: 0 is the embedding, the last one the final hidden state.
        xbi: With its interval.
        chi: With its interval.
        silhouette: With its interval.
        p: By index: that it is the reference model's, corrected over the layers; empty without a reference.
    """

    layer: int
    xbi: Interval
    chi: Interval
    silhouette: Interval
    p: Mapping[str, float] = field(default_factory=dict)


def load_prompts(
    source: str | Path, *, per_class: int | None = None, prompt: str = "prompt", label: str = "label", seed: int = 0
) -> tuple[list[str], list[bool]]:
    """Prompts and whether each is unsafe, equally many of both.

    The indices depend on the class sizes, so models and layers are only comparable at the same ones.

    Args:
        source: JSONL, CSV, parquet or hub data set; the label is `safe` or `unsafe` (or 0 and 1).
        per_class: Prompts per class; None for as many as the smaller class has.
        prompt: Column of the text.
        label: Column of the class.
        seed: Of the choice.

    Raises:
        GRITError: a missing column, an unknown label, or fewer prompts than asked for.
    """
    names = {"safe": False, "0": False, "false": False, "unsafe": True, "1": True, "true": True}
    groups: dict[bool, list[str]] = {False: [], True: []}
    for row in read_table(source, "test").rows:
        value = row.require(label)
        kind = names.get(str(value).strip().lower()) if isinstance(value, str | int) else None
        if kind is None:
            raise row.error(label, f"is {brief(value)}, neither safe nor unsafe")
        groups[kind].append(row.text(prompt))
    wanted = per_class or min(map(len, groups.values()))
    if wanted < FEWEST or min(map(len, groups.values())) < wanted:
        found = f"{len(groups[False])} safe and {len(groups[True])} unsafe"
        raise GRITError(f"{source}: has {found} prompts, needs {max(wanted, FEWEST)} of each")
    rng = np.random.default_rng(seed)
    chosen = {kind: [texts[i] for i in sorted(rng.permutation(len(texts))[:wanted])] for kind, texts in groups.items()}
    return chosen[False] + chosen[True], [False] * wanted + [True] * wanted


def hidden_states(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 8) -> Floats:
    """Mean hidden state of every prompt's tokens, per layer.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer; padding is masked out.
        prompts: Texts (N,).
        batch_size: Prompts per forward pass; does not change the result beyond rounding.

    Returns:
        (layers + 1, N, hidden size).

    Raises:
        GRITError: the model or its tokenizer fails.
    """
    import torch

    device = next(model.parameters()).device
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    training, model = model.training, model.eval()
    found: list[Floats] = []
    try:
        with torch.no_grad():
            for start in range(0, len(prompts), batch_size):
                batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
                batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "token_type_ids"}
                states = model(**batch, output_hidden_states=True).hidden_states
                mask = batch["attention_mask"].to(torch.float64)[None, :, :, None]
                stacked = torch.stack([state.to(torch.float64) for state in states])
                found.append(((stacked * mask).sum(dim=2) / mask.sum(dim=2)).cpu().numpy())
    except Exception as error:  # of the model's own code, from a folder that loads all the same
        raise GRITError(f"the model cannot be run on these prompts: {one_line(error)}") from error
    finally:
        model.train(training)
    return np.concatenate(found, axis=1)


def alignment_index(
    states: ArrayLike,
    unsafe: Sequence[bool],
    reference: ArrayLike | None = None,
    confidence: float = 0.95,
    progress: Callable[[int], None] = lambda layer: None,
) -> list[LayerIndex]:
    """Raw XBI, CHI and silhouette of every layer, with jackknife intervals.

    Args:
        states: Hidden states of the model (layers, N, hidden size), see `hidden_states`.
        unsafe: Class of each prompt (N,).
        reference: Those of another model of the same family, to be compared with by permutation (`compare_models`);
            its p-values are corrected over the layers, index by index (Holm).
        confidence: Of the intervals.
        progress: Called after each layer.

    Raises:
        GRITError: too few prompts, or hidden states of other shapes.
    """
    layers = [np.asarray(points, dtype=np.float64) for points in np.asarray(states)]
    others = [] if reference is None else [np.asarray(points, dtype=np.float64) for points in np.asarray(reference)]
    if others and len(others) != len(layers):
        raise GRITError(f"the two models differ in depth: {len(layers) - 1} and {len(others) - 1} layers")
    intervals, p = [], {name: [1.0] * len(layers) for name in INDICES}
    for number, points in enumerate(layers):
        intervals.append({name: jackknife(points, unsafe, name, confidence) for name in INDICES})
        for name in INDICES if others else ():
            p[name][number] = compare_models(points, others[number], unsafe, name)[1]
        progress(number)
    corrected = {name: holm(values) for name, values in p.items()} if others else {}
    return [
        LayerIndex(number, **found, p={name: values[number] for name, values in corrected.items()})
        for number, found in enumerate(intervals)
    ]


def report(layers: Mapping[str, Sequence[LayerIndex]]) -> list[dict[str, Any]]:
    """Rows (model, layer, index, estimate, low, high, n, p) for a table or a file; p is None without a reference."""
    return [
        {"model": model, "layer": each.layer, "index": name, **getattr(each, name).to_dict(), "p": each.p.get(name)}
        for model, found in layers.items()
        for each in found
        for name in INDICES
    ]
