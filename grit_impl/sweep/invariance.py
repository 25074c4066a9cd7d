"""What each method makes of another parametrisation of the same model: a table for the documents.

B A = (B R^-1)(R A) for every invertible R, so a method that depends on the choice depends on nothing real. Each method
trains from both, and the table has |change of B A - change of B A from the other| / |change of B A|, over all layers.

    python -m grit_impl.sweep.invariance
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.sweep.optimizers import build_optimizer
from grit_impl.sweep.run import MAX_GRAD_NORM

_EAGER = {"kfac_update_freq": 1, "kfac_min_samples": 1}
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "AdamW, rsLoRA": ("adamw", {}, None),
    "LoRA+": ("loraplus", {"ratio": 4.0}, None),
    "Muon on A and on B": ("muon", {}, None),
    "Riemannian before Adam (peft)": ("riemannian", {"reg": 1e-6}, None),
    "Riemannian after Adam": ("riemannian_after", {"reg": 0.0}, None),
    "Riemannian, momentum": ("riemannian_sgd", {"reg": 0.0}, None),
    "LoRA-Muon": ("lora_muon", {}, None),
    "LoRA-RITE": ("lora_rite", {}, None),
    "`gram` (SOAP on the r side)": ("grit", {}, {"update_rule": "gram", **_EAGER}),
    "`precondition`": ("grit", {}, _EAGER),
    "`eigenbasis`": ("grit", {}, {"update_rule": "eigenbasis", **_EAGER}),
    "`trust_region`": ("grit", {}, {"update_rule": "trust_region", **_EAGER}),
    "`spectral`": ("grit", {}, {"update_rule": "spectral"}),
}
"""Name in the table -> the sweep's method, its settings, GRIT's options. Floors are 0 where a method lets them be."""
LEARNING_RATE, STEPS = 1e-4, 5


def transforms(rank: int) -> dict[str, Tensor]:
    """(r, r) each: a rotation, a scale of 4, and a random R with condition number 8."""
    generator = torch.Generator().manual_seed(5)
    u, v = torch.linalg.qr(torch.randn(2, rank, rank, generator=generator, dtype=torch.float64)).Q
    spread = torch.logspace(-0.5, 0.5, rank, base=8, dtype=torch.float64)
    return {"orthogonal": u, "scale": 4 * torch.eye(rank, dtype=torch.float64), "general": u @ torch.diag(spread) @ v}


def travelled(
    method: str, settings: dict[str, Any], grit: dict[str, Any] | None, made: Callable[[], Any], batches: Any, r: Tensor
) -> Tensor:
    """What B A moves by, of all layers in one vector, from the model in the parametrisation R.

    Args:
        method, settings, grit: As in `METHODS`.
        made: Makes the PEFT model, with a B that is not 0, in float64.
        batches: Of each step, what the model is called with.
        r: (rank, rank); A -> R A, B -> B R^-1.
    """
    from grit_impl.method.layers import find_layers

    model = made()
    layers = find_layers(model)
    for layer in layers:
        layer.a.data, layer.b.data = r @ layer.a.data, torch.linalg.solve(r, layer.b.data, left=False)

    def products() -> Tensor:
        return torch.cat([(layer.b @ layer.a).detach().flatten() for layer in layers])

    before = products()
    config = None if grit is None else GRITConfig(**grit)
    optimizer, manager = build_optimizer(
        model, method, {"lr": LEARNING_RATE, "beta1": 0.8, "beta2": 0.95, **settings}, config, MAX_GRAD_NORM
    )
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if manager is not None:
        manager.detach()
    return products() - before


def table() -> str:
    """The table, on the embedded base and AQI's rows; B is drawn at random in A's size."""
    from grit_impl.recipes.tasks import TASKS
    from grit_impl.sweep.run import _encode, _model, collate

    job = {"base": "tiny", "method": "adamw", "seed": 0}

    def made() -> Any:
        model, _ = _model(job, {"rank": 16, "alpha": 16}, "cpu")
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        return model.double()

    _, tokenizer = _model(job, {"rank": 16, "alpha": 16}, "cpu")
    rows = _encode(TASKS["aqi"].training(4 * STEPS, 0), tokenizer)
    batches = [collate(rows[i : i + 4], tokenizer, "cpu") for i in range(0, len(rows), 4)]
    changes = transforms(16)
    lines = [f"| method | {' | '.join(changes)} |", "| --- " * (1 + len(changes)) + "|"]
    for name, chosen in METHODS.items():
        plain = travelled(*chosen, made, batches, torch.eye(16, dtype=torch.float64))
        errors = [float((travelled(*chosen, made, batches, r) - plain).norm() / plain.norm()) for r in changes.values()]
        lines.append(f"| {name} | {' | '.join(f'{error:.2g}' for error in errors)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
