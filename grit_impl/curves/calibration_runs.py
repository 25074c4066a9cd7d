"""Real training curves for the calibration: a small Llama with LoRA, several optimizers on the same batches.

Everything comes from seeds. Each (optimizer, seed) is trained once exactly and several times with the noise of a GPU in
bfloat16: every gradient element is perturbed by its unit round-off, and the logged loss by 0.05% (two runs of the same
training on one GPU were measured to log losses 0.05% apart). This is the only file of the curve tools that needs torch.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grit_impl.record import write_atomic

STEPS = 100
REPLICATES = 4
TUNING_SEEDS = (101, 102, 103)
EVALUATION_SEEDS = (1, 2, 3, 4, 5)
GRADIENT_NOISE = 2.0**-9
LOSS_NOISE = 5e-4
VOCABULARY, LENGTH, BATCH, RANK = 48, 24, 8, 4
OPTIMIZERS = ("adamw", "nadam", "adamax", "rmsprop", "adagrad", "sgd", "kfac-adamw")
"""`kfac-adamw` multiplies each LoRA gradient by an inverse second moment in rank space before AdamW, as GRIT does."""


def _optimizer(name: str, parameters: list[Any]) -> Any:
    import torch

    makers: dict[str, Callable[[], Any]] = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=5e-3),
        "kfac-adamw": lambda: torch.optim.AdamW(parameters, lr=5e-3),
        "nadam": lambda: torch.optim.NAdam(parameters, lr=5e-3),
        "adamax": lambda: torch.optim.Adamax(parameters, lr=5e-3),
        "rmsprop": lambda: torch.optim.RMSprop(parameters, lr=2e-3),
        "adagrad": lambda: torch.optim.Adagrad(parameters, lr=2e-2),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    }
    return makers[name]()


def _batches(table: Any, count: int, seed: int) -> list[Any]:
    """Sequences of a second-order Markov chain; each batch has its own share of random tokens: its difficulty."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        noise = float(torch.rand((), generator=generator)) * 0.4
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        for t in range(2, LENGTH):
            follow = table[tokens[:, t - 1], tokens[:, t - 2] % 4]
            stray = torch.rand(BATCH, generator=generator) < noise
            tokens[:, t] = torch.where(stray, tokens[:, t], follow)
        batches.append(tokens)
    return batches


def _base() -> dict[str, Any]:
    """State of a Llama of 30 thousand parameters after 150 steps on another chain; the same for all runs."""
    import torch

    torch.manual_seed(0)
    model = _llama()
    table = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in _batches(table, 150, seed=8):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def _precondition(model: Any) -> None:
    """dA <- (G G^T / d + damping)^-1 dA over its rank, likewise dB, each renormalised: a small K-FAC of gradients."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad if "lora_A" in name else parameter.grad.T
        moment = gradient @ gradient.T
        damping = 1e-2 * moment.trace() / RANK + 1e-12
        solved = torch.linalg.solve(moment + damping * torch.eye(RANK), gradient)
        solved *= gradient.norm() / solved.norm().clamp_min(1e-12)
        parameter.grad.copy_(solved if "lora_A" in name else solved.T)


def train(base: dict[str, Any], optimizer: str, seed: int, *, order: int, init: int, noise: int | None) -> Any:
    """One run: losses and gradient norms (2, STEPS).

    Args:
        base: State of the base model.
        optimizer: One of `OPTIMIZERS`.
        seed: Decides the task.
        order: Seed of the batches.
        init: Seed of the LoRA initialisation.
        noise: Seed of the GPU-like noise; None for an exact run.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    model = _llama()
    model.load_state_dict(base)
    torch.manual_seed(init)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=projections))
    parameters = [p for p in model.parameters() if p.requires_grad]
    table = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(1000 + seed))
    update = _optimizer(optimizer, parameters)
    source = None if noise is None else torch.Generator().manual_seed(noise)
    log = np.empty((2, STEPS))
    for step, batch in enumerate(_batches(table, STEPS, seed=order)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if source is not None:
            for gradient in (p.grad for p in parameters if p.grad is not None):
                gradient *= 1 + GRADIENT_NOISE * torch.randn(gradient.shape, generator=source)
        shown = 1.0 if source is None else 1 + LOSS_NOISE * float(torch.randn((), generator=source))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        log[:, step] = loss.item() * shown, float(norm)
        if optimizer == "kfac-adamw":
            _precondition(model)
        update.step()
        update.zero_grad()
    return log


def plan() -> Iterator[tuple[str, str, int, int]]:
    """(kind, optimizer, seed, replicate) of all runs; replicate 0 is exact, the others carry noise."""
    for seed in TUNING_SEEDS + EVALUATION_SEEDS:
        for optimizer in OPTIMIZERS:
            for replicate in range(REPLICATES + 1):
                yield "run", optimizer, seed, replicate
        yield "other order", "adamw", seed, 0
        yield "other init", "adamw", seed, 0


def record(out: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Train everything and write `out` (npz): loss, grad_norm (R, STEPS); kind, optimizer, seed, replicate (R,)."""
    import torch

    torch.set_num_threads(1)
    base, rows = _base(), list(plan())
    logs: list[NDArray[np.float64]] = []
    for index, (kind, optimizer, seed, replicate) in enumerate(rows):
        order = 50_000 + seed if kind == "other order" else 10_000 + seed
        init = 60_000 + seed if kind == "other init" else 20_000 + seed
        noise = 1_000 * seed + 10 * OPTIMIZERS.index(optimizer) + replicate if replicate else None
        logs.append(train(base, optimizer, seed, order=order, init=init, noise=noise))
        if progress:
            progress(index + 1, len(rows))
    stacked = np.stack(logs).astype(np.float32)
    kinds, optimizers, seeds, replicates = (np.array(column) for column in zip(*rows, strict=True))
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        loss=stacked[:, 0],
        grad_norm=stacked[:, 1],
        kind=kinds,
        optimizer=optimizers,
        seed=seeds,
        replicate=replicates,
    )
    return write_atomic(out, buffer.getvalue())
