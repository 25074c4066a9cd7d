"""Small models for the exporter's tests, built once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two bases that differ in all that a Llama's export depends on, and an adapter for each.

    `untied`: plain rope, Llama 3's split, end tokens as usual. `tied`: Llama 3's scaled rope, GPT-2's split, a padded
    vocabulary.
    """
    root = tmp_path_factory.mktemp("lab")
    untied = tiny.make_base(root / "untied")
    tied = tiny.make_base(root / "tied", tied=True, llama3_rope=True, pad_rows=13, split="gpt2", seed=2)
    return SimpleNamespace(
        root=root,
        untied=untied,
        tied=tied,
        untied_lora=tiny.make_adapter(untied, root / "untied-lora"),
        tied_lora=tiny.make_adapter(tied, root / "tied-lora"),
    )
