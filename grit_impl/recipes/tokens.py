"""Rows as tokens: once, by the base's own tokenizer, before any arm. Every arm then reads the same file.

A library that an arm trains with may bring a tokenizer of its own; what it would make of the rows does not matter.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.imports import closure
from grit_impl.machine import versions
from grit_impl.processes import place
from grit_impl.recipes.bases import TINY, find_base, load_tokenizer
from grit_impl.recipes.datasets import load_instructions
from grit_impl.recipes.fetch import digest
from grit_impl.recipes.formats import find_format
from grit_impl.record import fingerprint, sha256_file, write_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from grit_impl.recipes.arms import RunSpec

IGNORE = -100
"""The label of a token that is not learned."""
_LIBRARIES = ("transformers", "datasets")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Rows as ids.

    Attributes:
        input_ids: Per row a list of T ids.
        prompts: Per row how many of them are the prompt, which is not learned.
        pad: The id that fills up shorter rows of a batch.
    """

    input_ids: Sequence[list[int]]
    prompts: Sequence[int]
    pad: int

    def dataset(self) -> Any:
        """A `datasets.Dataset` with `input_ids` and `labels` (-100 on the prompt)."""
        from datasets import Dataset  # type: ignore[import-untyped]

        labels = [[IGNORE] * n + ids[n:] for ids, n in zip(self.input_ids, self.prompts, strict=True)]
        return Dataset.from_dict({"input_ids": list(self.input_ids), "labels": labels})

    def collate(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Right-padded tensors (N, T) of some rows."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        pads = [width - len(row["input_ids"]) for row in rows]

        def filled(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[value] * n] for row, n in zip(rows, pads, strict=True)])

        mask = torch.tensor([[1] * (width - n) + [0] * n for n in pads])
        return {"input_ids": filled("input_ids", self.pad), "attention_mask": mask, "labels": filled("labels", IGNORE)}


def encode(
    rows: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    end: Sequence[int] | None = None,
) -> dict[str, list[list[int]]]:
    """Columns `prompt` and `completion` as `input_ids` and `labels`.

    Training sees the very prompt tokens that generation will: where prompt and completion would share a token, they
    are tokenized apart.

    Args:
        rows: The texts; with a column `rendered`, every special token is in them already.
        tokenizer: Adds its own leading token to the prompt.
        max_length: Longer rows are cut at the end; rows of which no completion token is left are dropped.
        end: Ids that end a completion; None: the tokenizer's EOS.
    """
    add = "rendered" not in rows
    wholes = [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]
    prompts = tokenizer(rows["prompt"], add_special_tokens=add)["input_ids"]
    joint = tokenizer(wholes, add_special_tokens=add)["input_ids"]
    closing = [] if not add else [tokenizer.eos_token_id] if end is None else list(end)
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for prompt, whole, text in zip(prompts, joint, rows["completion"], strict=True):
        fits = whole[: len(prompt)] == prompt
        answer = [*(whole[len(prompt) :] if fits else _continued(text, tokenizer)), *closing]
        if len(prompt) < max_length:
            encoded["input_ids"].append([*prompt, *answer][:max_length])
            encoded["labels"].append(([IGNORE] * len(prompt) + answer)[:max_length])
    return encoded


def _continued(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that stands after another: some tokenizers put a space before what stands alone."""
    before: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    after: list[int] = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    if after[: len(before)] == before:
        return after[len(before) :]
    alone: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return alone


def tokenize(rows: Any, tokenizer: Any, max_length: int, end: Sequence[int] | None = None) -> Tokens:
    """Rows with the columns `prompt` and `completion` (and `rendered`) as tokens; see `encode`.

    Raises:
        GRITError: the tokenizer has no EOS token, or nothing is left to learn from.
    """
    if tokenizer.eos_token_id is None:
        raise GRITError("the tokenizer has no end-of-text token: set its eos_token")
    names = getattr(rows, "column_names", rows)  # of a `datasets.Dataset`, or of a dictionary
    texts = {name: list(rows[name]) for name in ("prompt", "completion", "rendered") if name in names}
    found = encode(texts, tokenizer, max_length, end)
    kept, given = len(found["input_ids"]), len(texts["prompt"])
    if not kept:
        raise GRITError(f"no example has a prompt shorter than {max_length} tokens: raise the maximum length")
    if kept < given:
        logger.warning("%d of %d prompts fill max_length and were dropped", given - kept, given)
    pad = tokenizer.pad_token_id
    prompts = [sum(label == IGNORE for label in labels) for labels in found["labels"]]
    return Tokens(found["input_ids"], prompts, tokenizer.eos_token_id if pad is None else pad)


def make_tokens(spec: RunSpec, folder: Path) -> str:
    """Make the tokens that a run learns from, unless they are there: SHA-256 of the file `<sha256>.json` in `folder`.

    Raises:
        GRITError: the base model or the data set is wrong, or nothing is left to learn from.
    """
    _, processes = place()
    examples = spec.training.steps * spec.training.batch_size * spec.training.accumulation * processes
    base = find_base(spec.base_model)
    home = TINY if base.shape else base.folder()
    inputs = {
        "tokenizer": {path.name: sha256_file(path) for path in sorted(home.iterdir()) if _of_tokenizer(path)},
        "format": base.format,
        "data": [spec.dataset, digest(Path(spec.dataset)) if Path(spec.dataset).is_file() else None],
        "rows": [examples, spec.seed, spec.training.max_length],
        "source": {name: sha256_file(path) for name, path in closure(__name__).items()},
        "versions": {name: version for name, version in versions().items() if name in _LIBRARIES},
    }
    note = folder / f"{fingerprint(inputs)[:16]}.sha256"
    if note.is_file() and (folder / f"{note.read_text()}.json").is_file():
        return note.read_text()
    tokenizer = load_tokenizer(spec.base_model)
    how = find_format(spec.base_model, tokenizer)
    rows = load_instructions(spec.dataset, "train", examples, spec.seed, how.form, tokenizer)
    found = tokenize(rows, tokenizer, spec.training.max_length, how.end)
    hashed = _write(found, folder)
    write_atomic(note, hashed)
    return hashed


def _of_tokenizer(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".jinja" or "token" in path.name)


def longest(path: Path, n: int, folder: Path) -> tuple[str, float]:
    """Write a file with the n longest rows of another: its SHA-256, and how many times an average step's tokens it has.

    Args:
        path: The whole file.
        n: Rows of a step.
        folder: Where the new one goes, as `<sha256>.json`.
    """
    whole = read_tokens(path, path.stem)
    order = sorted(range(len(whole.input_ids)), key=lambda i: len(whole.input_ids[i]), reverse=True)[:n]
    ids, prompts = [whole.input_ids[i] for i in order], [whole.prompts[i] for i in order]
    average = sum(map(len, whole.input_ids)) / len(whole.input_ids)
    return _write(Tokens(ids, prompts, whole.pad), folder), sum(map(len, ids)) / (n * average)


def _write(tokens: Tokens, folder: Path) -> str:
    # Nothing but the tokens, so that the same tokens have the same hash however they came about.
    content = json.dumps({"pad": tokens.pad, "prompts": tokens.prompts, "input_ids": tokens.input_ids})
    hashed = hashlib.sha256(content.encode()).hexdigest()
    write_atomic(folder / f"{hashed}.json", content)
    return hashed


def read_tokens(path: Path, sha256: str) -> Tokens:
    """The tokens of a file.

    Raises:
        GRITError: it is not there, or has another hash.
    """
    try:
        if sha256_file(path) != sha256:
            raise GRITError(f"{path} holds other tokens than the run was started with: start it again")
        content = json.loads(path.read_text())
    except OSError as error:
        raise GRITError(f"cannot read the tokens in {path}: {error.strerror or error}") from error
    return Tokens(content["input_ids"], content["prompts"], content["pad"])
