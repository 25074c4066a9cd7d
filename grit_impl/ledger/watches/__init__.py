"""What the ledger watches of a model: LoRA tensors and their use, others' hooks and reads, and tensors left behind."""

from __future__ import annotations

from grit_impl.ledger.watches.copies import CopyWatch, plain, traced
from grit_impl.ledger.watches.hooks import HookWatch
from grit_impl.ledger.watches.layers import LayerWatch
from grit_impl.ledger.watches.memory import MEMORY_STEP, MemoryWatch, optimized
from grit_impl.ledger.watches.passes import PassWatch
from grit_impl.ledger.watches.standins import StandIn, stand_ins
from grit_impl.ledger.watches.tensors import hook_bases, owners, sharded, spread

__all__ = [
    "MEMORY_STEP",
    "CopyWatch",
    "HookWatch",
    "LayerWatch",
    "MemoryWatch",
    "PassWatch",
    "StandIn",
    "hook_bases",
    "optimized",
    "owners",
    "plain",
    "sharded",
    "spread",
    "stand_ins",
    "traced",
]
