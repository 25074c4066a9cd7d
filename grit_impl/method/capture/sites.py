"""Fused LoRA functions that GRIT can read: one `Site` each, in `SITES`.

A fused function takes the LoRA weights as tensors and never calls the `lora_A` and `lora_B` modules, so that hooks on
modules see nothing. Its backward holds everything that the statistics need, and a site says where. Both ways of reading
follow the table: `fused.py` where Python runs, `fused_traced.py` where a compiler traces it. No library's names stand
anywhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from grit_impl.errors import GRITError

Dropout = Callable[[Any, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class FromKernel:
    """A tensor that exists only within a backward: the one at this place of what the site's kernel returns."""

    place: int


@dataclass(frozen=True)
class Site:
    """A fused function, an `autograd.Function` that computes LoRA layers y = W x + s B A x.

    The tuples have one entry per layer.

    Attributes:
        module: The module in which the library looks the function up at every call.
        name: Its name there.
        a, b: Places of A (r, d_in) and B (d_out, r) among the saved tensors, which are the parameters themselves.
        x: Places of x (..., d_in) among the saved tensors.
        dy: Places of dL/dy among what the backward is given.
        arguments: Places of A among the forward's arguments, hence of its gradient among the backward's results.
        scales: (ctx) -> s of each layer.
        kernel: Attribute of ctx, and place in it, of a function whose results are the `FromKernel` tensors of x and dy.
        masks: Where dropout's masks begin among the saved tensors, one per layer or None; None: there is no dropout.
        dropout: (module) -> (ctx, x, mask, layer) -> x after dropout, both as rows, as the function itself computes it.
        advice: For users whose version of the library lacks the function.
    """

    module: str
    name: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    x: tuple[int | FromKernel, ...]
    dy: tuple[int | FromKernel, ...]
    arguments: tuple[int, ...]
    scales: Callable[[Any], Sequence[float]]
    kernel: tuple[str, int] | None = None
    masks: int | None = None
    dropout: Callable[[ModuleType], Dropout] | None = None
    advice: str = "use another version"

    @property
    def adapters(self) -> tuple[int, ...]:
        """Places of A and B of each layer in turn."""
        return tuple(place for pair in zip(self.a, self.b, strict=True) for place in pair)


def inputs_and_gradients(
    site: Site, saved: Sequence[Any], dys: Sequence[Any], returned: Any = ()
) -> tuple[list[Any], list[Any]]:
    """x and dL/dy of each layer; None where the kernel has to return it first.

    Args:
        site: The function's.
        saved: Its saved tensors.
        dys: What its backward was given.
        returned: What the kernel has returned.
    """
    xs = [(returned[at.place] if returned else None) if isinstance(at, FromKernel) else saved[at] for at in site.x]
    return xs, [(returned[at.place] if returned else None) if isinstance(at, FromKernel) else dys[at] for at in site.dy]


def dropped(dropout: Dropout | None, ctx: Any, x: Tensor, masks: Sequence[Tensor | None], i: int) -> Tensor:
    """What layer i's adapter saw: x, after dropout where there is a mask."""
    mask = masks[i] if i < len(masks) else None
    if mask is None:
        return x
    assert dropout is not None
    return dropout(ctx, rows(x), rows(mask), i)


def rows(x: Tensor) -> Tensor:
    """(..., d) as (n, d)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def loaded_sites() -> list[Site]:
    """The functions of libraries that are loaded.

    Raises:
        GRITError: a library has not all of its functions, so that layers would be missed.
    """
    found = [site for site in SITES if site.module in sys.modules]
    for site in found:
        if not hasattr(sys.modules[site.module], site.name):
            library = site.module.partition(".")[0]
            version = getattr(sys.modules.get(library), "__version__", "of unknown version")
            raise GRITError(
                f"GRIT cannot take statistics from {library} {version}: {site.module} has no {site.name}; {site.advice}"
            )
    return found


def _unsloth_dropout(module: ModuleType) -> Dropout:
    replay = getattr(module, "_dropout_replay", None)

    def dropped(ctx: Any, x: Tensor, mask: Tensor, layer: int) -> Tensor:
        p = ctx.dropout_p[layer] if isinstance(ctx.dropout_p, tuple) else ctx.dropout_p
        result: Tensor = replay(x, mask, p)  # type: ignore[misc]
        return result

    return dropped


def _unsloth(name: str, **places: Any) -> Site:
    return Site(
        "unsloth.kernels.fast_lora",
        name,
        # x comes first, then W, its quantisation, A, B and s of each layer.
        arguments=tuple(range(3, 3 + 5 * len(places["a"]), 5)),
        scales=lambda ctx: ctx.custom_saved_tensors[2::3],
        dropout=_unsloth_dropout,
        advice="use a version from 2025.10 to 2026.10, or train without Unsloth (--arm pure)",
        **places,
    )


# Read in unsloth 2025.10.9 and 2026.10.9.
SITES = [
    # Gate, up and down. The kernel returns down's x, and the gradients at the outputs of up and gate.
    _unsloth(
        "LoRA_MLP",
        a=(0, 2, 4),
        b=(1, 3, 5),
        x=(6, 6, FromKernel(0)),
        dy=(FromKernel(2), FromKernel(1), 0),
        kernel=("custom_saved_tensors", 9),
        masks=9,
    ),
    _unsloth("LoRA_QKV", a=(1, 3, 5), b=(2, 4, 6), x=(0, 0, 0), dy=(0, 1, 2), masks=7),
    _unsloth("LoRA_W", a=(0,), b=(1,), x=(2,), dy=(0,), masks=3),
]
