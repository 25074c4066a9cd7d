"""Checkpoints by transformers' rules. Oracle: the state dict of the model that transformers loads from the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_merged
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint


def same_as_transformers(folder: Path) -> None:
    """Assert that a checkpoint gives the parameters that transformers loads, to the bit."""
    from transformers import AutoModelForCausalLM

    base = Checkpoint(folder)
    base.check()
    loaded = dict(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32").named_parameters(remove_duplicate=False)
    )
    with base.reader() as reader:
        assert {HEAD, *base.names()} == {HEAD, *loaded}
        assert [name for name in loaded if not reader(name).equal(loaded[name].detach())] == []


def edited(base: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Change a folder's tensors in place."""
    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return base


def sharded(source: Path, out: Path, size: str = "500KB") -> Path:
    """The same model in several files."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, out)
    (out / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(out, max_shard_size=size)
    assert (out / "model.safetensors.index.json").is_file()
    return out


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "one file": lambda source, out: shutil.copytree(source, out),
    "shards": sharded,
    "many shards": lambda source, out: sharded(source, out, "200KB"),
    "half precision": lambda source, out: edited(
        shutil.copytree(source, out), lambda t: {name: tensor.bfloat16() for name, tensor in t.items()}
    ),
    "another program's metadata": lambda source, out: edited(shutil.copytree(source, out), dict),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_every_layout(lab: SimpleNamespace, tmp_path: Path, base: str, layout: str) -> None:
    """Oracle: transformers."""
    same_as_transformers(LAYOUTS[layout](getattr(lab, base), tmp_path / "base"))


def test_a_head_stored_beside_a_tied_embedding(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: transformers 5 keeps two different matrices apart; 4 drops the head, and then the export refuses."""
    import transformers

    base = shutil.copytree(lab.tied, tmp_path / "base")
    edited(base, lambda t: {**t, HEAD: t[EMBEDDING].clone()})
    assert Checkpoint(base).tied
    same_as_transformers(base)
    edited(base, lambda t: {**t, HEAD: t[EMBEDDING] * 0.5})
    if int(transformers.__version__.split(".")[0]) < 5:
        with pytest.raises(GRITError, match="tie_word_embeddings"):
            export_merged(base, None, tmp_path / "m.gguf")
        return
    assert not Checkpoint(base).tied
    same_as_transformers(base)
    from grit_impl.gguf.tensors import Weights

    assert "output.weight" in Weights(export_merged(base, None, tmp_path / "m.gguf").path)


def test_a_tied_matrix_under_the_heads_name(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: transformers 5 ties either way round; 4 leaves the embedding without values, and this refuses then."""
    import transformers

    base = edited(
        shutil.copytree(lab.tied, tmp_path / "base"),
        lambda t: {(HEAD if name == EMBEDDING else name): tensor for name, tensor in t.items()},
    )
    if int(transformers.__version__.split(".")[0]) < 5:
        with pytest.raises(GRITError, match=rf"as {HEAD} alone, from which transformers 4\..*rename the tensor"):
            export_merged(base, None, tmp_path / "m.gguf")
        return
    same_as_transformers(base)
    export_merged(base, None, tmp_path / "m.gguf")


def older(folder: Path) -> None:
    """A shard of an older save, in more files."""
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00003-of-00009.safetensors")


def whole(folder: Path) -> None:
    """An older save in one file, which transformers prefers."""
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors")


def variant(folder: Path) -> None:
    """Another precision beside."""
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.fp16.safetensors")


def lost(folder: Path) -> None:
    """A shard is missing."""
    (folder / "model-00002-of-00002.safetensors").unlink()


def index(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], None]:
    """Another index."""

    def plant(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        body = json.loads(file.read_text())
        file.write_text(json.dumps({**body, "weight_map": change(body["weight_map"])}))

    return plant


def adapter_inside(folder: Path) -> None:
    """An adapter's configuration in the base's folder: transformers loads that adapter, too."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


NORM = "model.norm.weight"
STRAYS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an older save's shard": (older, "model-00003-of-00009"),
    "an older save in one file": (whole, "model-00001-of-00002"),
    "another precision": (variant, "model.fp16"),
    "a shard lost": (lost, "lacks a shard"),
    "a tensor the index lacks": (index(lambda m: {k: v for k, v in m.items() if k != NORM}), "nothing"),
    "a tensor the shards lack": (index(lambda m: {**m, "model.extra.weight": next(iter(m.values()))}), "model.extra"),
    "a tensor in another shard": (
        index(lambda m: {**m, NORM: next(v for v in m.values() if v != m[NORM])}), "model.norm.weight is in",
    ),
    "an index that is none": (lambda f: (f / "model.safetensors.index.json").write_text("{}") and None, "no index"),
    "an adapter inside": (adapter_inside, "adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRAYS)
def test_stray_and_missing_files(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Oracle: the plant, named in a GRITError; of most of these transformers says nothing."""
    plant, named = STRAYS[kind]
    base = sharded(lab.untied, tmp_path / "base", "1500KB")
    plant(base)
    with pytest.raises(GRITError, match=named) as caught:
        export_merged(base, None, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def tensors(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Add or drop (None) tensors; two underscores stand for a dot."""
    import torch

    def change(found: dict[str, Any]) -> dict[str, Any]:
        for name, shape in changes.items():
            key = name.replace("__", ".")
            found.pop(key, None)
            if shape is not None:
                found[key] = torch.ones(shape)
        return found

    return change


WRONG_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer's matrix missing": ({"model__layers__1__mlp__up_proj__weight": None}, "at random"),
    "a layer more": ({"model__layers__2__mlp__up_proj__weight": (352, 128)}, "no place"),
    "a bias that the configuration denies": ({"model__layers__0__self_attn__q_proj__bias": (128,)}, "no place"),
    "another width": ({"model__norm__weight": (64,)}, "config.json makes it"),
    "rows that the configuration does not count": ({"lm_head__weight": (600, 128)}, "config.json makes it"),
    "a scale of another quantisation": ({"model__layers__0__mlp__up_proj__weight_scale": (352,)}, "no place"),
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_exactly_the_tensors_of_the_model(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Oracle: the plant; transformers ignores what it has no place for, and makes up what is missing."""
    changes, named = WRONG_TENSORS[kind]
    base = edited(shutil.copytree(lab.untied, tmp_path / "base"), tensors(**changes))
    with pytest.raises(GRITError, match=named):
        export_merged(base, None, tmp_path / "m.gguf")


def test_biases_that_the_configuration_has(tmp_path: Path) -> None:
    """Oracle: transformers."""
    same_as_transformers(tiny.make_base(tmp_path / "base", attention_bias=True, mlp_bias=True))
    same_as_transformers(tiny.make_base(tmp_path / "qwen", model="Qwen2", split="qwen2"))
