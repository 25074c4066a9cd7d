"""Where claims register: `@claim` on a function that judges evidence. What it declares is the function's docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from grit_impl.errors import GRITError
from grit_impl.statistics.decision import Judgement
from grit_impl.verify.claims.base import Claim

Decide = TypeVar("Decide", bound=Callable[..., Judgement])
REGISTERED: dict[str, Claim] = {}
"""All claims by id, in the order in which they were declared."""


def claim(
    id: str, *, needs: Sequence[str], gates: bool | Sequence[bool] = True, **variants: Sequence[Any]
) -> Callable[[Decide], Decide]:
    """Declare a claim, or several alike; the first paragraph of the docstring is its statement, the rest its rationale.

        @claim("training.{arm}-quick", needs=["record:{arm}"], arm=["hybrid", "pure"])
        def quick(evidence: Evidence, arm: str) -> Judgement:
            \"""{arm} GRIT trains within ten minutes.

            Nobody waits longer.
            \"""

    Args:
        id: `family.name`, lower case; the family is the folder in suites/ and the file in claims/.
        needs: What must be there: `record:`, `verdict:`, `export:`, `evaluation:`, `cost:` or `seeds:` and a name.
        gates: Whether it must hold (correctness), or is a hypothesis that is only reported; one for all, or one each.
        variants: Values by name, equally many for every name: each makes a claim. Id, needs and docstring may contain
            `{name}`, the docstring constants of its module as well; the function is given those that it takes.

    Raises:
        GRITError: another claim has the id, or the docstring is incomplete or names what is not there.
    """

    def register(decide: Decide) -> Decide:
        for values, gating in _variants(variants, gates):
            name = id.format_map(values)
            if name in REGISTERED:
                raise GRITError(f"two claims have the id {name!r}")
            statement, rationale = _texts(name, decide, values)
            accepted = {key: values[key] for key in inspect.signature(decide).parameters if key in values}
            required = tuple(need.format_map(values) for need in needs)
            REGISTERED[name] = Claim(name, statement, required, rationale, partial(decide, **accepted), gating)
        return decide

    return register


def _variants(
    variants: dict[str, Sequence[Any]], gates: bool | Sequence[bool]
) -> Iterator[tuple[dict[str, Any], bool]]:
    rows = [dict(zip(variants, row, strict=True)) for row in zip(*variants.values(), strict=True)] or [{}]
    return zip(rows, [gates] * len(rows) if isinstance(gates, bool) else gates, strict=True)


def _texts(name: str, decide: Callable[..., Judgement], values: dict[str, Any]) -> tuple[str, str]:
    """Statement and rationale, each on one line; a statement that begins with a variant's value is capitalised."""
    text = inspect.cleandoc(decide.__doc__ or "")
    try:
        text = text.format_map({**decide.__globals__, **values})
    except (KeyError, ValueError) as error:
        raise GRITError(f"claim {name}: its docstring cannot be filled in: {error!r}") from None
    statement, _, rationale = (" ".join(part.split()) if part.strip() else part for part in text.partition("\n\n"))
    if not statement or not rationale:
        raise GRITError(f"claim {name}: write its statement, an empty line and its rationale as the docstring")
    return statement[0].upper() + statement[1:], rationale
