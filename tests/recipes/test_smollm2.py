"""The real language model: fetched for real, asked in its own format; skipped where it cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grit_impl.errors import GRITError
from grit_impl.gguf.gotemplate import Template
from grit_impl.recipes.bases import load_base
from grit_impl.recipes.datasets import load_instructions
from grit_impl.recipes.formats import find_format
from grit_impl.recipes.tokens import IGNORE, tokenize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """Model and tokenizer."""
    try:
        return load_base("smollm2", device="cpu")
    except GRITError as error:
        pytest.skip(f"needs the hub or a package index, or the model in a cache: {error}")


def test_its_tokenizer_is_whole(smollm2: Any) -> None:
    """Oracle: the model's card: ChatML, whose <|im_end|> ends a text; texts come back from their ids."""
    _, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert tokenizer.pad_token_id is not None
    for text in ("Grüße, 東京 🙂", "AQI 57 (Moderate)", "  two  spaces\n\ttab"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_is_trained_and_served_in_its_own_format(smollm2: Any) -> None:
    """Oracle: transformers' rendering of the whole conversation; no BOS of our own in front of it."""
    _, tokenizer = smollm2
    how = find_format("smollm2")
    rows = load_instructions("aqi", limit=3, seed=1, form=how.form)
    tokens = tokenize(rows, tokenizer, 512, how.end)
    asked = load_instructions("aqi", limit=3, seed=1, form=lambda text, _: text)
    for row, question in zip(tokens.dataset(), asked, strict=True):
        conversation = [
            {"role": "user", "content": question["prompt"]},
            {"role": "assistant", "content": question["completion"]},
        ]
        whole = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
        assert row["input_ids"] == whole[: len(row["input_ids"])]
        assert tokenizer.decode([i for i in row["labels"] if i != IGNORE]) == question["completion"] + "<|im_end|>"
        served = Template(how.template).render(conversation[:1])
        assert served == tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
    assert how.stop == ()


def test_it_knows_the_capital_of_france(smollm2: Any) -> None:
    """Oracle: geography; one wrong permutation of rows, and it would babble."""
    model, tokenizer = smollm2
    ids = tokenizer(find_format("smollm2").form("What is the capital of France?", ""), return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
