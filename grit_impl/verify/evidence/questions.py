"""The questions of a verification, none of them in what any arm is trained on."""

from __future__ import annotations

from dataclasses import replace

from grit_impl.evaluate.items import ItemSet, aqi_fields, load_aqi, load_knowledge
from grit_impl.files import FIXTURES
from grit_impl.machine import has_gpu
from grit_impl.recipes.arms import default_training
from grit_impl.verify.options import Options


def questions(options: Options) -> tuple[ItemSet, ItemSet]:
    """The AQI questions that were asked for, and those about knowledge.

    Raises:
        GRITError: unusable questions, or some that are in the training data.
    """
    own = not options.aqi_dataset
    aqi = load_aqi(
        FIXTURES / "aqi_test.jsonl" if own else options.aqi_dataset,
        aqi_fields(options.features_field, options.answer_field),
        # The frozen set is not in the training data by construction, and a test holds it to that.
        training=() if own else _trained_on(options),
        allow_overlap=options.allow_overlap,
    )
    return spread(aqi, options.limit), spread(load_knowledge(FIXTURES / "knowledge_test.jsonl"), options.limit)


def spread(items: ItemSet, n: int | None) -> ItemSet:
    """At most `n` of these questions, from all over the set, since a file may be sorted."""
    if n is None or n >= len(items.items):
        return items
    return replace(items, items=[items.items[i * len(items.items) // n] for i in range(n)])


def _trained_on(options: Options) -> list[str]:
    """The AQI questions of the training data of every seed."""
    from grit_impl import aqi

    frozen = aqi.frozen_items()
    training = default_training(options.base_model, cuda=has_gpu(), steps=options.steps)
    size = training.steps * training.batch_size * training.accumulation
    seeds = range(options.seed, options.seed + options.seeds)
    return [item["features"] for seed in seeds for item in aqi.generate(size, seed, frozen)]
