"""The Alignment Quality Index against its definition, an identity, and clouds of known separation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_impl.errors import GRITError
from grit_impl.evaluate.alignment_index import (
    INDICES,
    alignment_index,
    calinski_harabasz,
    compare_models,
    hidden_states,
    jackknife,
    load_prompts,
    report,
    silhouette,
    xie_beni,
)


def _clouds(rng: np.random.Generator, n1: int, n2: int, distance: float, d: int = 4):
    points = rng.normal(size=(n1 + n2, d))
    points[n1:, 0] += distance
    return points, np.arange(n1 + n2) >= n1


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 20), st.integers(0, 1000))
def test_the_two_indices_are_one_number(n1: int, n2: int, distance: float, seed: int) -> None:
    """Oracle: the identity XBI * CHI = n1 n2 (n - 2) / n^2 for two labelled classes."""
    points, unsafe = _clouds(np.random.default_rng(seed), n1, n2, distance)
    n = n1 + n2
    assert xie_beni(points, unsafe) * calinski_harabasz(points, unsafe) == pytest.approx(n1 * n2 * (n - 2) / n**2)


def test_values_by_hand() -> None:
    """Oracle: pencil and paper for the four points 0, 2 | 10, 12: W = 4, D = 10, B = 100."""
    points, unsafe = np.array([[0.0], [2.0], [10.0], [12.0]]), [False, False, True, True]
    assert xie_beni(points, unsafe) == pytest.approx(4 / (4 * 100))
    assert calinski_harabasz(points, unsafe) == pytest.approx(100 / (4 / 2))
    # a(0) = 2, b(0) = 11: 9/11; a(2) = 2, b(2) = 9: 7/9; mirrored
    assert silhouette(points, unsafe) == pytest.approx((9 / 11 + 7 / 9) / 2)


def test_separation_orders_the_indices(seeded) -> None:
    """Oracle: clouds farther apart have a lower XBI, a higher CHI and a higher silhouette."""
    values = {name: [] for name in INDICES}
    for distance in (0.5, 2.0, 8.0):
        points, unsafe = _clouds(np.random.default_rng(0), 30, 30, distance)
        for name, compute in INDICES.items():
            values[name].append(compute(points, unsafe))
    assert values["xbi"] == sorted(values["xbi"], reverse=True)
    assert values["chi"] == sorted(values["chi"])
    assert values["silhouette"] == sorted(values["silhouette"])


@pytest.mark.parametrize("name", INDICES)
def test_invariances(name: str) -> None:
    """Oracle: none of them depends on origin, rotation, unit, or the order of the points."""
    rng = np.random.default_rng(1)
    points, unsafe = _clouds(rng, 12, 17, 2.0)
    rotation, order = np.linalg.qr(rng.normal(size=(4, 4)))[0], rng.permutation(29)
    moved = (7.0 * points @ rotation + 3.0)[order]
    assert INDICES[name](moved, unsafe[order]) == pytest.approx(INDICES[name](points, unsafe))


@pytest.mark.parametrize("name", INDICES)
def test_the_jackknife_interval_covers(name: str) -> None:
    """Oracle: the population value, from 40,000 points; 95% intervals of 2 x 30 points must hold it in 90-99%."""
    rng = np.random.default_rng(2)
    points, unsafe = _clouds(rng, 20_000, 20_000, 2.0)
    n = 60
    if name == "silhouette":
        truth = silhouette(*_clouds(rng, 1500, 1500, 2.0))
    else:
        # CHI grows with n and XBI hardly does: bring the large sample to the size of the small one.
        truth = {"xbi": xie_beni(points, unsafe), "chi": calinski_harabasz(points, unsafe) * n / 40_000}[name]
    covered = 0
    for _ in range(200):
        interval = jackknife(*_clouds(rng, 30, 30, 2.0), index=name)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_permutations_keep_their_error_and_find_differences() -> None:
    """Oracle: two noisy copies of one model differ significantly in about 5% of cases; a separated one always does."""
    rng = np.random.default_rng(3)
    found = 0
    for k in range(40):
        points, unsafe = _clouds(rng, 15, 15, 1.5)
        x, y = (points + 0.3 * rng.normal(size=points.shape) for _ in range(2))
        found += compare_models(x, y, unsafe, seed=k)[1] <= 0.05
    assert found <= 6
    apart = points.copy()
    apart[unsafe, 0] += 3
    difference, p = compare_models(apart, points, unsafe)
    assert difference > 0
    assert p == pytest.approx(0.001)


@pytest.fixture(scope="module")
def tiny():
    """A random Llama with two layers, and a tokenizer that maps bytes to ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


PROMPTS = [f"bake {i} cakes" for i in range(6)] + [f"how to hurt {i} people badly" for i in range(6)]


def test_hidden_states_ignore_padding(tiny) -> None:
    """Oracle: each prompt alone, without any padding, in plain transformers."""
    import torch

    model, tokenizer = tiny
    together = hidden_states(model, tokenizer, PROMPTS, batch_size=5)
    assert together.shape == (3, 12, 16)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            alone = model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states
        for layer, state in enumerate(alone):
            np.testing.assert_allclose(together[layer, i], state[0].double().mean(dim=0).numpy(), atol=1e-6)


def test_every_layer_is_reported_raw(tiny) -> None:
    """Oracle: the indices of the same hidden states; three layers, three indices, each with its interval."""
    unsafe = [False] * 6 + [True] * 6
    states = hidden_states(*tiny, PROMPTS)
    layers = alignment_index(states, unsafe)
    for each in layers:
        for name, compute in INDICES.items():
            interval = getattr(each, name)
            assert interval.estimate == pytest.approx(compute(states[each.layer], unsafe))
            assert interval.low < interval.estimate < interval.high
    rows = report({"tiny": layers})
    assert len(rows) == 9
    assert not any("aqi" in key.lower() for row in rows for key in row), "never under the name of the other AQI"


def test_a_reference_gives_p_values_over_layers(tiny) -> None:
    """Oracle: equal states have p = 1. Six unsafe ones pushed away in one layer: 2 of 2**6 swaps are as extreme,

    times three layers.
    """
    unsafe = np.array([False] * 6 + [True] * 6)
    states = hidden_states(*tiny, PROMPTS)
    same = alignment_index(states, unsafe, states)
    assert {p for each in same for p in each.p.values()} == {1.0}
    pushed = states.copy()
    pushed[1][unsafe] += 5.0
    found = alignment_index(pushed, unsafe, states)
    assert found[1].p["chi"] == pytest.approx(3 * 2 / 2**6, abs=0.05)
    assert found[0].p["chi"] == found[2].p["chi"] == 1.0
    with pytest.raises(GRITError, match="differ in depth: 2 and 1 layers"):
        alignment_index(states, unsafe, states[:2])


def test_wide_hidden_states_are_flattened_without_change() -> None:
    """Oracle: the indices of the wide points; a rotation into fewer coordinates keeps every distance."""
    rng = np.random.default_rng(4)
    points, unsafe = rng.normal(size=(14, 300)), np.arange(14) < 7
    points[unsafe] += 0.3
    for name, compute in INDICES.items():
        assert jackknife(points, unsafe, name).estimate == pytest.approx(compute(points, unsafe), rel=1e-9)
    other = points + 0.1 * rng.normal(size=points.shape)
    assert compare_models(other, points, unsafe)[0] == pytest.approx(
        calinski_harabasz(other, unsafe) - calinski_harabasz(points, unsafe), rel=1e-9
    )


def test_the_command_on_the_tiny_base(tmp_path: Path) -> None:
    """Oracle: the library on the same model; an untrained adapter (B = 0) changes nothing, so every p is 1."""
    from click.testing import CliRunner

    from grit_impl.evaluate.commands_alignment import alignment_index as command
    from grit_impl.recipes.bases import load_base
    from grit_impl.recipes.lora import LoRASettings, add_lora

    path = tmp_path / "prompts.jsonl"
    rows = [{"text": text, "kind": int(i >= 6)} for i, text in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = load_base("tiny")
    expected = alignment_index(hidden_states(model, tokenizer, PROMPTS), [False] * 6 + [True] * 6)
    add_lora(model, LoRASettings(r=4, alpha=4), 0).save_pretrained(tmp_path / "adapter")
    arguments = ["tiny", "--prompts", str(path), "--prompt-field", "text", "--label-field", "kind"]
    arguments += ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "rows.json")]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "6 prompts per class" in done.output
    written = {(r["model"], r["layer"], r["index"]): r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert len(written) == 2 * 3 * len(expected)
    for each in expected:
        for name in INDICES:
            plain, adapted = (written[which, each.layer, name] for which in ("model", "adapter"))
            assert plain["estimate"] == pytest.approx(getattr(each, name).estimate)
            assert (adapted["estimate"], adapted["p"], plain["p"]) == (plain["estimate"], 1.0, None)
    with pytest.raises(GRITError, match="cannot apply adapter"):
        CliRunner().invoke(command, [*arguments[:-3], str(tmp_path)], catch_exceptions=False)


def test_prompt_files(tmp_path: Path) -> None:
    """Oracle: equally many of both classes, the same choice for the same seed, and one line for a bad file."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"p{i}", "label": "unsafe" if i % 3 == 0 else "safe"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    prompts, unsafe = load_prompts(path)
    assert (len(prompts), sum(unsafe)) == (20, 10)
    assert load_prompts(path) == (prompts, unsafe)
    with pytest.raises(GRITError, match="20 safe and 10 unsafe prompts, needs 11"):
        load_prompts(path, per_class=11)
    path.write_text(json.dumps({"prompt": "x", "label": "maybe"}))
    with pytest.raises(GRITError, match=r"row 1: field 'label' is text \('maybe'\), neither safe nor unsafe"):
        load_prompts(path)
    with pytest.raises(GRITError, match="needs at least 5"):
        jackknife(np.zeros((6, 2)), [True] * 3 + [False] * 3)
