"""A byte-level BPE tokenizer as GGUF metadata.

Source: llama.cpp's `convert_hf_to_gguf.py` (`_set_vocab_gpt2`). It recognises a pre-tokenizer by hashing the ids of a
test string, which fails on a tokenizer trained elsewhere; here the split expression itself is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.checkpoint import Checkpoint, read_json
from grit_impl.gguf.splits import split_name

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file needs to tokenise as the Hugging Face tokenizer does."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    bos: int | None
    eos: list[int]
    pad: int | None
    add_bos: bool
    chat_template: str | None

    @property
    def stops(self) -> list[str]:
        """The texts of all tokens that end an answer."""
        return [self.tokens[i] for i in self.eos]

    def write(self, writer: GGUFWriter) -> None:
        """Add the tokenizer's keys to a GGUF file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos[0])
        if len(self.eos) > 1:
            # GGUF has one slot for the end of the text and one for the end of a turn; llama.cpp stops at both.
            writer.add_eot_token_id(self.eos[1])
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.add_bos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(base: Checkpoint, rows: int) -> Vocabulary:
    """Read the tokenizer next to a model whose embedding has `rows` rows.

    Raises:
        GRITError: the tokenizer is no byte-level BPE, has no merges, splits text in a way llama.cpp does not know, has
            more tokens than the embedding has rows, or names no end of text.
    """
    from tokenizers import Tokenizer

    path = base.folder / "tokenizer.json"
    data = read_json(path)
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise GRITError(f"cannot export {path}: a {model.get('type')} tokenizer; only byte-level BPE is supported")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    if not merges:
        raise GRITError(f"missing-merges: {path} has no BPE merges, and llama.cpp would not load the file")
    added = {entry["id"]: entry for entry in data.get("added_tokens") or []}
    by_id = {i: text for text, i in model["vocab"].items()} | {i: entry["content"] for i, entry in added.items()}
    if max(by_id) >= rows:
        raise GRITError(f"vocabulary-size: {path} has token id {max(by_id)}, the embedding only {rows} rows; resize it")
    # The embedding may have more rows than there are tokens (padded to a multiple); llama.cpp wants a name for each.
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [_type(i, by_id, added) for i in range(rows)]
    settings = _settings(base)
    ids = {text: i for i, text in by_id.items()}
    bos = _token_id(settings.get("bos_token"), ids, base.config.get("bos_token_id"))
    eos = _ends(base, ids, settings)
    first = Tokenizer.from_file(str(path)).encode("a").ids
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        pre=_pre_tokenizer(data, str(path)),
        bos=bos,
        eos=eos,
        pad=_token_id(settings.get("pad_token"), ids, base.config.get("pad_token_id")),
        add_bos=bos is not None and bool(first) and first[0] == bos,
        chat_template=_chat_template(base, settings),
    )


def _settings(base: Checkpoint) -> dict[str, Any]:
    path = base.folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _type(i: int, by_id: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if i not in by_id:
        return UNUSED
    if i in added:
        return CONTROL if added[i].get("special") else USER_DEFINED
    return NORMAL


def _token_id(token: Any, ids: dict[str, int], default: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str) and text in ids:
        return ids[text]
    return default if isinstance(default, int) else None


def _ends(base: Checkpoint, ids: dict[str, int], settings: dict[str, Any]) -> list[int]:
    """The end token first, then the others that generation stops at (Llama 3 has two)."""
    generation = base.folder / "generation_config.json"
    settings_file = read_json(generation) if generation.exists() else {}
    declared = settings_file.get("eos_token_id", base.config.get("eos_token_id"))
    listed = declared if isinstance(declared, list) else [declared]
    ends = [_token_id(settings.get("eos_token"), ids, None), *listed]
    found = list(dict.fromkeys(int(i) for i in ends if i is not None))
    if not found:
        raise GRITError(f"stop-token: {base.folder} names no eos_token, so generation would never end; set it")
    return found


def _chat_template(base: Checkpoint, settings: dict[str, Any]) -> str | None:
    # transformers 5 keeps the template in a file of its own, 4 in tokenizer_config.json.
    path = base.folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def _pre_tokenizer(data: dict[str, Any], path: str) -> str:
    found = split_name(data.get("pre_tokenizer"))
    if found is None or data.get("normalizer"):
        steps = (data.get("pre_tokenizer") or {}).get("pretokenizers", [data.get("pre_tokenizer") or {}])
        raise GRITError(
            f"pre-tokenizer: {path} splits text with {[step.get('type') for step in steps]}, for which llama.cpp has "
            "no name; use Llama 3's split"
        )
    return found
