"""The cost of one stack: measured in a process of its own, watched, and kept length by length."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from grit_impl.data import FIXTURES
from grit_impl.errors import GRITError, RunFailed
from grit_impl.verify import cost_run
from grit_impl.verify.cost_run import LENGTHS, complete, read, run_cost

# Stands in for `python -m grit_impl.verify.cost_run`: leaves what it is told to, after a while.
CHILD = """
import json, pathlib, sys, time
target, inputs = pathlib.Path(sys.argv[1]), sys.argv[2]
def keep(lengths, running):
    cells = [{"length": length} for length in lengths]
    new = target.with_suffix(".new")
    new.write_text(json.dumps({"inputs": inputs, "cells": cells, "running": running}))
    new.replace(target)
"""
SLOW = CHILD + "for lengths, running in (([], 4), ([512], 0), ([512], 7)): keep(lengths, running); time.sleep(0.4)\n"
WHOLE = CHILD + "keep([512, 2048], 0)\n"


@pytest.fixture
def child(monkeypatch):
    """A function that puts a script in the place of the measuring process; everything else is real."""
    real, started = subprocess.Popen, []

    def install(script):
        def popen(command, **options):
            target, inputs = command[5], command[command.index("--inputs") + 1]
            started.append(real([sys.executable, "-c", script, target, inputs], **options))
            return started[-1]

        monkeypatch.setattr(cost_run.subprocess, "Popen", popen)
        monkeypatch.setattr(cost_run, "_POLL_SECONDS", 0.02)
        return started

    return install


def run(target, told=None, seconds=10.0):
    """Measure through the parent's side."""
    tell = (lambda *now: told.append(now)) if told is not None else (lambda *now: None)
    return run_cost("base", "peft", target, seconds=seconds, inputs="mine", progress=tell)


def test_progress_is_told_in_seconds_of_rounds(child, tmp_path):
    """Oracle: what the process wrote, 10 s for each of two lengths; what another measurement left counts nothing."""
    target, told = tmp_path / "peft.json", []
    target.write_text(json.dumps({"inputs": "others", "cells": [{"length": n} for n in LENGTHS]}))
    child(SLOW + WHOLE)
    assert complete(run(target, told), "mine")
    done = list(dict.fromkeys(now for _, now, _ in told))
    assert done == [0, 4, 10, 17, 20]
    assert {total for *_, total in told} == {20}


def test_a_measurement_that_fails_says_its_last_line(child, tmp_path):
    """Oracle: the process's own words and the log's name; a process that stops half way is a failure, too."""
    child("print('error: no such projection'); raise SystemExit(2)")
    with pytest.raises(RunFailed, match=r"^error: no such projection \(see .*peft\.log\)$"):
        run(tmp_path / "peft.json")
    child(CHILD + "keep([512], 0); print('as far as I got')")
    with pytest.raises(RunFailed, match="as far as I got"):
        run(tmp_path / "peft.json")


def test_an_interrupted_parent_leaves_no_process(child, tmp_path):
    """Oracle: the process's exit status after ctrl-C reached the parent in the middle."""
    started = child("import time; time.sleep(30)")

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cost("base", "peft", tmp_path / "peft.json", seconds=1.0, inputs="mine", progress=interrupt)
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


def test_an_interrupted_measurement_keeps_what_is_finished(measured, tmp_path):
    """Oracle: the first length's figures survive; the second call measures the second length alone, a third none."""
    assert measured(fail_at=LENGTHS[1]) == [LENGTHS[0]]
    left = read(tmp_path / "peft.json")
    assert not complete(left, "mine")
    assert measured() == [LENGTHS[1]]
    assert read(tmp_path / "peft.json")["cells"][0] == left["cells"][0]
    assert measured() == []
    assert complete(read(tmp_path / "peft.json"), "mine")


@pytest.mark.parametrize("change", [{"inputs": "others"}, {"gpu": "another card"}, {"stack": "unsloth"}])
def test_figures_of_something_else_are_not_kept(measured, tmp_path, change):
    """Oracle: other code, another card, another stack: both lengths are measured, and the old figures lie beside."""
    cells = [{"length": length} for length in LENGTHS]
    left = {"stack": "peft", "gpu": None, "inputs": "mine", "cells": cells, **change}
    (tmp_path / "peft.json").write_text(json.dumps(left))
    assert measured() == list(LENGTHS)
    assert read(tmp_path / f"peft.{left['inputs']}.json") == left


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": [1]}', '{"cells": [{}]}'])
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
    command = [sys.executable, "-m", "grit_impl.verify.cost_run", str(FIXTURES / "tiny_llama"), "peft", str(target)]
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
    """Oracle: a grandchild whose parent is killed without warning is gone within seconds."""
    grandchild = (
        "import os, pathlib, sys, time; from grit_impl.verify.processes import end_with_parent; end_with_parent();"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}, sys.argv[1]])"
    note = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", parent, str(note)])
    while not (note.is_file() and note.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while _alive(int(note.read_text())):
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
