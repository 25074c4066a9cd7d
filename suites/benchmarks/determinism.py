"""Which settings of the server change greedy answers, and how near to a tie they change.

    python suites/benchmarks/determinism.py base.gguf pure.gguf

The frozen questions (420 about the index, 200 about facts) go to the embedded server as the evaluation asks them, under
one setting after another. Every set of answers is compared with that of another setting; the first token that differs
is looked up in the first set, with the difference of the two likeliest log-probabilities there.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.items import load_aqi, load_knowledge
from grit_impl.export import write_modelfile
from grit_impl.gguf.llamacpp import LlamaCpp
from grit_impl.serve import completion, engine
from grit_impl.serve.server import EmbeddedOllama

FIXTURES = Path(__file__).parents[2] / "fixtures"
NEAR = 0.02
"""Nats between the two likeliest tokens, below which a place counts as a tie."""
STOPS = ("<|end_of_text|>",)


class Answer(NamedTuple):
    """What was said: the text, and for each token its text and the lead of the likeliest over the second, in nats."""

    text: str
    tokens: list[tuple[str, float]]


Answers = dict[str, Answer]


@contextmanager
def server(modelfile: Path, slots: int, threads: int, reuse: bool, settings: dict[str, Any]) -> Iterator[str]:
    """An embedded server whose llama.cpp is started with these settings; its address."""
    engine.LlamaCpp = functools.partial(LlamaCpp, **settings)  # type: ignore[misc, assignment]
    completion.REUSE = reuse
    try:
        with EmbeddedOllama({"m": modelfile}, parallel=slots, threads=threads) as running:
            yield running.url
    finally:
        engine.LlamaCpp, completion.REUSE = LlamaCpp, False  # type: ignore[misc]


def ask(url: str, items: list[dict[str, Any]], in_flight: int = 1) -> Answers:
    """All items' answers, by id."""
    options = EvaluationOptions().greedy()
    shared = {"model": "m", "stream": False, "truncate": False, "options": options, "logprobs": True, "top_logprobs": 2}

    def one(item: dict[str, Any]) -> tuple[str, Answer]:
        reply = client.post("/api/generate", json={**shared, "prompt": item["prompt"]})
        found = reply.raise_for_status().json()
        tokens = []
        for each in found.get("logprobs", []):
            best = sorted((top["logprob"] for top in each["top_logprobs"]), reverse=True)
            tokens.append((each["token"], best[0] - best[1]))
        return item["id"], Answer(found["response"], tokens)

    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client, ThreadPoolExecutor(in_flight) as pool:
        return dict(pool.map(one, items))


def leads(first: Answers, second: Answers) -> list[float]:
    """Of the answers that differ: how far ahead the likeliest token was where they part, in nats."""
    found = []
    for item, answer in first.items():
        other = second[item]
        if answer.text != other.text:
            pairs = zip(answer.tokens, other.tokens, strict=False)
            found.append(next((a[1] for a, b in pairs if a[0] != b[0]), answer.tokens[-1][1]))
    return found


def main(files: list[str]) -> None:
    """Print the table."""
    items = [*load_aqi(FIXTURES / "aqi_test.jsonl").items, *load_knowledge(FIXTURES / "knowledge_test.jsonl").items]
    shuffled = random.Random(1).sample(items, len(items))
    print(
        "| model | setting | compared with | answers changed | of these at a tie below 0.02 nats | largest lead, nats |"
    )
    print("|---|---|---|---|---|---|")
    for file in map(Path, files):
        modelfile = write_modelfile(file, file.with_suffix(".Modelfile"), stop=STOPS)
        seen: dict[str, Answers] = {}

        def told(
            setting: str,
            against: str | None,
            url: str,
            order: list[dict[str, Any]] = items,
            in_flight: int = 1,
            name: str = file.stem,
            seen: dict[str, Answers] = seen,
        ) -> None:
            start = time.monotonic()
            seen[setting] = ask(url, order, in_flight)
            print(f"{name}: {setting} took {time.monotonic() - start:.0f} s", file=sys.stderr)
            if against is not None:
                found = leads(seen[against], seen[setting])
                near = sum(lead < NEAR for lead in found)
                share = f"{len(found)} of {len(order)} ({100 * len(found) / len(order):.1f}%)"
                print(
                    f"| {name} | {setting} | {against} | {share} | {near} | {max(found, default=0):.3f} |", flush=True
                )

        with server(modelfile, 1, 1, False, {}) as url:
            told("default", None, url)
            told("again", "default", url)
            told("shuffled", "default", url, shuffled)
        with server(modelfile, 1, 1, False, {}) as url:
            told("another process", "default", url)
        with server(modelfile, 4, 1, False, {}) as url:
            told("4 slots, one request at a time", "default", url)
            told("4 slots, four requests at a time", "default", url, in_flight=4)
            told("4 slots, four at a time, again", "4 slots, four requests at a time", url, in_flight=4)
        for kind in ("q8_0", "f32"):
            with server(modelfile, 1, 1, False, {"cache": kind}) as url:
                told(f"{kind} cache", "default", url)
                told(f"{kind} cache, again", f"{kind} cache", url)
        with server(modelfile, 1, 1, False, {"flash": False}) as url:
            told("no flash attention", "default", url)
        with server(modelfile, 1, 1, False, {"flash": False, "cache": "f32"}) as url:
            # With flash attention llama.cpp makes float16 of a float32 cache before it uses it.
            told("no flash attention, f32 cache", "no flash attention", url)
        with server(modelfile, 1, 1, True, {}) as url:
            told("prompts reused", "default", url)
            told("prompts reused, again", "prompts reused", url)
            told("prompts reused, shuffled", "prompts reused", url, shuffled)
        # Last, because on a busy machine two threads that wait for each other take the longest.
        with server(modelfile, 1, 2, False, {}) as url:
            told("2 threads", "default", url)


if __name__ == "__main__":
    main(sys.argv[1:])
