"""By how much a step of `trust_region` changes the model, against what its metric predicts, and why.

The rule's metric stands for the Fisher through a chain of assumptions; each is undone in turn, on the same step and the
same batch, so that the factors below multiply to measured / predicted. All are sums over what is asked (answer tokens),
divided by the number of real tokens, which is the unit that the rule's own statistics have.

    python suites/benchmarks/trust_region_kl.py --task convert --lr 0.004
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.recipes.tasks import TASKS
from grit_impl.recipes.tokens import IGNORE
from grit_impl.sweep.optimizers import build_optimizer
from grit_impl.sweep.run import MAX_GRAD_NORM, _encode, _model, _schedule, collate

DRAWS = 4  # of labels from the model itself
FACTORS = {
    "lag, damping": "the factors are averages of earlier steps, and damped",
    "isotropic": "the long side of a block is a multiple of I",
    "Kronecker": "a block is a product of two averages",
    "empirical": "labels of the data instead of the model's own",
    "tokens": "tokens of a sequence count one by one",
    "block-diagonal": "A and B of all layers count one by one",
    "quadratic": "the divergence beyond second order",
}


class Captured:
    """x, a, g and s dy of every layer, (tokens, d) each, per token of a summed loss."""

    def __init__(self, model: Any, layers: Any) -> None:
        self.model, self.layers = model, layers

    def __call__(self, batch: dict[str, Any], labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
        kept: list[dict[str, Tensor]] = [{} for _ in self.layers]
        handles = []
        for layer, found in zip(self.layers, kept, strict=True):

            def into(module: Any, args: Any, output: Tensor, found: dict[str, Tensor] = found) -> None:
                found["x"], found["a"] = args[0].detach(), output.detach()
                output.register_hook(lambda g: found.__setitem__("g", g))

            def out(module: Any, args: Any, output: Tensor, found: dict[str, Tensor] = found) -> None:
                output.register_hook(lambda g: found.__setitem__("dy", g))

            handles += [layer.module.lora_A[layer.adapter].register_forward_hook(into)]
            handles += [layer.module.lora_B[layer.adapter].register_forward_hook(out)]
        logits = self.model(**batch).logits[:, :-1]
        asked = labels != IGNORE
        torch.nn.functional.cross_entropy(logits[asked], labels[asked], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        real = batch["attention_mask"].bool()
        for found in kept:
            yield tuple(found[name][real] for name in ("x", "a", "g", "dy"))


def blocks(rows: Any, moved: list[tuple[Tensor, Tensor]], pairs: Any) -> tuple[float, float, float]:
    """D'FD / 2 per real token, summed over tensors: long side isotropic, long side as it is, no product of averages."""
    sums = [0.0, 0.0, 0.0]
    for (x, a, g, dy), (d_a, d_b), (w_a, w_b) in zip(rows, moved, pairs, strict=True):
        n = len(x)
        s_a, s_g, s_x, s_y = (v.T @ v / n for v in (a, g, x, dy))
        sums[0] += float((s_a.trace() / w_a.square().sum()) * (d_a * (s_g @ d_a)).sum())
        sums[1] += float((d_a * (s_g @ d_a @ s_x)).sum() + (d_b * (s_y @ d_b @ s_a)).sum())
        sums[2] += float((((x @ d_a.T) * g).sum(1).square() + ((a @ d_b.T) * dy).sum(1).square()).mean())
        if float(w_b.norm()):
            sums[0] += float((s_g.trace() / w_b.square().sum()) * (d_b * (d_b @ s_a)).sum())
    return sums[0] / 2, sums[1] / 2, sums[2] / 2


@torch.no_grad()
def log_probs(model: Any, batch: dict[str, Any], asked: Tensor) -> Tensor:
    """(answer tokens, vocabulary)."""
    return torch.log_softmax(model(**batch).logits[:, :-1][asked], -1)


def probe(
    model: Any, layers: Any, batch: dict[str, Any], before: list[Tensor], after: list[Tensor]
) -> dict[str, float]:
    """The chain for one step, without its first and last member's ratio to the rule's prediction."""
    labels = batch["labels"][:, 1:]
    asked, real = labels != IGNORE, float(batch["attention_mask"].sum())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    parameters = [p for layer in layers for p in (layer.a, layer.b)]

    def put(values: list[Tensor]) -> None:
        for p, value in zip(parameters, values, strict=True):
            p.data.copy_(value)

    put(before)
    moved = [new - old for old, new in zip(before, after, strict=True)]
    pairs = [(a.detach(), b.detach()) for a, b in zip(before[::2], before[1::2], strict=True)]
    steps = list(zip(moved[::2], moved[1::2], strict=True))
    capture = Captured(model, layers)
    isotropic, kronecker, empirical = blocks(capture(inputs, labels), steps, pairs)
    p = log_probs(model, inputs, asked)
    own = []
    for _ in range(DRAWS):
        drawn = labels.clone()
        drawn[asked] = torch.multinomial(p.exp(), 1)[:, 0]
        own.append(blocks(capture(inputs, drawn), steps, pairs)[2])

    def fisher(which: list[int]) -> float:
        """Var_p(J D) / 2 of these tensors moving together, by central differences in float64."""
        h = 1e-3
        sides = []
        for sign in (1, -1):
            put([w + sign * h * d if i in which else w for i, (w, d) in enumerate(zip(before, moved, strict=True))])
            sides.append(log_probs(model, inputs, asked))
        change = (sides[0] - sides[1]) / (2 * h)
        return float((p.exp() * change.square()).sum()) / 2 / real

    one_by_one = sum(fisher([i]) for i in range(len(moved)))
    together = fisher(list(range(len(moved))))
    put(after)
    divergence = float((p.exp() * (p - log_probs(model, inputs, asked))).sum()) / real
    chain = (isotropic, kronecker, empirical, sum(own) / len(own), one_by_one, together, divergence)
    return dict(zip(FACTORS, chain, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="convert")
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--probes", type=int, nargs="+", default=(3, 6, 12, 25, 50, 100, 150))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    torch.set_num_threads(1)
    settings = {"rank": 16, "alpha": 16, "lr": asked.lr, "beta1": 0.9, "beta2": 0.999}
    model, tokenizer = _model({"base": "tiny", "method": "grit", "seed": asked.seed}, settings, "cpu")
    model.double()
    rows = _encode(TASKS[asked.task].training(200 * 8, asked.seed), tokenizer)
    optimizer, manager = build_optimizer(model, "grit", settings, GRITConfig(update_rule="trust_region"), MAX_GRAD_NORM)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    print("step", "predicted", *FACTORS, "measured / predicted", sep=" | ")
    parameters = [p for layer in manager.layers for p in (layer.a, layer.b)]
    for step in range(1, max(asked.probes) + 1):
        batch = collate(rows[8 * (step - 1) : 8 * step], tokenizer, "cpu")
        rate = asked.lr * _schedule(step, 200, 5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(**batch).loss.backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        optimizer.zero_grad()
        if step in asked.probes:
            predicted = min(rate**2, float(manager.rule.decrement)) / 2
            after = [p.detach().clone() for p in parameters]
            manager.detach()
            found = probe(model, manager.layers, batch, before, after)
            manager.attach()
            optimizer.zero_grad()
            chain = [predicted, *(found[name] for name in FACTORS)]
            ratios = [new / old for old, new in itertools.pairwise(chain)]
            print(
                step,
                f"{predicted:.2e}",
                *(f"{r:.3g}" for r in ratios),
                f"{math.prod(ratios):.3g}",
                sep=" | ",
                flush=True,
            )


if __name__ == "__main__":
    main()
