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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grit_impl.recipes.tasks import FolderTask, find_task
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
    training, _ = split_settings(job["method"], settings)
    steps, size, task = training["steps"], training["batch_size"], find_task(job["task"])
    split = "validation" if job["phase"] == "tuning" else "test"
    length = settings.get("max_length", MAX_LENGTH)
    if isinstance(task, FolderTask):
        held_out = by_length(task.rows(split, job["base"], tokenizer, length), tokenizer, device)
        rows = epochs(task.rows("train", job["base"], tokenizer, length) if steps else [], steps * size, job["seed"])
    else:
        held_out = _evaluation_batches(task.held_out(split), tokenizer, device)
        rows = _encode(task.training(steps * size, job["seed"]), tokenizer) if steps else []
        random.Random(job["seed"]).shuffle(rows)
    facts = [(item["question"], item["answer"]) for item in knowledge.frozen_items()]
    batches = [collate(rows[i : i + size], tokenizer, device) for i in range(0, len(rows), size)]
    result = fit(
        model,
        job["method"],
        settings,
        batches,
        lambda: held_out_loss(model, held_out),
        device,
        # In tuning only the last loss counts, and nothing else is paid for.
        every=settings["every"] if split == "test" else steps,
    )
    finite = result["status"] == "done"
    result["retention"] = held_out_loss(model, _evaluation_batches(facts, tokenizer, device))[0] if finite else None
    return result if split == "test" else {**result, "curve": []}


def fit(
    model: Any,
    method: str,
    settings: Mapping[str, Any],
    batches: Sequence[Batch],
    measure: Callable[[], tuple[float, float]],
    device: str,
    *,
    every: int,
    accumulation: int = 1,
) -> dict[str, Any]:
    """Train a model on batches, and measure it.

    Args:
        model: With its adapters.
        method: One of `METHODS`.
        settings: As of `train`.
        batches: As `collate` makes them, in their order; none: the model is only evaluated.
        measure: Gives loss and accuracy on the held-out set.
        device: `cpu` or `cuda`.
        every: Optimizer steps between two evaluations.
        accumulation: Batches per optimizer step; a step's loss is the mean over all its tokens.

    Returns:
        As `train`, without `retention`.
    """
    training, grit = split_settings(method, settings)
    steps = len(batches) // accumulation
    curve: list[tuple[int, float, float, float]] = []
    spent = 0.0
    losses: list[Tensor] = []
    blocks: list[float] = []
    optimizer, manager = None, None
    if steps:
        optimizer, manager = build_optimizer(model, method, training, grit, MAX_GRAD_NORM)
        peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for p in model.parameters() if p.requires_grad]
    block = min(every, settings["every"])
    began = _clock(device)
    for step in range(1, steps + 1):
        assert optimizer is not None
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _schedule(step, steps, training["warmup"])
        parts = batches[(step - 1) * accumulation : step * accumulation]
        losses.append(_backward(model, parts))
        if manager is None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % block == 0 or step == steps:
            now = _clock(device)
            blocks.append((now - began) / ((step - 1) % block + 1))
            spent += now - began
            if not math.isfinite(float(losses[-1])):
                break
            if step % every == 0 or step == steps:
                curve.append((step, *measure(), spent))
            began = _clock(device)
    if not steps:
        curve.append((0, *measure(), 0.0))
    if manager is not None:
        manager.detach()
    values = torch.stack(losses).tolist() if losses else []
    finite = bool(curve) and all(map(math.isfinite, (*values, curve[-1][1])))
    return {
        "status": "done" if finite else "diverged",
        "loss": curve[-1][1] if finite else None,
        "accuracy": curve[-1][2] if finite else None,
        "retention": None,
        "curve": curve,
        "losses": [round(statistics.fmean(values[i : i + LOSS_BLOCK]), 5) for i in range(0, len(values), LOSS_BLOCK)],
        "step_seconds": statistics.median(blocks) if blocks else None,
        "train_seconds": spent,
        "coverage": float(manager.applied.sum()) / (2 * len(manager.layers) * steps) if manager else None,
    }


def _backward(model: Any, parts: Sequence[Batch]) -> Tensor:
    """Gradients of one step: its loss is the mean over the tokens of all its parts."""
    if len(parts) == 1:
        loss = model(**parts[0]).loss
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]
    tokens = [int((part["labels"][:, 1:] != IGNORE).sum()) for part in parts]
    total = torch.zeros(())
    for part, n in zip(parts, tokens, strict=True):
        loss = model(**part).loss * (n / sum(tokens))
        loss.backward()
        total = total.to(loss.device) + loss.detach()
    return total


def _model(job: Mapping[str, Any], settings: Mapping[str, Any], device: str) -> tuple[Any, Any]:
    """The base in float32 with the run's adapters, which depend on its seed."""
    from grit_impl.recipes.bases import load_base
    from grit_impl.recipes.lora import LoRASettings, add_lora

    base, tokenizer = load_base(job["base"], dtype="float32", device=device)
    base.config.use_cache = False
    lora = LoRASettings(r=settings["rank"], alpha=settings["alpha"], rslora=job["method"] == "rslora")
    return add_lora(base, lora, job["seed"]).train(), tokenizer


def epochs(rows: Sequence[Any], n: int, seed: int) -> list[Any]:
    """`n` rows in the seed's order, each once before any comes again."""
    random_, found = random.Random(seed), list[Any]()
    while rows and len(found) < n:
        found += random_.sample(rows, len(rows))
    return found[:n]


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


def collate(rows: Sequence[dict[str, list[int]]], tokenizer: Any, device: str) -> Batch:
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
    return by_length(_encode(rows, tokenizer), tokenizer, device)


def by_length(encoded: Sequence[dict[str, list[int]]], tokenizer: Any, device: str) -> list[Batch]:
    """Batches of rows that are about as long as each other, for `held_out_loss`."""
    ordered = sorted(encoded, key=lambda row: len(row["input_ids"]))
    starts = range(0, len(ordered), EVALUATION_BATCH)
    return [collate(ordered[i : i + EVALUATION_BATCH], tokenizer, device) for i in starts]


@torch.no_grad()
def held_out_loss(model: Any, batches: Sequence[Batch]) -> tuple[float, float]:
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
