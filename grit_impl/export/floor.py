"""What llama.cpp may differ by: two right programs give two answers, and how far apart is measured on the model itself.

Where weights are stored in fewer bits than float32, llama.cpp rounds what it multiplies them with, too: to float16 or
bfloat16, or to 8 bits with a scale for each 32 numbers (256 for K-quants). Here transformers does the same. Where
nothing is rounded, the order of sums is what differs: products are then taken in float64, and side by side with others.
Source: `vec_dot_type` in llama.cpp's ggml-cpu.c.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Round = Callable[["torch.Tensor"], "torch.Tensor"]


def rounding(kind: str) -> Round | None:
    """How llama.cpp rounds the other factor of a matrix of this type; None for float32."""
    import torch

    if kind == "F32":
        return None
    if kind in ("F16", "BF16"):
        narrow = torch.float16 if kind == "F16" else torch.bfloat16
        return lambda x: x.to(narrow).to(x.dtype)
    return lambda x: eight_bits(x, 256 if "_K" in kind or kind.startswith("IQ") else 32)


def eight_bits(x: torch.Tensor, block: int) -> torch.Tensor:
    """Numbers (..., n) rounded to 127 steps to either side, with a float16 scale for each `block` of them."""
    import torch

    if x.shape[-1] % block:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    steps = (blocks * torch.where(largest == 0, 0.0, 127 / largest)).round()
    return (steps * (largest / 127).half().to(x.dtype)).reshape(x.shape)


@contextlib.contextmanager
def as_llama_cpp(model: Any, kinds: dict[str, str]) -> Iterator[None]:
    """Inputs of linear layers are rounded as llama.cpp does; `kinds` has the number type of each module's weight."""
    import torch

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (change := rounding(kinds.get(name, "F32"))) is not None:
            handles.append(module.register_forward_pre_hook(lambda _, inputs, change=change: (change(inputs[0]),)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def in_double(model: Any) -> Iterator[None]:
    """Products of linear layers are taken in float64, one layer at a time."""
    import torch

    handles = []

    def double(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        bias = module.bias.double() if module.bias is not None else None
        exact = torch.nn.functional.linear(inputs[0].double(), module.weight.double(), bias)
        return exact.to(output.dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_hook(double))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Branch:
    """A file's adapter beside one matrix: A (r, in), B (out, r) with the scaling in it, and their number types."""

    a: torch.Tensor
    b: torch.Tensor
    kinds: tuple[str, str]


@contextlib.contextmanager
def branches(
    model: Any, adapter: Mapping[str, Branch], *, rounded: bool = False, exact: bool = False
) -> Iterator[None]:
    """Linear layers add what an adapter that stays apart gives, by the name of the module.

    To be entered inside of the two above: the branch takes the input before it is rounded for the matrix.

    Args:
        model: Without the adapter.
        adapter: By module.
        rounded: As llama.cpp does.
        exact: Products are taken in float64, as `in_double` takes the matrices'.
    """
    import torch

    handles = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        return x

    wide: Round = torch.Tensor.double if exact else keep
    for name, branch in adapter.items():
        first, second = (rounding(kind) if rounded else None for kind in branch.kinds)
        before: dict[str, torch.Tensor] = {}

        def remember(_: Any, inputs: tuple[Any, ...], before: dict[str, torch.Tensor] = before) -> None:
            before["x"] = inputs[0]

        def add(
            _: Any, __: Any, output: torch.Tensor, before: dict[str, torch.Tensor] = before, branch: Branch = branch,
            first: Round = first or keep, second: Round = second or keep,
        ) -> torch.Tensor:  # fmt: skip
            inner = torch.nn.functional.linear(wide(first(before["x"])), wide(branch.a))
            return output + torch.nn.functional.linear(second(inner), wide(branch.b)).to(output.dtype)

        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(remember, prepend=True), module.register_forward_hook(add)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
