"""Which of several answers a model finds likeliest: independent of how it would phrase one.

A question's answers are compared by the probability that the model gives to each of them after the question, as
lm-evaluation-harness does for multiple choice. Ollama's API has no log-probabilities of a given text, but those of what
is generated, as they were before sampling; and `format` can allow one string alone. The model then writes this string,
in quotes, and the log-probabilities are its own. Of the opening quote, which is the same for all answers, they do not
count; a model that has never seen quotes is better judged by its answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from grit_impl.serve.client import Endpoint, Unanswered


def likelihood(
    endpoint: Endpoint, model: str, prompt: str, text: str, options: Mapping[str, Any], **fields: Any
) -> float:
    """Log-probability (nats) of an answer in quotes after the prompt, its end included.

    Args:
        endpoint: The server.
        model: Name on the server.
        prompt: The question, which goes through the model's template.
        text: The answer.
        options: Ollama options, e.g. `num_ctx`.
        **fields: Further fields of the request, e.g. `system`.

    Raises:
        Unanswered: no trustworthy answer, or a server that gives no log-probabilities (`faults`: `no-logprobs`).
    """
    quoted = json.dumps(text, ensure_ascii=False)
    only = {"type": "string", "enum": [text]}
    room = {**options, "temperature": 0.0, "num_predict": len(quoted.encode()) + 4, "stop": []}
    reply = endpoint.generate(model, prompt, room, format=only, logprobs=True, **fields)
    written, total = "", 0.0
    for number, (token, logprob, *_) in enumerate(reply.logprobs):
        written += token
        total += logprob if number or token != '"' else 0.0
        if written.strip() == quoted:
            return total
    raise Unanswered(f"{endpoint.url} gives no log-probabilities of a given answer", ["no-logprobs"])


def likeliest(
    endpoint: Endpoint, model: str, prompt: str, texts: Iterable[str], options: Mapping[str, Any], **fields: Any
) -> tuple[str, dict[str, float]]:
    """The answer that the model finds likeliest, and the log-probability of each (nats); see `likelihood`."""
    found = {text: likelihood(endpoint, model, prompt, text, options, **fields) for text in texts}
    return max(found, key=lambda text: found[text]), found
