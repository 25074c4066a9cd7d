"""Tokens per second by the server's own counters, fair between models and robust against a drifting machine.

* The rate is `(eval_count - 1) / eval_duration`: the first token is produced while the prompt is read and costs nothing
  in `eval_duration`, so short answers look absurdly fast (one token: a million tokens per second).
* Every sample has the same number of tokens. A model decides itself when to stop, and Ollama has no option against it;
  but at a temperature of 100 over the 100 likeliest tokens it babbles, and hardly ever says "end". What is said does
  not matter to the speed of a dense model. A sample that ends early all the same is drawn again with another seed.
* Models take turns within a round, in rotating order, and are compared within the round: when the machine slows down,
  it slows down for all of them. The first requests to each model are warm-up and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from grit_impl.evaluate.client import Endpoint, Reply, Unanswered

BABBLE = {"temperature": 100.0, "top_k": 100, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "stop": []}
WARM_UP = 2
"""Requests per model that are not kept: loading, caches, frequency scaling."""
REDRAWS = 5
RELOADED = 50_000_000
"""Nanoseconds of load_duration from which on the model was loaded for this request, which then is warm-up again."""


def measure(
    endpoint: Endpoint,
    models: Mapping[str, str],
    prompt: str,
    *,
    rounds: int,
    tokens: int,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    done: Iterable[tuple[int, str]] = (),
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Measure all models in interleaved rounds.

    Args:
        endpoint: The server; requests go out one at a time.
        models: Name on the server by label.
        prompt: Sent to every model.
        rounds: Samples per model.
        tokens: Tokens of each sample.
        options: Further Ollama options, e.g. `num_thread`.
        seed: Of the sampling; a round uses the same for every model.
        done: (round, label) pairs that are measured already.
        keep: Called with each row as it is measured.

    Returns:
        Rows with `round`, `label`, `tokens_per_second`, `eval_count`, `eval_duration` (ns), `order` (position in the
        round). A sample that no attempt gave is missing.
    """
    finished = set(done)
    rows: list[dict[str, Any]] = []
    labels = list(models)
    warm: set[str] = set()
    for number in range(rounds):
        # Every order is followed by its reverse, so that a steady drift favours nobody.
        first = number // 2 % len(labels)
        turn = labels[first:] + labels[:first]
        for order, label in enumerate(turn if number % 2 == 0 else reversed(turn)):
            if (number, label) in finished:
                continue
            for _ in range(0 if label in warm else WARM_UP):
                _sample(endpoint, models[label], prompt, tokens, options, seed)
            warm.add(label)
            reply = _sample(endpoint, models[label], prompt, tokens, options, seed + 1000 * number)
            if reply is None:
                continue
            row = {
                "label": label,
                "round": number,
                "order": order,
                "tokens_per_second": reply.tokens_per_second,
                "eval_count": reply.eval_count,
                "eval_duration": reply.eval_duration,
            }
            keep(row)
            rows.append(row)
    return rows


def _sample(
    endpoint: Endpoint, model: str, prompt: str, tokens: int, options: Mapping[str, Any] | None, seed: int
) -> Reply | None:
    """An answer of exactly `tokens` tokens from a loaded model, or None."""
    for draw in range(REDRAWS):
        request = {**BABBLE, **(options or {}), "seed": seed + draw, "num_predict": tokens}
        try:
            reply = endpoint.generate(model, prompt, request)
        except Unanswered:
            return None
        if reply.eval_count == tokens and reply.eval_duration > 0 and reply.load_duration < RELOADED:
            return reply
    return None
