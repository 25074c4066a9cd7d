"""What GRIT adds per process when n gloo processes train together: `python processes.py OUT.json N [N ...]`.

A small random Llama with 14 adapters of rank 16, each process with batches of its own, under torch's DDP. OUT gets
{n: [per process: {"sent": {collective: [calls, bytes]} per inversion, "merge": seconds of each merge}]}.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

LAYERS, RANK = 14, 16
# Steps from one inversion to the next.
EVERY = 3
ROUNDS = 9
# Seconds that a process may take; eight take 15 on two cores.
LIMIT = 120


def process(folder: Path, world: int, rank: int) -> NoReturn:
    """One of `world` processes, in a fork of its own; leaves WORLD-RANK.json in `folder`."""
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.profiler import ProfilerActivity, profile
    from transformers import LlamaConfig, LlamaForCausalLM

    from grit_impl.config import GRITConfig
    from grit_impl.method.manager import GRITManager

    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = f"file://{folder}/store-{world}"
    # A process that died must not keep the others for half an hour.
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=48, num_hidden_layers=LAYERS // 7, pad_token_id=0, use_cache=False, **shape)
    # B is not zero, so that the first step already tells whether the statistics are complete.
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    manager = GRITManager(model, GRITConfig(kfac_update_freq=EVERY, kfac_min_samples=1))
    assert len(manager.layers) == LAYERS
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(1 + rank)

    def steps(grit: bool) -> None:
        manager.attach() if grit else manager.detach()
        for _ in range(EVERY):
            ids = torch.randint(3, 48, (2, 16), generator=generator)
            parallel(input_ids=ids, labels=ids).loss.backward()
            if grit:
                manager.precondition()
            inner.step()
            if grit:
                manager.after_step(inner)
            inner.zero_grad()

    def collectives(grit: bool) -> dict[str, list[int]]:
        """Calls and numbers of each kind from one inversion to the next, as torch's profiler saw them."""
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
            steps(grit)
        found: dict[str, list[int]] = {}
        for event in watched.events():
            if event.name.startswith("gloo:"):
                before = found.setdefault(event.name, [0, 0])
                before[0] += 1
                before[1] += sum(math.prod(each) for each in event.input_shapes)
        return found

    # DDP settles its buckets and GRIT its completeness in the first steps.
    steps(True)
    with_grit, without = collectives(True), collectives(False)
    size = manager.factors.recent.element_size()
    sent = {}
    for name, (calls, numbers) in with_grit.items():
        less = without.get(name, [0, 0])
        if (calls, numbers) != tuple(less):
            sent[name] = [calls - less[0], (numbers - less[1]) * size]

    taken: list[float] = []
    merge = manager.factors.merge

    def timed() -> None:
        # Or it would be the wait for the slowest process's step.
        dist.barrier()
        began = time.perf_counter()
        merge()
        taken.append(time.perf_counter() - began)

    manager.factors.merge = timed  # type: ignore[method-assign]
    for _ in range(ROUNDS):
        steps(True)
    (folder / f"{world}-{rank}.json").write_text(json.dumps({"sent": sent, "merge": taken}))
    # DDP's destructor would wait for gloo's threads, and they for the interpreter's lock that it holds.
    os._exit(0)


def main(out: Path, sizes: list[int]) -> None:
    """All sizes, one after the other."""
    # What takes seconds to import is imported once; the processes are forks of this one.
    import peft  # noqa: F401
    import torch.profiler  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import grit_impl.method.manager  # noqa: F401

    found = {}
    fork = multiprocessing.get_context("fork")
    with TemporaryDirectory() as folder:
        for world in sizes:
            started = [fork.Process(target=process, args=(Path(folder), world, rank)) for rank in range(world)]
            for each in started:
                each.start()
            for each in started:
                each.join(LIMIT)
                each.kill()
                each.join()
            if any(each.exitcode for each in started):
                sys.exit(f"{world} processes ended with {[each.exitcode for each in started]}")
            found[world] = [json.loads(Path(folder, f"{world}-{rank}.json").read_text()) for rank in range(world)]
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    main(Path(sys.argv[1]), [int(n) for n in sys.argv[2:]])
