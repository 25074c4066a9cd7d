"""How text is cut before the merges: llama.cpp's names (llama-vocab.cpp) and Hugging Face's pre-tokenizers."""

from __future__ import annotations

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Digits are the only difference of the two.
SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _TAIL: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _TAIL: "qwen2",
}
# GPT-2's own expression, after each digit was cut off or not.
GPT2 = {"gpt-2": False, "smollm": True}


def split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of the `pre_tokenizer` in a tokenizer.json; None if it has none."""
    pre = pre_tokenizer or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    regexes = [step["pattern"]["Regex"] for step in steps if step.get("type") == "Split" and "Regex" in step["pattern"]]
    digits_apart = any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps)
    gpt2_split = any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps)
    if "ByteLevel" not in kinds or set(kinds) - {"Split", "ByteLevel", "Digits"}:
        return None
    if len(regexes) == 1 and not gpt2_split and regexes[0] in SPLITS:
        # Digits cut apart first are what the one-digit split gives, too.
        return "qwen2" if digits_apart else SPLITS[regexes[0]]
    if not regexes and gpt2_split:
        return "smollm" if digits_apart else "gpt-2"
    return None


def pre_tokenizer(name: str) -> Any:
    """The `tokenizers` object that cuts text as llama.cpp does under this name; None if the name is not known."""
    from tokenizers import Regex, pre_tokenizers

    if name in GPT2:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if GPT2[name] else []
        return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    expression = next((text for text, known in SPLITS.items() if known == name), None)
    if expression is None:
        return None
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
