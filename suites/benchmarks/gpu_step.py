"""Cost of GRIT on a GPU, as ratios measured in one process: blocks of plain LoRA steps alternate with blocks of GRIT.

    python suites/benchmarks/gpu_step.py FOLDER --stack peft
    python suites/benchmarks/gpu_step.py FOLDER --stack unsloth

FOLDER is a 4-bit Llama (`python -m grit_impl.recipes.random_base random:llama-3-8b FOLDER` makes one with random
weights). Prints one JSON line: step time and peak memory with and without GRIT, the inversion of all factors, and
whether anything between backward and step waited for the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any


def main() -> None:
    """Parse the arguments, build the model, alternate the blocks, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--stack", choices=("peft", "unsloth"), default="peft")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4, help="pairs of blocks")
    parser.add_argument("--block-steps", type=int, default=6)
    options = parser.parse_args()

    from grit_impl.recipes.arms import TrainingSettings
    from grit_impl.recipes.lora import LoRASettings, add_lora

    lora = LoRASettings(r=options.rank, alpha=options.rank)
    settings = TrainingSettings(precision="bf16", gradient_checkpointing=True, max_length=2048, rank=options.rank)
    if options.stack == "unsloth":
        from grit_impl.recipes.unsloth import load_unsloth

        model, _ = load_unsloth(options.folder, lora, settings, 3407)
    else:
        from peft import prepare_model_for_kbit_training

        from grit_impl.recipes.bases import load_base

        base, _ = load_base(options.folder)
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model = add_lora(base, lora, 3407)
    print(json.dumps(measure(model, options)), flush=True)


def measure(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the blocks; all times in seconds, memory in GiB."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    from grit_impl.config import GRITConfig
    from grit_impl.manager import GRITManager

    torch.manual_seed(0)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    optimizer = AdamW8bit(parameters, lr=1e-5)
    vocabulary = model.config.vocab_size
    batches = [torch.randint(3, vocabulary, (2, options.length), device="cuda") for _ in range(16)]
    manager = GRITManager(model, GRITConfig(kfac_update_freq=5))

    def step(i: int, grit: bool, *, forbid_sync: bool = False) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for micro in range(4):
            ids = batches[(4 * i + micro) % len(batches)]
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss / 4
            loss.backward()
        if forbid_sync:
            torch.cuda.set_sync_debug_mode("error")
        try:
            if grit:
                manager.precondition()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if grit:
            manager.after_step(optimizer)
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    times: dict[bool, list[list[float]]] = {False: [], True: []}
    peaks: dict[bool, float] = {False: 0.0, True: 0.0}
    synchronises = "no"
    for block in range(options.blocks + 1):  # the first pair warms up
        for grit in (False, True):
            if grit:
                manager.attach()
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            for i in range(options.block_steps):
                forbid = grit and block == 1
                try:
                    seconds.append(step(i, grit, forbid_sync=forbid))
                except RuntimeError as error:
                    if not forbid or "synchroniz" not in str(error):
                        raise
                    synchronises = str(error).splitlines()[0]
            if grit:
                manager.detach()
            if block:
                times[grit].append(seconds)
                peaks[grit] = max(peaks[grit], torch.cuda.max_memory_allocated() / 2**30)
    ratios = [statistics.median(g) / statistics.median(p) for p, g in zip(times[False], times[True], strict=True)]
    events = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        manager.factors.invert()
        end.record()
        torch.cuda.synchronize()
        events.append(start.elapsed_time(end))
    report = manager.factor_report()
    return {
        "stack": options.stack,
        "gpu": torch.cuda.get_device_name(),
        "length": options.length,
        "rank": options.rank,
        "layers": len(manager.layers),
        "ready": report["statuses"].get("ready", 0),
        "completeness_error": report["completeness_error"],
        "plain_step_seconds": statistics.median([t for b in times[False] for t in b]),
        "grit_step_seconds": statistics.median([t for b in times[True] for t in b]),
        "step_ratio_by_block": [round(r, 4) for r in ratios],
        "step_ratio_median": statistics.median(ratios),
        "plain_peak_gib": peaks[False],
        "grit_peak_gib": peaks[True],
        "memory_ratio": peaks[True] / peaks[False],
        "invert_all_factors_ms": statistics.median(events),
        "factors": 2 * len(manager.layers),
        "host_synchronisation_in_precondition": synchronises,
    }


if __name__ == "__main__":
    main()
