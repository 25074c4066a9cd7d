"""Merging as PEFT does. Oracle: PEFT's `merge_and_unload` on the model that transformers loads."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_adapter, export_merged
from grit_impl.export.adapter import Adapter
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("untied", {}),
    "rslora": ("untied", {"use_rslora": True}),
    "patterns": ("untied", {"alpha_pattern": {"q_proj": 64, "layers.1.mlp.up_proj": 2}, "rank_pattern": {"v_proj": 3}}),
    "dora": ("untied", {"use_dora": True}),
    "dora on the embedding": ("untied", {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
    "dora on a tied embedding": ("tied", {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
    "embedding": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "head": ("untied", {"target_modules": ["lm_head"]}),
    "all-linear": ("untied", {"target_modules": "all-linear"}),
    "a regular expression": ("untied", {"target_modules": r".*\.1\..*(up|down)_proj"}),
    "some layers": ("untied", {"layers_to_transform": [1], "target_modules": ["q_proj", "gate_proj"]}),
    "exclusions": ("untied", {"exclude_modules": ["v_proj"]}),
    "saved head and embedding": ("untied", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved norms": ("untied", {"modules_to_save": ["input_layernorm", "norm"]}),
    "saved matrix": ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}),
    "tied, embedding saved": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "token rows": ("untied", {"trainable_token_indices": [3, 5, 300]}),
    "token rows, tied": ("tied", {"trainable_token_indices": {"embed_tokens": [3, 5]}}),
    "pissa": ("untied", {"init_lora_weights": "pissa"}),
    "pissa with rslora": ("untied", {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 7}),
    "pissa with dora": ("untied", {"init_lora_weights": "pissa", "use_dora": True}),
    "olora": ("untied", {"init_lora_weights": "olora", "rank_pattern": {"k_proj": 4}}),
    "gaussian": ("untied", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("untied", {"init_lora_weights": "orthogonal"}),
    "biases of the base": ("qwen", {"bias": "all"}),
    "biases of adapted layers": ("qwen", {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "a bias of its own": ("qwen", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
}


@pytest.fixture(scope="module")
def bases(lab: SimpleNamespace) -> dict[str, Path]:
    """The lab's, and one with biases."""
    qwen = tiny.make_base(lab.root / "qwen", model="Qwen2", split="qwen2", seed=3)
    return {"untied": lab.untied, "tied": lab.tied, "qwen": qwen}


def peft_merges(base: Path, adapter: Path) -> dict[str, Any]:
    """All parameters after PEFT's own loading and merging of the whole model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        # PEFT would add both changes to the one matrix that head and embedding share.
        for name in ("model.embed_tokens", "lm_head"):
            module = model.base_model.model.get_submodule(name)
            inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if "weight" in inner._parameters:
                inner.weight = torch.nn.Parameter(inner.weight.detach().clone())
        return dict(model.merge_and_unload().named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("kind", OPTIONS)
def test_merged_as_peft_merges(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Oracle: PEFT's `merge_and_unload` of the whole model, to the bit."""
    name, settings = OPTIONS[kind]
    base = Checkpoint(bases[name])
    folder = tiny.make_adapter(bases[name], tmp_path / "lora", **settings)
    expected = peft_merges(bases[name], folder)
    adapter = Adapter(folder, base)
    assert adapter.changed
    with base.reader() as reader:
        for key, value in expected.items():
            ours = adapter.merged(key, reader) if key in adapter.changed else reader(key)
            assert ours.equal(value.detach()), f"{key}: {float((ours - value).abs().max())}"


REFUSED_OPTIONS: dict[str, tuple[str, Any]] = {
    "corda": ("init_lora_weights", "corda"),
    "loftq": ("init_lora_weights", "loftq"),
    "lora-ga": ("init_lora_weights", "lora_ga"),
    "random pissa": ("init_lora_weights", "pissa_niter_4"),
    "a start nobody knows": ("init_lora_weights", "martian"),
    "replication": ("layer_replication", [[0, 1], [0, 1]]),
    "invocation tokens": ("alora_invocation_tokens", [3]),
    "parameters": ("target_parameters", ["mlp.down_proj.weight"]),
    "blocks": ("use_bdlora", {"nblocks": 2}),
    "kasa": ("kasa_config", {"beta": 1e-4}),
    "qalora": ("use_qalora", True),
    "an option of the future": ("use_hyperspace", True),
    "another method": ("peft_type", "IA3"),
}


@pytest.mark.parametrize("kind", REFUSED_OPTIONS)
def test_options_that_are_not_merged_are_refused(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Oracle: the option's name or value in a GRITError; the list is of what is known, so the future is on it."""
    field, value = REFUSED_OPTIONS[kind]
    folder = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tiny.edit_json(folder / "adapter_config.json", **{field: value})
    with pytest.raises(GRITError, match=field if field != "peft_type" else str(value)) as caught:
        Adapter(folder, Checkpoint(lab.untied))
    assert "\n" not in str(caught.value)


def test_a_start_that_changes_nothing_is_merged(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the same adapter with an ordinary start. EVA begins with B = 0, as usual."""
    folder = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tiny.edit_json(folder / "adapter_config.json", init_lora_weights="eva", eva_config={"rho": 1.0})
    plain, eva = (Adapter(path, Checkpoint(lab.untied)) for path in (lab.untied_lora, folder))
    assert plain.changed == eva.changed
    with plain.base.reader() as reader:
        assert all(plain.merged(name, reader).equal(eva.merged(name, reader)) for name in plain.changed)


def test_converted_pissa_is_a_plain_adapter(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: PEFT's unmerged forward pass of the model that was trained from PiSSA's start."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(r=4, target_modules=ALL, init_lora_weights="pissa_niter_4")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(lab.untied), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(GRITError, match="pissa_niter_4"):
        export_merged(lab.untied, tmp_path / "raw", tmp_path / "m.gguf")
    adapter = Adapter(tmp_path / "lora", Checkpoint(lab.untied))
    trained = model.merge_and_unload().state_dict()
    with adapter.base.reader() as reader:
        for name in adapter.changed:
            assert adapter.merged(name, reader).allclose(trained[name], atol=1e-5)


def rewritten(folder: Path, change: Any) -> Path:
    """Change an adapter's tensors in place."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(part: str) -> Any:
    """Drop the first tensor whose name contains `part`."""
    return lambda tensors: {n: t for n, t in tensors.items() if n != next(k for k in sorted(tensors) if part in k)}


def also(name: str, shape: tuple[int, ...]) -> Any:
    """Add a tensor."""
    import torch

    return lambda tensors: {**tensors, name: torch.ones(shape)}


LAYER = "base_model.model.model.layers.0"
BAD_FILES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no B": ({}, without("v_proj.lora_B"), "v_proj.lora_B"),
    "no A": ({}, without("v_proj.lora_A"), "v_proj.lora_A"),
    "no magnitude": ({"use_dora": True}, without("magnitude"), "magnitude"),
    "no saved head": ({"modules_to_save": ["lm_head"]}, without("lm_head"), "lm_head"),
    "no token rows": ({"trainable_token_indices": [3]}, without("trainable_tokens"), "trainable_tokens"),
    "a magnitude without DoRA": ({}, also(f"{LAYER}.mlp.up_proj.lora_magnitude_vector", (352,)), "magnitude"),
    "a saved weight that nobody asked for": ({}, also(f"{LAYER}.input_layernorm.weight.1", (128,)), "input_layernorm"),
    "another prefix": ({}, also("module.base.lora_A.weight", (8, 128)), "module.base"),
    "a bias of B": ({}, also(f"{LAYER}.mlp.up_proj.lora_B.bias", (352,)), "lora_B.bias"),
    "a layer beyond the last": ({}, also(f"{LAYER[:-1]}7.mlp.up_proj.lora_A.weight", (8, 128)), "layers.7"),
    "another method's": ({}, also(f"{LAYER}.mlp.up_proj.hada_w1_a", (352, 8)), "hada_w1_a"),
    "NaN": (
        {},
        lambda t: {n: x * float("nan") if "up_proj.lora_B" in n else x for n, x in t.items()},
        "up_proj has NaN",
    ),
    "another rank": ({}, lambda t: {n: x[:4] if "up_proj.lora_A" in n else x for n, x in t.items()}, "rank_pattern"),
    "nothing": ({}, lambda t: {}, "no adapter tensor"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_every_tensor_is_used_and_none_is_missing(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Oracle: the plant, named in a GRITError of one line. PEFT itself loads most of these with at most a warning."""
    settings, change, named = BAD_FILES[kind]
    folder = rewritten(tiny.make_adapter(lab.untied, tmp_path / "lora", **settings), change)
    with pytest.raises(GRITError, match=named) as caught:
        export_merged(lab.untied, folder, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


def test_an_adapter_of_another_base_is_refused(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: "wrong-base", for other widths, fewer layers, and modules that are not there."""
    for name, settings in {"narrow": {"hidden_size": 64}, "short": {"num_hidden_layers": 1}}.items():
        with pytest.raises(GRITError, match=r"wrong-base|no place"):
            Adapter(lab.untied_lora, Checkpoint(tiny.make_base(tmp_path / name, **settings)))
    folder = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tiny.edit_json(folder / "adapter_config.json", target_modules=["c_attn"])
    with pytest.raises(GRITError, match="c_attn"):
        Adapter(folder, Checkpoint(lab.untied))


def test_a_vocabulary_made_larger(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: PEFT on the resized model: rows that only the adapter's file has are in the export."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lab.untied)
    model.resize_token_embeddings(520)
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    for name, parameter in peft.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "lora")
    adapter = Adapter(tmp_path / "lora", Checkpoint(lab.untied))
    assert adapter.rows == 520
    assert {EMBEDDING, HEAD} <= adapter.changed
    trained = peft.merge_and_unload().state_dict()
    with adapter.base.reader() as reader:
        for name in adapter.changed:
            assert adapter.merged(name, reader).equal(trained[name])


def test_weights_in_half_precision_and_in_pickles(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the same numbers from a `.bin` file, and PEFT's merge of bf16 factors in float32."""
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    rewritten(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    half = Adapter(folder, Checkpoint(lab.untied))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    pickled = Adapter(folder, Checkpoint(lab.untied))
    with half.base.reader() as reader:
        for name in half.changed:
            merged = half.merged(name, reader)
            assert merged.dtype == torch.float32
            assert merged.equal(pickled.merged(name, reader))


def test_what_changed_the_base_cannot_lie_over_it(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: an adapter file over the untouched base would lack what PiSSA took out of it."""
    folder = tiny.make_adapter(lab.untied, tmp_path / "lora", init_lora_weights="pissa")
    with pytest.raises(GRITError, match="pissa"):
        export_adapter(lab.untied, folder, tmp_path / "lora.gguf")
