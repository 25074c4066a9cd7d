"""Ollama's Modelfile: written with everything explicit, and read as Ollama reads it.

An explicit TEMPLATE matters: without one Ollama guesses a chat format from the GGUF's Jinja template by edit distance,
and silently takes another model's when it is near.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.record import write_atomic

# The training format (`grit_impl.recipes.datasets.ALPACA_TEMPLATE`) in Go's template language.
TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}"
    ),
    "plain": "{{ .Prompt }}{{ .Response }}",
}
INTEGERS = [
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "num_keep",
    "seed",
    "num_predict",
    "top_k",
    "repeat_last_n",
    "draft_num_predict",
]
FLOATS = ["top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"]
DEPRECATED = [
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "tfs_z",
    "penalize_newline",
    "low_vram",
    "f16_kv",
    "logits_all",
    "vocab_only",
    "use_mlock",
    "numa",
]
COMMANDS = (
    "from",
    "adapter",
    "template",
    "system",
    "parameter",
    "message",
    "license",
    "renderer",
    "parser",
    "requires",
    "draft",
)


@dataclass
class Modelfile:
    """A parsed Modelfile. Paths are absolute; `parameters` are typed, `stop` is a list."""

    base: str
    adapters: list[Path] = field(default_factory=list)
    template: str | None = None
    system: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    license: list[str] = field(default_factory=list)

    @property
    def gguf(self) -> Path:
        """The model file that FROM names.

        Raises:
            GRITError: FROM is not an existing file. Ollama would take it for a model's name and try to pull it.
        """
        path = Path(self.base)
        if not path.is_file():
            raise GRITError(f"FROM {self.base}: no such file; a missing file would be taken for a model's name")
        return path


def write_modelfile(
    gguf: Path | str,
    out: Path | str,
    template: str | None = "alpaca",
    *,
    adapter: Path | str | None = None,
    stop: Sequence[str] = ("<|end_of_text|>",),
    temperature: float = 1.5,
    min_p: float = 0.1,
    num_ctx: int = 2048,
    system: str | None = None,
) -> Path:
    """Write a Modelfile for a GGUF file, with the training format as its explicit TEMPLATE.

    Args:
        gguf: The model; the Modelfile names it relative to its own folder, so that both can be moved together.
        out: The Modelfile.
        template: "alpaca", "plain", or a Go template (`Export.template`); None writes no TEMPLATE, so that Ollama uses
            the file's own, or guesses.
        adapter: A GGUF adapter over `gguf`.
        stop: Texts that end an answer; pass `Export.stops`.
        temperature: For chat; an evaluation overrides it with 0 and a seed.
        min_p: Smallest probability kept, relative to the most likely token's.
        num_ctx: Context window in tokens.
        system: System prompt.

    Raises:
        GRITError: the template is unknown, or the file cannot be written.
    """
    target = Path(out)
    text = TEMPLATES.get(template, template) if template is not None else None
    if text is not None and "{{" not in text:
        raise GRITError(f"unknown template {template!r}: one of {', '.join(TEMPLATES)}, or a Go template")
    lines = [f"FROM {_relative(Path(gguf), target.parent)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_relative(Path(adapter), target.parent)}")
    if text is not None:
        lines.append(f"TEMPLATE {_quote(text)}")
    if system:
        lines.append(f"SYSTEM {_quote(system)}")
    lines += [f"PARAMETER stop {_quote(s)}" for s in stop]
    lines += [f"PARAMETER temperature {temperature}", f"PARAMETER min_p {min_p}", f"PARAMETER num_ctx {num_ctx}"]
    return write_atomic(target, "\n".join(lines) + "\n")


def read_modelfile(path: Path | str) -> Modelfile:
    """Read a Modelfile from disk; paths in it are relative to its folder.

    Raises:
        GRITError: unreadable, or not a valid Modelfile (with the line).
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GRITError(f"Modelfile {source} cannot be read: {error}") from error
    return parse_modelfile(text, source.parent, str(source))


def find_modelfile(path: Path) -> Path:
    """The GGUF file or Modelfile that `path` is, or the Modelfile of the run folder that it is.

    Raises:
        GRITError: it is none of them.
    """
    if path.is_file():
        return path
    for candidate in (path / "Modelfile", path / "gguf" / "Modelfile"):
        if candidate.is_file():
            return candidate
    raise GRITError(f"{path} is no GGUF file, no Modelfile, and no folder with one: run grit export first")


def parse_modelfile(text: str, folder: Path, name: str = "Modelfile") -> Modelfile:
    """Parse a Modelfile's text (grammar of Ollama's `parser/parser.go`)."""
    parsed = Modelfile(base="")
    if "\0" in text:
        raise GRITError(f"{name} is no text: it holds a NUL character")
    for line, command, value in _commands(text, name):
        if command == "from":
            path = (folder / value).resolve()
            parsed.base = str(path) if path.exists() or value.startswith((".", "/")) else value
        elif command == "adapter":
            parsed.adapters.append((folder / value).resolve())
        elif command == "template":
            parsed.template = value
        elif command == "system":
            parsed.system = value
        elif command == "license":
            parsed.license.append(value)
        elif command == "message":
            role, _, content = value.partition(" ")
            if role not in ("system", "user", "assistant"):
                raise GRITError(f'{name}, line {line}: message role must be one of "system", "user", or "assistant"')
            parsed.messages.append({"role": role, "content": _unquote(content.strip())})
        elif command == "parameter":
            key, _, raw = value.partition(" ")
            _set_parameter(parsed.parameters, key, _unquote(raw.strip()), f"{name}, line {line}")
    if not parsed.base:
        raise GRITError(f"{name}: no FROM line")
    return parsed


def _set_parameter(parameters: dict[str, Any], key: str, raw: str, where: str) -> None:
    try:
        if key == "stop":
            parameters.setdefault("stop", []).append(raw)
        elif key in INTEGERS:
            parameters[key] = int(raw)
        elif key in FLOATS:
            parameters[key] = float(raw)
        elif key in ("use_mmap", "shift", "truncate"):
            parameters[key] = {"true": True, "false": False, "1": True, "0": False}[raw.lower()]
        elif key not in DEPRECATED:
            raise GRITError(f"{where}: unknown parameter '{key}'")
    except (ValueError, KeyError) as error:
        if isinstance(error, GRITError):
            raise
        raise GRITError(f"{where}: invalid value {raw!r} for parameter {key}") from None


def _commands(text: str, name: str) -> list[tuple[int, str, str]]:
    """(line, lower-case command, value); a value in triple quotes may span lines."""
    found = []
    lines = text.split("\n")
    i = 0
    while i < len(lines):
        number, line = i + 1, lines[i].strip()
        i += 1
        if not line or line.startswith("#"):
            continue
        command, _, value = line.partition(" ")
        command, value = command.lower(), value.strip()
        if command not in COMMANDS:
            raise GRITError(f"{name}, line {number}: command must be one of {', '.join(c.upper() for c in COMMANDS)}")
        head = re.match(r'((?:system|user|assistant|[a-z_]+)\s+)?"""', value)
        if head and not (value.endswith('"""') and len(value) >= head.end() + 3):
            # The first line keeps its own spaces, which the strip above would lose.
            parts = [lines[i - 1].split('"""', 1)[1]]
            while i < len(lines) and '"""' not in lines[i]:
                parts.append(lines[i])
                i += 1
            if i == len(lines):
                raise GRITError(f'{name}, line {number}: """ is never closed')
            parts.append(lines[i].rsplit('"""', 1)[0])
            i += 1
            value = (head[1] or "") + '"""' + "\n".join(parts) + '"""'
        found.append((number, command, _unquote(value) if command not in ("parameter", "message") else value))
    return found


def _unquote(value: str) -> str:
    if len(value) >= 6 and value.startswith('"""') and value.endswith('"""'):
        return value[3:-3]
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


def _quote(value: str) -> str:
    if '"""' in value:
        raise GRITError('a Modelfile value cannot hold """')
    return f'"""{value}"""' if "\n" in value or '"' in value or value != value.strip() else f'"{value}"'


def _relative(path: Path, folder: Path) -> str:
    inside = os.path.relpath(path.resolve(), folder.resolve())
    return str(path.resolve()) if inside.startswith("..") else f"./{inside}"
