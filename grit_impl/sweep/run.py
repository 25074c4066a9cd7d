"""One training run of a sweep: a lean loop over the project's data, adapters and optimizers.

transformers' Trainer costs more than the model here (measured: docs/measurements/grit-vs-lora.md), so the loop is
written out; the tests hold it to the Trainer's losses. The vocabulary is scored only where something is learnt or
asked.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grit_impl.recipes.tasks import find_task
from grit_impl.recipes.tiny_llama import knowledge
from grit_impl.recipes.tiny_llama.corpus import SHORT_TEMPLATE
from grit_impl.recipes.tokens import IGNORE, encode
from grit_impl.sweep.optimizers import build_optimizer
from grit_impl.sweep.plan import split_settings

MAX_LENGTH, MAX_GRAD_NORM = 256, 1.0
EVALUATION_BATCH = 32
LOSS_BLOCK = 5
"""Optimizer steps that one recorded training loss is the mean of."""

Batch = dict[str, Any]


def train(job: Mapping[str, Any], settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Train one run and measure it.

    Args:
        job: A `PlannedRun` as a dictionary.
        settings: Its settings, resolved.
        device: `cpu` (one thread) or `cuda`.

    Returns:
        `status` (`done`, or `diverged` when a loss was not finite), `loss` and `accuracy` on the held-out set (in
        tuning `validation`, else `test`; nats per answer token, fraction of answers greedily decoded to the letter),
        `retention` (nats per token of the base's own facts), `curve` (rows of step, loss, accuracy, training
        seconds), `losses` (means of 5 steps), `step_seconds` (median), `train_seconds` (without evaluations),
        `coverage` (GRIT's).

    Raises:
        GRITError: a setting, the base or the task is wrong.
    """
    torch.set_num_threads(1)
    model, tokenizer = _model(job, settings, device)
    training, grit = split_settings(job["method"], settings)
    steps, size, task = training["steps"], training["batch_size"], find_task(job["task"])
    split = "validation" if job["phase"] == "tuning" else "test"
    held_out = _evaluation_batches(task.held_out(split), tokenizer, device)
    facts = [(item["question"], item["answer"]) for item in knowledge.frozen_items()]
    rows = _encode(task.training(steps * size, job["seed"]), tokenizer) if steps else []
    random.Random(job["seed"]).shuffle(rows)
    batches = [_collate(rows[i : i + size], tokenizer, device) for i in range(0, len(rows), size)]
    curve: list[tuple[int, float, float, float]] = []
    spent = 0.0
    losses: list[Tensor] = []
    blocks: list[float] = []
    optimizer, manager = None, None
    if steps:
        optimizer, manager = build_optimizer(model, job["method"], training, grit, MAX_GRAD_NORM)
        peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for p in model.parameters() if p.requires_grad]
    # In tuning only the last loss counts, and nothing else is paid for.
    every = settings["every"] if split == "test" else steps
    block = min(every, settings["every"])
    began = _clock(device)
    for step, batch in enumerate(batches, 1):
        assert optimizer is not None
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _schedule(step, steps, training["warmup"])
        loss = model(**batch).loss
        loss.backward()
        if manager is None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % block == 0 or step == steps:
            now = _clock(device)
            blocks.append((now - began) / ((step - 1) % block + 1))
            spent += now - began
            if not math.isfinite(float(losses[-1])):
                break
            if step % every == 0 or step == steps:
                curve.append((step, *_evaluate(model, held_out), spent))
            began = _clock(device)
    if not steps:
        curve.append((0, *_evaluate(model, held_out), 0.0))
    if manager is not None:
        manager.detach()
    values = torch.stack(losses).tolist() if losses else []
    finite = bool(curve) and all(map(math.isfinite, (*values, curve[-1][1])))
    retention = _evaluate(model, _evaluation_batches(facts, tokenizer, device))[0] if finite else None
    return {
        "status": "done" if finite else "diverged",
        "loss": curve[-1][1] if finite else None,
        "accuracy": curve[-1][2] if finite else None,
        "retention": retention,
        "curve": curve if split == "test" else [],
        "losses": [round(statistics.fmean(values[i : i + LOSS_BLOCK]), 5) for i in range(0, len(values), LOSS_BLOCK)],
        "step_seconds": statistics.median(blocks) if blocks else None,
        "train_seconds": spent,
        "coverage": float(manager.applied.sum()) / (2 * len(manager.layers) * steps) if manager else None,
    }


def _model(job: Mapping[str, Any], settings: Mapping[str, Any], device: str) -> tuple[Any, Any]:
    """The base in float32 with the run's adapters, which depend on its seed."""
    from grit_impl.recipes.bases import load_base
    from grit_impl.recipes.lora import LoRASettings, add_lora

    base, tokenizer = load_base(job["base"], dtype="float32", device=device)
    base.config.use_cache = False
    lora = LoRASettings(r=settings["rank"], alpha=settings["alpha"], rslora=job["method"] == "rslora")
    return add_lora(base, lora, job["seed"]).train(), tokenizer


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay that would reach zero after the last step: transformers' `linear`.

    It starts at zero, so that the first step moves nothing: every arm alike has one movement fewer than it has steps.
    """
    done = step - 1
    return done / max(1, warmup) if done < warmup else (steps - done) / max(1, steps - warmup)


def _clock(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _encode(rows: Sequence[tuple[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    columns = encode(
        {
            "prompt": [SHORT_TEMPLATE.format(instruction=question) for question, _ in rows],
            "completion": [answer for _, answer in rows],
        },
        tokenizer,
        MAX_LENGTH,
    )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _collate(rows: Sequence[dict[str, list[int]]], tokenizer: Any, device: str) -> Batch:
    """Right-padded tensors (N, T), and `logits_to_keep`: positions from the shortest prompt's last token on."""
    width = max(len(row["input_ids"]) for row in rows)
    pads = [width - len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [tokenizer.pad_token_id] * pad for row, pad in zip(rows, pads, strict=True)]
    mask = [[1] * (width - pad) + [0] * pad for pad in pads]
    labels = torch.tensor([row["labels"] + [IGNORE] * pad for row, pad in zip(rows, pads, strict=True)])
    keep = width - int((labels != IGNORE).int().argmax(1).min()) + 1
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        # The first kept position only predicts: the loss shifts labels by one.
        "labels": labels[:, -keep:].to(device),
        "logits_to_keep": keep,
    }


def _evaluation_batches(rows: Sequence[tuple[str, str]], tokenizer: Any, device: str) -> list[Batch]:
    encoded = sorted(_encode(rows, tokenizer), key=lambda row: len(row["input_ids"]))
    starts = range(0, len(encoded), EVALUATION_BATCH)
    return [_collate(encoded[i : i + EVALUATION_BATCH], tokenizer, device) for i in starts]


@torch.no_grad()
def _evaluate(model: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean loss per answer token, and the share of answers that greedy decoding would give to the letter.

    Greedy decoding repeats the answer exactly if and only if every one of its tokens is the most probable one after
    the true tokens before it, so that one forward pass decides.
    """
    loss, tokens, right, count = 0.0, 0, 0, 0
    for batch in batches:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        asked = labels != IGNORE
        loss += float(torch.nn.functional.cross_entropy(logits[asked], labels[asked], reduction="sum"))
        tokens += int(asked.sum())
        right += int(((logits.argmax(-1) == labels) | ~asked).all(1).sum())
        count += len(labels)
    return loss / tokens, right / count
