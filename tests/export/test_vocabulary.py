"""What training saved beside the adapter wins. Oracles: transformers' tokenizer of that folder, and llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import tiny
from bench import chatml_tokenizer
from click.testing import CliRunner

from grit_impl.errors import GRITError
from grit_impl.export import commands, export_merged, read_metadata, read_modelfile
from grit_impl.export.check import verify_export
from grit_impl.export.checkpoint import Checkpoint
from grit_impl.export.vocabulary import read_vocabulary
from grit_impl.gguf.gotemplate import Template


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base with spare rows, Alpaca's template and the end `<|end_of_text|>`; an adapter trained for ChatML."""
    root = tmp_path_factory.mktemp("chatml")
    base = tiny.make_base(root / "base", pad_rows=64, seed=5)
    adapter = tiny.make_adapter(base, root / "lora")
    chatml_tokenizer(base, adapter)
    return SimpleNamespace(base=base, adapter=adapter)


def test_what_training_saved_wins(chatml: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the adapter's tokenizer in transformers: names, end, template; and the Modelfile's own rendering."""
    from transformers import AutoTokenizer

    done = CliRunner().invoke(
        commands.export, [str(chatml.adapter), "--base", str(chatml.base), "--out", str(tmp_path), "--dtype", "f16"]
    )
    assert done.exit_code == 0, done.output
    assert "'<|im_end|>'" in done.output
    assert "the base has '<|end_of_text|>'" in done.output
    trained = AutoTokenizer.from_pretrained(chatml.adapter)
    found = read_metadata(tmp_path / "model-f16.gguf", arrays=True)
    assert found["tokenizer.ggml.tokens"][trained.eos_token_id] == "<|im_end|>"
    assert found["tokenizer.ggml.eos_token_id"] == trained.eos_token_id
    assert found["tokenizer.chat_template"] == cases.CHATML
    spec = read_modelfile(tmp_path / "Modelfile")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
    assert Template(str(spec.template)).render(talk) == trained.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )
    assert spec.parameters["stop"] == ["<|im_end|>", "<|end_of_text|>"]


def test_the_proof_reads_the_trainings_side(chatml: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: an export made as if training had saved no tokenizer must not be called the trained model."""
    right = export_merged(chatml.base, chatml.adapter, tmp_path / "right.gguf", "f32").path
    assert verify_export(chatml.base, chatml.adapter, right, tokens=4).passed
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(chatml.adapter / name, bare)
    wrong = export_merged(chatml.base, bare, tmp_path / "wrong.gguf", "f32").path
    found = {finding.mode for finding in verify_export(chatml.base, chatml.adapter, wrong, tokens=4).findings}
    assert {"stop-token", "chat-template", "vocabulary"} <= found


@pytest.mark.parametrize("value", ["x", "\ud800", [1, "2"], {}, True, 2.5], ids=repr)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_is_named(tmp_path: Path, file: str, value: Any) -> None:
    """Oracle: the plant in one of the files that name the ends of a text."""
    base = tiny.make_base(tmp_path / "base")
    (base / "generation_config.json").write_text("{}")
    tiny.edit_json(base / file, eos_token_id=value)
    with pytest.raises(GRITError, match=r"eos_token_id|config\.json") as caught:
        export_merged(base, None, tmp_path / "m.gguf", "f16")
    assert "\n" not in str(caught.value)


def tokenizer_config(folder: Path, **fields: Any) -> Path:
    """Change a folder's tokenizer settings."""
    tiny.edit_json(folder / "tokenizer_config.json", **fields)
    return folder


def test_chat_templates_in_every_place(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: transformers: a file of its own, a text in the settings, and a list by name."""
    base = shutil.copytree(lab.untied, tmp_path / "base")

    def found() -> dict[str, str]:
        return read_vocabulary(Checkpoint(base), 512).chat_templates

    (base / "chat_template.jinja").write_text("file {{ messages[0]['content'] }}")
    assert found() == {"default": "file {{ messages[0]['content'] }}"}
    (base / "chat_template.jinja").unlink()
    tokenizer_config(base, chat_template=tiny.ALPACA)
    assert found() == {"default": tiny.ALPACA}
    listed = [{"name": "default", "template": tiny.ALPACA}, {"name": "tool_use", "template": cases.CHATML}]
    tokenizer_config(base, chat_template=listed)
    assert found() == {"default": tiny.ALPACA, "tool_use": cases.CHATML}
    made = read_metadata(export_merged(base, None, tmp_path / "m.gguf").path)
    assert made["tokenizer.chat_template"] == tiny.ALPACA
    assert made["tokenizer.chat_template.tool_use"] == cases.CHATML
    tokenizer_config(base, chat_template=listed[1:])
    with pytest.raises(GRITError, match="none named default"):
        found()


@pytest.mark.parametrize("ends", [[1], [1, 2], [2, 1], [5, 1, 2]])
def test_several_ends(lab: SimpleNamespace, tmp_path: Path, ends: list[int]) -> None:
    """Oracle: llama.cpp stops at each of them (`check_stops`, part of the verification)."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    tiny.edit_json(base / "generation_config.json", eos_token_id=ends)
    out = export_merged(base, None, tmp_path / "m.gguf", "f32")
    assert len(out.stops) == len({1, *ends})
    result = verify_export(base, None, out.path, prompts=("a",), tokens=2)
    assert result.passed, result.summary()


def test_more_ends_than_there_is_room_for(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: GGUF has three places; a text that llama.cpp knows for an end needs none."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    tiny.edit_json(base / "generation_config.json", eos_token_id=[1, 2, 5, 6])
    export_merged(base, None, tmp_path / "m.gguf")
    tiny.edit_json(base / "generation_config.json", eos_token_id=[1, 5, 6, 7])
    with pytest.raises(GRITError, match="room for three"):
        export_merged(base, None, tmp_path / "m.gguf")


def test_another_bases_tokenizer_is_refused(chatml: SimpleNamespace, lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: a tokenizer that gives the base's tokens other texts, in the adapter's folder."""
    folder = shutil.copytree(chatml.adapter, tmp_path / "lora")
    data = json.loads((folder / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    one, two = [text for text, i in words.items() if i in (100, 101)]
    words[one], words[two] = words[two], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(GRITError, match="in the tokenizer that training saved"):
        export_merged(chatml.base, folder, tmp_path / "m.gguf")
    with pytest.raises(GRITError, match="vocabulary-size"):
        export_merged(lab.untied, chatml.adapter, tmp_path / "m.gguf")


def test_templates_that_go_cannot_say(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the Modelfile has no TEMPLATE, the user is told, and the verification does not ask for one."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }}")
    arguments = [str(base), "--out", str(tmp_path / "out"), "--dtype", "f32", "--verify"]
    done = CliRunner().invoke(commands.export, arguments)
    assert done.exit_code == 0, done.output
    assert "Go's language cannot say" in done.output
    assert read_modelfile(tmp_path / "out" / "Modelfile").template is None


def test_a_beginning_that_only_the_template_writes(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: transformers' rendering; the token must be in the TEMPLATE, since nobody else puts it there (SmolLM2)."""
    base = shutil.copytree(lab.untied, tmp_path / "base")
    tiny.edit_json(base / "tokenizer.json", post_processor=None)
    template = cases.CHATML.replace("<|im_start|>", "<|begin_of_text|>").replace("<|im_end|>", "<|end_of_text|>")
    (base / "chat_template.jinja").write_text(template)
    out = export_merged(base, None, tmp_path / "m.gguf", "f32")
    rendered = Template(str(out.template)).render([{"role": "user", "content": "Hi"}])
    assert rendered == "<|begin_of_text|>user\nHi<|end_of_text|>\n<|begin_of_text|>assistant\n"
    assert verify_export(base, None, out.path, prompts=("a b",), tokens=2).passed
