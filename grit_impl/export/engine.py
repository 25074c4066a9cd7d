"""llama.cpp asked about a file: token ids, where it stops, how it renders a conversation, and what it expects next."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from grit_impl.errors import GRITError
from grit_impl.export.findings import Finding
from grit_impl.export.reference import Reference
from grit_impl.export.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "Predict AQI given: PM2.5 35.4 ug/m3, O3 0.071 ppm",
    "What is the capital of France?",
    "Add 17 and 25.",
    "List three primary colors.",
    "Repeat: 0123456789 3.14159 1,000,000 -7e-3",
    "Grüße aus Köln: naïve façade, Ærøskøbing",
    "東京は今日も晴れです。",
    "Привет, как дела?",
    "emoji 🙂🚀 and flags 🇫🇷, family 👨‍👩‍👧",
    "tabs\tand  double  spaces   and trailing ",
    "line one\nline two\r\n\n\nline five",
    "def f(x):\n    return {'a': x[0], \"b\": None}",
    "I'll say we've it's don't you're HE'LL",
    "MiXeD CaSe wOrDs AND ACRONYMS like NATO, pH, iOS",
    "!!!???... --- *** ((nested [brackets] {here})) <tag/> \\ | ~ ` ^",
    "a",
    " leading space",
    "zero width\u200bspace, combining e\u0301, nbsp\u00a0end",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Give the AQI category for NO2 101 ppb, CO 4.5 ppm, SO2 36 ppb and explain why it is not the worst pollutant.",
)
# Probabilities asked for at each step: everything for small vocabularies, the head of the distribution for large ones.
MOST_PROBABILITIES = 512


@dataclass
class Answer:
    """One prompt's greedy continuation: all ids, where it starts, and per step the ids and log-probabilities given."""

    ids: list[int]
    start: int
    steps: list[tuple[torch.Tensor, torch.Tensor] | None]


def check_tokens(
    client: httpx.Client, reference: Reference, vocabulary: Vocabulary, prompts: tuple[str, ...]
) -> list[Finding]:
    """Whether llama.cpp cuts texts into the tokens of training."""
    bos = reference.tokenizer.bos_token_id
    wrong, bos_only = [], 0
    for prompt in prompts:
        text = unicodedata.normalize("NFC", prompt) if vocabulary.composed else prompt
        ours = reference.ids(text)
        theirs = client.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
        if ours != theirs:
            wrong.append(prompt)
            bos_only += [i for i in ours if i != bos] == [i for i in theirs if i != bos]
    if wrong and bos_only == len(wrong):
        return [Finding("bos", f"{len(wrong)} of {len(prompts)} prompts begin with another BOS")]
    detail = f"{len(wrong)} of {len(prompts)} prompts have other token ids, e.g. {wrong[0][:40]!r}" if wrong else ""
    return [Finding("pre-tokenizer", detail)] if wrong else []


def check_stops(client: httpx.Client, vocabulary: Vocabulary) -> list[Finding]:
    """Whether llama.cpp stops at every token that ends an answer."""
    for token in vocabulary.eos:
        # Forced to say the end token, the engine must stop.
        body = {
            "prompt": [vocabulary.bos or 0, token],
            "n_predict": 3,
            "temperature": 0,
            "logit_bias": [[token, 1000.0]],
        }
        reply = client.post("/completion", json=body).json()
        if reply.get("stop_type") != "eos":
            return [Finding("stop-token", f"generation goes on after {vocabulary.tokens[token]!r}")]
    return []


def check_template(client: httpx.Client, reference: Reference) -> list[Finding]:
    """Whether llama.cpp renders conversations as training did."""
    messages = [{"role": "user", "content": "Name a river. "}]
    more = [*messages, {"role": "assistant", "content": "Rhine"}, {"role": "user", "content": "Another?"}]
    for conversation in (messages, more):
        ours = reference.render(conversation)
        if ours is None:
            return []
        reply = client.post("/apply-template", json={"messages": conversation}).json()
        # Whether a beginning is added is asked with the tokens.
        bos = reference.tokenizer.bos_token or ""
        ours, theirs = (str(t).removeprefix(bos) for t in (ours, reply.get("prompt", reply.get("error"))))
        if ours != theirs:
            return [Finding("chat-template", f"the file renders {theirs[:60]!r}, training had {ours[:60]!r}")]
    return []


def ask(client: httpx.Client, ids: list[int], tokens: int, vocabulary: int) -> Answer:
    """Let llama.cpp continue a prompt, and say what it thought of at each step.

    Raises:
        GRITError: it refuses the prompt.
    """
    reply = _complete(client, ids, tokens, vocabulary)
    said, entries = reply["tokens"], reply.get("completion_probabilities", [])
    if len(entries) == len(said):
        return Answer([*ids, *said], len(ids), [_step(entry) for entry in entries])
    # llama.cpp gives no probabilities for a token that ends inside a character, nor says where: one token at a time.
    all_ids = list(ids)
    steps: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for _ in said:
        reply = _complete(client, all_ids, 1, vocabulary)
        if not reply["tokens"]:
            break
        entries = reply.get("completion_probabilities", [])
        all_ids += reply["tokens"][:1]
        steps.append(_step(entries[0]) if entries else None)
    return Answer(all_ids, len(ids), steps)


def _complete(client: httpx.Client, ids: list[int], tokens: int, vocabulary: int) -> dict[str, Any]:
    body = {
        "prompt": ids,
        "n_predict": tokens,
        "temperature": 0,
        "n_probs": min(vocabulary, MOST_PROBABILITIES),
        "return_tokens": True,
    }
    reply = client.post("/completion", json=body)
    if reply.status_code != 200:
        raise GRITError(f"llama.cpp refused a prompt: {reply.text[:200]}")
    value: dict[str, Any] = reply.json()
    return value


def _step(entry: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    top = entry["top_logprobs"]
    return torch.tensor([t["id"] for t in top]), torch.tensor([t["logprob"] for t in top], dtype=torch.float64)
