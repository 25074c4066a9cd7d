"""What the callback probe found: which events and hooks fire, in which order. `run.py` makes it; no torch here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from grit_impl.errors import GRITError
from grit_impl.record import write_atomic

FILE = "probe.json"


@dataclass(frozen=True)
class Event:
    """Something that could fire.

    Attributes:
        name: A callback event, a hook, or a call.
        kind: `callback`, `hook` or `call`.
        order: Its place in a step, from 1; 0: it never fired inside a step.
        per_step: (least, most) times in a step, first and last step left out.
        gradients: Whether the LoRA gradients were there when it first fired in a step: `all`, `some`, `none`.
        total: Times in the whole run.
    """

    name: str
    kind: str
    order: int
    per_step: tuple[int, int]
    gradients: str
    total: int


@dataclass(frozen=True)
class Requirement:
    """Something that GRIT relies on."""

    name: str
    good: bool
    found: str


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found.

    Attributes:
        stack: `unsloth` or `peft`.
        optimizer: Class of the optimizer.
        versions: Of the libraries.
        events: In the order of a step; those that never fired last.
        checks: What GRIT relies on.
    """

    stack: str
    optimizer: str
    versions: dict[str, str]
    events: tuple[Event, ...]
    checks: tuple[Requirement, ...]

    @property
    def good(self) -> bool:
        """Whether a callback can precondition here."""
        return all(check.good for check in self.checks)

    def write(self, path: Path) -> None:
        """As JSON."""
        write_atomic(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> ProbeReport:
        """What `write` wrote.

        Raises:
            GRITError: the file is damaged.
        """
        try:
            value = json.loads(path.read_text())
            events = tuple(Event(**{**e, "per_step": tuple(e["per_step"])}) for e in value.pop("events"))
            return cls(events=events, checks=tuple(Requirement(**c) for c in value.pop("checks")), **value)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise GRITError(f"corrupt run record: {path} is no probe ({error})") from error
