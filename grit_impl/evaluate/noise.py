"""How much of an answer is the server's doing: some questions are asked again, and what changes widens the intervals.

Greedy answers of a server depend on more than the question: on what shares its cache and its batch. An accuracy moves
when the server is asked again, and so does the difference between two models, whatever they learned.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.evaluate.metrics import share
from grit_impl.serve.openai_client import open_endpoint
from grit_impl.statistics.intervals import Interval

if TYPE_CHECKING:
    from grit_impl.serve.client import Endpoint

Row = dict[str, Any]
Task = tuple[str, str, str]
NEAR = 0.02
"""Nats between the two likeliest tokens, below which a place counts as a tie."""
CONFIDENCE = 0.95
MOST_FAILURES = 2
"""Second requests that may fail before the server is asked for no more."""
FILE = "again.jsonl"
"""What was answered the second time, beside `answers.jsonl`."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What changed when answers were asked for again.

    Attributes:
        asked: Answers that were asked for once more.
        changed: Of these, answers with another text.
        flipped: Of these, right answers that became wrong or the reverse.
        ties: Changed answers that begin to differ where the two likeliest tokens are less than 0.02 nats apart.
        seen: Changed answers of which the server's log-probabilities tell that.
        exact: Whether the server computes every request alone, so that nothing can change.
    """

    asked: int
    changed: int
    flipped: int
    ties: int
    seen: int
    exact: bool

    @property
    def share(self) -> Interval | None:
        """Percent of answers that change, with Wilson's interval; None if none was asked for again."""
        return share([True] * self.changed + [False] * (self.asked - self.changed), CONFIDENCE)

    @property
    def allowance(self) -> float:
        """Points by which the server may have moved a model's accuracy: what every interval is widened by.

        If the results of at most a share e of the items are not those that the server usually gives, an accuracy is off
        by at most e, in either direction (bounds for contaminated data: Horowitz and Manski, Econometrica 63, 1995).
        Asked twice, an item's result changes with probability 2 q (1 - q), where q <= 1/2 is the probability of the
        rarer result; that is at least q, so the share of items that change bounds e. It is estimated from the items
        that were asked again by Laplace's rule of succession, (changed + 1) / (asked + 2): a few items without a change
        do not show that there is none. Independent changes of single items alone are in the intervals already; the
        bound holds for changes that favour one model, too. A server that computes each request alone needs none.
        """
        if not self.asked or (self.exact and not self.flipped):
            return 0.0
        return 100 * (self.flipped + 1) / (self.asked + 2)

    def __str__(self) -> str:
        return self.told()

    def told(self, beside: str = "") -> str:
        """One line, of the same server or of the one `beside` it, which widens nothing."""
        if self.share is None:
            return "no answer was asked for again: what the server changes is not known"
        text = f"{self.changed} of {self.asked} answers {'differ there' if beside else 'changed when asked again'}"
        text += f" ({self.share.estimate:.1f}% [{self.share.low:.1f}, {self.share.high:.1f}])"
        if self.changed:
            text += f", {self.flipped} between right and wrong"
        if self.seen:
            begin = "difference begins" if self.seen == 1 else "differences begin"
            text += f"; {self.ties} of {self.seen} {begin} at a tie below {NEAR:g} nats"
        if beside:
            return text
        if not self.allowance:
            return f"{text}; the server computes each request alone: no interval is widened"
        return f"{text}; widens a retention by {self.allowance:.1f} points, a difference by {2 * self.allowance:.1f}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "share": self.share and self.share.to_dict(), "allowance": self.allowance}


def tally(pairs: Iterable[tuple[Row, Row]], score: Mapping[str, str], exact: bool) -> Noise:
    """What changed between the first and the second answers.

    Args:
        pairs: Both rows of each item.
        score: Name of the score that says whether an answer of a suite is right.
        exact: What the server says of itself.
    """
    asked, changed, flipped, leads = 0, 0, 0, []
    for first, second in pairs:
        name = score[first["suite"]]
        asked += 1
        changed += first["answer"] != second["answer"]
        flipped += bool(first["scores"].get(name)) != bool(second["scores"].get(name))
        leads.append(second.get("lead"))
    known = [lead for lead in leads if lead is not None]
    return Noise(asked, changed, flipped, sum(lead < NEAR for lead in known), len(known), exact)


def sample(answered: Collection[Task], repeats: int, seed: int) -> list[Task]:
    """So many tasks of each model, in an order of their own: answers may depend on what was asked before."""
    labels = dict.fromkeys(task[0] for task in answered)
    drawn = []
    for label in labels:
        tasks = sorted(task for task in answered if task[0] == label)
        drawn += random.Random(seed).sample(tasks, min(repeats, len(tasks)))
    return drawn


@contextmanager
def open_beside(url: str | None, models: list[str], **how: Any) -> Iterator[Endpoint | None]:
    """The other server that the sample is asked of; None without an address. Other arguments as `Endpoint`.

    Raises:
        GRITError: it does not answer, or lacks a model; before any question is asked.
    """
    if url is None:
        yield None
        return
    with open_endpoint(url, **how) as other:
        try:
            other.require(models)
        except GRITError as error:
            raise GRITError(f"--beside-url {url}: {error}") from None
        yield other


def lead_at_parting(endpoint: Endpoint, request: Mapping[str, Any], first: str, second: str) -> float | None:
    """Nats between the two likeliest tokens where two answers part; None if the server does not tell.

    Args:
        endpoint: The server, which is asked once more, for log-probabilities.
        request: Arguments of `Endpoint.generate`.
        first: One answer.
        second: Another answer to the same request.
    """
    from grit_impl.serve.client import Unanswered
    from grit_impl.serve.versions import has

    if not has(endpoint.version(), "logprobs"):
        return None
    try:
        reply = endpoint.generate(**request, logprobs=True, top_logprobs=2)
    except Unanswered:
        return None
    written = ""
    for token, _, lead in reply.logprobs:
        written += token
        if not (first.startswith(written) and second.startswith(written)):
            return lead
    return None
