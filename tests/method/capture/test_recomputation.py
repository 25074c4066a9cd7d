"""Several forward passes before a backward, and layers that run again in it: each token is counted once, as its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from grit_impl.config import GRITConfig
from grit_impl.method.manager import GRITManager

VOCABULARY = 48  # of the fixtures' sequences


class Twice(nn.Module):
    """One layer called twice; each call is kept, or recomputed with reentrant checkpointing or the other."""

    def __init__(self, calls: str, nested: bool = False) -> None:
        super().__init__()
        self.embed, self.proj = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.calls, self.nested = calls, nested

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        x = self.embed(input_ids).detach().requires_grad_()
        for call in self.calls:
            x = self.proj(x) if call == "k" else checkpoint(self.proj, x, use_reentrant=call == "r")
            x = self.scale * x.tanh()
        out = x[:, :-1][labels[:, 1:] != -100].square().mean()
        return {"scale": self.scale, "hidden_states": (x, [out])} if self.nested else {"scale": self.scale, "loss": out}


def _twice(calls: str, nested: bool = False) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Twice(calls, nested), LoraConfig(r=3, target_modules=["proj"], init_lora_weights=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_are_asked_once(reentrant: bool, llama: Any, sequences: Any, collate: Any) -> None:
    """Oracle: a counter of gradient hooks: one per layer, though checkpointing calls each twice."""
    model, batch, asked = llama(), collate(sequences(4)), []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    manager = GRITManager(model).attach()
    original = torch.Tensor.register_hook
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "register_hook", lambda x, hook: (asked.append(hook), original(x, hook))[1])
        model(**batch).loss.backward()
    assert sum("ModuleTap.note" in hook.__qualname__ for hook in asked) == len(manager.layers)
    assert (manager.statistics.tokens == float(batch["attention_mask"].sum())).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_a_forward_between_checkpointed_ones(
    labels: bool, training: bool, llama: Any, sequences: Any, collate: Any
) -> None:
    """Oracle: the same backward with no other forward before it: its own padding counts, and its own divisor."""
    found = []
    for between in (False, True):
        model, batch, other = llama(), collate(sequences(4)), collate(sequences(3, seed=5))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        manager = GRITManager(model).attach()
        first = model(**batch).loss
        if between:
            model.train(training)(**{name: other[name] for name in other if labels or name != "labels"})
        first.backward()
        found.append((manager.statistics.tokens.clone(), manager.statistics.sums.clone()))
    assert (found[0][0] == float(batch["attention_mask"].sum())).all()
    for alone, after in zip(*found, strict=True):
        assert torch.equal(alone, after)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_and_one_backward(
    reentrant: bool, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle: the two batches one after the other. The second one, in evaluation mode, is not checkpointed."""
    found = []
    for together in (False, True):
        model, batches = llama(), [collate(sequences(4)), collate(sequences(3, seed=5))]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        manager = GRITManager(model).attach()
        losses = []
        for batch, mode in zip(batches, (True, False), strict=True):
            losses.append(model.train(mode)(**batch).loss)
            if not together:
                losses[-1].backward()
        if together:
            torch.stack(losses).sum().backward()
        found.append(manager.statistics.sums.clone())
        assert (manager.statistics.tokens == sum(float(batch["attention_mask"].sum()) for batch in batches)).all()
    assert relative(*found) < 1e-6


@pytest.mark.parametrize("calls", ["kk", "rr", "nn", "kr", "rk", "kn", "rn"])
def test_a_layer_both_kept_and_recomputed(calls: str, sequences: Any, collate: Any) -> None:
    """Oracle: two calls of one layer are two times the tokens, and the sums meet the gradients."""
    model, batch = _twice(calls), collate(sequences(4))
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    model(**batch)["loss"].backward()
    assert (manager.statistics.tokens == 2 * float(batch["attention_mask"].sum())).all()
    manager.precondition()
    assert manager.completeness is not None
    assert float(manager.completeness.max()) < 1e-5


def test_a_loss_deep_inside_the_output(sequences: Any, collate: Any) -> None:
    """Oracle: the same backward without a second forward before it. Whatever of the output it is taken from."""
    found, batch, other = [], collate(sequences(4)), collate(sequences(4, seed=5))
    for between in (False, True):
        model = _twice("rr", nested=True)
        manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
        manager.loss_tokens = 10
        first = model(**batch)["hidden_states"][1][0]
        if between:
            model(**other)
        first.backward()
        found.append(manager.statistics.sums.clone())
    assert torch.equal(*found)


def test_no_hooks_pile_up_on_a_parameter_that_is_returned(sequences: Any, collate: Any) -> None:
    """Oracle: the parameter's own list of hooks (a temperature, as CLIP returns it)."""
    model, batch = _twice("kk"), collate(sequences(4))
    model.base_model.model.scale.requires_grad_()
    GRITManager(model).attach()
    for _ in range(3):
        model(**batch)["loss"].backward()
    assert not model.base_model.model.scale._backward_hooks
