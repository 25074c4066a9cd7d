"""Export streams: what it needs is the largest tensor's, not the model's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter, make_base

from grit_impl.export.checkpoint import safetensors_entries

# Exports a small model first, so that what libraries allocate when they are imported is there already.
CHILD = """
import sys, threading, time
from pathlib import Path
from grit_impl.export import export_merged

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024

small, large, adapter, dtype, out = sys.argv[1:]
export_merged(small, None, out + "-small.gguf", dtype)
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, resident())

thread = threading.Thread(target=watch)
thread.start()
export_merged(large, adapter, out + ".gguf", dtype)
done.set()
thread.join()
print(before, peak)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A small base, and one whose embedding (33 MiB in bf16) is a fifth of it, with an adapter."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("memory")
    small = make_base(folder / "small")
    large = make_base(
        folder / "large", pad_rows=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, head_dim=64
    )
    file = large / "model.safetensors"
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return small, large, make_adapter(large, folder / "adapter")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
@pytest.mark.parametrize("dtype", ["q8_0", "bf16"])
def test_export_needs_memory_for_one_tensor(dtype: str, models: Any, tmp_path: Path) -> None:
    """Bound: twice the largest tensor, and 1 GiB for Python and its libraries; without those 1 GiB for what exporting
    adds. Counted is all resident memory: libraries, and pages of files should any be mapped, included."""
    small, large, adapter = models
    entries = safetensors_entries(large / "model.safetensors").values()
    sizes = [entry.end - entry.start for entry in entries]
    largest, whole = max(sizes), sum(sizes)
    assert whole > 4 * largest  # or the bound would tell nothing
    command = [sys.executable, "-c", CHILD, *map(str, (small, large, adapter, dtype, tmp_path / "out"))]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    before, peak = map(int, done.stdout.split())
    assert peak - before < 2 * largest
    assert peak < 2 * largest + 2**30
