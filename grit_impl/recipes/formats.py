"""How a model is asked: the Alpaca form for plain bases, its own chat template for the others.

The same in training, in the Modelfile, and so in every evaluation through a server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.recipes.bases import find_base, load_tokenizer
from grit_impl.recipes.datasets import DATE, Form, alpaca_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

_ANSWER = "<[answer]>"


@dataclass(frozen=True)
class Format:
    """How one base is asked.

    Attributes:
        name: `alpaca` or `chat`.
        form: Makes a prompt of an instruction and its input; None: the data sets' own, the Alpaca form.
        end: Ids of the tokens that end an answer.
        template: The TEMPLATE of a Modelfile, or the name of one.
        stop: Texts that end an answer besides the model's own end: `###` opens the Alpaca form's next section.
        room: Tokens for an answer: a chat model explains before it says a number.
    """

    name: str
    form: Form | None
    end: tuple[int, ...]
    template: str
    stop: tuple[str, ...]
    room: int

    def told(self) -> str:
        """The prompt of an instruction, with `{instruction}` in its place."""
        return (self.form or alpaca_prompt)("{instruction}", "")


def find_format(spec: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Format:
    """How this base is asked.

    Args:
        spec: What `find_base` takes.
        tokenizer: The base's, where it is loaded already.

    Raises:
        GRITError: no such base; or it has no end-of-text token, or a chat template that cannot be used.
    """
    tokenizer = tokenizer or load_tokenizer(spec)
    if tokenizer.eos_token_id is None:
        raise GRITError("the tokenizer has no end-of-text token: set its eos_token")
    name = find_base(spec).format or ("chat" if tokenizer.chat_template else "alpaca")
    if name == "alpaca":
        return Format("alpaca", None, (tokenizer.eos_token_id,), "alpaca", ("###",), 32)
    from grit_impl.gguf.chat import go_template

    chat = _Chat(tokenizer)
    return Format("chat", chat.ask, chat.end(), go_template(chat.render), (), 160)


class _Chat:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer("a")["input_ids"]
        # What the tokenizer, and llama.cpp, put in front of every text must not stand in the text as well.
        adds_bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        self.bos = tokenizer.bos_token if adds_bos else ""

    def render(self, messages: list[dict[str, str]], *, ask: bool = True) -> str:
        """The conversation as text, up to where an answer begins if `ask`."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, date_string=DATE
            )
        except Exception as error:  # jinja's errors, and what a template raises itself
            roles = ", ".join(message["role"] for message in messages)
            raise GRITError(f"the chat template refuses a conversation of {roles}: {error}") from error
        return str(text).removeprefix(self.bos)

    def ask(self, instruction: str, more: str) -> str:
        """The prompt of one question."""
        content = f"{instruction}\n\n{more}" if more.strip() else instruction
        return self.render([{"role": "user", "content": content}])

    def end(self) -> tuple[int, ...]:
        """The tokens after an answer, up to the first that is no text."""
        said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
        after = self.render(said, ask=False).rpartition(_ANSWER)[2]
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        first = next((place for place, i in enumerate(ids) if i in special), None)
        return (self.tokenizer.eos_token_id,) if first is None else tuple(ids[: first + 1])
