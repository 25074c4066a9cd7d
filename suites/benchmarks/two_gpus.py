"""GRIT on the GPUs of one host, on NF4 weights in Llama-3-8B's shape: `python suites/benchmarks/two_gpus.py OUT`.

Two processes through torchrun and NCCL, first under DDP, then under FSDP2 with whole adapters. Under each: a training
(`GRITTrainer`, 200 steps under DDP, 40 under FSDP2) whose ledger every process judges; blocks of steps with GRIT and
without it in turn; what merging the factors sends and takes. OUT gets a file of JSON per engine; the table comes last.
`--rehearse` takes two CPU processes and a tiny shape: a test of this script, no result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from grit_impl.config import GRITConfig
from grit_impl.cost.bench import MAX_GRAD_NORM, frozen_objects, ratios, spread
from grit_impl.ledger.findings import facts
from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.ledger.verdict import judge_ledger
from grit_impl.method.engines import Averaging, is_sharded
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer
from grit_impl.processes import end_with_parent

# Steps of its training, and its part of the time.
ENGINES = {"ddp": (200, 0.64), "fsdp2": (40, 0.36)}
BATCH, BLOCK, REPEATS = 2, 5, 20  # the last step of a block inverts
GRACE = 60  # seconds after which a process that should have ended hangs


def main() -> int:
    """Start the processes of each engine, one after the other, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--seconds", type=float, default=340, help="for everything (default 340)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, a tiny shape")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    ends, failed, left = time.time() + options.seconds, 0, 1.0
    for engine, (_, share) in ENGINES.items():
        (options.out / f"{engine}.json").unlink(missing_ok=True)
        seconds, left = (ends - time.time()) * share / left, left - share
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [*torchrun, "--nproc-per-node", "2", __file__, *sys.argv[1:], "--engine", engine]
        try:
            command += ["--ends", str(time.time() + seconds)]
            failed |= subprocess.run(command, timeout=seconds + GRACE).returncode
        except subprocess.TimeoutExpired:
            print(f"{engine}: stopped, it hangs", flush=True)
            failed = 1
    print(table(options.out), flush=True)
    return int(bool(failed))


def work(options: argparse.Namespace) -> None:
    """One process under one engine; it ends here."""
    end_with_parent()
    cuda = not options.rehearse
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
        os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("nccl" if cuda else "gloo")
    found = {"processes": dist.get_world_size(), "length": options.length, "failed": {}}
    model: Any = None
    for part in (training, blocks) if cuda or options.engine == "ddp" else (blocks,):  # no FSDP of accelerate's on CPUs
        began = time.time()
        try:
            model = model or load(cuda, options.engine)
            found |= part(model, options, cuda)
        except Exception as error:  # one part must not cost the other, which begins with a whole model
            found["failed"][part.__name__], model = f"{type(error).__name__}: {error}"[:500], None
        if dist.get_rank() == 0:
            print(f"[{time.strftime('%X')}] {options.engine} {part.__name__}: {time.time() - began:.0f} s", flush=True)
            found["gpu"] = torch.cuda.get_device_name() if cuda else "CPU"
            (options.out / f"{options.engine}.json").write_text(json.dumps(found, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(len(found["failed"]))  # threads of gloo's would race with the end of the interpreter


def load(cuda: bool, engine: str) -> Any:
    """The base in NF4 (on a GPU) with LoRA of rank 16 on all projections; the same numbers in every process."""
    from grit_impl.recipes.arms import RunSpec, default_training
    from grit_impl.recipes.train import build_model

    base = "random:llama-3-8b" if cuda else "random:tiny"
    settings = default_training(base, cuda=cuda, gradient_checkpointing=False)
    model, _ = build_model(RunSpec("pure", base, training=settings), use_unsloth=False)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # so that both kinds of statistics are there from the first step on
            p.data.normal_(std=0.01)
        if engine == "fsdp2" and type(p).__name__ == "Params4bit":  # it shards what looks like floats, whatever it is
            p.data, p.quant_storage = p.data.view(-1).view(torch.bfloat16).view(-1, 1), torch.bfloat16
    return model.train()


def training(model: Any, options: argparse.Namespace, cuda: bool) -> dict[str, Any]:
    """A run of GRITTrainer under the ledger."""
    from transformers import PrinterCallback, TrainingArguments

    from grit_impl.trainer import GRITTrainer

    (steps, _), world = ENGINES[options.engine], dist.get_world_size()
    rows = torch.randint(3, model.config.vocab_size, (steps * BATCH * world, options.length))
    given: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 1e-4}
    given |= {"bf16": cuda, "use_cpu": not cuda, "optim": "adamw_torch", "logging_steps": 10, "report_to": []}
    given |= {"save_strategy": "no", "disable_tqdm": True, "ddp_find_unused_parameters": False}
    if options.engine == "fsdp2":
        layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        given |= {"fsdp": True, "fsdp_config": {"version": 2, **layers}}

    def collate(batch: list[Any]) -> dict[str, Any]:
        ids = torch.stack(batch)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    common: dict[str, Any] = {"data_collator": collate, "grit_config": GRITConfig(kfac_update_freq=BLOCK)}
    trainer = GRITTrainer(model, TrainingArguments(str(options.out), **given), train_dataset=rows, **common)
    trainer.remove_callback(PrinterCallback)
    path, began = options.out / f"{options.engine}-{dist.get_rank()}.jsonl.gz", time.perf_counter()
    with gradient_ledger(model, path):
        trainer.train()
    seconds, verdict = time.perf_counter() - began, judge_ledger(path)
    every: list[Any] = [None] * world
    updates = zlib.crc32(repr(list(facts(path).tensors.hash_after)).encode())
    dist.all_gather_object(every, (verdict.cause, updates))
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    told = f"{verdict.summary}; {seconds:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    return {"steps": steps, "verdicts": [each[0] for each in every], "same": len(set(every)) == 1, "told": told}


def blocks(model: Any, options: argparse.Namespace, cuda: bool) -> dict[str, Any]:
    """Blocks of steps with GRIT and without in turn, until the time is over; then all-reduces by themselves."""
    from torch.distributed.fsdp import fully_shard

    from grit_impl.cost.measure import adamw

    trained, forward = [p for p in model.parameters() if p.requires_grad], model
    if options.engine == "ddp":
        forward = torch.nn.parallel.DistributedDataParallel(model)
    elif not is_sharded(model):  # where accelerate has not done it
        for layer in (*model.base_model.model.model.layers, model):
            fully_shard(layer, ignored_params=set(trained))
    manager, averaging = GRITManager(model, GRITConfig(kfac_update_freq=BLOCK)), Averaging(model)
    inner = adamw(trained)
    grit = GRITOptimizer(inner, manager, MAX_GRAD_NORM)
    ids = torch.randint(3, model.config.vocab_size, (BATCH, options.length), device=trained[0].device)

    def timed(what: Callable[[], Any]) -> float:
        wait: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
        dist.barrier()
        wait()
        began = time.perf_counter()
        what()
        wait()
        return time.perf_counter() - began

    def steps(with_grit: bool) -> None:
        manager.attach() if with_grit else manager.detach()
        for _ in range(BLOCK):
            with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=cuda):
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            if not with_grit:
                if options.engine == "fsdp2":
                    averaging.average()
                torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            (grit if with_grit else inner).step()
            inner.zero_grad()

    taken: dict[bool, list[float]] = {False: [], True: []}
    going_on, round_ = torch.ones(1, device=ids.device), -1  # the first round is not counted
    with frozen_objects():
        while going_on:
            for with_grit in (False, True)[:: 1 if round_ % 2 else -1]:
                taken[with_grit] += [timed(partial(steps, with_grit))][: round_ + 1]
            going_on.fill_(round_ < 5 or time.time() < options.ends - 10)
            dist.broadcast(going_on, 0)
            round_ += 1
    times = torch.tensor([taken[False], taken[True]], device=ids.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)  # a block takes as long as its slowest process
    plain, ours = times.tolist()

    def merge() -> None:
        manager.factors.pending = 1
        manager.factors.merge()

    found = {"plain": statistics.median(plain) / BLOCK, "ratios": ratios(ours, plain), "layers": len(manager.layers)}
    found["factors"] = [manager.factors.recent.nbytes, [timed(merge) for _ in range(REPEATS)]]
    found["gradients"] = [sum(p.nbytes for p in trained), [timed(averaging.average) for _ in range(REPEATS)]]
    found["sharded"] = sum(type(p).__name__ == "DTensor" for p in model.parameters())
    return {**found, "peak": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0}


def table(out: Path) -> str:
    """What the engines' files say, for people."""
    lines = []
    for path in [path for engine in ENGINES if (path := out / f"{engine}.json").is_file()]:
        found = json.loads(path.read_text())
        where = f"{found['processes']} processes ({found['gpu']}), {BATCH} x {found['length']} tokens in each"
        lines += [f"{path.stem}: {where}", *(f"  FAILED {part}: {why}" for part, why in found["failed"].items())]
        if "verdicts" in found:
            same = "the same updates" if found["same"] else "OTHER updates in each"
            lines.append(f"  {found['steps']} steps of GRITTrainer: {', '.join(found['verdicts'])}; {same}")
            lines.append(f"    {found['told']}")
        if "ratios" in found:
            ratio, plain = spread(found["ratios"]), found["plain"]
            lines.append(f"  GRIT over LoRA: {ratio} of {plain:.3f} s a step, n = {ratio.n} blocks of {BLOCK} steps")
            sharded = f"{found['sharded']} tensors sharded, peak {found['peak']:.2f} GiB"
            lines.append(f"    {found['layers']} LoRA layers, {sharded}")
            for name in ("factors", "gradients"):
                size, ms = found[name][0] / 1e6, spread([1000 * seconds for seconds in found[name][1]])
                lines.append(f"    all-reduce of the {name}: {size:.2f} MB, {ms} ms, {ms.median / plain:.3f} per mille")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
