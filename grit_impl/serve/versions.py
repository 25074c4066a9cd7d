"""What is known of servers by their version: what each can do, and which server it is; the one place that asks."""

from __future__ import annotations

from typing import NamedTuple

from packaging.version import InvalidVersion, Version

from grit_impl.errors import GRITError

IMITATED = "0.33.0"
"""The version of Ollama whose behaviour the embedded server has."""
BUILD = "+grit"
"""How the embedded server ends its version."""


class Since(NamedTuple):
    """Something that servers do from a version on, and what is said of those before."""

    since: str
    before: str


CHANGES = {
    "schema": Since("0.5.0", "knows no JSON schema as a format, which --knowledge-by likelihood needs"),
    "logprobs": Since("0.12.11", "gives no log-probabilities, which --knowledge-by likelihood needs"),
    "llama.cpp": Since("0.30.0", "computes with an engine of its own, whose answers are not llama.cpp's"),
}
"""Sources: Ollama's releases v0.5.0, v0.12.11 and v0.30.0 (every GGUF runs in llama.cpp's server)."""


def has(version: str, what: str) -> bool:
    """Whether a server of this version does one of `CHANGES`; one that nobody numbered is taken for the newest."""
    try:
        found = Version(version)
    except InvalidVersion:
        return True
    # Ollama that was built from its sources says 0.0.0.
    return found.release == (0, 0, 0) or found >= Version(CHANGES[what].since)


def require(version: str, *what: str) -> None:
    """Refuse a server that lacks one of these.

    Raises:
        GRITError: it does.
    """
    for each in what:
        if not has(version, each):
            raise GRITError(f"Ollama {version} {CHANGES[each].before}: use a newer one")


def quirks(version: str) -> list[str]:
    """What a server of this version does otherwise than those that were tried, for a person to read."""
    return [f"Ollama {version} {change.before}" for what, change in CHANGES.items() if not has(version, what)]


def called(url: str, version: str) -> str:
    """A server by name: the embedded one is everywhere the same, whatever its address."""
    return f"{'the embedded server' if exact(version) else url}, {version}"


def exact(version: str) -> bool:
    """Whether a server of this version computes every request alone, from the same state: the embedded one, one slot.

    Its version is that of the Ollama that it imitates, with `+grit` where semantic versions name the build; with more
    slots than one, `+grit.4`.
    """
    return version.endswith(BUILD)
