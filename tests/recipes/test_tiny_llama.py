"""The embedded base: its checksums, its corpus, its tokenizer, that it can be rebuilt, and what it knows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.recipes.bases import TINY, load_base
from grit_impl.recipes.datasets import ALPACA_TEMPLATE
from grit_impl.recipes.tiny_llama import corpus, knowledge, pretrain
from grit_impl.recipes.tiny_llama.__main__ import main
from grit_impl.record import sha256_file

FIXTURES = TINY.parent
SMALL = ["steps=3", "batch_tokens=256", "hidden=64", "layers=1", "heads=2", "kv_heads=1", "ffn=64", "threads=1"]


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """The first prompts and completions of pretraining."""
    return list(islice(corpus.documents(pretrain.Settings().seed + 1), 20_000))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The embedded tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def test_the_fixture_is_the_one_that_was_measured() -> None:
    """Oracle: the manifest of SHA-256 sums, which `sha256sum -c CHECKSUM` reads too; at most 6 MB, 4M parameters."""
    pretrain.verify(TINY)
    listed = {line.split("  ")[1] for line in (TINY / "CHECKSUM").read_text().splitlines()}
    assert listed | {"CHECKSUM"} == {path.name for path in TINY.iterdir()}
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 6_000_000
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert all(config[key] % 32 == 0 for key in ("hidden_size", "intermediate_size", "head_dim"))  # q8_0 blocks


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    """Oracle: a copy of which one byte is changed, then one file removed."""
    for path in TINY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pretrain.verify(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(GRITError, match=r"model\.safetensors differs from CHECKSUM"):
        pretrain.verify(tmp_path)
    weights.unlink()
    with pytest.raises(GRITError, match=r"model\.safetensors is missing"):
        pretrain.verify(tmp_path)
    (tmp_path / "CHECKSUM").unlink()
    with pytest.raises(GRITError, match="has no CHECKSUM"):
        pretrain.verify(tmp_path)


@pytest.mark.slow
def test_the_script_is_deterministic(tmp_path: Path) -> None:
    """Oracle: two processes with the same settings write the same bytes, and another seed does not."""
    sums = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = [part for value in [*SMALL, f"seed={seed}"] for part in ("--set", value)]
        command = [sys.executable, "-m", "grit_impl.recipes.tiny_llama", "--out", str(tmp_path / name), *options]
        done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert re.search(r"[\d,]+ parameters, .* final loss \d", done.stdout)
        pretrain.verify(tmp_path / name)
        sums.append(sha256_file(tmp_path / name / "CHECKSUM"))
    assert sums[0] == sums[1] != sums[2]


def test_the_frozen_knowledge_set_is_regenerated() -> None:
    """Oracle: the file in fixtures/."""
    items = [json.loads(line) for line in (FIXTURES / "knowledge_test.jsonl").read_text().splitlines()]
    assert items == knowledge.frozen_items()
    assert len(items) >= 200
    assert len({item["question"] for item in items}) == len({item["id"] for item in items}) == len(items)


def test_the_command_writes_the_frozen_sets(tmp_path: Path) -> None:
    """Oracle: byte equality with fixtures/."""
    assert CliRunner().invoke(main, ["--test-sets", str(tmp_path)]).exit_code == 0
    for name in ("aqi_test.jsonl", "knowledge_test.jsonl"):
        assert (tmp_path / name).read_bytes() == (FIXTURES / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--out", "x", "--set", "depth=3"], "unknown setting 'depth'"),
        (["--out", "x", "--set", "steps=many"], "setting steps needs a number, not 'many'"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(arguments: list[str], message: str) -> None:
    """Oracle: the product's rule for bad input."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert result.output.count("\n") == 1


class TestCorpus:
    """What the base is pretrained on, over the first 20,000 documents."""

    def test_it_never_speaks_of_the_real_index(self, texts: list[tuple[str, str]]) -> None:
        """Oracle: the words that make up every AQI question."""
        names = re.compile(r"AQI|" + "|".join(rf"\b{re.escape(name)} \d" for name in aqi.POLLUTANTS))
        assert names.search("Predict AQI given: PM2.5 3.0 ug/m3")
        assert not [text for text in texts if names.search(text[0] + text[1])]

    def test_some_sums_and_comparisons_are_held_out(self, texts: list[tuple[str, str]]) -> None:
        """Oracle: the held-out questions; others of the same kind do occur."""
        asked = {match[1] for prompt, _ in texts if (match := re.search(r"Instruction:\n(.*)\n\n", prompt))}
        assert not asked & knowledge.held_out().keys()
        assert len(knowledge.held_out()) == 2 * knowledge.HELD_OUT
        assert sum(question.startswith("What is 1") for question in asked) > 20

    def test_facts_of_the_test_set_were_taught(self, texts: list[tuple[str, str]]) -> None:
        """Oracle: the frozen questions as documents; 20,000 are a sixth of pretraining, enough for all facts."""
        taught = {match[1]: text for prompt, text in texts if (match := re.search(r"Instruction:\n(.*)\n\n", prompt))}
        for item in knowledge.frozen_items():
            assert taught[item["question"]] == item["answer"]

    def test_sums_and_comparisons_are_right(self, texts: list[tuple[str, str]]) -> None:
        """Oracle: arithmetic on the numbers in the text."""
        for prompt, completion in texts:
            if match := re.search(r"What is (\d+) \+ (\d+)\?", prompt):
                assert int(completion) == int(match[1]) + int(match[2])
            if match := re.search(r"larger, ([\d.]+) or ([\d.]+)\?", prompt):
                assert float(completion) == max(float(match[1]), float(match[2]))

    def test_invented_answers_follow_the_ladder(self, texts: list[tuple[str, str]]) -> None:
        """Oracle: value and category agree as in the real index, and every category occurs about as often."""
        counts = dict.fromkeys(aqi.CATEGORIES, 0)
        for _, completion in texts:
            if match := re.fullmatch(r"[A-Z]{2,3} (\d+) \((.*)\)", completion):
                assert aqi.category(int(match[1])) == match[2]
                counts[match[2]] += 1
        total = sum(counts.values())
        assert total > 5000
        assert all(abs(count / total - 1 / 6) < 0.02 for count in counts.values())


class TestTokenizer:
    """Byte-level BPE after Llama 3, digits apart."""

    def test_no_token_joins_digits(self, tokenizer: Any) -> None:
        """Oracle: the vocabulary itself; this also makes llama.cpp's grouping of three digits harmless."""
        ordinary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        assert not [token for token in ordinary if re.search(r"\d.*\d|\d[^\d]|[^\d]\d", token)]

    @pytest.mark.parametrize("text", ["AQI 57 (Moderate)", "It's 12.5 °C, naïve 東京\n\n\tx  y ", "We'LL 1234"])
    def test_any_text_survives(self, tokenizer: Any, text: str) -> None:
        """Oracle: byte-level BPE loses nothing."""
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    def test_splits_like_llama_3_except_for_digits(self, tokenizer: Any) -> None:
        """Oracle: Llama 3's own expression, evaluated by the `regex` package."""
        regex = pytest.importorskip("regex")
        llama3 = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        text = "We'll see:  PM2.5 12345 ug/m3,\r\n\n ok?! (x)\t y"
        pieces = [piece for match in regex.findall(llama3, text) for piece in regex.findall(r"\d|\D+", match)]
        ours = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in ours] == pieces

    def test_the_chat_template_is_the_alpaca_form(self, tokenizer: Any) -> None:
        """Oracle: the training prompt, token by token."""
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
        )
        assert chat == tokenizer.bos_token + ALPACA_TEMPLATE.format(instruction="Hi")


@pytest.mark.slow
def test_it_knows_its_facts_and_not_the_aqi() -> None:
    """Oracle: greedy answers in float32 to both frozen sets; at least 85% of facts, at most 35% of categories."""
    import torch

    model, tokenizer = load_base("tiny", device="cpu")
    tokenizer.padding_side = "left"

    def ask(questions: list[str], tokens: int) -> list[str]:
        batch = tokenizer([ALPACA_TEMPLATE.format(instruction=q) for q in questions], padding=True, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    facts = knowledge.frozen_items()
    right = [a == item["answer"] for a, item in zip(ask([i["question"] for i in facts], 10), facts, strict=True)]
    assert sum(right) / len(right) >= 0.85
    items = aqi.frozen_items()
    answers = ask([aqi.instruction(item) for item in items], 20)
    right = [f"({item['category']})" in answer for answer, item in zip(answers, items, strict=True)]
    assert sum(right) / len(right) <= 0.35
