"""GGUF -> Hugging Face folder. Oracles: the folder that the file was made from, and llama.cpp on the file itself."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_merged
from grit_impl.gguf.folder import to_folder
from grit_impl.gguf.metadata import read_header
from grit_impl.gguf.requantize import rewrite
from grit_impl.gguf.splits import split_name
from grit_impl.gguf.tensors import Weights

TEXTS = (
    "What is 17 + 25?",
    "Grüße aus Köln 東京 🙂",
    "tabs\tand  double  spaces \n\n 1234567 ",
    "I'll <|eot_id|> a",
)
BASES: dict[str, dict[str, Any]] = {
    "untied": {"seed": 1},
    "tied-llama3-gpt2-padded": {"tied": True, "llama3_rope": True, "split": "gpt2", "pad_rows": 13, "seed": 2},
    "biases": {"attention_bias": True, "mlp_bias": True, "seed": 3},
    "qwen2": {"model": "Qwen2", "split": "qwen2", "seed": 4},
    "qwen2-tied-30-layers": {
        "model": "Qwen2",
        "split": "qwen2",
        "tied": True,
        "num_hidden_layers": 30,
        "hidden_size": 64,
        "seed": 5,
    },
    "linear-rope": {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "split": "smollm"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each base as a folder, and in float32 as `<name>.gguf`."""
    root = tmp_path_factory.mktemp("folder")
    for name, settings in BASES.items():
        export_merged(tiny.make_base(root / name, **settings), None, root / f"{name}.gguf", "f32")
    return root


def tensors(folder: Path) -> dict[str, Any]:
    """All weights of a folder by name."""
    from safetensors.torch import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", BASES)
def test_comes_back_as_it_went(files: Path, tmp_path: Path, name: str) -> None:
    """Oracle: the folder that the file was written from: weights to the bit, settings, logits, tokens, ends."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = to_folder(files / f"{name}.gguf", tmp_path / "out")
    before, after = tensors(files / name), tensors(out)
    assert before.keys() == after.keys()
    assert [key for key in before if not before[key].equal(after[key])] == []
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (files / name, out))
    for text in TEXTS:
        ids = old(text).input_ids
        assert new(text).input_ids == ids
        assert new.decode(ids) == old.decode(ids)
    cuts = [json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] for tokenizer in (old, new)]
    assert split_name(cuts[0]) == split_name(cuts[1]) is not None
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(new, field) == getattr(old, field)
    ids = torch.tensor([[i * 7 % 500 for i in range(150)]])
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (files / name, out)]
    assert logits[0].equal(logits[1])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_rounded_once(files: Path, tmp_path: Path, dtype: str) -> None:
    """Oracle: the file itself: made again from its folder, every tensor has the same bytes."""
    first = export_merged(files / "untied", None, tmp_path / "first.gguf", dtype).path
    folder = to_folder(first, tmp_path / "folder")
    second = export_merged(folder, None, tmp_path / "second.gguf", dtype).path
    for path in (first, second):
        assert {entry.kind for entry in read_header(path)[1].values() if len(entry.shape) == 2} == {
            {"f16": 1, "bf16": 30, "q8_0": 8}[dtype]
        }
    one, two = Weights(first), Weights(second)
    assert one.entries.keys() == two.entries.keys()
    assert [name for name in one.entries if one.raw(name).tobytes() != two.raw(name).tobytes()] == []


def test_shards(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: transformers reads the same weights from several files."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("grit_impl.gguf.folder.SHARD", 300_000)
    out = to_folder(files / "untied.gguf", tmp_path / "out")
    assert len(list(out.glob("*.safetensors"))) > 2
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (files / "untied", out))
    assert all(one[key].equal(two[key]) for key in one)


def test_two_ends(files: Path, tmp_path: Path) -> None:
    """Oracle: the keys that were written into the file."""
    from transformers import GenerationConfig

    changed = rewrite(files / "untied.gguf", tmp_path / "m.gguf", keys={"tokenizer.ggml.eot_token_id": 2})
    assert GenerationConfig.from_pretrained(to_folder(changed, tmp_path / "out")).eos_token_id == [1, 2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"keys": {"general.architecture": "mamba"}}, "'mamba'"),
    "an adapter": ({"keys": {"general.type": "adapter"}}, "general.type 'adapter'"),
    "experts": ({"keys": {"llama.expert_count": 8}}, "expert_count=8"),
    "yarn": ({"keys": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
    "partial rotation": ({"keys": {"llama.rope.dimension_count": 16}}, "rotates 16"),
    "sentencepiece": ({"keys": {"tokenizer.ggml.model": "llama"}}, "tokenizer"),
    "unknown split": ({"keys": {"tokenizer.ggml.pre": "martian"}}, "'martian'"),
    "no merges": ({"drop_keys": ("tokenizer.ggml.merges",)}, "no merges"),
    "no end": ({"drop_keys": ("tokenizer.ggml.eos_token_id",)}, "no eos"),
    "end beyond the vocabulary": ({"keys": {"tokenizer.ggml.eos_token_id": 9999}}, "9999"),
    "no width": ({"drop_keys": ("llama.embedding_length",)}, "lacks llama.embedding_length"),
    "a tensor missing": (
        {"change": lambda n, a: None if n == "blk.1.ffn_up.weight" else a},
        "lacks tensor blk.1",
    ),
    "a tensor cut": ({"change": lambda n, a: a[:-1] if n == "blk.1.ffn_up.weight" else a}, "ffn_up.weight is"),
    "no embedding": ({"change": lambda n, a: None if n == "token_embd.weight" else a}, "lacks tensor token_embd"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(files: Path, tmp_path: Path, kind: str) -> None:
    """Oracle: the plant, named in a GRITError; no folder is left."""
    changes, reason = REFUSED[kind]
    source = files / "untied.gguf"
    if kind == "architecture":
        broken = tmp_path / "broken.gguf"
        text = struct.pack("<Q", 5)
        broken.write_bytes(source.read_bytes().replace(text + b"llama", text + b"mamba", 1))
    else:
        broken = rewrite(source, tmp_path / "broken.gguf", **changes)
    with pytest.raises(GRITError, match=reason) as caught:
        to_folder(broken, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [broken]


COUNTS = ("embedding_length", "feed_forward_length", "block_count", "context_length", "attention.head_count")
COUNTS += ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count")
SIZES = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
TOKENS = ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id", "unknown_token_id")
JUNK = ("x", "\ud800", [1, 2], {}, True, -1)
PLANTS = [
    *((f"llama.{key}", value) for key in COUNTS for value in (*JUNK, 0, 2.5)),
    *((f"llama.{key}", value) for key in SIZES for value in (*JUNK, 0, float("nan"))),
    *((f"tokenizer.ggml.{key}", value) for key in TOKENS for value in (*JUNK, 2.5)),
]


@pytest.mark.parametrize(("key", "value"), PLANTS, ids=repr)
def test_what_is_no_number_is_named(files: Path, tmp_path: Path, monkeypatch, key: str, value: Any) -> None:
    """Oracle: the plant in what the file's header says: the message names the key, on one line."""

    def planted(path: Path, **options: Any) -> Any:
        metadata, entries = read_header(path, **options)
        return {**metadata, key: value}, entries

    monkeypatch.setattr("grit_impl.gguf.tensors.read_header", planted)
    with pytest.raises(GRITError) as caught:
        to_folder(files / "linear-rope.gguf", tmp_path / "out")
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 20, 5000, -40_000, -1])
def test_truncated(files: Path, tmp_path: Path, length: int) -> None:
    """Oracle: a file cut in its magic, header, vocabulary, or tensors."""
    broken = tmp_path / "short.gguf"
    data = (files / "untied.gguf").read_bytes()
    # The end of the file may be padding, which nobody misses.
    last = max(e.start + 4 * math.prod(e.shape) for e in read_header(files / "untied.gguf")[1].values())
    broken.write_bytes(data[:last][:length])
    with pytest.raises(GRITError):
        to_folder(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [broken]


def test_nothing_is_overwritten(files: Path, tmp_path: Path) -> None:
    """Oracle: the folder's content."""
    (tmp_path / "mine").write_text("x")
    with pytest.raises(GRITError, match="not empty"):
        to_folder(files / "untied.gguf", tmp_path)


@pytest.mark.slow
def test_llama_cpp_reads_the_same_model(files: Path, tmp_path: Path) -> None:
    """Oracle: llama.cpp, given the file and the one made again from its folder: the same tokens and probabilities."""
    import httpx

    from grit_impl.gguf.llamacpp import LlamaCpp

    for name in BASES:
        again = export_merged(to_folder(files / f"{name}.gguf", tmp_path / name), None, tmp_path / "again.gguf", "f32")
        answers = []
        for path in (files / f"{name}.gguf", again.path):
            with LlamaCpp(path, context=256, exact=True) as engine, httpx.Client(headers=engine.headers) as client:
                body = {"content": TEXTS[1], "add_special": True}
                ids = client.post(f"{engine.url}/tokenize", json=body).json()["tokens"]
                body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 500}
                answers.append(
                    (ids, client.post(f"{engine.url}/completion", json=body).json()["completion_probabilities"])
                )
        assert answers[0] == answers[1]
