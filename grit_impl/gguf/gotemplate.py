"""The part of Go's text/template that Modelfiles use, and Ollama's rules for rendering messages with it.

Actions: fields and variables, if / else if / else / with / range / end, assignment, pipelines, comments, trim markers;
functions: and or not eq ne lt le gt ge len index slice printf json, and Ollama's currentDate and last. Sources: Go's
text/template documentation; Ollama's `template/template.go`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|`[^`]*`|:=|[()|,=]|\$?[\w.$]+|-?\d+')
_DEPTH = 64
_OUTPUT = 4 << 20


class TemplateError(ValueError):
    """A template that cannot be parsed or executed; the message reads like Go's."""


@dataclass
class Node:
    """`kind` is text, action, if, with, range or else; `text` the text or the pipeline."""

    kind: str
    text: str
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


class Template:
    """A parsed template.

    Args:
        source: Go template text. Without `.Messages` and `.Response`, `{{ .Response }}` is appended, as Ollama does.

    Raises:
        TemplateError: it cannot be parsed.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.nodes = _parse(source)
        names = set(self._identifiers(self.nodes))
        self.uses_messages = "Messages" in names
        if not names & {"Messages", "Response"}:
            self.nodes.append(Node("action", ".Response"))

    def render(self, messages: list[Message]) -> str:
        """The prompt of a conversation, up to where the model's answer begins."""
        system, merged = collate(messages)
        if self.uses_messages:
            data = {"System": system, "Messages": [_exported(m) for m in merged], "Response": "", "Tools": None}
            return _execute(self.nodes, data)
        return self._legacy(merged)

    def render_fill(self, prompt: str, suffix: str) -> str:
        """The prompt for filling in between `prompt` and `suffix`."""
        return _execute(self.nodes, {"Prompt": prompt, "Suffix": suffix, "Response": "", "System": ""})

    def _legacy(self, messages: list[Message]) -> str:
        turn = {"System": "", "Prompt": "", "Response": ""}
        out = []

        def flush() -> None:
            out.append(_execute(self.nodes, dict(turn)))
            turn.update(System="", Prompt="", Response="")

        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system":
                if turn["Prompt"] or turn["Response"]:
                    flush()
                turn["System"] = content
            elif role == "user":
                if turn["Response"]:
                    flush()
                turn["Prompt"] = content
            elif role == "assistant":
                turn["Response"] = content
        # The last turn ends where the model is to continue.
        cut, _ = _cut_after_response(self.nodes)
        return "".join(out) + _execute(cut, turn)

    def _identifiers(self, nodes: list[Node]) -> Iterator[str]:
        for node in nodes:
            if node.kind != "text":
                yield from re.findall(r"\.([A-Z]\w*)", node.text)
            yield from self._identifiers(node.body)
            yield from self._identifiers(node.otherwise)


def collate(messages: list[Message]) -> tuple[str, list[Message]]:
    """All system texts joined, and the messages with neighbours of one role joined by an empty line."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] != "tool":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(dict(message))
    return "\n\n".join(system), merged


def _exported(message: Message) -> dict[str, Any]:
    return {"Role": message["role"], "Content": message["content"], "ToolCalls": None, "Thinking": "", "Images": None}


def _cut_after_response(nodes: list[Node]) -> tuple[list[Node], bool]:
    """Drop the first action that prints .Response and everything behind it."""
    kept: list[Node] = []
    for node in nodes:
        if node.kind != "text" and re.search(r"\.Response\b", node.text):
            return kept, True
        body, cut = _cut_after_response(node.body)
        otherwise, cut_else = _cut_after_response(node.otherwise)
        kept.append(Node(node.kind, node.text, body, otherwise))
        if cut or cut_else:
            return kept, True
    return kept, False


def _parse(source: str) -> list[Node]:
    root: list[Node] = []
    stack: list[tuple[Node | None, list[Node]]] = [(None, root)]
    position, trim = 0, False
    while position < len(source):
        start = source.find("{{", position)
        text = source[position:] if start < 0 else source[position:start]
        if trim:
            text = text.lstrip()
        left = start >= 0 and source[start + 2 : start + 4].startswith("-") and source[start + 3 : start + 4].isspace()
        if left:
            text = text.rstrip()
        if text:
            stack[-1][1].append(Node("text", text))
        if start < 0:
            break
        inner_start = start + (3 if left else 2)
        end = _action_end(source, inner_start)
        inner = source[inner_start:end]
        trim = inner.endswith("-") and inner[-2:-1].isspace()
        inner = (inner[:-1] if trim else inner).strip()
        position = end + 2
        if not inner.startswith("/*"):
            _add(inner, stack)
    if len(stack) > 1:
        raise TemplateError("template: unexpected EOF")
    return root


def _action_end(source: str, start: int) -> int:
    for match in re.compile(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`|/\*.*?\*/|\}\}', re.DOTALL).finditer(source, start):
        if match[0] == "}}":
            return match.start()
    raise TemplateError("template: unclosed action")


def _add(inner: str, stack: list[tuple[Node | None, list[Node]]]) -> None:
    word, _, rest = inner.partition(" ")
    if word in ("if", "with", "range"):
        node = Node(word, rest.strip())
        if not node.text:
            raise TemplateError(f"template: missing value for {word}")
        stack[-1][1].append(node)
        if len(stack) >= _DEPTH:
            raise TemplateError("template: nested too deeply")
        stack.append((node, node.body))
    elif word == "else":
        node_or_none = stack[-1][0]
        if node_or_none is None or stack[-1][1] is node_or_none.otherwise:
            raise TemplateError("template: unexpected {{else}}")
        stack[-1] = (node_or_none, node_or_none.otherwise)
        if rest.startswith("if "):
            # An else-if closes together with the if that it belongs to.
            nested = Node("if", rest[3:].strip())
            node_or_none.otherwise.append(nested)
            stack[-1] = (nested, nested.body)
    elif word == "end":
        if len(stack) == 1:
            raise TemplateError("template: unexpected {{end}}")
        stack.pop()
    elif word in ("define", "template", "block", "break", "continue"):
        raise TemplateError(f"template: {word} is not supported")
    elif not inner:
        raise TemplateError("template: missing value for command")
    else:
        _tokens(inner)
        stack[-1][1].append(Node("action", inner))


def _execute(nodes: list[Node], data: dict[str, Any]) -> str:
    out: list[str] = []
    _Run(data, out).walk(nodes, data, {"$": data})
    return "".join(out)


class _Run:
    def __init__(self, data: dict[str, Any], out: list[str]) -> None:
        self.data, self.out, self.written = data, out, 0

    def write(self, text: str) -> None:
        self.written += len(text)
        if self.written > _OUTPUT:
            raise TemplateError("template: output too long")
        self.out.append(text)

    def walk(self, nodes: list[Node], dot: Any, variables: dict[str, Any]) -> None:
        for node in nodes:
            if node.kind == "text":
                self.write(node.text)
            elif node.kind == "action":
                if (assigned := _assignment(node.text)) is not None:
                    variables[assigned[0]] = _evaluate(assigned[1], dot, variables)
                else:
                    self.write(_text(_evaluate(node.text, dot, variables)))
            else:
                self.branch(node, dot, variables)

    def branch(self, node: Node, dot: Any, variables: dict[str, Any]) -> None:
        names, pipeline = _range_variables(node.text) if node.kind == "range" else ([], node.text)
        assigned = _assignment(pipeline) if node.kind != "range" else None
        value = _evaluate(assigned[1] if assigned else pipeline, dot, variables)
        scope = {**variables, assigned[0]: value} if assigned else variables
        if node.kind == "range":
            items = list(value) if isinstance(value, list | tuple) else []
            for i, item in enumerate(items):
                pair = [i, item] if len(names) == 2 else [item]
                self.walk(node.body, item, {**variables, **dict(zip(names, pair, strict=False))})
            if not items:
                self.walk(node.otherwise, dot, variables)
        elif _truth(value):
            self.walk(node.body, value if node.kind == "with" else dot, scope)
        else:
            self.walk(node.otherwise, dot, scope)


def _assignment(text: str) -> tuple[str, str] | None:
    match = re.match(r"(\$\w+)\s*:?=\s*(.+)$", text, re.DOTALL)
    return (match[1], match[2]) if match else None


def _range_variables(text: str) -> tuple[list[str], str]:
    match = re.match(r"((?:\$\w+\s*,\s*)?\$\w+)\s*:=\s*(.+)$", text, re.DOTALL)
    return ([n.strip() for n in match[1].split(",")], match[2]) if match else ([], text)


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    for match in _TOKEN.finditer(text):
        if text[position : match.start()].strip():
            raise TemplateError(f"template: unexpected {text[position : match.start()].strip()!r} in command")
        tokens.append(match[0])
        position = match.end()
    if text[position:].strip():
        raise TemplateError(f"template: unexpected {text[position:].strip()!r} in command")
    return tokens


def _evaluate(text: str, dot: Any, variables: dict[str, Any]) -> Any:
    tokens = _tokens(text)
    value, rest = _pipeline(tokens, dot, variables, 0)
    if rest:
        raise TemplateError(f"template: unexpected {rest[0]!r} in operand")
    return value


def _pipeline(tokens: list[str], dot: Any, variables: dict[str, Any], depth: int) -> tuple[Any, list[str]]:
    if depth > _DEPTH:
        raise TemplateError("template: nested too deeply")
    value: Any = None
    piped = False
    while True:
        words: list[Any] = []
        name = ""
        while tokens and tokens[0] not in ("|", ")"):
            token, tokens = tokens[0], tokens[1:]
            if token == "(":
                inner, tokens = _pipeline(tokens, dot, variables, depth + 1)
                if not tokens:
                    raise TemplateError("template: unclosed left paren")
                words.append(inner)
                tokens = tokens[1:]
            elif not words and not name and token in _FUNCTIONS:
                name = token
            else:
                words.append(_operand(token, dot, variables))
        if piped:
            words.append(value)
        value = _call(name, words)
        if not tokens or tokens[0] == ")":
            return value, tokens
        tokens, piped = tokens[1:], True


def _call(name: str, words: list[Any]) -> Any:
    if name:
        try:
            return _FUNCTIONS[name](*words)
        except (TypeError, IndexError, KeyError, ValueError) as error:
            raise TemplateError(f"template: error calling {name}: {error}") from None
    if len(words) != 1:
        raise TemplateError("template: can't give argument to non-function" if words else "template: missing value")
    return words[0]


def _operand(token: str, dot: Any, variables: dict[str, Any]) -> Any:
    if token[0] == '"':
        try:
            return json.loads(token)
        except json.JSONDecodeError:
            raise TemplateError(f"template: bad string {token}") from None
    if token[0] == "`":
        return token[1:-1]
    if token in ("true", "false"):
        return token == "true"
    if token == "nil":
        return None
    if re.fullmatch(r"-?\d+", token):
        return int(token)
    if token == ".":
        return dot
    head, *path = token.split(".")
    if head.startswith("$"):
        if head not in variables:
            raise TemplateError(f"template: undefined variable {head!r}")
        value = variables[head]
    elif head == "":
        value = dot
    else:
        raise TemplateError(f'template: function "{head}" not defined')
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _truth(value: Any) -> bool:
    return bool(value)


def _text(value: Any) -> str:
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else str(value)


def _and(*values: Any) -> Any:
    return next((v for v in values if not _truth(v)), values[-1])


def _or(*values: Any) -> Any:
    return next((v for v in values if _truth(v)), values[-1])


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(key, int) and not 0 <= key < len(value):
            raise IndexError("index out of range")
        value = value[key] if not isinstance(value, dict) else value.get(key)
    return value


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    return value[start:end]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": _and,
    "or": _or,
    "not": lambda value: not _truth(value),
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "len": lambda value: len(value or ()),
    "index": _index,
    "slice": _slice,
    "print": lambda *values: "".join(_text(v) for v in values),
    "printf": lambda form, *values: form.replace("%v", "%s") % values,
    "json": lambda value: json.dumps(value, ensure_ascii=False),
    "currentDate": lambda: datetime.date.today().isoformat(),
    "last": lambda values: values[-1] if values else None,
}
