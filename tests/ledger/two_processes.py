"""One training for test_processes.py under the ledger: `[RANK=0 WORLD_SIZE=2 ...] python two_processes.py LEDGER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.zoo.bench import Bench, Whitening

STEPS, BATCH = 5, 4


def train(path: Path) -> None:
    """Plain data parallel: every process has its part of each batch, and preconditions the averaged gradients."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    bench = Bench("loop", "sgd", seed=3)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 64, (STEPS, BATCH, 24), generator=generator)
    model, optimizer = accelerator.prepare(bench.model, bench.standard(list(bench.lora.values())))
    white, part = Whitening(bench.lora), BATCH // accelerator.num_processes
    with gradient_ledger(accelerator.unwrap_model(model), path):
        for batch in batches:
            rows = batch[accelerator.process_index * part :][:part]
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
            white.apply()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
