"""One training for test_processes.py: `[RANK=0 WORLD_SIZE=2 ...] python two_processes.py OUT cpu|cuda [WHAT]`.

WHAT is `no-all-reduce` (a fault), `sparse` or `fsdp2`.

On `cuda` the processes talk through NCCL, one GPU each.
"""

from __future__ import annotations

import math
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

STEPS = 6
# As `accelerate launch --use_fsdp --fsdp_version 2` sets it up; transformers 4 has no other way to FSDP2.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "ACCELERATE_TORCH_DEVICE": "cpu",  # not one by the process's number
}


def train(out: Path, device: str, fault: str = "") -> None:
    """Train the tiny model with pure GRIT and save factors, adapters and losses of this process to OUT.

    `sparse` reads the factors at inversions only, every third step, and lists what was sent. `fsdp2` shards the base.
    """
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from grit_impl.config import GRITConfig
    from grit_impl.ledger.recorder import gradient_ledger
    from grit_impl.method import manager
    from grit_impl.trainer import GRITTrainer

    if fault == "no-all-reduce":
        # Everywhere but in DDP's own reduction of the gradients, which is C++.
        torch.distributed.all_reduce = lambda *args, **kwargs: None
        # GRIT would notice that its statistics miss the other process's tokens, and stop.
        manager.completeness_errors = lambda *args: None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if shards := fault == "fsdp2":
        os.environ.update(FSDP2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        use_cache=False,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    copy = deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 9, (4 * STEPS,), generator=generator).tolist()
    ids = [torch.randint(3, 48, (n,), generator=generator).tolist() for n in lengths]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]
    grit = GRITConfig(kfac_update_freq=2, kfac_min_samples=1, reprojection_freq=3, reprojection_k=3, lambda_kfac=1e-3)
    if fault == "sparse":
        grit = GRITConfig(kfac_update_freq=3, kfac_min_samples=1)
    arguments = TrainingArguments(
        output_dir=str(out.parent / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=1 if shards else 2,
        gradient_accumulation_steps=2 if shards else 2 // world,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="steps" if fault in ("sparse", "fsdp2") else "no",
        save_steps=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=3,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    if shards:
        pretend_gpus()
    common = {"train_dataset": Dataset.from_list(rows), "data_collator": pad, "grit_config": grit}
    trainer = GRITTrainer(model, arguments, **common)
    ledger = gradient_ledger(model, out.with_suffix(".jsonl.gz"))
    with ledger, profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        trainer.train()
    grit_manager = trainer.grit_manager
    result: dict[str, Any] = {
        "world": trainer.accelerator.num_processes,
        "factors": grit_manager.factors.covariances().cpu(),
        "seen": grit_manager.factors.seen.cpu(),
        "adapters": torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).cpu(),
        "completeness": float(grit_manager.completeness.max()) if grit_manager.completeness is not None else None,
    }
    result["sharded"] = sorted(name for name, p in model.named_parameters() if isinstance(p, DTensor))
    result["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    sent = [event for event in watched.events() if event.name in ("gloo:all_reduce", "nccl:all_reduce")]
    result["sent"] = [math.prod(event.input_shapes[0]) for event in sent]
    if shards:
        resumed = GRITTrainer(copy, arguments, **common)
        resumed.train(resume_from_checkpoint=str(Path(arguments.output_dir, "checkpoint-4")))
        result["resumed"] = torch.cat([p.detach().flatten() for p in copy.parameters() if p.requires_grad])
    torch.save(result, out)


def pretend_gpus() -> None:
    """accelerate keeps FSDP to processes with accelerators; it works over gloo all the same."""
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def pad(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right padding; -100 where there is no label."""
    longest = max(len(f["input_ids"]) for f in features)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([f[name] + [fill] * (longest - len(f[name])) for f in features])
        for name, fill in fills.items()
    }


if __name__ == "__main__":
    train(Path(sys.argv[1]), *sys.argv[2:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # Threads of gloo's, of which FSDP has several groups, would race with the end of the interpreter.
        sys.stdout.flush()
        os._exit(0)
