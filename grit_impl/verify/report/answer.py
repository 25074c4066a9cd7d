"""What the first screen says: did it matter, did it help, and why; and every stored answer, to browse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grit_impl.config import TUNED
from grit_impl.verify.claims import Evidence, Metric
from grit_impl.verify.claims.measures import measured
from grit_impl.verify.options import MODELS
from grit_impl.verify.report.content import Cell, cell, changed_answers
from grit_impl.verify.store.database import JudgedClaim

Tone = Literal["supported", "refuted", "inconclusive"]
NAMES = {
    "base": "the base model, untrained",
    "baseline": "plain LoRA, AdamW",
    "hybrid": "K-FAC rule, in a callback",
    "pure": "K-FAC rule, GRITTrainer",
    "recommended": "preset recommended, GRITTrainer",
}
HELPED = {
    "pure": "hypotheses.pure-beats-lora",
    "recommended": "hypotheses.recommended-beats-lora",
}
"""By arm, the claim whose first metric is what it gained over plain LoRA."""


@dataclass(frozen=True, slots=True)
class Line:
    """A question of the first screen: its answer in a word, how that looks, and the sentence behind it."""

    question: str
    word: str
    tone: Tone
    text: str
    link: str = ""


@dataclass(frozen=True, slots=True)
class ArmLines:
    """What the first screen says of one way of training."""

    name: str
    title: str
    answers: tuple[Line, ...]


def arms(evidence: Evidence, judged: Sequence[JudgedClaim]) -> list[ArmLines]:
    """The K-FAC rule and the preset `recommended`, as far as there is something to say; a trainer of one's own."""
    found = []
    for name in ("pure", "recommended", "trainer"):
        mattered, helped = _mattered(evidence, judged, name), _helped(evidence, judged, name)
        answers = tuple(each for each in (mattered, helped, _why(evidence, name, mattered)) if each)
        if mattered or helped:
            found.append(ArmLines(name, NAMES.get(name, "your trainer"), answers))
    return found


def sentence(found: Sequence[ArmLines]) -> str:
    """What the arms' answers come to, a sentence each; empty if there are none."""
    subjects = {"pure": "The K-FAC rule", "recommended": "The preset recommended", "trainer": "Your trainer"}
    sentences = []
    for arm in found:
        words = {each.question: each.word for each in arm.answers}
        mattered = {"yes": "mattered", "no": "did not matter"}.get(words.get("mattered", ""), "may have mattered")
        helped = {"yes": "helped", "no": "did not help"}.get(words.get("helped", ""))
        if "helped" not in words:
            rest = ""
        elif helped is None:
            rest = "; whether it helped is open"
        else:
            rest = f"{' and' if (words.get('mattered') == 'yes') == (words['helped'] == 'yes') else ', but'} {helped}"
        sentences.append(f"{subjects[arm.name]} {mattered}{rest}.")
    return " ".join(sentences)


def _claim(judged: Sequence[JudgedClaim], id: str) -> JudgedClaim | None:
    return next((each for each in judged if each.claim.id == id), None)


def _mattered(evidence: Evidence, judged: Sequence[JudgedClaim], arm: str) -> Line | None:
    """Whether the optimizer used the modified gradients: the ledger's verdict."""
    claim = f"gradients.{arm}-effective"
    if arm in evidence.verdicts:
        verdict = evidence.verdicts[arm]
        effective, text = verdict.effective, verdict.summary
    elif (each := _claim(judged, claim)) is not None and each.judgement.verdict != "not exercised":
        effective, text = each.judgement.evidence.get("effective"), each.judgement.summary.partition(": ")[2]
    else:
        return None
    word, tone = _word(effective)
    return Line("mattered", word, tone, _without_word(text), claim if _claim(judged, claim) else "")


def _word(good: bool | None) -> tuple[str, Tone]:
    return ("open", "inconclusive") if good is None else ("yes", "supported") if good else ("no", "refuted")


def _without_word(text: str) -> str:
    for word in ("Yes: ", "No: ", "Cannot say: ", "Yes, ", "No, "):
        text = text.removeprefix(word)
    # As the ledger puts it: "in 191 of 200 steps, all 56 tensors; ..."
    text = f"the optimizer took modified gradients {text}" if text.startswith("in ") else text
    return text[:1].upper() + text[1:]


def gain(judged: Sequence[JudgedClaim], arm: str) -> Metric | None:
    """What an arm gained over plain LoRA in points, with its interval; None where that was not measured."""
    each = _claim(judged, HELPED.get(arm, ""))
    if each is None or each.judgement.verdict == "not exercised" or not each.judgement.metrics:
        return None
    metric = each.judgement.metrics[0]
    return metric if metric.low is not None and metric.high is not None else None


def _helped(evidence: Evidence, judged: Sequence[JudgedClaim], arm: str) -> Line | None:
    found = gain(judged, arm)
    if found is None or found.low is None or found.high is None:
        return None
    word, tone = _word(True if found.low > 0 else False if found.high < 0 else None)
    size, ends = abs(found.estimate), sorted((abs(found.low), abs(found.high)))
    if word == "open":
        text = f"{found.estimate:+.1f} points of accuracy against plain LoRA [{found.low:+.1f}, {found.high:+.1f}]"
    else:
        more = "more" if word == "yes" else "fewer"
        text = f"{size:.1f} points {more} than plain LoRA [{ends[0]:.1f}, {ends[1]:.1f}]"
    seeds = len(evidence.seeds)
    scope = f"over {seeds} seeds" if seeds else f"one seed, {found.n} questions: these models, not the method"
    return Line("helped", word, tone, f"{text}; {scope}", HELPED[arm])


def _why(evidence: Evidence, arm: str, mattered: Line | None) -> Line | None:
    """What is known of the reason: the link that broke, or rule and learning rate."""
    if mattered is not None and mattered.word == "no":
        return Line("why", evidence.verdicts[arm].cause if arm in evidence.verdicts else "lost", "refuted", "")
    record = evidence.records.get(arm)
    grit = (record.run.get("grit") or {}) if record else {}
    training = (record.run.get("config") or {}).get("training") if record else None
    if not grit or not training:
        return None
    rule, base = grit.get("update_rule", "precondition"), str(record.run.get("base_model")) if record else ""
    tuned = TUNED.get(arm, {}).get(base, {})
    rate = f"learning rate {training['learning_rate']:g}"
    if tuned and tuned["learning_rate"].value == training["learning_rate"]:
        text = f"Rule {rule}, {rate}, tuned on this base"
    else:
        text = f"Rule {rule}; {rate}, which nobody tuned for it: it is the base's own, in every arm of the plan"
    return Line("why", "", "inconclusive", text)


def models(evidence: Evidence, judged: Sequence[JudgedClaim]) -> list[tuple[str, str, list[Cell]]]:
    """The first screen's table: a model, what it is, and accuracy, gain over plain LoRA and knowledge kept."""
    found = evidence.evaluation
    if found is None:
        return []
    rows = []
    for name in (each for each in MODELS if each in found.models):
        over = found.metrics[name].delta_over_baseline
        against = Cell() if over is None else cell(Metric("", over.estimate, over.low, over.high), sign=True)
        accuracy, kept = (cell(measured(evidence, name, each)) for each in ("aqi_accuracy", "retention"))
        # That none changed is in the table of all figures; here it would crowd out the names.
        changed = changed_answers(evidence, name) if found.noise(name).changed else ""
        beside = "; ".join(filter(None, (accuracy.interval, changed)))
        cells = [Cell(accuracy.value, beside), against, kept]
        rows.append((name, NAMES[name], cells))
    return rows


def stored_answers(evidence: Evidence) -> str:
    """Every stored answer as JSON that may stand in a page: per question what each model said, and whether right."""
    found = evidence.evaluation
    if found is None:
        return ""
    labels = list(found.models)
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found.answers:
        entry = items.setdefault(
            (row["suite"], row["item"]),
            {"s": row["suite"], "q": row["prompt"], "t": row.get("true_category") or "", "a": [None] * len(labels)},
        )
        if row["label"] in found.models:
            right = None if row.get("error") else int(bool(row.get("correct")))
            entry["a"][labels.index(row["label"])] = [str(row.get("error") or row.get("answer") or ""), right]
    text = json.dumps({"models": labels, "items": list(items.values())}, ensure_ascii=False, separators=(",", ":"))
    # Nothing that an answer says may end the element.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
