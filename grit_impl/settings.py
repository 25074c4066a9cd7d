"""Options declared once, as the fields of a dataclass: pytest, its configuration file and the command line offer them.

@dataclass(frozen=True)
class Thresholds:
    min_retention: float = setting(70.0, "percent of the base's knowledge that must be kept", percentage)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar
from urllib.parse import urlparse

from grit_impl.errors import GRITError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Kind = Callable[[str], Any]
"""Reads a text, or raises `ValueError`; its docstring says what the text must be, for whoever got it wrong."""


def number(text: str) -> float:
    """a number"""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def points(text: str) -> float:
    """a number between -100 and 100"""
    if not -100 <= (value := number(text)) <= 100:
        raise ValueError(text)
    return value


def points_or_nothing(text: str) -> float | None:
    """a number between -100 and 100, or nothing"""
    return points(text) if text and text != "None" else None


def positive(text: str) -> float:
    """a number above 0"""
    if (value := number(text)) <= 0:
        raise ValueError(text)
    return value


def percentage(text: str) -> float:
    """a percentage between 0 and 100"""
    value = number(text.removesuffix("%"))
    if not 0 <= value <= 100:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    """a whole number of at least 1"""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def count_or_nothing(text: str) -> int | None:
    """a whole number of at least 1"""
    return count(text) if text and text != "None" else None


def whole(text: str) -> int:
    """a whole number of at least 0"""
    if (value := int(text)) < 0:
        raise ValueError(text)
    return value


def seed(text: str) -> int:
    """a whole number between 0 and 4294967295"""
    if not 0 <= (value := int(text)) < 2**32:
        raise ValueError(text)
    return value


def url(text: str) -> str:
    """an http address such as http://localhost:11434"""
    if not text:
        return ""
    address = text if "://" in text else f"http://{text}"
    parts = urlparse(address)
    _ = parts.port
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(text)
    return address.rstrip("/")


def setting(default: Any, help: str, kind: Kind = str) -> Any:
    """A dataclass field that is an option.

    Args:
        default: Its value where nothing is given; False makes it a switch.
        help: What it sets, beginning in lower case, without a full stop.
        kind: What its text must be.
    """
    return field(default=default, metadata={"help": help, "kind": kind})


def flag(name: str) -> str:
    """`min_delta_aqi` -> `--min-delta-aqi`."""
    return "--" + name.replace("_", "-")


def shown(option: Field[Any]) -> str:
    """The default as help texts show it."""
    if isinstance(option.default, float):
        return f"{option.default:g}"
    return "none" if option.default in (None, "") else str(option.default)


def read(option: Field[Any], text: Any) -> Any:
    """The value that a text gives an option.

    Raises:
        GRITError: the text is not what the option takes.
    """
    if isinstance(option.default, bool):
        return bool(text)
    kind: Kind = option.metadata["kind"]
    try:
        return kind(str(text).strip())
    except ValueError:
        raise GRITError(f"{flag(option.name)} takes {kind.__doc__ or 'something else'}, not {str(text)!r}") from None


def parse(cls: type[T], texts: Mapping[str, Any]) -> T:
    """An instance from texts as they were typed; None or a missing name stands for the default.

    Raises:
        GRITError: a text is not what its option takes.
    """
    given = {each.name: texts.get(each.name) for each in fields(cls)}  # type: ignore[arg-type]
    return cls(**{e.name: read(e, given[e.name]) for e in fields(cls) if given[e.name] is not None})  # type: ignore[arg-type]


def pick(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance from the values among which those of its fields are."""
    return cls(**{each.name: values[each.name] for each in fields(cls)})  # type: ignore[arg-type]


def click_options(cls: type[Any], *only: str) -> Callable[[F], F]:
    """Decorator: the options of a dataclass, or those named, for a click command, which is given their values."""
    import click

    def decorate(command: F) -> F:
        for each in reversed(fields(cls)):
            if not only or each.name in only:
                command = click.option(flag(each.name), callback=value, **_click_attributes(each))(command)
        return command

    def value(_: click.Context, parameter: click.Parameter, text: Any) -> Any:
        option = next(each for each in fields(cls) if each.name == parameter.name)
        return option.default if text is None else read(option, text)

    return decorate


def _click_attributes(option: Field[Any]) -> dict[str, Any]:
    text = str(option.metadata["help"])
    text = f"{text[0].upper()}{text[1:]}."
    if isinstance(option.default, bool):
        return {"is_flag": True, "help": text}
    default = "" if option.default in (None, "") else f"  [default: {shown(option)}]"
    return {"metavar": option.name.rpartition("_")[2].upper(), "help": text + default}
