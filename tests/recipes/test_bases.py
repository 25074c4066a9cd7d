"""Base models and adapters: what is loaded, in which precision, and clear refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from grit_impl.errors import GRITError
from grit_impl.recipes.bases import TINY, load_base, save_tokenizer
from grit_impl.recipes.lora import PROJECTIONS, LoRASettings, add_lora
from grit_impl.recipes.shapes import SHAPES


def test_tiny_is_float32_on_the_cpu_and_generates() -> None:
    """Oracle: the checkpoint read without our loader; bfloat16 values survive the cast to float32."""
    model, tokenizer = load_base("tiny", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    reference = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.float())
    assert model.num_parameters() <= 4_000_000
    ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_a_folder_is_the_same_model(tmp_path: Path) -> None:
    """Oracle: the logits of `tiny`; the dtype is the one asked for."""
    folder = shutil.copytree(TINY, tmp_path / "copy")
    ids = torch.arange(20)[None]
    tiny, _ = load_base("tiny", device="cpu")
    copy, _ = load_base(folder, device="cpu")
    assert torch.equal(copy(input_ids=ids).logits, tiny(input_ids=ids).logits)
    half, _ = load_base(folder, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_saved_tokenizer_names_a_class_that_every_transformers_knows(tmp_path: Path) -> None:
    """Oracle: `PreTrainedTokenizerFast` is in transformers 4 and 5; the tokens are the same afterwards."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_base("tiny", device="cpu")[1]
    save_tokenizer(tokenizer, tmp_path)
    assert "TokenizersBackend" not in (tmp_path / "tokenizer_config.json").read_text()
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again("What kind of thing is a frog?").input_ids == tokenizer("What kind of thing is a frog?").input_ids


def test_random_weights_make_a_working_llama() -> None:
    """Oracle: an ordinary LlamaForCausalLM with the same configuration and weights gives the same logits."""
    model, tokenizer = load_base("random:tiny", device="cpu")
    again, _ = load_base("random:tiny", device="cpu")
    ordinary = LlamaForCausalLM(model.config).eval()
    ordinary.load_state_dict(model.state_dict())
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, ordinary(input_ids=ids).logits)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = model.model.layers[0].mlp.up_proj.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert len(tokenizer) <= model.config.vocab_size


@pytest.mark.parametrize(("name", "billions"), [("llama-1b", 1.236), ("llama-3-8b", 8.030)])
def test_shapes_are_the_published_ones(name: str, billions: float) -> None:
    """Oracle: the parameter counts on the models' pages (1.24 and 8.03 billion)."""
    from transformers import LlamaConfig

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.001)


def test_four_bit_random_weights_are_nf4_and_take_adapters() -> None:
    """Oracle: bitsandbytes' own dequantisation; the result stays within NF4's error of the same weights."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    full, _ = load_base("random:tiny", device="cpu")
    model, _ = load_base("random:tiny", device="cpu", four_bit=True)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    restored = bnb.functional.dequantize_4bit(layer.weight.data, state)
    original = full.model.layers[0].mlp.up_proj.weight
    assert (restored - original).norm() / original.norm() < 0.15
    peft = add_lora(model, LoRASettings(r=4), seed=0)
    loss = peft(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss
    loss.backward()
    assert all(p.grad is not None for p in peft.parameters() if p.requires_grad)


def test_four_bit_without_bitsandbytes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message names the package."""
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(GRITError, match="needs bitsandbytes"):
        load_base("tiny", device="cpu", four_bit=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("random:llama-9b", "unknown random shape 'llama-9b'"),
        ("no-such-model", "unknown base model 'no-such-model': give tiny, smollm2,"),
        ("nobody/no-such-model", "base model 'nobody/no-such-model' is neither a folder nor on the hub"),
        ("nobody/no-such.gguf", "there is no such file"),
        ("./no/such/folder", "there is no such file or folder"),
    ],
)
def test_unknown_bases_are_one_clear_line(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the product's rule for bad input. The hub is switched off, as without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GRITError, match=message) as caught:
        load_base(spec, device="cpu")
    assert "\n" not in str(caught.value)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    """Oracle: an empty folder, then one whose weights are cut short."""
    with pytest.raises(GRITError, match=r"has no config\.json"):
        load_base(tmp_path, device="cpu")
    folder = shutil.copytree(TINY, tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(GRITError, match="cannot load base model"):
        load_base(folder, device="cpu")


def test_unknown_dtype_is_named() -> None:
    """Oracle: the message has the value."""
    for dtype in ("float7", "int8"):
        with pytest.raises(GRITError, match=f"unknown dtype '{dtype}'"):
            load_base("tiny", dtype=dtype)


class TestLoRA:
    """`add_lora`."""

    def test_only_the_adapters_train_and_nothing_changes_yet(self) -> None:
        """Oracle: y = W0 x + s B A x with B = 0, counted by hand: 7 adapters per layer, r (d_in + d_out) each."""
        base, _ = load_base("random:tiny", device="cpu")
        ids = torch.arange(12)[None]
        before = base(input_ids=ids).logits
        model = add_lora(base, LoRASettings(r=4, alpha=8), seed=1)
        assert torch.equal(model(input_ids=ids).logits, before)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trainable) == 2 * 7 * 2
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
        hidden, kv, ffn = 64, 32, 160
        widths = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + ffn)
        assert sum(p.numel() for p in trainable.values()) == 4 * 2 * widths
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert layer.scaling == {"default": 2.0}

    def test_the_seed_fixes_the_adapters_and_leaves_the_global_stream_alone(self) -> None:
        """Oracle: equal seeds, equal A; a draw from the global generator is the one it would have been."""
        torch.manual_seed(5)
        expected = torch.rand(3)

        def adapters(seed: int) -> list[torch.Tensor]:
            base, _ = load_base("random:tiny", device="cpu")
            torch.manual_seed(5)
            model = add_lora(base, LoRASettings(), seed)
            assert torch.equal(torch.rand(3), expected)
            return [p.detach() for name, p in model.named_parameters() if "lora_A" in name]

        one, same, other = adapters(1), adapters(1), adapters(2)
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize(
        "options", [{"r": 0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"target_modules": ()}]
    )
    def test_bad_settings_are_named(self, options: dict[str, object]) -> None:
        """Oracle: the message has the option."""
        with pytest.raises(GRITError, match=next(iter(options)) + "[= ]"):
            LoRASettings(**options)  # type: ignore[arg-type]

    def test_absent_layers_are_named(self) -> None:
        """Oracle: the message has the name."""
        base, _ = load_base("random:tiny", device="cpu")
        with pytest.raises(GRITError, match="no layer named c_attn"):
            add_lora(base, LoRASettings(target_modules=(*PROJECTIONS, "c_attn")), seed=0)
