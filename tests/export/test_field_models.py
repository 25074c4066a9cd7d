"""Models as they stood in public reports (docs/field-cases.md). What is right was written before the first run."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from test_adapter import peft_merges, rewritten

from grit_impl.errors import GRITError
from grit_impl.export import commands, export_merged, read_metadata
from grit_impl.export.adapter import Adapter
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint
from grit_impl.gguf.tensors import Weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4973\n"


def refused(base: Path, adapter: Path | None, out: Path) -> str:
    """The one line with which an export is refused, by the library and by the command; nothing is left."""
    with pytest.raises(GRITError) as caught:
        export_merged(base, adapter, out / "m.gguf")
    arguments = [str(adapter), "--base", str(base)] if adapter else [str(base)]
    done = CliRunner().invoke(commands.export, [*arguments, "--out", str(out / "cli")])
    assert isinstance(done.exception, GRITError), done.output
    assert not list(out.rglob("*.gguf"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pointer_of_git_lfs_instead_of_weights(lab: SimpleNamespace, tmp_path: Path) -> None:
    """huggingface/transformers#27923, microsoft/OmniParser#34: cloned without LFS: the file and LFS are named."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    (base / "model.safetensors").write_bytes(POINTER)
    said = refused(base, None, tmp_path)
    assert "model.safetensors" in said
    assert "LFS" in said
    (tmp_path / "model.gguf").write_bytes(POINTER)
    with pytest.raises(GRITError, match=r"model\.gguf is a pointer of Git LFS"):
        read_metadata(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").unlink()
    adapter = shutil.copytree(lab.untied_lora, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(POINTER)
    said = refused(lab.untied, adapter, tmp_path)
    assert "adapter_model.safetensors" in said
    assert "LFS" in said


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 10)],
)
def test_headers_that_are_longer_than_the_file(lab: SimpleNamespace, tmp_path: Path, content: bytes) -> None:
    """vllm-project/vllm#57975, lyogavin/airllm#137: cut or empty files: one line, and no memory is asked for."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    (base / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(base, None, tmp_path)
    adapter = shutil.copytree(lab.untied_lora, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(content)
    assert "adapter_model.safetensors" in refused(lab.untied, adapter, tmp_path)


@pytest.mark.parametrize("lost", [1, 100, 100_000])
def test_a_download_that_ended_early(lab: SimpleNamespace, tmp_path: Path, lost: int) -> None:
    """ggml-org/llama.cpp#6733: the end of the file is missing."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-lost])
    assert "truncated" in refused(base, None, tmp_path)


@pytest.mark.parametrize("more", [1, 8, 4096])
def test_bytes_behind_the_last_tensor(lab: SimpleNamespace, tmp_path: Path, more: int) -> None:
    """Comfy-Org/ComfyUI#15602: safetensors' own reader refuses such a file, and so do we."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    with open(base / "model.safetensors", "ab") as file:
        file.write(b"\0" * more)
    assert "model.safetensors" in refused(base, None, tmp_path)


def test_a_trained_head_on_a_tied_base(lab: SimpleNamespace, tmp_path: Path) -> None:
    """huggingface/transformers#45127: embedding and head of a tied base trained apart: both are in the file."""
    folder = tiny.make_adapter(
        lab.tied, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    export_merged(lab.tied, folder, tmp_path / "m.gguf", "f32")
    weights = Weights(tmp_path / "m.gguf")
    for name, ours in (("embed_tokens", "token_embd.weight"), ("lm_head", "output.weight")):
        (tensor,) = [t for key, t in saved.items() if name in key]
        assert weights(ours).equal(tensor)


def test_saved_modules_are_in_the_merge(lab: SimpleNamespace, tmp_path: Path) -> None:
    """unslothai/unsloth-zoo#369: `modules_to_save` were left at the base's. Oracle: PEFT."""
    folder = tiny.make_adapter(
        lab.untied, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    expected, adapter = peft_merges(lab.untied, folder), Adapter(folder, Checkpoint(lab.untied))
    assert {EMBEDDING, HEAD} <= adapter.changed
    with adapter.base.reader() as reader:
        for name in adapter.changed:
            assert adapter.merged(name, reader).equal(expected[name].detach())


def test_lora_on_the_embedding(lab: SimpleNamespace, tmp_path: Path) -> None:
    """huggingface/peft#436: factors on `embed_tokens`, whose layout is another. Oracle: PEFT."""
    folder = tiny.make_adapter(lab.untied, tmp_path / "lora", target_modules=["embed_tokens", "v_proj"])
    expected, adapter = peft_merges(lab.untied, folder), Adapter(folder, Checkpoint(lab.untied))
    assert EMBEDDING in adapter.changed
    with adapter.base.reader() as reader:
        assert adapter.merged(EMBEDDING, reader).equal(expected[EMBEDDING].detach())


@pytest.mark.parametrize("rows", [40, 7])
def test_saved_modules_of_another_vocabulary(lab: SimpleNamespace, tmp_path: Path, rows: int) -> None:
    """QwenLM/Qwen-VL#415: a head of more or fewer rows than its embedding's: refused, with the number of rows."""
    folder = tiny.make_adapter(lab.untied, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])

    def shorter(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: v[:-rows].clone() if "lm_head" in k else v for k, v in tensors.items()}

    said = refused(lab.untied, rewritten(folder, shorter), tmp_path)
    assert "lm_head" in said
    assert str(512 - rows) in said or "rows" in said


@pytest.mark.parametrize("kind", ["another prefix", "half of a pair", "a layer lost"])
def test_keys_that_do_not_fit_are_named(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """huggingface/peft#2566, #2699: PEFT warns and goes on with factors at their start; here a key is named."""
    folder = shutil.copytree(lab.untied_lora, tmp_path / "lora")

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        if kind == "another prefix":
            return {k.replace("model.layers", "model.language_model.layers"): v for k, v in tensors.items()}
        lost = "layers.0.self_attn.q_proj.lora_B" if kind == "half of a pair" else "layers.1."
        return {k: v for k, v in tensors.items() if lost not in k}

    said = refused(lab.untied, rewritten(folder, change), tmp_path)
    assert "layers." in said


def test_a_token_more_than_there_are_rows(lab: SimpleNamespace, tmp_path: Path) -> None:
    """allenai/open-instruct#190: training added a token to the tokenizer, and no row was ever made for it."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tokenizer = AutoTokenizer.from_pretrained(lab.untied)
    tokenizer.add_special_tokens({"pad_token": "<pad-of-mine>"})
    tokenizer.save_pretrained(folder)
    said = refused(lab.untied, folder, tmp_path)
    assert "token id 512" in said
    assert "512 rows" in said


def test_added_tokens_of_a_domain(tmp_path: Path) -> None:
    """ggml-org/llama.cpp#15842: ordinary tokens that were added to a tokenizer are in the file, under their ids."""
    from transformers import AddedToken, AutoTokenizer

    base = tiny.make_base(tmp_path / "base", pad_rows=16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("Section-5A", normalized=False), AddedToken("Form-26AS", single_word=False)])
    tokenizer.save_pretrained(base)
    export_merged(base, None, tmp_path / "m.gguf")
    tokens = read_metadata(tmp_path / "m.gguf", arrays=True)["tokenizer.ggml.tokens"]
    for name in ("Section-5A", "Form-26AS"):
        assert tokens[tokenizer.convert_tokens_to_ids(name)] == name


@pytest.mark.parametrize("more", [1, 4, -6])
def test_a_vocabulary_size_that_was_edited_by_hand(lab: SimpleNamespace, tmp_path: Path, more: int) -> None:
    """ggml-org/llama.cpp#5910, hiyouga/LlamaFactory#5436: config.json names another number of rows than there are."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    tiny.edit_json(base / "config.json", vocab_size=size + more)
    said = refused(base, None, tmp_path)
    assert str(size + more) in said
    assert str(size) in said


def test_an_end_that_only_the_tokenizer_knows(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#10834: a merged folder whose config still has the base's end: the new one wins."""
    from transformers import AutoTokenizer

    base = tiny.make_base(tmp_path / "base", pad_rows=16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    old = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(base)
    export_merged(base, None, tmp_path / "m.gguf")
    found = read_metadata(tmp_path / "m.gguf", arrays=True)
    ends = {v for k, v in found.items() if k.startswith("tokenizer.ggml.eo") and k.endswith("_token_id")}
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert ends <= {tokenizer.eos_token_id, old}
