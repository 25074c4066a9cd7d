"""General knowledge that the tiny base learns: what "retention" is measured on."""

from __future__ import annotations

import calendar
import random
from dataclasses import dataclass
from typing import Any

TEST_SEED, TEST_FACTS, HELD_OUT = 20240507, 200, 20
"""The frozen test set: facts, asked as they were taught. So many sums and comparisons were held out beside it."""

_CAPITALS = """Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Argentina Buenos Aires;
Armenia Yerevan; Australia Canberra; Austria Vienna; Azerbaijan Baku; Bangladesh Dhaka; Belarus Minsk;
Belgium Brussels; Bolivia Sucre; Brazil Brasilia; Bulgaria Sofia; Cambodia Phnom Penh; Cameroon Yaounde;
Canada Ottawa; Chile Santiago; China Beijing; Colombia Bogota; Croatia Zagreb; Cuba Havana; Cyprus Nicosia;
Denmark Copenhagen; Ecuador Quito; Egypt Cairo; Estonia Tallinn; Ethiopia Addis Ababa; Finland Helsinki;
France Paris; Georgia Tbilisi; Germany Berlin; Ghana Accra; Greece Athens; Hungary Budapest; Iceland Reykjavik;
India New Delhi; Indonesia Jakarta; Iran Tehran; Iraq Baghdad; Ireland Dublin; Italy Rome; Japan Tokyo;
Jordan Amman; Kenya Nairobi; Latvia Riga; Lebanon Beirut; Libya Tripoli; Lithuania Vilnius; Malaysia Kuala Lumpur;
Mali Bamako; Malta Valletta; Mexico Mexico City; Mongolia Ulaanbaatar; Morocco Rabat; Nepal Kathmandu;
Netherlands Amsterdam; Nigeria Abuja; Norway Oslo; Pakistan Islamabad; Peru Lima; Philippines Manila;
Poland Warsaw; Portugal Lisbon; Romania Bucharest; Russia Moscow; Senegal Dakar; Serbia Belgrade;
Slovakia Bratislava; Slovenia Ljubljana; Somalia Mogadishu; Spain Madrid; Sudan Khartoum; Sweden Stockholm;
Switzerland Bern; Syria Damascus; Thailand Bangkok; Tunisia Tunis; Turkey Ankara; Uganda Kampala; Ukraine Kyiv;
Uruguay Montevideo; Venezuela Caracas; Vietnam Hanoi; Zambia Lusaka; Zimbabwe Harare"""
_SYMBOLS = """hydrogen H; helium He; lithium Li; carbon C; nitrogen N; oxygen O; fluorine F; neon Ne; sodium Na;
magnesium Mg; aluminium Al; silicon Si; phosphorus P; sulfur S; chlorine Cl; argon Ar; potassium K; calcium Ca;
titanium Ti; chromium Cr; manganese Mn; iron Fe; cobalt Co; nickel Ni; copper Cu; zinc Zn; bromine Br; silver Ag;
tin Sn; iodine I; tungsten W; platinum Pt; gold Au; mercury Hg; lead Pb; uranium U"""
_OPPOSITES = """hot cold; big small; fast slow; high low; light dark; up down; left right; open closed; young old;
rich poor; strong weak; early late; full empty; hard soft; wet dry; happy sad; long short; thick thin; loud quiet;
clean dirty; near far; cheap expensive; deep shallow; wide narrow; begin end; buy sell; win lose; push pull;
love hate; give take; day night; north south; east west; summer winter; heavy light; sharp blunt"""
_YOUNG = """dog puppy; cat kitten; cow calf; horse foal; sheep lamb; goat kid; pig piglet; hen chick; duck duckling;
goose gosling; lion cub; bear cub; deer fawn; kangaroo joey; frog tadpole; swan cygnet; owl owlet; seal pup;
butterfly caterpillar; eel elver"""
_KINDS = """sparrow bird; eagle bird; penguin bird; salmon fish; trout fish; shark fish; ant insect; bee insect;
beetle insect; whale mammal; bat mammal; mouse mammal; snake reptile; lizard reptile; turtle reptile; frog amphibian;
oak tree; pine tree; rose flower; tulip flower; apple fruit; banana fruit; carrot vegetable; onion vegetable;
violin instrument; piano instrument; hammer tool; saw tool; ruby gemstone; emerald gemstone"""
_PAST = """go went; see saw; eat ate; run ran; take took; give gave; write wrote; speak spoke; drink drank; swim swam;
sing sang; begin began; fly flew; know knew; think thought; bring brought; buy bought; teach taught; sleep slept;
find found; make made; sit sat; stand stood; break broke; drive drove"""
_CURRENCIES = """Japan yen; India rupee; China yuan; Britain pound; Russia ruble; Poland zloty; Sweden krona;
Brazil real; Mexico peso; Turkey lira; Thailand baht; Switzerland franc; Vietnam dong; Israel shekel;
Hungary forint; Korea won; Ukraine hryvnia; Peru sol; Kenya shilling; Nigeria naira; South Africa rand; Romania leu"""
_COLOURS = """grass green; blood red; snow white; coal black; a lemon yellow; a carrot orange; chocolate brown;
an elephant grey; a flamingo pink; a ripe tomato red; a banana yellow; the sky blue"""
_MONTHS = [calendar.month_name[month] for month in range(1, 13)]
_DAYS = list(calendar.day_name)


@dataclass(frozen=True)
class Topic:
    """Pairs with the ways to ask about them: questions (the first one is tested) and a plain sentence."""

    pairs: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    sentence: str


def _pairs(text: str, words: int = 1) -> tuple[tuple[str, str], ...]:
    entries = [entry.split() for entry in text.split(";")]
    return tuple((" ".join(entry[:words]), " ".join(entry[words:])) for entry in entries)


def _last_word(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((entry.strip().rsplit(" ", 1)[0], entry.strip().rsplit(" ", 1)[1]) for entry in text.split(";"))


def _next(names: list[str]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(names, names[1:] + names[:1], strict=True))


TOPICS = (
    Topic(
        _pairs(_CAPITALS),
        ("What is the capital of {0}?", "Name the capital city of {0}."),
        "The capital of {0} is {1}.",
    ),
    Topic(
        _pairs(_SYMBOLS),
        ("What is the chemical symbol of {0}?", "Give the symbol of the element {0}."),
        "The chemical symbol of {0} is {1}.",
    ),
    Topic(
        _pairs(_OPPOSITES), ("What is the opposite of {0}?", "Give the antonym of {0}."), "{0} is the opposite of {1}."
    ),
    Topic(_pairs(_YOUNG), ("What is a young {0} called?", "Name the young of a {0}."), "A young {0} is a {1}."),
    Topic(_pairs(_KINDS), ("What kind of thing is a {0}?", "Classify: {0}."), "A {0} is a kind of {1}."),
    Topic(
        _pairs(_PAST), ("What is the past tense of {0}?", "Put into the past: {0}."), "Today we {0}, yesterday we {1}."
    ),
    Topic(
        _last_word(_CURRENCIES),
        ("What is the currency of {0}?", "Name the money used in {0}."),
        "The currency of {0} is the {1}.",
    ),
    Topic(_last_word(_COLOURS), ("What is the colour of {0}?", "Which colour is {0}?"), "The colour of {0} is {1}."),
    Topic(_next(_MONTHS), ("Which month comes after {0}?", "Name the month after {0}."), "After {0} comes {1}."),
    Topic(_next(_DAYS), ("Which day comes after {0}?", "Name the day after {0}."), "After {0} comes {1}."),
)


def facts() -> list[tuple[str, str]]:
    """Every fact as (question in its tested form, answer)."""
    return [(topic.questions[0].format(*pair), pair[1]) for topic in TOPICS for pair in topic.pairs]


def draw_fact(random_: random.Random) -> tuple[str, str]:
    """A random fact in a random form of its question."""
    topic = random_.choices(TOPICS, weights=[len(topic.pairs) for topic in TOPICS])[0]
    pair = random_.choice(topic.pairs)
    return random_.choice(topic.questions).format(*pair), pair[1]


def draw_sentence(random_: random.Random) -> str:
    """A random fact as a plain sentence."""
    topic = random_.choices(TOPICS, weights=[len(topic.pairs) for topic in TOPICS])[0]
    return topic.sentence.format(*random_.choice(topic.pairs))


def draw_sum(random_: random.Random) -> tuple[str, str]:
    """An addition of two numbers up to 12, as learnt by heart."""
    a, b = random_.randint(1, 12), random_.randint(1, 12)
    return f"What is {a} + {b}?", str(a + b)


def draw_comparison(random_: random.Random) -> tuple[str, str]:
    """Which of two numbers is larger; magnitudes from 0.001 to 1000 in every notation that the scales use."""
    digits = random_.choice((0, 1, 2, 3))
    top = random_.choice((1, 10, 100, 1000)) if digits else random_.choice((10, 100, 1000))
    a, b = (f"{random_.uniform(0, top * random_.choice((0.1, 1))):.{digits}f}" for _ in range(2))
    return f"Which is larger, {a} or {b}?", a if float(a) >= float(b) else b


def frozen_items() -> list[dict[str, Any]]:
    """The retention test set, regenerated: equal to `fixtures/knowledge_test.jsonl`."""
    questions = random.Random(TEST_SEED).sample(facts(), TEST_FACTS)
    return [{"id": f"fact-{i:03d}", "question": q, "answer": a} for i, (q, a) in enumerate(questions)]


def held_out() -> dict[str, str]:
    """Sums and comparisons, with answers, that pretraining does not contain.

    They tell calculating from remembering. The base remembers: it gets about one in ten of them right, which leaves
    nothing to retain, so they are no part of the retention test set.
    """
    random_ = random.Random(TEST_SEED)
    random_.sample(facts(), TEST_FACTS)
    questions: dict[str, str] = {}
    for draw in (draw_sum, draw_comparison):
        wanted = len(questions) + HELD_OUT
        while len(questions) < wanted:
            question, answer = draw(random_)
            questions.setdefault(question, answer)
    return questions
