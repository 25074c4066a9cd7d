"""What the processes that train and measure have in common: they know their place, and end with who started them."""

from __future__ import annotations

import os
import threading
import time

_POLL_SECONDS = 0.5
# As torchrun and accelerate set them, and what accelerate reads where mpirun started the processes.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def place() -> tuple[int, int]:
    """The number of this process among those that a launcher has started to train together, and how many they are."""
    rank, size = (next((int(os.environ[n]) for n in names if os.environ.get(n)), None) for names in (_RANKS, _SIZES))
    return rank or 0, size or 1


def end_with_parent() -> None:
    """From now on, leave when the process that started this one is gone: two must not write one record."""
    threading.Thread(target=_wait_and_leave, args=(os.getppid(),), daemon=True).start()


def _wait_and_leave(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
