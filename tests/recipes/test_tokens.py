"""Rows as tokens: what is learned of them, one file for all arms, and the two forms of a prompt."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch

from grit_impl.errors import GRITError
from grit_impl.gguf.chat import go_template
from grit_impl.gguf.gotemplate import Template
from grit_impl.recipes.arms import RunSpec, TrainingSettings
from grit_impl.recipes.bases import TINY, load_tokenizer
from grit_impl.recipes.datasets import ALPACA_TEMPLATE, load_instructions
from grit_impl.recipes.formats import find_format
from grit_impl.recipes.tokens import IGNORE, Tokens, make_tokens, read_tokens, tokenize

# ChatML as SmolLM2 has it, with a system prompt of its own.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3's: the text begins with BOS, and contents are trimmed.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Gemma's: no system role, the model is called model.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMALL = TrainingSettings(steps=3, batch_size=2, accumulation=1, max_length=256)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The embedded tokenizer."""
    return load_tokenizer("tiny")


def chat_base(folder: Path, template: str, *special: str) -> Path:
    """The tiny base with another chat template and its special tokens, the last of which ends a text."""
    from transformers import AutoTokenizer

    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.eos_token = special[-1]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if "bos_token" not in template:  # then the tokenizer adds none either, as SmolLM2's
        content = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


class TestTokenize:
    """Ids and labels, with the tiny base's tokenizer."""

    def test_only_the_answer_and_its_end_are_supervised(self, tokenizer: Any) -> None:
        """Oracle: decoding the supervised ids gives the answer; the ids before are the generation prompt's."""
        data = load_instructions("aqi", limit=20, seed=1)
        for text, row in zip(data, tokenize(data, tokenizer, 256).dataset(), strict=True):
            supervised = [label for label in row["labels"] if label != IGNORE]
            assert tokenizer.decode(supervised) == text["completion"] + tokenizer.eos_token
            prompt = tokenizer(text["prompt"])["input_ids"]
            assert row["input_ids"] == prompt + supervised
            assert row["input_ids"][0] == tokenizer.bos_token_id
            assert row["labels"] == [IGNORE] * len(prompt) + supervised

    def test_long_rows_are_cut_and_hopeless_ones_dropped(
        self, tokenizer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Oracle: a prompt that fills the length leaves nothing to learn."""
        data = {"prompt": ["a " * n for n in (2, 500)], "completion": ["b " * 50] * 2}
        with caplog.at_level(logging.WARNING):
            (row,) = tokenize(data, tokenizer, 32).dataset()
        assert len(row["input_ids"]) == len(row["labels"]) == 32
        assert "1 of 2 prompts fill max_length" in caplog.text
        with pytest.raises(GRITError, match="shorter than 2 tokens"):
            tokenize(data, tokenizer, 2)

    def test_batches_are_padded_as_transformers_does(self, tokenizer: Any) -> None:
        """Oracle: DataCollatorForSeq2Seq, which the arms would use otherwise."""
        from transformers import DataCollatorForSeq2Seq

        tokens = tokenize(load_instructions("aqi", limit=6, seed=1), tokenizer, 256)
        rows = list(tokens.dataset())
        ours, theirs = tokens.collate(rows), DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)(rows)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestOneFile:
    """What every arm reads."""

    def spec(self, **changes: Any) -> RunSpec:
        return replace(RunSpec("pure", training=SMALL), **changes)

    def test_it_holds_what_a_run_would_have_made_itself(self, tmp_path: Path, tokenizer: Any) -> None:
        """Oracle: the rows of the same seed, tokenized apart from any file."""
        found = read_tokens(tmp_path / f"{(made := make_tokens(self.spec(), tmp_path))}.json", made)
        expected = tokenize(load_instructions("aqi", "train", 6, 3407), tokenizer, 256)
        assert found == Tokens(expected.input_ids, expected.prompts, expected.pad)

    def test_it_is_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: other arms of the session need no tokenizer; another seed has other tokens."""
        made = make_tokens(self.spec(), tmp_path)
        other = make_tokens(self.spec(seed=1), tmp_path)
        monkeypatch.setattr("grit_impl.recipes.tokens.load_tokenizer", None)
        assert make_tokens(self.spec(arm="baseline"), tmp_path) == made != other

    def test_another_tokenizer_or_file_makes_it_anew(self, tmp_path: Path) -> None:
        """Oracle: the ids differ, so the hash does."""
        folder = shutil.copytree(TINY, tmp_path / "base")
        data = tmp_path / "d.jsonl"
        data.write_text(json.dumps({"prompt": "Who?", "completion": "Ann"}) + "\n")
        spec = self.spec(base_model=str(folder), dataset=str(data))
        first = make_tokens(spec, tmp_path / "tokens")
        data.write_text(json.dumps({"prompt": "Who?", "completion": "Bob"}) + "\n")
        second = make_tokens(spec, tmp_path / "tokens")
        vocabulary = json.loads((folder / "tokenizer.json").read_text())
        ids = vocabulary["model"]["vocab"]
        ids["A"], ids["B"] = ids["B"], ids["A"]
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        assert len({first, second, make_tokens(spec, tmp_path / "tokens")}) == 3

    def test_a_changed_file_is_refused(self, tmp_path: Path) -> None:
        """Oracle: one id is another one."""
        made = make_tokens(self.spec(), tmp_path)
        path = tmp_path / f"{made}.json"
        content = json.loads(path.read_text())
        content["input_ids"][0][-1] += 1
        path.write_text(json.dumps(content))
        with pytest.raises(GRITError, match="holds other tokens"):
            read_tokens(path, made)
        path.unlink()
        with pytest.raises(GRITError, match="cannot read the tokens"):
            read_tokens(path, made)


class TestFormats:
    """How a base is asked."""

    def test_the_tiny_base_keeps_the_alpaca_form(self, tokenizer: Any) -> None:
        """Oracle: the form it was pretrained in, though its tokenizer has a chat template."""
        how = find_format("tiny")
        assert (how.name, how.form, how.end, how.template) == ("alpaca", None, (tokenizer.eos_token_id,), "alpaca")

    def test_a_tokenizer_without_a_template_is_plain(self, tmp_path: Path) -> None:
        """Oracle: the Alpaca form."""
        folder = shutil.copytree(TINY, tmp_path / "base")
        (folder / "chat_template.jinja").unlink()
        assert find_format(folder).name == "alpaca"

    @pytest.mark.parametrize(
        ("template", "special"),
        [
            (CHATML, ("<|im_start|>", "<|im_end|>")),
            (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
            (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
        ],
        ids=["chatml", "llama3", "gemma"],
    )
    def test_a_chat_template_is_the_form_in_training(
        self, template: str, special: tuple[str, ...], tmp_path: Path
    ) -> None:
        """Oracle: transformers' own rendering and ids of the whole conversation, up to the token that ends a turn."""
        folder = chat_base(tmp_path / "base", template, *special)
        how, tokenizer = find_format(folder), load_tokenizer(folder)
        rows = {"prompt": [how.form("Add.", "1 and 2")], "completion": ["It is 3."]}
        (ids,), (prompt,) = (found := tokenize(rows, tokenizer, 256, how.end)).input_ids, found.prompts
        conversation = [
            {"role": "user", "content": "Add.\n\n1 and 2"},
            {"role": "assistant", "content": "It is 3."},
        ]
        whole = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, return_dict=True)
        assert ids == whole[: len(ids)]
        assert ids[:prompt] == asked["input_ids"]
        assert ids[-1] == tokenizer.convert_tokens_to_ids(special[-1])

    @pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA], ids=["chatml", "llama3", "gemma"])
    def test_the_modelfile_renders_the_same(self, template: str, tokenizer: Any) -> None:
        """Oracle: the Jinja template, on conversations that made neither the TEMPLATE nor its trial."""

        def render(messages: list[dict[str, str]]) -> str:
            options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
            try:
                return str(tokenizer.apply_chat_template(messages, **options))
            except jinja2.TemplateError as error:
                raise GRITError(str(error)) from error

        made = Template(go_template(render))
        conversation = [
            {"role": "user", "content": "Who\n\nare 'you' <b>?"},
            {"role": "assistant", "content": "A model."},
            {"role": "user", "content": "Ünïcode {curly} 100%"},
        ]
        assert made.render(conversation) == render(conversation)
        assert made.render(conversation[:1]) == render(conversation[:1])

    def test_what_no_modelfile_can_say_is_refused(self, tokenizer: Any) -> None:
        """Oracle: a template that counts the messages, and one that shouts."""
        for template in (
            "{{ messages | length }}{{ messages[-1]['content'] }}",
            "{{ messages[0]['content'] | upper }}",
        ):

            def render(messages: list[dict[str, str]], template: str = template) -> str:
                return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))

            with pytest.raises(GRITError, match="chat template"):
                go_template(render)

    def test_the_alpaca_form_has_one_home(self) -> None:
        """Oracle: the TEMPLATE of that name renders what training had."""
        from grit_impl.gguf.modelfile import TEMPLATES

        rendered = Template(TEMPLATES[find_format("tiny").template]).render([{"role": "user", "content": "Add."}])
        assert rendered == ALPACA_TEMPLATE.format(instruction="Add.")
