"""One run of `grit try`, in a process of its own: the sweep's loop over somebody's rows."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grit_impl.sweep.plan import BASE_ARM
from grit_impl.tryout.plan import GRIT

LEDGER = "ledger.jsonl.gz"
HOW = "how.json"
"""In the folder: what all runs share and no setting of a sweep says."""
GENERATED = 32
"""Prompts that are answered at a time."""


def work(folder: str, job: Mapping[str, Any], settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Train and measure one run, on the validation rows in tuning, else on the test rows.

    Args:
        folder: With `rows.json` and `how.json`.
        job: A `PlannedRun` as a dictionary.
        settings: Its settings, resolved.
        device: `cpu` or `cuda`.

    Returns:
        As `sweep.run.fit`; `accuracy` is the metric's where that is not the loss. The first seed's run of GRIT leaves a
        ledger, every run after tuning its adapter's folder or nothing, and what it cost in `measures/ARM-SEED.json`.
    """
    import torch

    from grit_impl.ledger.recorder import gradient_ledger
    from grit_impl.method.reprojection import save_adapter
    from grit_impl.record import write_atomic
    from grit_impl.sweep.run import by_length, collate, epochs, fit, held_out_loss
    from grit_impl.tryout.data import encoded, items, read_side

    torch.set_num_threads(1)
    where = Path(folder)
    how = json.loads((where / HOW).read_text())
    model, tokenizer = _model(job, settings, how, device)
    tuning = job["phase"] == "tuning"
    test = read_side(where, "validation" if tuning else "test")
    held_out = by_length(encoded(test), tokenizer, device)
    size, accumulation = settings["batch_size"], how["accumulation"]
    rows = epochs(encoded(read_side(where, "train")), settings["steps"] * accumulation * size, job["seed"])
    batches = [collate(rows[i : i + size], tokenizer, device) for i in range(0, len(rows), size)]
    first = job["arm"] == GRIT and job["seed"] == how["first"] and not tuning
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with gradient_ledger(model, path=where / LEDGER) if first else contextlib.nullcontext():
        result = fit(
            model,
            job["method"],
            settings,
            batches,
            lambda: held_out_loss(model, held_out),
            device,
            every=settings["every"] if job["arm"] != BASE_ARM else 1,
            accumulation=accumulation,
        )
    cuda = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if how["metric"] != "loss" and not tuning and result["status"] == "done":
        wanted = items(test, tokenizer, how["metric"], how["pattern"])
        result["accuracy"] = accuracy(model, tokenizer, test, wanted, how["metric"], device)
    if not tuning:
        if job["seed"] == how["first"]:
            save_adapter(model, where / f"adapter-{job['arm']}")
        note = where / "measures" / f"{job['arm']}-{job['seed']}.json"
        write_atomic(note, json.dumps({"memory_bytes": peak, "ledger": first}))
    return result


def _model(job: Mapping[str, Any], settings: Mapping[str, Any], how: Mapping[str, Any], device: str) -> tuple[Any, Any]:
    """The base with the run's adapters, which depend on its seed alone: float32 on a CPU, as it is stored on a GPU."""
    from grit_impl.recipes.bases import load_base
    from grit_impl.recipes.lora import LoRASettings, add_lora

    base, tokenizer = load_base(job["base"], device=device)
    base.config.use_cache = False
    if getattr(base, "is_loaded_in_4bit", False):
        from peft import prepare_model_for_kbit_training

        base = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            base, use_gradient_checkpointing=how["gradient_checkpointing"]
        )
    elif how["gradient_checkpointing"]:
        base.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
        base.enable_input_require_grads()  # type: ignore[no-untyped-call]
    lora = LoRASettings(r=settings["rank"], alpha=settings["alpha"], rslora=job["method"] == "rslora")
    return add_lora(base, lora, job["seed"]).train(), tokenizer


def accuracy(
    model: Any, tokenizer: Any, tokens: Any, wanted: Sequence[Mapping[str, Any]], metric: str, device: str
) -> float:
    """Percent of the rows that the model answers right: greedy, with twice the room of the longest right answer.

    Args:
        model: After training.
        tokenizer: The base's.
        tokens: The test rows.
        wanted: Their items, for the scorer.
        metric: Its name.
        device: `cpu` or `cuda`.
    """
    import torch

    from grit_impl.tryout.data import is_right

    prompts = [ids[:n] for ids, n in zip(tokens.input_ids, tokens.prompts, strict=True)]
    room = 2 * max(len(ids) - n for ids, n in zip(tokens.input_ids, tokens.prompts, strict=True))
    places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    right = 0
    model.eval()
    model.config.use_cache = True
    for start in range(0, len(places), GENERATED):
        chosen = places[start : start + GENERATED]
        width = max(len(prompts[place]) for place in chosen)
        pads = [width - len(prompts[place]) for place in chosen]
        # On the left, so that every answer begins where the width ends.
        ids = [[tokens.pad] * pad + prompts[place] for pad, place in zip(pads, chosen, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        with torch.no_grad():
            written = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokens.pad,
            )
        answers = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        right += sum(is_right(metric, wanted[place], text) for place, text in zip(chosen, answers, strict=True))
    return 100 * right / len(prompts)
