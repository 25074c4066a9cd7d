"""Every kind of LoRA layer is either right or refused by name; none is skipped in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.layers import find_layers
from grit_impl.method.manager import GRITManager

# sum_t g_t a_t' against dA A' and B' dB from autograd: two routes to the same float32 sums.
COMPLETE = 1e-3
# float32 gradients against an independent route through autograd.
SAME = 1e-5

RIGHT: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "rank-pattern": {"rank_pattern": {"v_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 5}},
    "modules-to-save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora-bias": {"lora_bias": True},
    "trained-bias": {"bias": "lora_only"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "tied-head": {"target_modules": ["q_proj", "lm_head"], "tied": True},
    "one-layer": {"layers_to_transform": [1]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")
@pytest.mark.parametrize("case", RIGHT)
def test_right_on_every_variant(case: str, llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Oracle: the gradients themselves. sum_t g_t a_t' is dA A' and B' dB in every layer, and the preconditioned
    gradients are (S_g + d)^-1 dA and dB (S_a + d)^-1 by dense inversion."""
    model = llama(**RIGHT[case])
    config = GRITConfig(kfac_update_freq=1, kfac_min_samples=1, renormalise="none")
    manager = GRITManager(model, config).attach()
    model(**collate(sequences(6))).loss.backward()
    raw = [(layer.a.grad.clone(), layer.b.grad.clone()) for layer in manager.layers]
    manager.precondition()
    assert manager.completeness is not None
    assert float(manager.completeness.max()) < COMPLETE
    expected = sum("lora_A" in name and "weight" in name for name, _ in model.named_parameters())
    assert len(manager.layers) == expected > 0
    s = manager.factors.covariances().double()
    for i, (layer, (a, b)) in enumerate(zip(manager.layers, raw, strict=True)):
        r = layer.rank
        s_a, s_g = (x[:r, :r] + 0.01 * x[:r, :r].trace() / r * torch.eye(r).double() for x in s[:, i])
        assert relative(layer.a.grad, torch.linalg.solve(s_g, a.double())) < SAME * 100
        assert relative(layer.b.grad, torch.linalg.solve(s_a, b.double(), left=False)) < SAME * 100


def test_gpt2s_transposed_linear_layers(sequences: Any, collate: Any) -> None:
    """Oracle as above on transformers' Conv1D, whose weight is stored transposed."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=48, n_positions=64))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    manager = GRITManager(model).attach()
    model(**collate(sequences(4))).loss.backward()
    manager.precondition()
    assert float(manager.completeness.max()) < COMPLETE


def test_classification_counts_every_label(sequences: Any, collate: Any) -> None:
    """One label per sequence: the loss is averaged over all of them, and none is shifted away."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "SEQ_CLS", "init_lora_weights": False}
    model = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(**options)).train()
    batch = collate(sequences(4), "right")
    batch["labels"] = torch.tensor([0, 1, 1, 0])
    values = []
    for parts in ([batch], [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]):
        manager = GRITManager(model, GRITConfig(factor_decay=0.0)).attach()
        for part in parts:
            (model(**part).loss / len(parts)).backward()
        manager.precondition()
        values.append(manager.factors.covariances()[1])
        model.zero_grad()
    assert float((values[0] - values[1]).norm() / values[0].norm()) < SAME


def conv_model() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    return Net()


def test_embeddings_are_refused(llama: Any) -> None:
    """Refused by name: an embedding's input is no vector."""
    with pytest.raises(GRITError, match=r"embed_tokens is Embedding: leave it out of target_modules"):
        GRITManager(llama(target_modules=["q_proj", "embed_tokens"]))


def test_convolutions_are_refused() -> None:
    """Refused by name: a convolution has no token."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(conv_model(), LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(GRITError, match=r"conv is Conv2d"):
        GRITManager(model)


def test_attention_modules_are_refused() -> None:
    """Refused by name: peft merges the adapter of nn.MultiheadAttention into its weight and calls no lora_A."""
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential()
    net.add_module("attention", nn.MultiheadAttention(8, 2))
    with pytest.raises(GRITError, match=r"MultiheadAttention"):
        GRITManager(get_peft_model(net, LoraConfig(r=2, target_modules=["attention"])))


def test_no_adapter_is_refused(llama: Any) -> None:
    """Refused: nothing to precondition, with or without peft."""
    with pytest.raises(GRITError, match="no trainable LoRA layer"):
        GRITManager(llama().unload())
    frozen = llama()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(GRITError, match="no trainable LoRA layer"):
        GRITManager(frozen)


def test_a_frozen_a_is_refused(llama: Any) -> None:
    """Refused by name: LoRA-FA trains B alone, and S_g would never be seen."""
    model = llama()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    with pytest.raises(GRITError, match="lora_A to be trained"):
        GRITManager(model)


def test_a_bypassed_layer_is_refused(llama: Any, sequences: Any, collate: Any) -> None:
    """Fused kernels compute a layer from its weights and call no module: the first step with a gradient says so."""
    model = llama()
    manager = GRITManager(model).attach()
    layer = manager.layers[1].module
    lora_a, lora_b, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]

    def fused(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return layer.base_layer(x) + scaling * (x @ lora_a.weight.T) @ lora_b.weight.T

    layer.forward = fused
    model(**collate(sequences(4))).loss.backward()
    with pytest.raises(GRITError, match=r"do not add up to the gradients: model\.layers\.0\.self_attn\.v_proj"):
        manager.precondition()


def test_a_model_that_is_called_past_its_hooks_is_refused(llama: Any, sequences: Any, collate: Any) -> None:
    """peft 0.17 calls `model.forward` of the base that it wraps: a manager of the base would see nothing."""
    base = llama().base_model.model
    manager = GRITManager(base).attach()
    base.forward(**collate(sequences(4))).loss.backward()
    with pytest.raises(GRITError, match=r"No layer saw a token: .* give GRIT the outermost model"):
        manager.precondition()


@pytest.mark.parametrize("warm_up", [0, 3])
def test_the_bypass_check_waits_for_a_gradient(warm_up: int, llama: Any, training: Any) -> None:
    """At B = 0, and under a learning rate of zero, there is nothing to compare; the check is not passed by default."""
    trainer = training(
        "pure", llama(zero_b=True), GRITConfig(), max_steps=1, lr_scheduler_type="linear", warmup_steps=3
    )
    trainer.train()
    assert trainer.grit_manager.completeness is None
    trainer = training(
        "pure",
        llama(zero_b=True),
        GRITConfig(),
        max_steps=warm_up + 3,
        lr_scheduler_type="linear",
        warmup_steps=warm_up,
    )
    trainer.train()
    assert trainer.grit_manager.completeness is not None


def test_part_of_the_tokens_is_refused(llama: Any, sequences: Any, collate: Any) -> None:
    """Expert routing and chunking show a layer other tokens than the model: refused with both numbers."""
    model = llama()
    GRITManager(model).attach()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    original = layer.forward
    layer.forward = lambda x, *a, **k: torch.cat([original(x[:, :2]), original(x[:, 2:])], 1)
    batch = collate(sequences(4))
    loss = model(**batch).loss
    with pytest.raises(GRITError, match=f"saw .* tokens where the model was given {batch['input_ids'].numel()}"):
        loss.backward()


def test_two_active_adapters_are_both_preconditioned(llama: Any, sequences: Any, collate: Any) -> None:
    """Several adapters: each has layers and factors of its own, and all of them add up."""
    from peft import LoraConfig

    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    manager = GRITManager(model).attach()
    assert [layer.adapter for layer in manager.layers].count("second") == 2
    model(**collate(sequences(4))).loss.backward()
    manager.precondition()
    assert float(manager.completeness.max()) < COMPLETE


def test_only_the_active_adapter_is_preconditioned(llama: Any) -> None:
    """Several adapters: an inactive one is left alone, even if somebody left it trainable."""
    from peft import LoraConfig

    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(True)
    assert {layer.adapter for layer in find_layers(model)} == {"default"}


def test_switching_adapters_mid_way_is_refused(llama: Any, sequences: Any, collate: Any) -> None:
    """Adapter switching: a switch and back is fine, stepping on another adapter is an error that names it."""
    from peft import LoraConfig

    model = llama()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    manager = GRITManager(model).attach()
    batch = collate(sequences(4))
    model.set_adapter("second")
    with torch.no_grad():
        model(**batch)
    model.set_adapter("default")
    model(**batch).loss.backward()
    manager.precondition()
    model.set_adapter("second")
    model(**batch).loss.backward()
    with pytest.raises(GRITError, match="adapter 'default', which is no longer active"):
        manager.precondition()
    other = GRITManager(model).attach()
    model.zero_grad()
    model(**batch).loss.backward()
    other.precondition()
    assert other.step == 1


def test_evaluation_leaves_no_trace(llama: Any, sequences: Any, collate: Any) -> None:
    """Forward passes without gradients, in evaluation mode or not, are not counted."""
    model, batch = llama(), collate(sequences(4))
    manager = GRITManager(model).attach()
    before = copy.deepcopy(manager.state_dict())
    with torch.no_grad():
        model(**batch)
        model.eval()
        model(**batch)
    assert str(before) == str(manager.state_dict())
    assert not manager.statistics.tokens.any()


def test_training_in_evaluation_mode_counts(llama: Any, sequences: Any, collate: Any) -> None:
    """model.eval() switches dropout off, not training: tokens with gradients are tokens."""
    model, batch = llama().eval(), collate(sequences(4))
    manager = GRITManager(model).attach()
    model(**batch).loss.backward()
    manager.precondition()
    assert float(manager.factors.seen[0]) == float(batch["attention_mask"].sum())


def test_a_copy_of_the_model_is_a_model_of_its_own(llama: Any, sequences: Any, collate: Any) -> None:
    """Oracle: the copy's own A, here zero: with GRIT attached, it must not compute with the original's."""
    model, batch = llama(), collate(sequences(4))
    GRITManager(model).attach()
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_A" in name:
            parameter.data.zero_()
    with torch.no_grad():
        found = twin(**batch).loss
        with model.disable_adapter():
            truth = model(**batch).loss
    assert torch.equal(found, truth)


def test_a_forward_that_others_wrap_is_left_alone(llama: Any, sequences: Any, collate: Any) -> None:
    """Wrapped before (accelerate does so): called, and given back. Wrapped after: it stays, and notes nothing more."""
    model, batch, calls = llama(), collate(sequences(4)), []
    first, second = (layer.module.lora_A["default"] for layer in GRITManager(model).layers[:2])

    def wrap(module: torch.nn.Module) -> Any:
        inner = module.forward
        module.forward = lambda x: (calls.append(module), inner(x))[1]
        return module.forward

    before = wrap(first)
    manager = GRITManager(model).attach()
    after = wrap(second)
    model(**batch).loss.backward()
    assert manager.statistics.tokens[:2].all()
    assert {id(module) for module in calls} == {id(first), id(second)}
    manager.detach()
    manager.statistics.reset()
    assert first.forward is before
    assert second.forward is after
    model(**batch).loss.backward()
    assert not manager.statistics.tokens.any()


def test_detached_hooks_are_gone(llama: Any, sequences: Any, collate: Any) -> None:
    """detach() removes every hook; precondition() then refuses instead of working on nothing."""
    model = llama()
    manager = GRITManager(model).attach()
    manager.detach()
    model(**collate(sequences(4))).loss.backward()
    assert not manager.statistics.tokens.any()
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    with pytest.raises(GRITError, match="not attached"):
        manager.precondition()
