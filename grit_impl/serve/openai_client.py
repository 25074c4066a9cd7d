"""The same distrustful client for a server that speaks OpenAI's API alone: vLLM, llama.cpp's own, or a paid one.

An address that ends in `/v1` is one. Such a server says neither how a model is stored nor how long generating took, so
there is no digest and no speed; that the prompt was read whole is seen from `usage`, as with Ollama.
"""

from __future__ import annotations

from typing import Any

from grit_impl.serve.client import Endpoint, Fault, full_name, one_json

OPTIONS = {"temperature": "temperature", "seed": "seed", "num_predict": "max_tokens", "stop": "stop"}
"""What of Ollama's options OpenAI's API knows, and by which name."""


def open_endpoint(url: str | None = None, **options: Any) -> Endpoint:
    """A client for the server at this address, by what it speaks. Arguments and errors as `Endpoint`."""
    endpoint = Endpoint(url, **options)
    if not endpoint.url.endswith("/v1"):
        return endpoint
    endpoint.close()
    return OpenAIEndpoint(url, **options)


class OpenAIEndpoint(Endpoint):
    """One server that speaks OpenAI's API. Arguments as `Endpoint`."""

    counts_time = False

    def version(self) -> str:
        """That it answers; these servers have no version."""
        self._get("/models", "data")
        return "OpenAI API"

    def models(self) -> dict[str, str]:
        """The models' names; nothing is known about their files."""
        return {full_name(str(each.get("id"))): "" for each in self._get("/models", "data") or []}

    def details(self, name: str) -> dict[str, str]:
        """Nothing."""
        return {}

    def find_thinking(self, names: Any) -> list[str]:
        """Not known."""
        return []

    def _exchange(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, options = body["prompt"], body["options"]
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        asked = {theirs: options[ours] for ours, theirs in OPTIONS.items() if ours in options}
        messages = [*system, {"role": "user", "content": prompt}]
        received = self._send("POST", "/chat/completions", {"model": body["model"], "messages": messages, **asked})
        answer = one_json(received)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text, ended = choice["message"].get("content") or "", choice["finish_reason"]
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise Fault("not-json", "the answer is no chat completion") from None
        if not isinstance(text, str) or ended not in ("stop", "length"):
            raise Fault("incomplete", f"the server did not finish its answer (finish_reason {ended!r})")
        if 0 < counts[0] < len(prompt.split()):
            raise Fault("truncated-prompt", f"only {counts[0]} prompt tokens were read")
        zero = dict.fromkeys(("eval_duration", "prompt_eval_duration", "load_duration"), 0)
        return {"text": text, "done_reason": ended, "prompt_eval_count": counts[0], "eval_count": counts[1], **zero}
