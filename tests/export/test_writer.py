"""The GGUF writer. Oracles: Hugging Face's forward pass on the same tokens, and PEFT's unmerged one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_adapter, export_merged, read_metadata
from grit_impl.export.check import PROMPTS, verify_export
from grit_impl.export.checkpoint import Checkpoint
from grit_impl.gguf.encoding import encode
from grit_impl.gguf.llamacpp import LlamaCpp
from grit_impl.record import sha256_file

# Enough to tell every planted fault from rounding; the full set runs once per base below.
FEW = (PROMPTS[0], PROMPTS[5], PROMPTS[11], PROMPTS[18])


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_merged_model_is_the_trained_model(lab: SimpleNamespace, tmp_path: Path, base: str, dtype: str) -> None:
    """Oracle: PEFT's merge of the whole model, and llama.cpp's tokens given to transformers."""
    lora = getattr(lab, f"{base}_lora")
    out = export_merged(getattr(lab, base), lora, tmp_path / "m.gguf", dtype).path
    result = verify_export(getattr(lab, base), lora, out, prompts=FEW, tokens=8)
    assert result.passed, result.summary()
    assert result.positions >= 20
    assert result.adapter_kl is not None
    # The control: without the adapter the same comparison is off by orders of magnitude.
    assert result.adapter_kl > 50 * result.mean_kl


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_blocks_leave_no_trace(
    lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, dtype: str
) -> None:
    """Oracle: the file written with each matrix in one block; and the file's own SHA-256, which is taken on the way."""
    folder, lora = getattr(lab, base), getattr(lab, f"{base}_lora")
    whole = export_merged(folder, lora, tmp_path / "whole.gguf", dtype)
    # Blocks of 7 rows of 128: no matrix is a multiple.
    monkeypatch.setattr("grit_impl.export.writer.BLOCK", 7 * 128)
    cut = export_merged(folder, lora, tmp_path / "cut.gguf", dtype)
    assert cut.path.read_bytes() == whole.path.read_bytes()
    assert cut.sha256 == whole.sha256 == sha256_file(whole.path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_numbers_are_encoded_as_gguf_does(kind: str) -> None:
    """Oracle: `gguf.quants`, on magnitudes from 1e-12 to 1e4, all-zero blocks, and multiples next to a half."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    random = np.random.default_rng(0)
    numbers = random.normal(size=(4096, 64)) * 10.0 ** random.integers(-12, 5, size=(4096, 1))
    halves = np.concatenate([np.arange(-126.5, 127), np.zeros(2)]).astype(np.float32).reshape(8, 32)
    # The largest is 127, so that the scale is 1 and these are the multiples that are rounded.
    ties = np.stack([halves, np.nextafter(halves, np.float32(1e9)), np.nextafter(halves, np.float32(-1e9))])
    ties[:, :, 0] = 127
    rows = np.concatenate([numbers.astype(np.float32), ties.reshape(-1, 64), np.zeros((2, 64), np.float32)])
    ours = encode(torch.from_numpy(rows), kind).flatten().view(torch.uint8).numpy()
    assert ours.tobytes() == quants.quantize(rows, GGMLQuantizationType[kind]).tobytes()


def test_a_checkpoint_that_is_not_what_its_table_says(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Truncated under the reader, or a tensor of another size than its shape: refused, and no bytes made up."""
    base = tmp_path / "base"
    shutil.copytree(lab.untied, base)
    model = Checkpoint(base)
    name = "model.norm.weight"
    with model.reader() as reader:
        assert reader.raw(name).shape == (128,)
        entry = model.entries[name]
        model.entries[name] = dataclasses.replace(entry, shape=(64,))
        with pytest.raises(GRITError, match="not its shape"):
            reader.raw(name)
        model.entries[name] = entry
        os.truncate(entry.file, entry.end - 4)
        with pytest.raises(GRITError, match="shorter"):
            reader.raw(name)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_all_prompts_f32_below_1e4(lab: SimpleNamespace, tmp_path: Path, base: str) -> None:
    """Oracle: Hugging Face, 20 prompts by 24 tokens; f32 differs by less than 1e-4 and every argmax agrees."""
    out = export_merged(getattr(lab, base), None, tmp_path / "m.gguf", "f32").path
    result = verify_export(getattr(lab, base), None, out)
    assert result.passed, result.summary()
    assert result.prompts == 20
    assert result.max_difference < 1e-4
    assert result.exact == result.tensors
    assert result.agreement == 1.0


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_adapter_over_base_is_the_trained_model(lab: SimpleNamespace, tmp_path: Path, base: str) -> None:
    """Oracle: PEFT's forward pass; the adapter stays a file of its own, applied by llama.cpp."""
    folder, lora = getattr(lab, base), getattr(lab, f"{base}_lora")
    model = export_merged(folder, None, tmp_path / "base.gguf", "f32").path
    adapter = export_adapter(folder, lora, tmp_path / "lora.gguf", "f32").path
    result = verify_export(folder, lora, model, gguf_adapter=adapter, prompts=FEW, tokens=8)
    assert result.passed, result.summary()


SCALINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64, "layers.1.mlp.up_proj": 2}},
    "rank_pattern": {"rank_pattern": {"v_proj": 3, "down_proj": 16}},
    "everything": {"use_rslora": True, "alpha_pattern": {"k_proj": 40}, "rank_pattern": {"k_proj": 5}},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_true_scaling_is_folded_into_the_adapter(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Oracle: PEFT's forward pass; llama.cpp alone would apply alpha / rank of the header."""
    lora = tiny.make_adapter(lab.untied, tmp_path / "lora", **SCALINGS[kind])
    model = export_merged(lab.untied, None, tmp_path / "base.gguf", "f32").path
    adapter = export_adapter(lab.untied, lora, tmp_path / "lora.gguf", "f32").path
    result = verify_export(lab.untied, lora, model, gguf_adapter=adapter, prompts=FEW[:2], tokens=8)
    assert result.passed, result.summary()


MERGE_ONLY: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("untied", {"use_dora": True}, "DoRA"),
    "modules_to_save": ("untied", {"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save"),
    "tied_head": ("tied", {"target_modules": ["lm_head", "q_proj"]}, "tied head"),
    "embedding": ("tied", {"target_modules": ["embed_tokens", "v_proj"]}, "embedding"),
}


@pytest.mark.parametrize("kind", MERGE_ONLY)
def test_what_an_adapter_file_cannot_hold_is_merged(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Oracle: PEFT's forward pass for the merged file; the adapter export refuses and names the reason."""
    base, settings, reason = MERGE_ONLY[kind]
    folder = getattr(lab, base)
    lora = tiny.make_adapter(folder, tmp_path / "lora", **settings)
    out = export_merged(folder, lora, tmp_path / "m.gguf", "f32").path
    result = verify_export(folder, lora, out, prompts=FEW[:2], tokens=8)
    assert result.passed, result.summary()
    with pytest.raises(GRITError, match=reason):
        export_adapter(folder, lora, tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize(("field", "value"), [("target_parameters", ["x"]), ("layer_replication", [[0, 1], [0, 1]])])
def test_options_that_cannot_be_merged_are_refused_by_name(
    lab: SimpleNamespace, tmp_path: Path, field: str, value: Any
) -> None:
    """Oracle: the option's name; nothing is written. More of them in `test_adapter.py`."""
    lora = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tiny.edit_json(lora / "adapter_config.json", **{field: value})
    with pytest.raises(GRITError, match=field):
        export_merged(lab.untied, lora, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [lora]


def test_same_inputs_give_the_same_bytes(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: a second export's SHA-256."""
    one = export_merged(lab.untied, lab.untied_lora, tmp_path / "one.gguf")
    two = export_merged(lab.untied, lab.untied_lora, tmp_path / "two.gguf")
    assert one.sha256 == two.sha256


def test_metadata_names_base_and_adapter(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the base's configuration file and the export's own report."""
    done = export_merged(lab.tied, lab.tied_lora, tmp_path / "m.gguf", "f16")
    found = read_metadata(done.path)
    config = json.loads((lab.tied / "config.json").read_text())
    assert found["llama.vocab_size"] == config["vocab_size"] == 525
    assert found["llama.rope.freq_base"] == config.get("rope_parameters", config)["rope_theta"]
    assert found["grit.base_fingerprint"] == done.base_fingerprint
    assert found["grit.adapter_sha256"] == done.adapter_sha256
    assert found["n_tensors"] == done.tensors


def test_progress_reaches_the_end(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the number of tensors."""
    seen: list[tuple[int, int]] = []
    done = export_merged(lab.untied, None, tmp_path / "m.gguf", progress=lambda i, n, _: seen.append((i, n)))
    assert [i for i, _ in seen] == list(range(done.tensors + 1))
    assert {n for _, n in seen} == {done.tensors}


KILLED = """
import sys, time
from grit_impl.export import export_merged
def slowly(done, total, name):
    print(done, flush=True)
    time.sleep(0.2 if done > 5 else 0)
export_merged(sys.argv[1], None, sys.argv[2], progress=slowly)
"""


def test_a_killed_export_leaves_no_file_that_loads(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the folder after SIGKILL, and llama.cpp's refusal of what lies in it; the next export succeeds."""
    out = tmp_path / "m.gguf"
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(lab.untied), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > 7:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    for leftover in tmp_path.iterdir():
        with pytest.raises(GRITError):
            LlamaCpp(leftover).close()
    export_merged(lab.untied, None, out)
    LlamaCpp(out).close()
    assert list(tmp_path.iterdir()) == [out]


def test_full_disk_is_one_line_and_leaves_nothing(lab: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    """Oracle: the message and the folder. Both a disk known to be too small, and one that fills up while writing."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(GRITError, match="not enough space"):
        export_merged(lab.untied, None, tmp_path / "m.gguf")
    monkeypatch.undo()
    full = Path("/dev/full")
    if full.exists():
        (tmp_path / ".m.gguf.partial").symlink_to(full)
        with pytest.raises(GRITError, match="cannot write"):
            export_merged(lab.untied, None, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


BAD_BASES: dict[str, tuple[str, Any, str]] = {
    "another architecture": ("config.json", {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    "yarn": ("config.json", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    "unigram tokenizer": ("tokenizer.json", {"model": {"type": "Unigram"}}, "Unigram"),
    "unknown split": ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer"),
}


@pytest.mark.parametrize("kind", BAD_BASES)
def test_bases_that_cannot_be_exported_are_refused(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Oracle: a GRITError naming the reason, and no file."""
    file, fields, reason = BAD_BASES[kind]
    base = shutil.copytree(lab.untied, tmp_path / "base")
    tiny.edit_json(base / file, **fields)
    with pytest.raises(GRITError, match=reason):
        export_merged(base, None, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "not safetensors"])
def test_damaged_weights_are_refused(lab: SimpleNamespace, tmp_path: Path, damage: str) -> None:
    """Oracle: a GRITError that names the file."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    weights = base / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"\xff" * 100)
    with pytest.raises(GRITError, match="safetensors"):
        export_merged(base, None, tmp_path / "m.gguf")


def test_diverged_adapter_is_refused(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: a GRITError that names the module with NaN."""
    from safetensors.torch import load_file, save_file

    lora = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tensors = load_file(lora / "adapter_model.safetensors")
    key = next(k for k in tensors if "layers.1.mlp.up_proj.lora_B" in k)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(GRITError, match=r"layers\.1\.mlp\.up_proj has NaN"):
        export_merged(lab.untied, lora, tmp_path / "m.gguf")


def test_rank_that_contradicts_its_configuration_is_refused(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: PEFT could not load it either; the message asks for rank_pattern (how adapted ranks are written)."""
    lora = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tiny.edit_json(lora / "adapter_config.json", r=4)
    with pytest.raises(GRITError, match="rank_pattern"):
        export_merged(lab.untied, lora, tmp_path / "m.gguf")


def test_fingerprint_tells_models_apart_and_copies_not(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: a copy, a copy cut into shards, and a model of the same shape with another seed."""
    from transformers import AutoModelForCausalLM

    from grit_impl.export.checkpoint import Checkpoint

    start = time.perf_counter()
    original = Checkpoint(lab.untied).fingerprint()
    assert time.perf_counter() - start < 5
    shards = shutil.copytree(lab.untied, tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(lab.untied).save_pretrained(shards, max_shard_size="500KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    assert Checkpoint(shards).fingerprint() == original
    assert Checkpoint(tiny.make_base(tmp_path / "other", seed=9)).fingerprint() != original
