"""`grit verdict`: did the modified gradients matter, and if not, which link of the chain broke?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from grit_impl.errors import GRITError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="RUN_OR_LEDGER", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def verdict(source: Path, as_json: bool) -> None:
    """Say whether a run's modified gradients reached the optimizer and mattered, and if not, why not.

    RUN_OR_LEDGER is a run record's folder, or a gradient ledger's file (ledger.jsonl.gz). Exit status 0: an effective
    modifier, or plain training; 1: a fault, or nothing that can be said; 2: no ledger.
    """
    from grit_impl.ledger.verdict import describe, judge_ledger

    ledger = _ledger(source)
    try:
        found = judge_ledger(ledger)
        text = json.dumps(_plain(asdict(found)), indent=2) if as_json else describe(found)
    except GRITError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # rows that no ledger has written
        raise GRITError(f"corrupt gradient ledger: {source}: {type(error).__name__}: {error}") from error
    click.echo(text)
    raise SystemExit(1 if found.fault else 0)


def _ledger(source: Path) -> Any:
    from grit_impl.record import RunRecord

    if not source.is_dir():
        return source
    record = RunRecord(source)
    if not (source / "run.json").is_file():
        raise GRITError(f"{source} is no run record: it has no run.json; give the ledger's file if there is one")
    if not record.ledger.is_file():
        raise GRITError(f"{source} has no gradient ledger ({record.ledger.name})")
    return record


def _plain(value: Any) -> Any:
    """Numbers that JSON knows: numpy's become Python's, what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and value - value != 0 else value
