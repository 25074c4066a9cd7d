"""Options declared once, as the fields of a dataclass: pytest, its configuration file and the command line offer them.

@dataclass(frozen=True)
class Gates:
    min_retention: float = setting(70.0, "percent of the base's knowledge that must be kept", percentage)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar

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


def amount(text: str) -> float:
    """a number of at least 0"""
    if (value := number(text)) < 0:
        raise ValueError(text)
    return value


def fraction(text: str) -> float:
    """a number of at least 0 and below 1"""
    if not 0 <= (value := number(text)) < 1:
        raise ValueError(text)
    return value


def one_of(*choices: str) -> Kind:
    """A kind that takes one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    read.__doc__ = f"one of {', '.join(choices)}"
    return read


def words(text: str) -> str:
    """words, separated by commas"""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise ValueError(text)
    return ",".join(found)


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


def setting(default: Any, help: str, kind: Kind = str, *names: str) -> Any:
    """A dataclass field that is an option.

    Args:
        default: Its value where nothing is given; False makes it a switch.
        help: What it sets, beginning in lower case, without a full stop.
        kind: What its text must be.
        *names: What a command line calls it, the first one being what help and messages say. Default: its own name.
    """
    return field(default=default, metadata={"help": help, "kind": kind, "names": names})


def flag(name: str) -> str:
    """`min_delta_aqi` -> `--min-delta-aqi`."""
    return "--" + name.replace("_", "-")


def flags(option: Field[Any]) -> list[str]:
    """All spellings of an option on a command line, the usual one first."""
    return [flag(name) for name in option.metadata["names"] or (option.name,)]


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
        raise GRITError(f"{flags(option)[0]} takes {kind.__doc__ or 'something else'}, not {str(text)!r}") from None


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


def click_options(
    cls: type[Any], *only: str, given: bool = False, defaults: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Decorator: the options of a dataclass, or those named, for a click command, which is given their values.

    Args:
        cls: The dataclass.
        *only: Fields that become options. Default: all.
        given: Whether an option that was not given is None instead of its default.
        defaults: What help shows as the default, where that is not the field's own.
    """
    import click

    def decorate(command: F) -> F:
        for each in reversed(fields(cls)):
            if not only or each.name in only:
                attributes = _click_attributes(each, (defaults or {}).get(each.name))
                command = click.option(*flags(each), each.name, callback=value, **attributes)(command)
        return command

    def value(_: click.Context, parameter: click.Parameter, text: Any) -> Any:
        option = next(each for each in fields(cls) if each.name == parameter.name)
        if text is None or (given and text is False):
            return None if given else option.default
        return read(option, text)

    return decorate


def within(low: float | None = None, high: float | None = None) -> Any:
    """A type for click: a finite number between two. click's own takes NaN, which is neither below nor above."""
    import click

    class Within(click.FloatRange):
        def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
            if not math.isfinite(found := super().convert(value, param, ctx)):
                self.fail(f"{value!r} is no finite number", param, ctx)
            return found

    return Within(low, high)


def _click_attributes(option: Field[Any], default: str | None) -> dict[str, Any]:
    text = str(option.metadata["help"])
    text = f"{text[0].upper()}{text[1:]}."
    if isinstance(option.default, bool):
        return {"is_flag": True, "help": text}
    if default is None:
        default = "" if option.default in (None, "") else shown(option)
    metavar = flags(option)[0].rpartition("-")[2].upper()
    return {"metavar": metavar, "help": text + (f"  [default: {default}]" if default else "")}
