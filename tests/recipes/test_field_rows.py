"""Rows as they stood in public reports (docs/field-cases.md). What is right was written before the first run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grit_impl.errors import GRITError
from grit_impl.recipes.bases import TINY
from grit_impl.recipes.datasets import load_instructions
from grit_impl.recipes.tokens import IGNORE, tokenize

RAISES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """The embedded tokenizer."""
    return AutoTokenizer.from_pretrained(TINY)


def refused(path: Path, tokenizer: Any) -> str:
    """The one line with which a file is refused, which names the file."""
    with pytest.raises(GRITError) as caught:
        tokenize(load_instructions(path, tokenizer=tokenizer), tokenizer, 512)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(path: Path, *rows: Any) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("name", "codec"), [("gbk.json", "gbk"), ("big5.jsonl", "big5"), ("spanish.csv", "latin-1")])
def test_another_encoding_is_named_with_its_byte(tmp_path: Path, tokenizer: Any, name: str, codec: str) -> None:
    """xxw1995/chatglm3-finetune#11 and gretelai/gretel-synthetics#5: files in an older encoding."""
    text = {"gbk": "\u6d4b\u8bd5", "big5": "\u6e2c\u8a66", "latin-1": "a\u00f1o"}[codec]
    row = f'{{"instruction": "{text}", "output": "b"}}'
    content = {"json": f"[{row}]", "jsonl": row, "csv": f"instruction,output\n{text},b\n"}[name.partition(".")[2]]
    (tmp_path / name).write_bytes(content.encode(codec))
    assert "not UTF-8" in refused(tmp_path / name, tokenizer)


@pytest.mark.parametrize("text", ["\u201cquoted\u201d", "\u00e9t\u00e9", "\U0001f642"])
def test_utf8_whatever_the_system_speaks(
    tmp_path: Path, tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openai/openai-cookbook#648: UTF-8 on a system whose own encoding is another one."""
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "cp1252")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"prompt": text, "completion": text}, ensure_ascii=False).encode())
    assert load_instructions(path, tokenizer=tokenizer)[0] == {"prompt": text, "completion": text}


def test_rows_under_the_name_of_a_split(tmp_path: Path, tokenizer: Any) -> None:
    """huggingface/trl#2541: a file that holds {"train": [...]}; `field=` reads it elsewhere, so it is said."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": [{"prompt": "a", "completion": "b"}]}, indent=1))
    assert "list" in refused(path, tokenizer)


def test_rows_that_are_the_same_stay(tmp_path: Path, tokenizer: Any) -> None:
    """unslothai/unsloth#1766: two equal rows of a CSV file whose text holds a comma in quotes."""
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"Braund, Mr. Owen",0\n"Braund, Mr. Owen",0\n')
    assert list(load_instructions(path, tokenizer=tokenizer)) == [{"prompt": "Braund, Mr. Owen", "completion": "0"}] * 2


@pytest.mark.parametrize("role", ["gpt", "assistant", "system"])
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sharegpt_is_said_to_be_none_of_ours(tmp_path: Path, tokenizer: Any, role: str, column: str) -> None:
    """axolotl-ai-cloud/axolotl#752 and #1179: `from` and `value`: refused with the keys or roles that are wanted."""
    turns = [{"from": "human", "value": "Sky?"}, {"from": role, "value": "Blue."}]
    said = refused(put(tmp_path / "rows.jsonl", {column: turns}), tokenizer)
    assert "messages" in said
    assert column == "conversations" or "role" in said


@pytest.mark.parametrize("roles", [("user", "assistant", "assistant"), ("user", "user"), ("system", "user")])
def test_what_the_template_refuses_names_the_row(tmp_path: Path, tokenizer: Any, roles: tuple[str, ...]) -> None:
    """unslothai/unsloth#334 and PromtEngineer/localGPT#720: a template that wants roles by turns, or no system."""
    tokenizer.chat_template = RAISES
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": role, "content": "c"} for role in roles]}
    said = refused(put(tmp_path / "rows.jsonl", good, bad), tokenizer)
    assert "row 2" in said
    assert "must alternate" in said


@pytest.mark.parametrize("pad", ["eos", "other"])
def test_the_end_is_learned_though_it_pads_too(tmp_path: Path, tokenizer: Any, pad: str) -> None:
    """mlabonne/llm-course#33 and huggingface/trl#976: a pad token that is the end token masks it."""
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    path = put(
        tmp_path / "rows.jsonl", {"prompt": "a", "completion": " b"}, {"prompt": "a" * 9, "completion": " b c d"}
    )
    for row in tokenize(load_instructions(path, tokenizer=tokenizer), tokenizer, 512).dataset():
        assert [i for i in row["labels"] if i != IGNORE][-1] == tokenizer.eos_token_id


def test_columns_of_no_layout_are_listed(tmp_path: Path, tokenizer: Any) -> None:
    """huggingface/open-r1#454: a data set without the column that a trainer takes for granted."""
    said = refused(put(tmp_path / "rows.jsonl", {"problem": "1+1", "solution": "2"}), tokenizer)
    assert "problem, solution" in said
    assert "text" in said


def test_a_record_without_text_is_told(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """huggingface/setfit#566: one null among the texts: the others are trained on, and the count is told."""
    path = put(tmp_path / "rows.jsonl", {"text": "a"}, {"text": None}, {"text": "b"})
    with caplog.at_level(logging.WARNING):
        found = load_instructions(path, tokenizer=tokenizer)
    assert [row["completion"] for row in found] == ["a", "b"]
    assert "1 of 3 rows" in caplog.text
