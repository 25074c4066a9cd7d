"""An Ollama TEMPLATE that renders conversations as a model's own (Jinja) chat template does.

The chat template is rendered with marked contents, and what stands between the marks becomes the text of the Go
template. Whether the two agree is then tried on other conversations.
"""

from __future__ import annotations

from collections.abc import Callable

from grit_impl.errors import GRITError
from grit_impl.gguf.gotemplate import Message, Template

Render = Callable[[list[Message]], str]
"""The prompt of a conversation, up to where the model's answer begins."""
USER, SYSTEM, ANSWER, NEXT = "<[user]>", "<[system]>", "<[answer]>", "<[next]>"
# Every other one begins with a system prompt.
TRIALS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)


def go_template(render: Render) -> str:
    """The Go template.

    Args:
        render: The chat template; raises `GRITError` where it takes no such conversation.

    Raises:
        GRITError: no such template renders as this one does.
    """
    head, ask = _between(render([_message("user", USER)]), USER)
    trials: tuple[tuple[str, ...], ...] = TRIALS
    try:
        told = render([_message("system", SYSTEM), _message("user", USER)])
        before_system, between, _ = _between(told, SYSTEM, USER)
    except GRITError:
        # It takes no system prompt: one that is set all the same stands before the first question.
        before_system, between, trials = head, "\n\n", TRIALS[::2]
    conversation = [_message("user", USER), _message("assistant", ANSWER), _message("user", NEXT)]
    following = _between(render(conversation), USER, ANSWER, NEXT)[2]
    source = (
        f"{{{{ if .System }}}}{before_system}{{{{ .System }}}}{between}{{{{ else }}}}{head}{{{{ end }}}}"
        f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{ask}'
        '{{ else if eq .Role "assistant" }}{{ .Content }}'
        f"{{{{ if gt (len (slice $.Messages $i)) 1 }}}}{following}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )
    template = Template(source)
    for roles in trials:
        messages = [_message(role, f"Text {i} of {role}: 1 < 2, 'so'") for i, role in enumerate(roles)]
        if (ours := template.render(messages)) != (theirs := render(messages)):
            raise GRITError(
                f"the chat template cannot be written as a TEMPLATE for Ollama: it renders {theirs[:60]!r} where the "
                f"TEMPLATE would give {ours[:60]!r}"
            )
    return source


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _between(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise GRITError(f"the chat template does not repeat what is said: {mark} is missing in {part[:60]!r}")
        parts.append(part)
    if any("{{" in part for part in (*parts, text)):
        raise GRITError("the chat template writes {{, which a TEMPLATE for Ollama cannot")
    return [*parts, text]
