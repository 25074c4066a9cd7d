"""The larger base: its size, and a schedule that follows the clock."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

import grit_impl.recipes.tiny_llama.pretrain as module
from grit_impl.recipes.tiny_llama.pretrain import SIZES, Settings, build_model, build_tokenizer, pretrain

SMALL = Settings(hidden=64, layers=1, heads=2, kv_heads=1, ffn=64, batch_tokens=256, warmup=5, threads=1)


def test_the_larger_base_has_the_size_of_its_name() -> None:
    """39 million parameters, counted on the meta device; the embedded base's settings are the defaults."""
    tokenizer = build_tokenizer(SMALL, sample=2000)
    with torch.device("meta"):
        model = build_model(SIZES["40m"], tokenizer)
    assert isinstance(model, LlamaForCausalLM)
    assert 30e6 < model.num_parameters() < 45e6
    assert SIZES["tiny"] == Settings()


def test_pretraining_by_the_clock_ends_in_time_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time ends the training, whatever the number of steps: a clock that ticks whenever it is read, so that a
    slow machine takes as many steps as a fast one."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    model, _, losses = pretrain(dataclasses.replace(SMALL, seconds=80.0, steps=10**9), progress=False)
    assert len(losses) == 40  # two looks per step, of the schedule and of the loop, after one of the schedule alone
    assert next(model.parameters()).device.type == "cpu"
    assert sum(losses[-10:]) < sum(losses[:10])
