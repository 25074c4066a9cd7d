"""The ways in which an exported model can differ from the trained one, by name."""

from __future__ import annotations

from dataclasses import dataclass

MODES = {
    "rope-permutation": "query and key rows are in Hugging Face's rotary order, not llama.cpp's",
    "rope-parameters": "the rotary base or Llama 3's frequency divisors are lost or changed",
    "peft-adapter": "ADAPTER names a PEFT folder: Ollama permutes the wrong factor; export the adapter as GGUF",
    "adapter-scaling": "PEFT's true scaling (rsLoRA, alpha_pattern, rank_pattern) is not the one applied",
    "chat-template": "the served prompt format is not the training format",
    "stop-token": "a token that ends an answer is unknown to the served model",
    "missing-merges": "the tokenizer's merges are missing",
    "pre-tokenizer": "text is split differently before the merges, so that token ids differ",
    "bos": "the BOS token is missing or doubled",
    "output-head": "the output matrix is missing, or tied where it was trained apart",
    "vocabulary-size": "the vocabulary and the embedding have different sizes",
    "qlora-merge-base": "a QLoRA adapter is merged into other weights than those it was trained on",
    "no-op-merge": "the adapter is not in the exported weights, or changes nothing",
    "wrong-base": "the adapter belongs to another base model",
    "evaluation-artefact": "the measurement itself is off: cut prompts, too few tokens, errors inside a stream",
    "wrong-adapter": "the file was made from another state of the adapter",
    "settings": "a setting that the engine builds the model from is not the trained model's",
    "vocabulary": "tokens or merges are not those of training",
    "engine": "llama.cpp computes another model than the file's numbers make",
    "rounding": "rounding to the file's number type costs more than is allowed",
    "weights": "a tensor differs from the trained one beyond its number type's rounding",
    "load": "llama.cpp cannot load the file",
}

# llama.cpp's complaint when loading, and the failure behind it.
LOAD_ERRORS = {
    "merges": "missing-merges",
    "pre-tokenizer": "pre-tokenizer",
    "wrong shape": "vocabulary-size",
    "token_embd": "vocabulary-size",
    "rope_freqs": "rope-parameters",
}


@dataclass(frozen=True)
class Finding:
    """One failure: its name (a key of `MODES`) and what was found."""

    mode: str
    detail: str

    def __str__(self) -> str:
        return f"{self.mode}: {self.detail} ({MODES[self.mode]})"


def from_load_error(message: str) -> Finding:
    """The failure mode behind llama.cpp's refusal to load a file."""
    reason = message.rsplit(": ", 1)[-1]
    mode = next((mode for text, mode in LOAD_ERRORS.items() if text in message), "load")
    return Finding(mode, reason)
