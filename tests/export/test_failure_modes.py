"""Every failure mode of `findings.MODES`, planted in a good export, is found under its own name, or refused earlier.

Oracle: the plant. Each test changes one thing in files that pass the verification.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_adapter, export_merged, read_metadata, read_modelfile, write_modelfile
from grit_impl.export.check import PROMPTS, Verification, verify_export
from grit_impl.export.deploy import deploy
from grit_impl.export.findings import MODES
from grit_impl.gguf.requantize import rewrite

FEW = (PROMPTS[5], PROMPTS[11])
TESTED: set[str] = set()


@pytest.fixture(scope="module")
def good(lab: SimpleNamespace) -> SimpleNamespace:
    """Correct f32 exports of both bases with their adapters."""
    merged = {name: export_merged(getattr(lab, name), getattr(lab, f"{name}_lora"), lab.root / f"good-{name}.gguf", "f32").path for name in ("untied", "tied")}  # fmt: skip  # noqa: E501
    plain = export_merged(lab.untied, None, lab.root / "good-base.gguf", "f32").path
    adapter = export_adapter(lab.untied, lab.untied_lora, lab.root / "good-lora.gguf", "f32").path
    return SimpleNamespace(**merged, plain=plain, adapter=adapter)


def modes(result: Verification) -> set[str]:
    """Names of the findings, each of which must say what it means."""
    assert not result.passed
    for finding in result.findings:
        assert str(finding).startswith(f"{finding.mode}: ")
        assert MODES[finding.mode] in str(finding)
    return {finding.mode for finding in result.findings}


def judge(lab: SimpleNamespace, base: str, gguf: Path, **options: Any) -> Verification:
    """Verify a merged model of the lab."""
    return verify_export(getattr(lab, base), getattr(lab, f"{base}_lora"), gguf, prompts=FEW, tokens=4, **options)


def unpermuted(name: str, array: Any) -> Any:
    """Hugging Face's row order in place of llama.cpp's."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return array
    heads = 4 if "attn_q" in name else 2
    return array.reshape(heads, array.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


PLANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rope permutation": ("untied", "rope-permutation", {"change": unpermuted}),
    "rope base": ("untied", "rope-parameters", {"keys": {"llama.rope.freq_base": 10000.0}}),
    "rope factors": ("tied", "rope-parameters", {"change": lambda n, a: None if n == "rope_freqs.weight" else a}),
    "merges": ("untied", "missing-merges", {"drop_keys": ("tokenizer.ggml.merges",)}),
    "pre-tokenizer default": ("untied", "pre-tokenizer", {"keys": {"tokenizer.ggml.pre": "gpt-2"}}),
    "pre-tokenizer unknown": ("untied", "pre-tokenizer", {"keys": {"tokenizer.ggml.pre": "martian"}}),
    "no bos": ("untied", "bos", {"keys": {"tokenizer.ggml.add_bos_token": False}}),
    "head dropped": ("untied", "output-head", {"change": lambda n, a: None if n == "output.weight" else a}),
    "rows cut": ("untied", "vocabulary-size", {"change": lambda n, a: a[:-8] if n == "token_embd.weight" else a}),
    "end token": ("untied", "stop-token", {"keys": {"tokenizer.ggml.eos_token_id": 300}}),
    "no chat template": ("untied", "chat-template", {"drop_keys": ("tokenizer.chat_template",)}),
    "norm's epsilon": ("untied", "settings", {"keys": {"llama.attention.layer_norm_rms_epsilon": 1e-3}}),
    "a layer too many": ("untied", "load", {"keys": {"llama.block_count": 3}}),
    "two tokens swapped": ("untied", "vocabulary", {"swap": ("tokenizer.ggml.tokens", 200, 300)}),
    "a head off by 0.3%": ("untied", "weights", {"change": lambda n, a: a * 1.003 if n == "output.weight" else a}),
    "one matrix damaged": ("untied", "weights", {"change": lambda n, a: a * 1.2 if n == "blk.1.ffn_up.weight" else a}),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_in_the_model_file(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path, plant: str) -> None:
    """Oracle: the plant; the mode must be named."""
    base, mode, changes = PLANTS[plant]
    if "swap" in changes:
        key, one, two = changes["swap"]
        listed = list(read_metadata(getattr(good, base), arrays=True)[key])
        listed[one], listed[two] = listed[two], listed[one]
        changes = {"keys": {key: listed}}
    broken = rewrite(getattr(good, base), tmp_path / "broken.gguf", **changes)
    assert mode in modes(judge(lab, base, broken))
    TESTED.add(mode)


def test_the_unbroken_copy_passes(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the control of all plants; rewriting alone changes nothing."""
    for base in ("untied", "tied"):
        copy = rewrite(getattr(good, base), tmp_path / f"{base}.gguf", change=lambda _, array: array)
        result = judge(lab, base, copy)
        assert result.passed, result.summary()


def test_merge_that_did_nothing(lab: SimpleNamespace, good: SimpleNamespace) -> None:
    """Oracle: the base's own export, passed off as the merged model."""
    assert "no-op-merge" in modes(judge(lab, "untied", good.plain))
    TESTED.add("no-op-merge")


def test_adapter_that_learned_nothing(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: an adapter with B = 0, merged correctly; the model is the base."""
    lora = tiny.make_adapter(lab.untied, tmp_path / "lora", scale=0.0)
    out = export_merged(lab.untied, lora, tmp_path / "m.gguf", "f32").path
    assert "no-op-merge" in modes(verify_export(lab.untied, lora, out, prompts=FEW, tokens=4))


def test_merge_with_half_the_scaling(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the adapter exported with half its alpha."""
    lora = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    tiny.edit_json(lora / "adapter_config.json", lora_alpha=8)
    out = export_merged(lab.untied, lora, tmp_path / "m.gguf", "f32").path
    result = judge(lab, "untied", out)
    assert "adapter-scaling" in modes(result)
    assert "0.50 times" in result.summary()
    TESTED.add("adapter-scaling")


ADAPTER_PLANTS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "adapter-scaling": ("adapter-scaling", lambda a, o: rewrite(a, o, keys={"adapter.lora.alpha": 4.0})),
    "rope-permutation": (
        "rope-permutation",
        lambda a, o: rewrite(
            a, o, change=lambda n, x: unpermuted(n.removesuffix(".lora_b"), x) if n.endswith("lora_b") else x
        ),
    ),
    "no-op-merge": (
        "no-op-merge",
        lambda a, o: rewrite(a, o, change=lambda n, x: None if "attn_v" in n else x),
    ),
}


@pytest.mark.parametrize("plant", ADAPTER_PLANTS)
def test_planted_in_the_adapter_file(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path, plant: str) -> None:
    """Oracle: the plant; llama.cpp loads all of these without a word."""
    mode, make = ADAPTER_PLANTS[plant]
    broken = make(good.adapter, tmp_path / "lora.gguf")
    assert mode in modes(judge(lab, "untied", good.plain, gguf_adapter=broken))


def test_adapter_on_another_base(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: a base of the same shape with other weights: refused when put together, found by the verification."""
    other = tiny.make_base(tmp_path / "other", seed=9)
    model = export_merged(other, None, tmp_path / "other.gguf", "f32").path
    modelfile = write_modelfile(model, tmp_path / "Modelfile", adapter=good.adapter)
    with pytest.raises(GRITError, match="wrong-base"):
        deploy("http://127.0.0.1:9", "x", modelfile)
    result = verify_export(other, lab.untied_lora, model, gguf_adapter=good.adapter, prompts=FEW, tokens=4)
    assert "wrong-base" in modes(result)
    with pytest.raises(GRITError, match="wrong-base"):
        export_merged(tiny.make_base(tmp_path / "small", hidden_size=64), lab.untied_lora, tmp_path / "m.gguf")
    TESTED.add("wrong-base")


MODELFILES: dict[str, tuple[str, str, str]] = {
    "no template": ("chat-template", "TEMPLATE", ""),
    "another template": ("chat-template", "### Instruction:", "### Question:"),
    "trimmed template": ("chat-template", "{{ .Prompt }}\n", "{{ .Prompt -}}\n"),
    "no stop": ("stop-token", "PARAMETER stop", "# PARAMETER stop"),
}


@pytest.mark.parametrize("plant", MODELFILES)
def test_planted_in_the_modelfile(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path, plant: str) -> None:
    """Oracle: the plant in a Modelfile that passes."""
    mode, old, new = MODELFILES[plant]
    path = write_modelfile(good.untied, tmp_path / "Modelfile")
    assert judge(lab, "untied", good.untied, modelfile=path).passed
    text = path.read_text()
    if plant == "no template":
        start, end = text.index("TEMPLATE"), text.index("PARAMETER")
        text = text[:start] + text[end:]
    else:
        text = text.replace(old, new)
    path.write_text(text)
    assert mode in modes(judge(lab, "untied", good.untied, modelfile=path))


def test_peft_folder_as_adapter(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: real Ollama permutes lora_A in place of B for such adapters; refused before anything is sent."""
    path = tmp_path / "Modelfile"
    path.write_text(f'FROM {good.plain}\nADAPTER {lab.untied_lora}\nTEMPLATE "{{{{ .Prompt }}}}"\n')
    assert read_modelfile(path).adapters == [lab.untied_lora]
    with pytest.raises(GRITError, match="peft-adapter"):
        deploy("http://127.0.0.1:9", "x", path)
    assert "peft-adapter" in modes(judge(lab, "untied", good.plain, modelfile=path))
    TESTED.add("peft-adapter")


def test_qlora_merged_into_other_weights(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: bitsandbytes' NF4. The default merge equals the trained model; the 16-bit one is named and measured."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    right = export_merged(lab.untied, lab.untied_lora, tmp_path / "nf4.gguf", "f32", four_bit=True)
    assert right.merge_base == read_metadata(right.path)["grit.merge_base"] == "dequantised-nf4"
    result = judge(lab, "untied", right.path, four_bit=True)
    assert result.passed, result.summary()
    wrong = export_merged(
        lab.untied, lab.untied_lora, tmp_path / "w16.gguf", "f32", four_bit=True, sixteen_bit_base=True
    )
    assert wrong.merge_base == "sixteen-bit"
    assert "qlora-merge-base" in modes(judge(lab, "untied", wrong.path, four_bit=True))
    asked = judge(lab, "untied", wrong.path, four_bit=True, sixteen_bit_base=True)
    assert asked.passed, asked.summary()
    assert asked.merge_difference is not None
    assert asked.merge_difference > 0.1
    TESTED.add("qlora-merge-base")


def test_no_tokens_is_no_evidence(lab: SimpleNamespace, good: SimpleNamespace) -> None:
    """Oracle: a comparison over nothing must not pass."""
    result = verify_export(lab.untied, lab.untied_lora, good.untied, prompts=())
    assert "evaluation-artefact" in modes(result)
    TESTED.add("evaluation-artefact")


def test_file_cut_short(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: refused before anything is compared."""
    broken = tmp_path / "short.gguf"
    broken.write_bytes(good.untied.read_bytes()[:-20000])
    with pytest.raises(GRITError, match="truncated"):
        judge(lab, "untied", broken)


def test_another_state_of_the_adapter(lab: SimpleNamespace, good: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the adapter's file was written again, with the same numbers and another name for its metadata."""
    from safetensors.torch import load_file, save_file

    lora = shutil.copytree(lab.untied_lora, tmp_path / "lora")
    file = lora / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "again": "yes"})
    assert modes(verify_export(lab.untied, lora, good.untied, prompts=FEW, tokens=4)) == {"wrong-adapter"}
    TESTED.add("wrong-adapter")


def test_what_rounding_may_cost(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: q8_0 of a random model changes likely tokens; that is told, and judged by a given limit only."""
    out = export_merged(lab.untied, lab.untied_lora, tmp_path / "m.gguf", "q8_0").path
    told = judge(lab, "untied", out)
    assert told.passed, told.summary()
    assert told.cost_kl > 0
    assert judge(lab, "untied", out, max_kl=told.cost_kl * 1.01, min_agreement=told.agreement).passed
    assert modes(judge(lab, "untied", out, max_kl=told.cost_kl * 0.99)) == {"rounding"}
    assert modes(judge(lab, "untied", out, min_agreement=told.agreement + 0.01)) == {"rounding"}
    TESTED.add("rounding")


def test_an_engine_that_computes_something_else(
    lab: SimpleNamespace, good: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every key and tensor is right, and the rotation that transformers is given is not llama.cpp's."""
    from grit_impl.export.reference import Reference

    said = Reference.log_probabilities

    def turned(self: Reference, ids: list[int], *rest: Any) -> Any:
        inside = self.model.base_model.model if self.adapted else self.model
        inside.model.rotary_emb.attention_scaling = 1.01
        return said(self, ids, *rest)

    monkeypatch.setattr(Reference, "log_probabilities", turned)
    assert modes(judge(lab, "untied", good.untied)) == {"engine"}
    TESTED.add("engine")


def test_every_named_mode_was_planted() -> None:
    """Oracle: the catalogue itself. Needs the whole file in one worker (--dist loadfile)."""
    skipped = set() if "qlora-merge-base" in TESTED else {"qlora-merge-base"}
    assert set(MODES) - TESTED - skipped == set()


def test_numbers_are_read_as_written(good: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: a plain copy has the same bytes."""
    assert rewrite(good.tied, tmp_path / "copy.gguf").read_bytes() == good.tied.read_bytes()
