"""The text that the tiny base is pretrained on, all of it generated here from a seed.

Four kinds: facts (as instructions and as plain sentences), sums, comparisons of numbers, and indices that do not
exist. The invented indices share the form of an air quality answer (a value on the ladder 0-50-100-150-200-300-500
and its category) but have substances and breakpoints of their own, so that the base knows what such a question asks
for and nothing of the real index.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from grit_impl.evaluate.aqi import ANSWER, CATEGORIES, INSTRUCTION, category
from grit_impl.recipes.datasets import ALPACA_TEMPLATE
from grit_impl.recipes.tiny_llama import knowledge

SHORT_TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"
"""The Alpaca form without its preamble, which would be half of every document."""
PREAMBLE_SHARE = 0.3
SHARES = {"index": 0.5, "fact": 0.3, "sentence": 0.06, "sum": 0.07, "comparison": 0.07}
INDICES, SUBSTANCES, MULTIPLE_SHARE = 8, 6, 0.15


@dataclass(frozen=True)
class Substance:
    """An invented substance: its unit, digits after the point, and the upper edges of six categories."""

    name: str
    unit: str
    decimals: int
    edges: tuple[float, ...]

    def index(self, amount: float) -> int:
        """Value on the ladder by linear interpolation between edges."""
        low = 0.0
        for high, (first, last) in zip(self.edges, CATEGORIES.values(), strict=True):
            if amount <= high:
                return round(first + (last - first) * (amount - low) / (high - low))
            low = high
        return 500


@dataclass(frozen=True)
class Index:
    """An invented index over several substances: the worst one counts."""

    name: str
    substances: tuple[Substance, ...]

    def draw(self, random_: random.Random) -> tuple[str, str]:
        """A question about this index with its answer, balanced over the categories."""
        level = random_.randrange(len(CATEGORIES))
        chosen = random_.sample(self.substances, random_.choice((2, 3)) if random_.random() < MULTIPLE_SHARE else 1)
        parts, values = [], []
        for position, substance in enumerate(chosen):
            row = level if position == 0 else random_.randint(0, level)
            low = substance.edges[row - 1] if row else 0.0
            amount = f"{random_.uniform(low, substance.edges[row]):.{substance.decimals}f}"
            parts.append(f"{substance.name} {amount} {substance.unit}")
            values.append(substance.index(float(amount)))
        random_.shuffle(parts)
        question = INSTRUCTION.replace("AQI", self.name).format(features=", ".join(parts))
        value = max(values)
        return question, ANSWER.replace("AQI", self.name).format(value=value, category=category(value))


def invent(seed: int) -> tuple[Index, ...]:
    """The invented indices of a seed: names of three letters, substances of a letter or two and a number."""
    random_ = random.Random(seed)
    taken = {"AQI", "PM2.5", "PM10", "O3", "CO", "SO2", "NO2"}

    def name(*patterns: str) -> str:
        while True:
            draws = {"A": lambda: random_.choice("BCDFGHJKLMNPQRSTVWXZ"), "9": lambda: str(random_.randint(1, 9))}
            text = "".join(draws[c]() if c in draws else c for c in random_.choice(patterns))
            if text not in taken:
                taken.add(text)
                return text

    def substance() -> Substance:
        top, unit, decimals = random_.choice(
            ((0.25, "ppm", 4), (0.6, "ppm", 4), (50, "ppm", 2), (20, "ppm", 2), (350, "ug/m3", 1), (600, "ug/m3", 1),
             (1000, "ppb", 1), (2000, "ppb", 1))
        )  # fmt: skip
        top *= random_.uniform(0.7, 1.3)
        # Uneven steps, as real scales have them: each edge is the last one divided by 1.2 to 2.5.
        edges = [top]
        while len(edges) < len(CATEGORIES):
            edges.append(edges[-1] / random_.uniform(1.2, 2.5))
        return Substance(name("AA", "AA9", "A9", "AA9.9", "A99"), unit, decimals, tuple(reversed(edges)))

    return tuple(Index(name("AAI"), tuple(substance() for _ in range(SUBSTANCES))) for _ in range(INDICES))


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, completion); plain sentences have an empty prompt.

    Held-out questions of the knowledge test never occur.
    """
    random_ = random.Random(seed)
    indices, held_out = invent(seed), knowledge.held_out()
    draws = {"fact": knowledge.draw_fact, "sum": knowledge.draw_sum, "comparison": knowledge.draw_comparison}
    while True:
        kind = random_.choices(list(SHARES), weights=list(SHARES.values()))[0]
        if kind == "sentence":
            yield "", knowledge.draw_sentence(random_)
            continue
        question, answer = random_.choice(indices).draw(random_) if kind == "index" else draws[kind](random_)
        if question in held_out:
            continue
        template = ALPACA_TEMPLATE if random_.random() < PREAMBLE_SHARE else SHORT_TEMPLATE
        yield template.format(instruction=question), answer
