"""Oracle f: statistics belong to the tokens, not to how they were batched, padded, checkpointed or averaged."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.manager import GRITManager

# The same float32 sums in another order over some tens of tokens: measured 1e-7 to 4e-7.
SAME = 1e-6
# Statistics that count padding, or count twice, are off by the share of padding: tens of percent.
DIFFERENT = 1e-2


def factors(manager: GRITManager) -> torch.Tensor:
    """(2, L, r, r), with S_a and S_g each scaled to unit norm per layer, so that neither hides the other's error."""
    s = manager.factors.covariances()
    return s / s.norm(dim=(-2, -1), keepdim=True)


def collect(model: Any, batches: list[dict[str, Any]], scale: float = 1.0, **options: Any) -> GRITManager:
    """One optimizer step's statistics over micro-batches (the last step of the plain formula keeps only this one)."""
    manager = GRITManager(model, GRITConfig(factor_decay=0.0, kfac_min_samples=1, **options)).attach()
    for batch in batches:
        (model(**batch).loss * scale).backward()
    manager.precondition()
    manager.detach()
    model.zero_grad()
    return manager


@pytest.fixture
def reference(llama: Any, sequences: Any, collate: Any) -> Any:
    """Statistics of four sequences, each in a forward pass of its own, without any padding."""
    model, rows = llama(), sequences(4)
    items = torch.tensor(sum(len(row) - 2 for row in rows))
    batches = [{**collate([row]), "num_items_in_batch": items} for row in rows]
    return collect(model, batches)


def test_same_however_the_batch_is_split(
    reference: Any, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle f: one batch of four (padded), two of two, one and three, against four of one (no padding)."""
    model, rows = llama(), sequences(4)
    items = torch.tensor(sum(len(row) - 2 for row in rows))
    for split in ([4], [2, 2], [1, 3]):
        parts = list(torch.utils.data.random_split(range(4), split, torch.Generator().manual_seed(0)))
        batches = [{**collate([rows[i] for i in part]), "num_items_in_batch": items} for part in parts]
        manager = collect(model, batches)
        assert relative(factors(manager), factors(reference)) < SAME
        assert relative(manager.factors.covariances()[1], reference.factors.covariances()[1]) < SAME
        assert float(manager.factors.seen[0]) == sum(map(len, rows))


def test_same_with_any_padding(reference: Any, llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Oracle f: left padding, right padding and twenty columns of padding against no padding at all."""
    model, rows = llama(), sequences(4)
    for side, length in (("left", None), ("right", 30), ("left", 30)):
        manager = collect(model, [collate(rows, side, length)])
        assert relative(factors(manager), factors(reference)) < SAME
        assert float(manager.factors.seen[0]) == sum(map(len, rows))


def test_counting_padding_would_be_seen(
    reference: Any, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle f, control: without the mask in GRIT's hands (every token real) the same comparison fails."""
    model, rows = llama(), sequences(4)
    manager = GRITManager(model, GRITConfig(factor_decay=0.0)).attach()
    batch = collate(rows, "right", 30)
    loss = model(**batch)
    manager._taps[0].context.mask = None
    loss.loss.backward()
    manager.precondition()
    assert relative(factors(manager), factors(reference)) > DIFFERENT


def test_positional_arguments_are_understood(
    reference: Any, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle f: a mask passed by position counts like one passed by name."""
    model = llama()
    batch = collate(sequences(4), "right", 30)
    manager = GRITManager(model, GRITConfig(factor_decay=0.0)).attach()
    model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss.backward()
    manager.precondition()
    assert relative(factors(manager), factors(reference)) < SAME


@pytest.mark.parametrize("reentrant", [True, False])
def test_same_under_gradient_checkpointing(
    reentrant: bool, reference: Any, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle f: a token is counted once, although checkpointing runs the forward twice."""
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    manager = collect(model, [collate(sequences(4))])
    assert relative(factors(manager), factors(reference)) < SAME
    assert float(manager.factors.seen[0]) == float(reference.factors.seen[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_without_gradients_in_between_changes_nothing(
    reentrant: bool, reference: Any, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle f: a reference model's forward between forward and backward (as in DPO), recomputation under way."""
    model = llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    manager = GRITManager(model, GRITConfig(factor_decay=0.0)).attach()
    loss = model(**collate(sequences(4))).loss
    with torch.no_grad(), model.disable_adapter():
        model(**collate(sequences(3, seed=5)))
    loss.backward()
    manager.precondition()
    assert relative(factors(manager), factors(reference)) < SAME


def test_sum_mean_and_scaled_losses_agree(llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Oracle f: S_g is of one token's gradient, whatever the loss was divided by or multiplied with."""
    model, batch = llama(), collate(sequences(4))
    mean = collect(model, [batch])
    total = collect(model, [{**batch, "num_items_in_batch": torch.tensor(1)}])
    scaled = collect(model, [batch], scale=1024.0)
    for other in (total, scaled):
        assert relative(other.factors.covariances()[1], mean.factors.covariances()[1]) < SAME


def test_packed_sequences_count_like_separate_ones(reference: Any, llama: Any, sequences: Any, relative: Any) -> None:
    """Oracle f: four sequences in one row without padding or mask, told apart by position_ids (padding-free)."""
    rows = sequences(4)
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "labels": torch.cat([torch.where(torch.arange(len(row)) < 2, -100, row) for row in rows])[None],
    }
    manager = collect(llama(), [packed])
    assert float(manager.factors.seen[0]) == sum(map(len, rows))
    assert relative(factors(manager), factors(reference)) < SAME


def test_a_four_dimensional_mask_is_read(
    reference: Any, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle f: a boolean and an additive (batch, 1, q, k) mask mark padding on their diagonal."""
    batch = collate(sequences(4), "right")
    real = batch["attention_mask"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    # Padding may see the first token (so that no row is empty) but not itself.
    allowed = (causal & real[:, None, None, :]) & real[:, None, :, None]
    allowed[..., 0] |= ~real[:, None, :]
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        manager = collect(llama(), [{**batch, "attention_mask": mask}])
        assert relative(factors(manager), factors(reference)) < SAME


def test_an_unreadable_mask_is_refused(llama: Any, sequences: Any, collate: Any) -> None:
    """Never silently wrong: padding that cannot be told from tokens is an error."""
    model, batch = llama(), collate(sequences(2))
    GRITManager(model).attach()
    with pytest.raises(GRITError, match="cannot read the attention mask"):
        model(**{**batch, "attention_mask": {"full_attention": batch["attention_mask"]}})


def test_a_loss_that_grit_cannot_see_is_refused(llama: Any, sequences: Any, collate: Any) -> None:
    """Never silently wrong: without labels the divisor is unknown, until the caller says it."""
    model, batch = llama(), collate(sequences(2))
    manager = GRITManager(model).attach()
    labels = batch.pop("labels")
    loss = torch.nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    with pytest.raises(GRITError, match="loss_tokens"):
        loss.backward()
    manager.loss_tokens = int((labels[:, 1:] != -100).sum())
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    manager.precondition()
    assert float(manager.factors.seen[0]) == float(batch["attention_mask"].sum())


def test_preconditioned_gradients_do_not_depend_on_the_split(
    llama: Any, sequences: Any, collate: Any, gradients: Any, relative: Any
) -> None:
    """Oracle f, to the end: accumulated over four micro-batches or in one batch, the same gradients come out."""
    results = []
    for size in (4, 1):
        model, rows = llama(), sequences(4)
        items = torch.tensor(sum(len(row) - 2 for row in rows))
        manager = GRITManager(model, GRITConfig(kfac_update_freq=1, kfac_min_samples=1)).attach()
        for start in range(0, 4, size):
            model(**collate(rows[start : start + size]), num_items_in_batch=items).loss.backward()
        manager.precondition()
        results.append(gradients(model))
    # Inverses amplify the statistics' rounding by the damped condition number, at most 1 / kfac_damping = 100.
    assert relative(results[1], results[0]) < 100 * SAME


def test_saving_and_loading_changes_nothing(llama: Any, sequences: Any, collate: Any, tmp_path: Any) -> None:
    """Oracle f: the state through a file, then one more step: the uninterrupted manager's gradients, to the bit."""
    options = {"kfac_update_freq": 2, "kfac_min_samples": 1, "reprojection_freq": 2, "reprojection_k": 3}
    model = llama()
    manager = GRITManager(model, GRITConfig(**options)).attach()
    for seed in range(3):
        model.zero_grad()
        model(**collate(sequences(4, seed))).loss.backward()
        manager.precondition()
        manager.after_step()
    torch.save(manager.state_dict(), tmp_path / "state.pt")
    other = GRITManager(model, GRITConfig(**options))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    grads = []
    for each in (manager, other):
        each.detach()
        each.attach()
        model.zero_grad()
        model(**collate(sequences(4, 9))).loss.backward()
        each.precondition()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(grads[0], grads[1])
    assert json.dumps(manager.factor_report()) == json.dumps(other.factor_report())


def test_a_state_of_another_model_is_refused(llama: Any) -> None:
    """Never silently wrong: a checkpoint of other layers names the difference."""
    state = GRITManager(llama()).state_dict()
    with pytest.raises(GRITError, match=r"differ in model\.layers\.0\.mlp\.down_proj"):
        GRITManager(llama(target_modules=["q_proj", "v_proj", "o_proj"])).load_state_dict(state)


def test_a_skipped_step_leaves_nothing_behind(llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Oracle f: gradients that were cleared without a step, in either way, take their statistics with them."""
    model = llama()
    expected = collect(model, [collate(sequences(4))])
    for clear in ("model", "optimizer"):
        from grit_impl.method.optimizer import GRITOptimizer

        manager = GRITManager(model, GRITConfig(factor_decay=0.0)).attach()
        optimizer = GRITOptimizer(torch.optim.SGD(model.parameters(), 0.1), manager)
        model(**collate(sequences(3, seed=8))).loss.backward()
        if clear == "model":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=False)
        model(**collate(sequences(4))).loss.backward()
        manager.precondition()
        assert relative(factors(manager), factors(expected)) < SAME
        model.zero_grad()


def test_hooks_alone_change_nothing(llama: Any, training: Any, losses: Any, adapters: Any) -> None:
    """Oracle f: with preconditioning off, losses and parameters are bit-identical to a run without GRIT."""
    plain, watched = llama(zero_b=True), llama(zero_b=True)
    reference = training("none", plain)
    reference.train()
    off = GRITConfig(kfac_update_freq=1, ng_warmup_steps=10**6)
    for kind in ("pure", "hybrid"):
        watched = llama(zero_b=True)
        trainer = training(kind, watched, off)
        trainer.train()
        assert losses(trainer) == losses(reference)
        assert torch.equal(adapters(watched), adapters(plain))
        manager = trainer.grit_manager if kind == "pure" else trainer.grit_callback.manager
        assert float(manager.factors.seen.min()) > 0
