"""Versions of the libraries that GRIT hooks into, and which of them go together.

Importing this module asks the installed packages' metadata (nothing is imported, no torch) and refuses what is known to
break, before a library fails in the middle with a message about something else. `tox` runs what is supported.
"""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

from grit_impl.errors import GRITError

OLDEST = {"torch": "2.8", "transformers": "4.56", "peft": "0.17", "trl": "0.23", "accelerate": "1.10"}
"""Hooks, callback order and state of the optimizer were never tried with older ones."""
BREAKS = (
    # (library, from this version on, another, before this version, why)
    ("transformers", "5.0", "peft", "0.18", "peft imports HybridCache, which transformers 5 removed"),
)


def installed() -> dict[str, Version]:
    """The versions that are there; what is not installed is left out."""
    found = {}
    for name in OLDEST:
        try:
            found[name] = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return found


def check_versions(found: dict[str, Version]) -> None:
    """Refuse a combination that is known to break.

    Raises:
        GRITError: one line with the versions and the command that mends it.
    """
    for name, oldest in OLDEST.items():
        if name in found and found[name] < Version(oldest):
            raise GRITError(f"{name} {found[name]} is not supported: pip install '{name}>={oldest}'")
    for name, since, other, before, why in BREAKS:
        if found.get(name, Version("0")) >= Version(since) and found.get(other, Version(before)) < Version(before):
            pair = f"{name} {found[name]} with {other} {found[other]}"
            raise GRITError(f"{pair} is not supported ({why}): pip install '{other}>={before}'")


check_versions(installed())
