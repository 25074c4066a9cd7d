"""What a row says is what is trained on: to the character, in TRL's formats as TRL does, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grit_impl.errors import GRITError
from grit_impl.recipes.bases import TINY
from grit_impl.recipes.datasets import load_instructions
from grit_impl.recipes.tokens import IGNORE, tokenize

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}]
ANSWERED = [{"role": "assistant", "content": "Blue."}]


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The embedded tokenizer, with the embedded chat template."""
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def chatml() -> Any:
    """The embedded tokenizer with other special tokens and ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def put(folder: Path, *rows: Any) -> Path:
    """A file with these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(path: Path, tokenizer: Any) -> list[tuple[str, str]]:
    """What the model sees of each row, and what it learns of it, as text."""
    data = tokenize(load_instructions(path, tokenizer=tokenizer), tokenizer, 512).dataset()
    return [
        (tokenizer.decode(row["input_ids"]), tokenizer.decode([i for i in row["labels"] if i != IGNORE]))
        for row in data
    ]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The sky is", " blue."),
        ("The sky is ", "blue."),
        ("The sky is", "n't blue."),
        ("    def f(x):\n", "        return x\n"),
        ("\t\tif a:\n", "\t\t\tb()\n\n"),
        ("\n\nQ: ", "\n\nA\n"),
        ("", "alone"),
        ("a\u00a0", "\u2028b\u0085"),
        ("word", "s"),
        ("trailing  ", "  leading"),
    ],
)
def test_text_is_trained_to_the_character(tmp_path: Path, tiny: Any, prompt: str, completion: str) -> None:
    """Oracle: the two texts and the tokenizer's ends, nothing between them; the completion alone is learned."""
    ((seen, learned),) = trained(put(tmp_path, {"prompt": prompt, "completion": completion}), tiny)
    assert seen == f"{tiny.bos_token}{prompt}{completion}{tiny.eos_token}"
    assert learned == completion + tiny.eos_token


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("instruction", "input", "output"), "### Instruction:\n  a\n\n### Input:\n\tb \n\n### Response:\n c\n"),
        (("instruction", "context", "response"), "### Instruction:\n  a\n\n### Input:\n\tb \n\n### Response:\n c\n"),
        (("question", "unused", "answer"), "### Instruction:\n  a\n\n### Response:\n c\n"),
    ],
)
def test_layouts_keep_their_indentation(tmp_path: Path, tiny: Any, columns: Any, expected: str) -> None:
    """Oracle: the texts as they were written, inside the Alpaca form."""
    ((seen, learned),) = trained(put(tmp_path, dict(zip(columns, ("  a", "\tb ", " c\n"), strict=True))), tiny)
    assert seen.endswith(expected + tiny.eos_token)
    assert learned == " c\n" + tiny.eos_token


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.tuples(st.text(st.characters(codec="ascii"), max_size=30), st.text(min_size=1, max_size=30)))
def test_any_text_is_trained_to_the_character(tmp_path: Path, tiny: Any, texts: tuple[str, str]) -> None:
    """Oracle: the tokenizer's own bytes, decoded."""
    prompt, completion = (text.encode("utf-8", "ignore").decode() for text in texts)
    if not completion:
        return
    ((seen, learned),) = trained(put(tmp_path, {"prompt": prompt, "completion": completion}), tiny)
    assert seen == f"{tiny.bos_token}{prompt}{completion}{tiny.eos_token}"
    assert learned == completion + tiny.eos_token


def test_a_tokenizer_that_puts_a_space_before_what_stands_alone(tmp_path: Path) -> None:
    """Oracle: the text; alone, such a tokenizer reads "n't" as " n't" and " blue" as "  blue"."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = [chr(i) for i in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", "\n", "isn", "is", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, [("i", "s"), ("is", "n")], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.pre_tokenizer = pre_tokenizers.Split("'", "isolated")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    for prompt, completion in (("The sky is", " blue."), ("The sky is", "n't blue."), ("a", "b")):
        ((seen, _),) = trained(put(tmp_path, {"prompt": prompt, "completion": completion}), tokenizer)
        assert seen == f"{prompt}{completion}</s>"


CONVERSATIONS = {
    "messages": [{"messages": [*ASKED, *ANSWERED]}, {"messages": [ASKED[1], *ANSWERED, ASKED[1], *ANSWERED]}],
    "prompt-completion": [{"prompt": ASKED, "completion": ANSWERED}, {"prompt": ASKED[1:], "completion": ANSWERED}],
    "several-answers": [{"prompt": [*ASKED, *ANSWERED, ASKED[1]], "completion": [*ANSWERED, ASKED[1], *ANSWERED]}],
    "text": [{"text": "The sky is blue."}, {"text": "  indented\n"}],
    "plain-prompt-completion": [{"prompt": "The sky is", "completion": " blue."}],
}


@pytest.mark.parametrize("which", ["tiny", "chatml"])
@pytest.mark.parametrize("form", CONVERSATIONS)
def test_as_trl_does(tmp_path: Path, form: str, which: str, request: pytest.FixtureRequest) -> None:
    """Oracle: TRL's own SFTTrainer on the same rows: ids, and which of them are learned."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = request.getfixturevalue(which)
    rows = CONVERSATIONS[form]
    ours = tokenize(load_instructions(put(tmp_path, *rows), tokenizer=tokenizer), tokenizer, 512).dataset()
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    arguments = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=512)
    trainer: Any = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    theirs = list(trainer.train_dataset)
    assert [row["input_ids"] for row in ours] == [row["input_ids"] for row in theirs]
    for mine, row in zip(ours, theirs, strict=True):
        mask = row.get("completion_mask") or [label != IGNORE for label in row.get("labels", row["input_ids"])]
        # The first token is never predicted, so it does not matter whether it is masked.
        assert [label != IGNORE for label in mine["labels"]][1:] == list(map(bool, mask))[1:]


def test_rendered_by_the_bases_template(tmp_path: Path, chatml: Any) -> None:
    """Oracle: ChatML by hand; with prompt and completion, the answer and its end are learned."""
    ((seen, learned),) = trained(put(tmp_path, {"prompt": ASKED, "completion": ANSWERED}), chatml)
    assert seen == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSky?<|im_end|>\n"
        "<|im_start|>assistant\nBlue.<|im_end|>\n"
    )
    assert learned == "Blue.<|im_end|>\n"
    ((_, whole),) = trained(put(tmp_path, {"messages": [*ASKED, *ANSWERED]}), chatml)
    assert whole == seen


def test_conversations_from_parquet(tmp_path: Path, chatml: Any) -> None:
    """Oracle: the same rows from JSON lines; Parquet fills keys that other messages have with null."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": [{**ASKED[1], "name": "Ann"}, *ANSWERED]}, {"messages": [ASKED[1], *ANSWERED]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert trained(tmp_path / "rows.parquet", chatml) == trained(put(tmp_path, *rows), chatml)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ["a"], "completion": "b"}, r"field 'prompt\[1\]' is text \('a'\), not a message"),
        ({"prompt": 3, "completion": "b"}, r"field 'prompt' is a number \(3\), not text"),
        ({"prompt": "a", "completion": float("nan")}, r"field 'completion' is a number \(nan\), not text"),
        ({"prompt": "a", "completion": 12}, r"field 'completion' is a number \(12\), not text"),
        ({"prompt": None, "completion": "b"}, "field 'prompt' is null, not text"),
        ({"completion": "b"}, r"no field 'prompt' \(it has: completion\)"),
        ({"prompt": "a", "complete": "b"}, r"no field 'completion' \(it has: prompt, complete\)"),
        ({"prompt": {"a": 1}, "completion": "b"}, "field 'prompt' is an object"),
        ({"prompt": "a", "completion": True}, "field 'completion' is a truth value"),
        ({"prompt": "a", "completion": "\ud800"}, "field 'completion' holds half a character"),
        ({"prompt": "say <|end_of_text|> now", "completion": "b"}, "holds '<|end_of_text|>', a special token"),
        ({"prompt": "a", "completion": "b<|end_of_text|>"}, "holds '<|end_of_text|>', a special token"),
        ({"prompt": "<|begin_of_text|>a", "completion": "b"}, r"holds '<\|begin_of_text\|>'"),
        ({"prompt": "a<|finetune_right_pad_id|>", "completion": "b"}, r"holds '<\|finetune_right_pad_id\|>'"),
        ({"prompt": ASKED, "completion": ANSWERED}, "is text in some rows and messages in others"),
        ({"prompt": ASKED, "completion": "b"}, r"field 'completion' is text \('b'\), not a list of messages"),
        ({"prompt": "a", "completion": ANSWERED}, r"field 'prompt' is text \('a'\), not a list of messages"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, tiny: Any, row: dict[str, Any], message: str) -> None:
    """Oracle: file, row and column in one line."""
    path = put(tmp_path, GOOD, row)
    with pytest.raises(GRITError, match=message.replace("|", r"\|").replace(r"\\|", r"\|")) as caught:
        load_instructions(path, tokenizer=tiny)
    assert str(caught.value).startswith(f"{path}, row 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("[{'role': 'user', 'content': 'a'}]", "is text"),
        ([], r"is a list \(\[\]\), not a list of messages"),
        (["a"], r"field 'messages\[1\]' is text"),
        ([{"from": "human", "value": "a"}], r"field 'messages\[1\]' is an object"),
        ([{"role": "human", "content": "a"}], "not a message with one of the roles system"),
        ([{"role": "user", "content": 3}], r"field 'messages\[1\].content' is a number"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"field 'messages\[1\].content' is a list"),
        ([{"role": "user"}], r"field 'messages\[1\].content' is null"),
        ([{"role": "user", "content": "a<|im_end|>"}], r"holds '<\|im_end\|>', a special token"),
    ],
)
def test_bad_messages_are_refused(tmp_path: Path, chatml: Any, messages: Any, message: str) -> None:
    """Oracle: file, row, column and the number of the message in one line."""
    path = put(tmp_path, {"messages": [*ASKED, *ANSWERED]}, {"messages": messages})
    with pytest.raises(GRITError, match=message) as caught:
        load_instructions(path, tokenizer=chatml)
    assert str(caught.value).startswith(f"{path}, row 2: field 'messages")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "conversations need a base with a chat template"),
        ("{{ raise_exception('roles must alternate') }}", "row 1: field 'completion' cannot be .*roles must alternate"),
        ("{{ messages[0]['nothing']['at all'] }}", "row 1: field 'completion' cannot be rendered"),
        (
            CHATML.replace("{% for message in messages %}", "{% for message in messages[1:] %}"),
            r"loses message 1 \(sys",
        ),
        ("{{ messages|length }}" + CHATML, "row 1: field 'prompt' is rendered otherwise alone"),
    ],
)
def test_templates_that_lose_something_are_refused(tmp_path: Path, template: str | None, message: str) -> None:
    """Oracle: each template was made to fail in this way."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    with pytest.raises(GRITError, match=message):
        load_instructions(put(tmp_path, {"prompt": ASKED, "completion": ANSWERED}), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": "b", "response": "c"}, "which fit alpaca and dolly"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "it holds preferences"),
        ({"prompt": "a", "completion": "b", "label": True}, "it holds preferences"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "it holds preferences"),
        ({"messages": ANSWERED, "images": []}, "it holds pictures"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "has columns conversations; it needs those of one"),
        ({"question": "a", "answer": "yes", "passage": "p"}, r"row 1: field 'answer' is text \('yes'\), which is none"),
        ({"question": "a", "sentence": "b", "label": 7}, r"row 1: field 'label' is a number \(7\), which is none of 0"),
        ({"features": "a", "aqi_value": "x", "category": "Good"}, "row 1: field 'aqi_value' is text"),
    ],
)
def test_other_kinds_of_data_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    """Oracle: one line with the columns or the value."""
    with pytest.raises(GRITError, match=message):
        load_instructions(put(tmp_path, row))


def test_the_layout_with_the_most_columns(tmp_path: Path) -> None:
    """Oracle: tatsu-lab/alpaca has a column `text`, ultrachat one named `prompt`."""
    row = {"instruction": "a", "input": "", "output": "b", "text": "c"}
    assert load_instructions(put(tmp_path, row))["completion"] == ["b"]
    with pytest.raises(GRITError, match="chat template"):
        load_instructions(put(tmp_path, {"prompt": "a", "prompt_id": "b", "messages": [*ASKED, *ANSWERED]}))
