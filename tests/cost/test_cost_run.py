"""The cost of one stack: measured in a process of its own, watched, and kept length by length."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from grit_impl.cost import measure as cost_run
from grit_impl.cost.measure import LENGTHS, complete, read
from grit_impl.errors import GRITError
from grit_impl.files import FIXTURES
from grit_impl.recipes.bases import load_base
from grit_impl.recipes.lora import LoRASettings, add_lora
from grit_impl.runs import execute
from grit_impl.runs.execute import run_cost
from grit_impl.verify.evidence import live as evidence
from grit_impl.verify.evidence.live import LiveEvidence
from grit_impl.verify.options import Options

# Stands in for `python -m grit_impl.cost.measure`: leaves what it is told to; after each it waits for the parent.
CHILD = """
import json, os, pathlib, sys, time
target, inputs = pathlib.Path(sys.argv[1]), sys.argv[2]
def keep(lengths, seconds=None, process=os.getpid(), seen=None):
    running = None if seconds is None else {"process": process, "since": time.time() - seconds}
    new = target.with_suffix(".new")
    cells = [{"length": length} for length in lengths]
    new.write_text(json.dumps({"inputs": inputs, "cells": cells, "running": running}))
    new.replace(target)
    if seen is not None:
        wait(seen)
def wait(seen):
    deadline = time.monotonic() + 20
    while not target.with_suffix(f".{seen}").exists():
        assert time.monotonic() < deadline, f"the parent did not tell {seen}"
        time.sleep(0.01)
"""
STATES = """
keep([], 4000, seen=4)
keep([512], seen=10)
keep([512], 7000, seen=17)
keep([512], 99000, seen=19)
keep([512, 2048])
"""


@pytest.fixture
def child(monkeypatch):
    """A function that puts a script in the place of the measuring process; everything else is real."""
    real, started = subprocess.Popen, []

    def install(script):
        def popen(command, **options):
            target, inputs = command[5], command[command.index("--inputs") + 1]
            started.append(real([sys.executable, "-c", CHILD + script, target, inputs], **options))
            return started[-1]

        monkeypatch.setattr(execute.subprocess, "Popen", popen)
        monkeypatch.setattr(execute, "_POLL_SECONDS", 0.02)
        return started

    return install


def run(target, progress=lambda *now: None):
    """Measure 10,000 s per length through the parent's side."""
    return run_cost("base", "peft", target, seconds=10_000.0, inputs="mine", progress=progress)


@pytest.mark.parametrize("left", ["others", "mine"])
def test_progress_is_told_in_seconds_of_rounds(child, tmp_path, left):
    """Oracle: what the process wrote, in thousands of seconds; the last thousand is told when all is there.

    What an earlier process left counts as far as it is finished: nothing of other inputs, nor the time that a killed
    process had spent in a length.
    """
    target, told = tmp_path / "peft.json", []
    lengths = {"others": [512, 2048], "mine": []}[left]
    running = {"process": 1, "since": time.time() - 9000}
    target.write_text(json.dumps({"inputs": left, "cells": [{"length": n} for n in lengths], "running": running}))

    def progress(label, done, total):
        assert (label, total) == ("measuring the cost on peft, seconds", 20_000)
        told.append(done // 1000)
        target.with_suffix(f".{told[-1]}").touch()

    child(f"wait(0)\n{STATES}")
    assert complete(run(target, progress), "mine")
    assert list(dict.fromkeys(told)) == [0, 4, 10, 17, 19, 20]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("print('error: no such projection'); raise SystemExit(2)", "status 2: no such projection"),
        ("keep([512]); print('figures of 512', flush=True); os.kill(os.getpid(), 9)", "status -9: figures of 512"),
        ("keep([512])", "status 0: it printed nothing"),
    ],
)
def test_a_measurement_that_fails_says_how(child, tmp_path, script, why):
    """Oracle: how the process ended, its last words and the log's name; half a measurement is none."""
    child(script)
    assert run(tmp_path / "peft.json") == f"its process ended with {why} (see {tmp_path / 'peft.log'})"


def test_an_interrupted_parent_leaves_no_process(child, tmp_path):
    """Oracle: the process's exit status after ctrl-C reached the parent in the middle."""
    started = child("time.sleep(30)")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "peft.json", interrupt)
    assert started[0].returncode == -signal.SIGTERM


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A function that runs the process's side on the tiny base here; returns the lengths that it measured.

    `measure` is replaced: it notes the length, and fails where it is told to.
    """

    def run(inputs="mine", fail_at=None):
        lengths = []

        def measure(model, length, **_):
            if length == fail_at:
                raise KeyboardInterrupt
            lengths.append(length)
            return {"length": length, "nth": len(lengths)}

        monkeypatch.setattr(cost_run, "measure", measure)
        monkeypatch.setattr(cost_run, "load", lambda folder, stack: None)
        monkeypatch.setattr(cost_run, "end_with_parent", lambda: None)
        monkeypatch.setattr(sys, "argv", ["cost_run", "base", "peft", str(tmp_path / "peft.json"), "--inputs", inputs])
        with contextlib.suppress(KeyboardInterrupt):
            assert cost_run.main() == 0
        return lengths

    return run


def test_a_measurement_leaves_nothing_on_the_model():
    """Oracle: a weak reference to GRIT's manager; the next length's plain steps are of a model without it."""
    base, _ = load_base("random:tiny")
    model, seen = add_lora(base, LoRASettings(r=4, alpha=4), 0), []
    gc.disable()
    try:
        found = cost_run.measure(model, 8, seconds=0, tell=lambda: seen.append(weakref.ref(model._grit_manager)))
        assert [left() for left in seen] == [None]
    finally:
        gc.enable()
    assert (found["layers"], found["ready"]) == (14, 14)
    assert not hasattr(model, "_grit_manager")


def test_an_interrupted_measurement_keeps_what_is_finished(measured, tmp_path):
    """Oracle: the first length's figures survive; the second call measures the second length alone, a third none."""
    assert measured(fail_at=LENGTHS[1]) == [LENGTHS[0]]
    left = read(tmp_path / "peft.json")
    assert not complete(left, "mine")
    assert measured() == [LENGTHS[1]]
    assert read(tmp_path / "peft.json")["cells"][0] == left["cells"][0]
    assert measured() == []
    assert complete(read(tmp_path / "peft.json"), "mine")


@pytest.mark.parametrize("asked", ["mine", ""])
def test_figures_of_something_else_lie_beside(measured, tmp_path, asked):
    """Oracle: other inputs, or none said: both lengths are measured, and the old figures are still on the disk."""
    left = {"stack": "peft", "gpu": None, "inputs": "others", "cells": [{"length": length} for length in LENGTHS]}
    (tmp_path / "peft.json").write_text(json.dumps(left))
    assert measured(inputs=asked) == list(LENGTHS)
    assert read(tmp_path / "peft.others.json") == left


def test_the_card_and_the_stack_are_inputs(monkeypatch, tmp_path):
    """Oracle: a finished measurement of another card, or of the other stack, is not taken for this one's."""
    asked = []

    def run_cost(base, stack, target, *, inputs, **_):
        asked.append(inputs)
        return {"cells": []}

    monkeypatch.setattr(evidence, "has_gpu", lambda: True)
    monkeypatch.setattr(evidence, "run_cost", run_cost)
    for card in ("NVIDIA A10", "NVIDIA H200"):
        monkeypatch.setattr(evidence, "gpu_names", lambda card=card: [card])
        LiveEvidence(Options(reports_dir=tmp_path)).gather(["cost:peft", "cost:unsloth"])
    assert len(set(asked)) == 4


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": [1]}', '{"cells": [{}]}', '{"cells": 7}'])
def test_a_file_of_something_else_is_named(tmp_path, content):
    """Oracle: one line with the file, whatever is in it."""
    (tmp_path / "peft.json").write_text(content)
    with pytest.raises(GRITError, match=r"peft\.json is damaged \(.+\): remove it"):
        read(tmp_path / "peft.json")


def test_without_a_fingerprint_everything_is_measured_anew(measured, tmp_path):
    """Who calls it by hand wants figures of now."""
    assert measured(inputs="") == measured(inputs="") == list(LENGTHS)


def test_real_steps_on_a_cpu(tmp_path):
    """The tiny base in a process of its own. Oracle: both lengths, at least two rounds each, every layer ready."""
    target = tmp_path / "peft.json"
    command = [sys.executable, "-m", "grit_impl.cost.measure", str(FIXTURES / "tiny_llama"), "peft", str(target)]
    done = subprocess.run(
        [*command, "--lengths", "8", "16", "--seconds", "0.05"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = read(target)["cells"]
    assert [cell["length"] for cell in cells] == [8, 16]
    for cell in cells:
        assert len(cell["step_ratios"]) >= 2
        assert cell["ready"] == cell["layers"] > 0


def test_the_process_ends_with_its_parent(tmp_path):
    """Real steps in a grandchild that says who it is when the rounds begin. Oracle: gone once its parent is killed."""
    target = tmp_path / "peft.json"
    parent = (
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'grit_impl.cost.measure', sys.argv[1],"
        " 'peft', sys.argv[2], '--inputs', 'mine', '--lengths', '8', '--seconds', '600'])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, str(FIXTURES / "tiny_llama"), str(target)])
    deadline = time.monotonic() + 300
    while not (running := read(target).get("running")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert time.time() - 300 < running["since"] <= time.time()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while _alive(running["process"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # an orphan that nobody waits for is a zombie, and gone
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
