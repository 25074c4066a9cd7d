"""The callback probe on the installed versions, and on versions broken on purpose."""

from __future__ import annotations

import click.testing
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.trainer_callback import CallbackHandler

from grit_impl.errors import GRITError, RunFailed
from grit_impl.probe import findings as probe
from grit_impl.probe import run as probe_run
from grit_impl.probe.commands import show
from grit_impl.recipes.arms import TrainingSettings

SHORT = TrainingSettings(accumulation=2)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(probe_run, "STEPS", 5)


def _failed(found):
    return [check.name for check in found.checks if not check.good]


def test_installed_versions_pass(tmp_path, capsys):
    """Oracle: the documented order of the loop; hooks per micro-step are known from accumulation."""
    found = probe_run.require_probe(tmp_path, SHORT, unsloth=False)
    events = {event.name: event for event in found.events}
    order = [
        probe_run.CLIP,
        probe_run.MOMENT,
        probe_run.ENTRY,
        probe_run.EXIT,
        "on_optimizer_step",
        probe_run.ZERO,
        "on_step_end",
    ]
    places = [events[name].order for name in order]
    assert _failed(found) == []
    assert places == sorted(places)
    assert places[0] > 0
    assert events["forward hook on q_proj.lora_A"].per_step == (2, 2)
    assert events["on_substep_end"].per_step == (1, 1)
    assert events["on_step_end"].total == 5
    assert probe.ProbeReport.read(tmp_path / probe.FILE) == found
    show(found)
    assert "on_pre_optimizer_step" in capsys.readouterr().out


def test_a_run_probes_once(tmp_path, monkeypatch):
    """Oracle: with the file of these versions there, nothing is trained."""
    probe_run.require_probe(tmp_path, SHORT, unsloth=False)
    monkeypatch.setattr(probe_run, "run_probe", None)
    assert probe_run.require_probe(tmp_path, SHORT, unsloth=False).good


def test_the_run_that_follows_compiles_as_the_first(tmp_path):
    """Oracle: Dynamo makes a size an argument of the graph once it has met two; after a probe it has met none."""
    arguments = []

    def backend(graph, inputs):
        arguments.append(len(inputs))
        return graph.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    compiled(torch.ones(4))
    probe_run.require_probe(tmp_path, SHORT, unsloth=False)
    compiled(torch.ones(8))
    assert arguments == [1, 1]


def test_overwritten_gradients_are_seen(tmp_path):
    """Planted: something changes the gradients after the callback."""

    def overwrite(optimizer, *_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(1e-3)

    handle = register_optimizer_step_pre_hook(overwrite)
    try:
        with pytest.raises(RunFailed, match=r"transformers .* bit for bit: 0 of 28 tensors"):
            probe_run.require_probe(tmp_path, SHORT, unsloth=False)
    finally:
        handle.remove()


def test_a_moment_that_is_gone_is_seen(monkeypatch):
    """Planted: a version of transformers that does not fire on_pre_optimizer_step."""
    monkeypatch.setattr(CallbackHandler, probe_run.MOMENT, lambda self, args, state, control: control)
    found = probe_run.run_probe(SHORT, unsloth=False)
    assert "fires once per optimizer step" in _failed(found)
    assert "clipping < on_pre_optimizer_step < optimizer.step" in _failed(found)


def test_a_moment_after_zero_grad_is_seen(monkeypatch):
    """Planted: the event fires where on_step_end does, with the gradients gone."""
    early, late = getattr(CallbackHandler, probe_run.MOMENT), CallbackHandler.on_step_end
    monkeypatch.setattr(CallbackHandler, probe_run.MOMENT, lambda self, args, state, control: control)

    def on_step_end(self, args, state, control):
        early(self, args, state, control)
        return late(self, args, state, control)

    monkeypatch.setattr(CallbackHandler, "on_step_end", on_step_end)
    failed = _failed(probe_run.run_probe(SHORT, unsloth=False))
    assert "gradients are ready at that moment" in failed
    assert "what is written there enters the optimizer, bit for bit" in failed


def test_bypassed_layers_are_seen(monkeypatch):
    """Planted: a fused forward that never calls lora_A; the statistics do not add up to the gradients."""
    from peft.tuners.lora import Linear

    def fused(self, x, *args, **kwargs):
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        return self.base_layer(x) + torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)

    monkeypatch.setattr(Linear, "forward", fused)
    assert _failed(probe_run.run_probe(SHORT, unsloth=False)) == [
        "GRIT's statistics see every layer and add up to the gradients"
    ]


def test_a_damaged_file_is_named(tmp_path):
    """Oracle: the error names the file."""
    (tmp_path / probe.FILE).write_text('{"stack": ')
    with pytest.raises(GRITError, match=r"corrupt run record: .*probe\.json"):
        probe_run.require_probe(tmp_path, SHORT, unsloth=False)


def test_the_command_reports_a_failure(monkeypatch):
    """Oracle: exit status 1 and the check's name."""
    from grit_impl.probe.commands import probe as command

    broken = probe.ProbeReport(
        "peft", "AdamW", {"torch": "2"}, (), (probe.Requirement("fires once", False, "0 per step"),)
    )
    monkeypatch.setattr(probe_run, "run_probe", lambda *_, **__: broken)
    result = click.testing.CliRunner().invoke(command, ["--no-unsloth"])
    assert result.exit_code == 1
    assert "FAIL  fires once: 0 per step" in result.output
