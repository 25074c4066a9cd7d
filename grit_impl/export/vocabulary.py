"""A byte-level BPE tokenizer as GGUF metadata.

Source: llama.cpp's `convert_hf_to_gguf.py` (`_set_vocab_gpt2`). It recognises a pre-tokenizer by hashing the ids of a
test string, which fails on a tokenizer trained elsewhere; here the split expression itself is looked up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.checkpoint import Checkpoint, read_json
from grit_impl.gguf.splits import split_name
from grit_impl.tables import brief, one_line

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# Texts that llama.cpp takes for an end of generation, whatever a file says (llama-vocab.cpp).
KNOWN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<EOT>",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file needs to tokenise as the Hugging Face tokenizer does.

    `eos` are all tokens that end an answer, `slots` those of them that the file names; `composed`: text is to be given
    in Unicode's composed form (NFC); `template` is the chat template in Go's language, None if there is no way to say
    it; `notes` say what training's tokenizer has other than the base's.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    bos: int | None
    eos: list[int]
    slots: list[int]
    pad: int | None
    add_bos: bool
    add_eos: bool
    composed: bool
    chat_templates: dict[str, str]
    template: str | None
    notes: list[str] = field(default_factory=list)

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
        # GGUF has a place for the end of the text, of a turn and of a message; llama.cpp stops at each.
        writer.add_eos_token_id(self.slots[0])
        if len(self.slots) > 1:
            writer.add_eot_token_id(self.slots[1])
        if len(self.slots) > 2:
            writer.add_eom_token_id(self.slots[2])
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.add_bos)
        if self.add_eos:
            writer.add_add_eos_token(True)
        if len(self.chat_templates) > 1:
            writer.add_chat_template([{"name": n, "template": text} for n, text in self.chat_templates.items()])
        elif self.chat_templates:
            writer.add_chat_template(self.chat_templates["default"])


def training_folder(base: Path, adapter: Path | None) -> Path:
    """Where the tokenizer of training lies: beside the adapter if training saved one there, or with the base."""
    saved = adapter is not None and any(
        (adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    return adapter if adapter is not None and saved else base


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder as transformers loads it. Raises `GRITError` if it cannot, or is none with merges."""
    data = read_json(folder / "tokenizer.json")
    kind = (data.get("model") or {}).get("type")
    if kind != "BPE":
        raise GRITError(
            f"cannot export {folder / 'tokenizer.json'}: a {kind} tokenizer; only byte-level BPE is supported"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise many unrelated types
        reason = one_line(error)
        raise GRITError(f"transformers cannot load the tokenizer in {folder}: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise GRITError(f"cannot export the tokenizer in {folder}: transformers has no fast version of it")
    return tokenizer


def read_vocabulary(base: Checkpoint, rows: int, adapter: Path | None = None, *, retrained: bool = False) -> Vocabulary:
    """Read the tokenizer of training, for a model whose embedding has `rows` rows.

    What training saved beside its adapter wins over what lies with the base; where the two differ, `notes` say so.

    Args:
        base: The base.
        rows: Rows of the embedding.
        adapter: The adapter's folder.
        retrained: The adapter brings an embedding of its own, so that a token may have got another meaning.

    Raises:
        GRITError: the tokenizer is no byte-level BPE, has no merges, splits text in a way llama.cpp does not know, has
            more tokens than the embedding has rows, names no end of text or more than GGUF has room for, or gives a
            token of the base another text.
    """
    folder = training_folder(base.folder, adapter)
    tokenizer = load_tokenizer(folder)
    path = folder / "tokenizer.json"
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data.get("model") or {}
    if model.get("byte_fallback"):
        raise GRITError(f"cannot export {path}: a tokenizer with byte fallback; only byte-level BPE is supported")
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
    eos = _ends(base, tokenizer, adapter)
    if unknown := [i for i in eos if not 0 <= i < rows]:
        raise GRITError(f"stop-token: {folder} ends texts with token {unknown[0]}, the embedding has {rows} rows")
    around = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    if bos is None and isinstance(base.config.get("bos_token_id"), int):
        bos = base.config["bos_token_id"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else base.config.get("pad_token_id")
    found = Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        pre=_pre_tokenizer(data, str(path)),
        bos=bos,
        eos=eos,
        slots=_slots(eos, tokens, str(folder)),
        pad=pad if isinstance(pad, int) else None,
        add_bos=bos is not None and bool(around) and around[0] == bos,
        add_eos=len(around) > 1 and around[-1] == tokenizer.eos_token_id,
        composed=bool(data.get("normalizer")),
        chat_templates=_chat_templates(tokenizer, str(folder)),
        template=_go_template(tokenizer),
    )
    if folder != base.folder and (base.folder / "tokenizer.json").is_file():
        found.notes.extend(_differences(base, tokenizer, by_id, retrained))
    return found


def _differences(base: Checkpoint, tokenizer: Any, by_id: dict[int, str], retrained: bool) -> list[str]:
    """What the training's tokenizer has other than the base's."""
    other = load_tokenizer(base.folder)
    theirs = {i: text for text, i in other.get_vocab().items()}
    for i in sorted(theirs.keys() & by_id.keys()):
        if theirs[i] != by_id[i] and not retrained:
            raise GRITError(
                f"token {i} is {by_id[i]!r} in the tokenizer that training saved and {theirs[i]!r} in {base.folder}: "
                "the adapter belongs to another base, or to another tokenizer"
            )
    notes = []
    if more := sorted(by_id.keys() - theirs.keys()):
        notes.append(f"{len(more)} tokens that the base does not name, from {by_id[more[0]]!r} on")
    if tokenizer.eos_token != other.eos_token:
        notes.append(f"end token {tokenizer.eos_token!r}, the base has {other.eos_token!r}")
    if tokenizer.chat_template != other.chat_template:
        notes.append("a chat template of its own" if tokenizer.chat_template else "no chat template, unlike the base")
    return notes


def _type(i: int, by_id: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if i not in by_id:
        return UNUSED
    if i in added:
        return CONTROL if added[i].get("special") else USER_DEFINED
    return NORMAL


def _ends(base: Checkpoint, tokenizer: Any, adapter: Path | None) -> list[int]:
    """The end token first, then the others that generation stops at (Llama 3 has two)."""
    declared = base.config.get("eos_token_id")
    for folder in (base.folder, adapter):
        if folder is not None and (folder / "generation_config.json").is_file():
            declared = read_json(folder / "generation_config.json").get("eos_token_id", declared)
    listed = [i for i in (declared if isinstance(declared, list) else [declared]) if i is not None]
    if wrong := [i for i in listed if not isinstance(i, int) or isinstance(i, bool)]:
        raise GRITError(f"stop-token: eos_token_id of {base.folder} is {brief(wrong[0])}, which is no token's number")
    found = list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *listed] if i is not None))
    if not found:
        raise GRITError(f"stop-token: {base.folder} names no eos_token, so generation would never end; set it")
    return found


def _slots(eos: list[int], tokens: list[str], folder: str) -> list[int]:
    """The end tokens that are written down: the first, and those whose text llama.cpp does not take for an end."""
    slots = [eos[0], *(i for i in eos[1:] if tokens[i] not in KNOWN_ENDS)]
    # Where there is room, the others are written, too.
    slots += [i for i in eos if i not in slots][: max(0, 2 - len(slots))]
    if len(slots) > 3:
        raise GRITError(
            f"stop-token: {folder} ends texts with {', '.join(repr(tokens[i]) for i in eos)}; GGUF has room for three "
            "that llama.cpp does not know by their text"
        )
    return slots


def _chat_templates(tokenizer: Any, folder: str) -> dict[str, str]:
    """The chat templates by name; the one that is used is "default"."""
    found = tokenizer.chat_template
    if not found:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if "default" not in found:
        raise GRITError(f"chat-template: {folder} has the templates {', '.join(sorted(found))}, but none named default")
    return dict(found)


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation in the tokenizer's chat template, up to where the answer begins.

    Without the token for a beginning, where the tokenizer, and llama.cpp, put it in front of every text.
    """
    from grit_impl.recipes.datasets import DATE

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=DATE)
    except Exception as error:  # jinja's errors, and what a template raises itself
        roles = ", ".join(message["role"] for message in messages)
        raise GRITError(f"the chat template refuses a conversation of {roles}: {error}") from error
    first = tokenizer("a").input_ids[:1]
    return str(text).removeprefix(tokenizer.bos_token or "") if first == [tokenizer.bos_token_id] else str(text)


def _go_template(tokenizer: Any) -> str | None:
    """The format of training as a Modelfile's TEMPLATE; None if Go's language cannot say it."""
    from grit_impl.gguf.chat import go_template
    from grit_impl.gguf.modelfile import TEMPLATES
    from grit_impl.recipes.datasets import ALPACA_TEMPLATE

    question = {"role": "user", "content": "What is 2 + 2?"}
    try:
        # The project's own format keeps its usual form.
        if not tokenizer.chat_template or render(tokenizer, [question]) == ALPACA_TEMPLATE.format(
            instruction=question["content"]
        ):
            return TEMPLATES["alpaca"]
        return go_template(lambda messages: render(tokenizer, messages))
    except GRITError:
        return None


def _pre_tokenizer(data: dict[str, Any], path: str) -> str:
    found = split_name(data.get("pre_tokenizer"))
    # llama.cpp takes characters as they come; a tokenizer that composes them first (Qwen's) gets them composed.
    if found is None or (data.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        steps = (data.get("pre_tokenizer") or {}).get("pretokenizers", [data.get("pre_tokenizer") or {}])
        raise GRITError(
            f"pre-tokenizer: {path} splits text with {[step.get('type') for step in steps]}, for which llama.cpp has "
            "no name; use Llama 3's split"
        )
    return found
