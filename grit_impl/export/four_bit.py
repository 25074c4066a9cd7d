"""NF4 weights (QLoRA): what the training saw, in full precision. bitsandbytes does both directions, on the CPU, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError

if TYPE_CHECKING:
    import torch


def dequantize(name: str, packed: torch.Tensor, side: dict[str, torch.Tensor]) -> torch.Tensor:
    """A stored 4-bit weight as float32.

    Args:
        name: The parameter's name, for messages.
        packed: The nibbles.
        side: The tensors saved next to it: `<name>.absmax`, `.quant_map`, `.quant_state.bitsandbytes__nf4`, ...

    Raises:
        GRITError: bitsandbytes is missing, or the tensors do not describe a 4-bit weight.
    """
    functional = _bitsandbytes()
    state = {key.removeprefix(f"{name}."): tensor for key, tensor in side.items() if key != name}
    try:
        quantized = functional.QuantState.from_dict(state, device=packed.device)
        weight: torch.Tensor = functional.dequantize_4bit(packed, quantized)
    except (ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise GRITError(f"cannot dequantise {name}: {error}") from error
    return weight.float()


def round_trip(weight: torch.Tensor, *, double_quantization: bool = True) -> torch.Tensor:
    """What a matrix (out, in) becomes when it is loaded with `load_in_4bit`: NF4, blocks of 64, and back; float32.

    Raises:
        GRITError: bitsandbytes is missing.
    """
    functional = _bitsandbytes()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quantization)
    restored: torch.Tensor = functional.dequantize_4bit(packed, state)
    return restored.float()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise GRITError("a QLoRA base needs bitsandbytes to be dequantised: pip install bitsandbytes") from None
    return bitsandbytes.functional
