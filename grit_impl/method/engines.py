"""Engines that spread a training over processes: what GRIT needs of them, and which it refuses.

GRIT turns whole gradients that are the mean over processes. DDP hands out such. FSDP2 (`fully_shard`) shards what
it is given and leaves alone what it ignores: the adapters, half a percent of the weights, are to be ignored
(`keep_whole` has accelerate do it), and their gradients, which nobody averages then, are averaged here, at the end of
the backward pass that an optimizer step follows, where DDP would have done it: whoever looks at them afterwards
(clipping, callbacks, the ledger) sees what DDP would show.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from grit_impl.errors import GRITError
from grit_impl.method.factors import world_size
from grit_impl.method.layers import LoRAFactorPair

# Elements that are averaged in one all-reduce: 16 MiB in float32.
BUCKET = 1 << 22
INSTEAD = "use DDP (accelerate launch without it) or FSDP2 (--use_fsdp --fsdp_version 2)"
_WHOLE = "GRIT needs whole adapters on every process"


def keep_whole(model: nn.Module, args: Any) -> None:
    """Have accelerate's FSDP2 leave what is trained out of its shards; call it before the model is prepared.

    Args:
        model: The PEFT model.
        args: The TrainingArguments: FSDP2 does not move to their device what it ignores.

    Raises:
        GRITError: as `require_engine`, or FSDP2 is to load the weights in one process only.
    """
    require_engine(model, args.n_gpu)
    plugin = _accelerate("fsdp_plugin")
    if plugin is None or is_sharded(model):
        return
    if plugin.cpu_ram_efficient_loading:
        raise GRITError(f"{_WHOLE}, and FSDP2's cpu_ram_efficient_loading shards all it loads: set it to false")
    import re

    given = plugin.ignored_modules or []
    if isinstance(given, str):
        given = [module for name, module in model.named_modules() if re.fullmatch(given, name)]
    trained = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    plugin.ignored_modules = [*given, *(module.to(args.device) for module in trained)]


def require_engine(model: nn.Module, gpus: int = 1) -> None:
    """Refuse, before anything is trained, an engine of accelerate's under which GRIT would not be one process's.

    Args:
        model: The PEFT model.
        gpus: That one process would copy the model to, as `torch.nn.DataParallel` does.

    Raises:
        GRITError: DeepSpeed, FSDP1, tensor or context parallel, Megatron-LM, XLA, DataParallel.
    """
    kind = str(getattr(_accelerate("distributed_type"), "value", ""))
    plugin, parallel = _accelerate("fsdp_plugin"), _accelerate("parallelism_config")
    split = [name for name in ("tp", "cp", "sp") if getattr(parallel, f"{name}_enabled", False)]
    if kind == "DEEPSPEED":
        why = "DeepSpeed, which steps inside of backward and takes the gradients apart"
    elif plugin is not None and plugin.fsdp_version != 2:
        why = "FSDP1, which flattens adapters into its shards"
    elif split or (getattr(model, "tp_size", None) or 1) > 1:
        why = f"{(split or ['tp'])[0].upper()} (tensor, context or sequence parallel), which splits layers or sequences"
    elif kind in ("MEGATRON_LM", "XLA"):
        why = kind.replace("MEGATRON_LM", "Megatron-LM")
    elif gpus > 1:
        why = f"torch.nn.DataParallel (one process that sees {gpus} GPUs); show it one (CUDA_VISIBLE_DEVICES=0), or"
    else:
        return
    raise GRITError(f"GRIT cannot train under {why}: {INSTEAD}")


def require_whole(model: nn.Module, layers: Sequence[LoRAFactorPair]) -> None:
    """The same for a loop without accelerate, by what became of the parameters.

    Raises:
        GRITError: an adapter is sharded, or a layer is split over processes.
    """
    for layer in layers:
        base: Any = getattr(layer.module.get_base_layer(), "weight", None)
        for p in (layer.a, layer.b):
            if _is_dtensor(p):
                raise GRITError(
                    f"{_WHOLE}; {layer.path} is sharded: give fully_shard ignored_params={{what is trained}}, or "
                    "accelerate FSDP_IGNORED_MODULES='.*lora_.*' (GRITTrainer does it by itself)"
                )
            if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):  # of stage 3, of stages 1 and 2
                raise GRITError(f"GRIT cannot train under DeepSpeed ZeRO, which has {layer.path} in parts: {INSTEAD}")
            if hasattr(p, "_fsdp_flattened"):
                raise GRITError(f"{_WHOLE}; {layer.path} was flattened (FSDP1): {INSTEAD}")
        if _is_dtensor(base) and not (is_sharded(model) and base.device_mesh.ndim == 1):
            raise GRITError(f"GRIT cannot train under tensor parallel, which splits {layer.path}: {INSTEAD}")


def require_same_layers(layers: Sequence[LoRAFactorPair]) -> None:
    """Every process must have the same layers, or their sums would be added to each other; every process calls it.

    Raises:
        GRITError: they differ, as the stages of a pipeline do.
    """
    if world_size() == 1:
        return
    mine = zlib.crc32(repr([(layer.path, layer.adapter, layer.rank) for layer in layers]).encode())
    ends = torch.tensor([mine, -mine], device=layers[0].a.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise GRITError(
            f"GRIT needs the same LoRA layers on every process; they differ (pipeline parallel?): {INSTEAD}"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or a part of it."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


class Averaging:
    """Means over processes of the gradients that FSDP2 leaves alone; every process does the same passes.

    Averaging what has been averaged changes nothing, so that it may follow any pass, and any average of others.

    Args:
        model: Whose trained parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._task, self._due = -1, False

    def backward_begins(self) -> None:
        """Called inside of a backward pass, any number of times: average at its end, if a step follows it."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task, self._due = task, True
        if _a_step_follows():
            # As DDP and FSDP themselves: when all gradients of this pass are there.
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """Average what no pass's end has averaged; at the latest when the optimizer is about to step."""
        if self._due:
            self._due = False
            self.average()

    @torch.no_grad()
    def average(self) -> None:
        """Average all of them, now."""
        bucket: list[nn.Parameter] = []
        for p in self.model.parameters():  # looked up each time: peft may re-create them
            if not p.requires_grad or _is_dtensor(p):
                continue
            if bucket and (sum(q.numel() for q in bucket) + p.numel() > BUCKET or p.dtype != bucket[0].dtype):
                _average(bucket)
                bucket = []
            bucket.append(p)
        if bucket:
            _average(bucket)


def _average(parameters: Sequence[nn.Parameter]) -> None:
    """The gradients of parameters of one type, in one all-reduce; one that is missing here counts as zero."""
    found = [p.grad is not None for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor(found, dtype=parameters[0].dtype, device=parameters[0].device)
    flat = torch.cat([*(g.flatten() for g in gradients), there]) / world_size()
    dist.all_reduce(flat)
    *means, there = torch.split(flat, [*(g.numel() for g in gradients), len(found)])
    torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])
    if not all(found):  # only then is it worth waiting for the device
        for p, mean, anywhere in zip(parameters, gradients, there.tolist(), strict=True):
            if anywhere:
                p.grad = mean


def _a_step_follows() -> bool:
    from accelerate.state import GradientState  # type: ignore[import-untyped]

    return bool(GradientState().sync_gradients)


def _accelerate(name: str) -> Any:
    """What accelerate knows of this process's engine; None where it was not set up."""
    from accelerate.state import AcceleratorState, is_initialized

    return getattr(AcceleratorState(), name, None) if is_initialized() else None


def _is_dtensor(x: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)
