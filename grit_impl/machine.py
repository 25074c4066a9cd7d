"""What a result was made with and on; asks without importing torch."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "unsloth",
    "gguf",
    "xllamacpp",
    "numpy",
    "scipy",
)

COMPILE_SWITCHES = {"UNSLOTH_BLOCK_COMPILE": "1", "UNSLOTH_COMPILE_DISABLE": "0", "UNSLOTH_BLOCK_CUDAGRAPHS": "0"}
"""Unsloth's own switches of its compiled decoder layers, and what they are where nobody sets them."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def switches() -> dict[str, str]:
    """Those of `COMPILE_SWITCHES` that are set otherwise: they change what a run computes, by rounding."""
    asked = {name: os.environ.get(name, usual) for name, usual in COMPILE_SWITCHES.items()}
    return {name: value for name, value in asked.items() if value != COMPILE_SWITCHES[name]}


def cores() -> int:
    """Cores that this process may use: a container or `taskset` may allow fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def leave_torch_to_runs(device: str) -> None:
    """Set what must be set before torch is loaded anywhere: a run has one thread, and only runs touch a GPU."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # Asking whether there is a GPU must not initialise it in the process that the runs are forked from.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded and not hidden by CUDA_VISIBLE_DEVICES."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def available_memory() -> int | None:
    """Bytes that new processes can use without swapping, within this container's limit; None where nobody says."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found) if found else None


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that may be used; without it the indices that nvidia-smi lists."""
    if (asked := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in map(str.strip, asked.split(",")) if name not in ("", "-1")]
    # Slices of a GPU (MIG) are listed below it, indented.
    return [str(i) for i, _ in enumerate(line for line in _nvidia_smi("-L") if line.startswith("GPU "))]


def gpu_names() -> list[str]:
    """What the machine's GPUs are called; none where nvidia-smi does not answer."""
    return _nvidia_smi("--query-gpu=name", "--format=csv,noheader")


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines that it prints; none where there is no driver."""
    command = ["nvidia-smi", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def least_used(gpus: Sequence[str], used: Iterable[str | None]) -> str | None:
    """The GPU that the fewest processes were given; None where there is no choice."""
    counts = Counter(used)
    return min(gpus, key=lambda gpu: counts[gpu]) if len(gpus) > 1 else None


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of the repository that `folder` is in, `+` appended if files differ from it; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").strip()
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
