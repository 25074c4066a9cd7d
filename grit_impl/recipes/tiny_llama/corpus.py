"""The text that the tiny base is pretrained on, all of it generated here from a seed.

Facts (as instructions and as plain sentences), sums, comparisons of numbers, and indices that do not exist. The
invented indices share the form of an air quality answer (a value on the ladder 0-50-100-150-200-300-500 and its
category) but have substances and breakpoints of their own, so that the base knows what such a question asks for and
nothing of the real index.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from string import ascii_uppercase

from grit_impl.aqi import ANSWER, CATEGORIES, INSTRUCTION, SCALES, category
from grit_impl.recipes.datasets import ALPACA_TEMPLATE
from grit_impl.recipes.tiny_llama import knowledge

SHORT_TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"
"""The Alpaca form without its preamble, which would be half of every document."""
PREAMBLE_SHARE = 0.3
SHARES = {"index": 0.55, "fact": 0.3, "sentence": 0.02, "sum": 0.06, "comparison": 0.07}
SUBSTANCES, SUBSTANCE_SEED, MULTIPLE_SHARE = 48, 1970, 0.15
NOTATIONS = ((2.0, "ppm", 4), (150.0, "ppm", 2), (2000.0, "ug/m3", 1), (7500.0, "ppb", 1))
"""Upper end, unit and digits after the point. These are the notations of real features at about five times their
amounts: what a number means must be learnt, and what is much for an invented substance says little of a real one."""
SPREAD = 0.3
"""Decades by which a scale's upper end may differ from its notation's."""
REAL = frozenset(("AQI", *SCALES))


@dataclass(frozen=True)
class Substance:
    """An invented substance: its unit, digits after the point, and the edges of its six categories.

    `edges` holds seven rising amounts; the first belongs to the value 0, the last to 500.
    """

    name: str
    unit: str
    decimals: int
    edges: tuple[float, ...]

    def draw(self, random_: random.Random, level: int) -> tuple[str, int]:
        """A reading within a category as text, and its value by linear interpolation between the edges."""
        start, end = self.edges[level : level + 2]
        amount = f"{random_.uniform(start, end):.{self.decimals}f}"
        first, last = list(CATEGORIES.values())[level]
        share = min(max((float(amount) - start) / (end - start), 0.0), 1.0)
        return f"{self.name} {amount} {self.unit}", round(first + (last - first) * share)


def draw_index(substances: tuple[Substance, ...], random_: random.Random) -> tuple[str, str]:
    """A question about an invented index with its answer, balanced over the categories; the worst substance counts.

    The index has a new name every time, to be copied; what counts are the substances.
    """
    level = random_.randrange(len(CATEGORIES))
    chosen = random_.sample(substances, random_.choice((2, 3)) if random_.random() < MULTIPLE_SHARE else 1)
    drawn = [chosen[0].draw(random_, level)]
    drawn += [substance.draw(random_, random_.randint(0, level)) for substance in chosen[1:]]
    random_.shuffle(drawn)
    value = max(value for _, value in drawn)
    name = _name(random_, "AAA", "AA")
    question = INSTRUCTION.replace("AQI", name).format(features=", ".join(feature for feature, _ in drawn))
    return question, ANSWER.replace("AQI", name).format(value=value, category=category(value))


def _name(random_: random.Random, *patterns: str) -> str:
    letters = {"A": ascii_uppercase, "9": "123456789"}
    while True:
        text = "".join(random_.choice(letters[c]) if c in letters else c for c in random_.choice(patterns))
        if text not in REAL:
            return text


def invent(seed: int) -> tuple[Substance, ...]:
    """The invented substances of a seed, named by a letter or two and a number."""
    random_ = random.Random(seed)
    found: dict[str, Substance] = {}
    while len(found) < SUBSTANCES:
        top, unit, decimals = random_.choice(NOTATIONS)
        top *= 10 ** random_.uniform(-SPREAD, SPREAD)
        # Uneven steps, as real scales have them: each edge is the next one divided by 1.2 to 2.5.
        edges = [top]
        while len(edges) < len(CATEGORIES):
            edges.append(edges[-1] / random_.uniform(1.2, 2.5))
        name = _name(random_, "AA", "AA9", "A9", "AA9.9", "AA99")
        found[name] = Substance(name, unit, decimals, (0.0, *reversed(edges)))
    return tuple(found.values())


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, completion); plain sentences have an empty prompt.

    Held-out sums and comparisons never occur.
    """
    random_ = random.Random(seed)
    substances, held_out = invent(SUBSTANCE_SEED), knowledge.held_out()
    draws: dict[str, Callable[[random.Random], tuple[str, str]]] = {
        "fact": knowledge.draw_fact,
        "sum": knowledge.draw_sum,
        "comparison": knowledge.draw_comparison,
        "index": lambda source: draw_index(substances, source),
    }
    while True:
        kind = random_.choices(list(SHARES), weights=list(SHARES.values()))[0]
        if kind == "sentence":
            yield "", knowledge.draw_sentence(random_)
            continue
        question, answer = draws[kind](random_)
        if question not in held_out:
            template = ALPACA_TEMPLATE if random_.random() < PREAMBLE_SHARE else SHORT_TEMPLATE
            yield template.format(instruction=question), answer
