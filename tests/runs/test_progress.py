"""What is left is told from the pace that was seen, not from the time that starting took."""

import io

import pytest

from grit_impl.runs.progress import ProgressLine


class Clock:
    """Stands in for the monotonic one."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("grit_impl.runs.progress.time", clock)
    return clock


def lines(clock: Clock, *seen: tuple[float, int], total: int = 200) -> list[str]:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for clock.now, done in seen:
        line("training pure", done, total)
    return stream.getvalue().split("\n")[1:-1]


def test_starting_is_not_taken_for_the_pace(clock: Clock):
    """A model that took 60 s to load does not make its first step one of 60 s."""
    told = lines(clock, (0, 0), (60, 1), (80, 11))
    assert told == ["training pure: 0/200", "training pure: 1/200", "training pure: 11/200, 6:18 min left"]


def test_steps_of_an_earlier_call_are_not_taken_for_the_pace(clock: Clock):
    """A run that goes on at step 150 has not trained 150 steps in the seconds it took to start."""
    told = lines(clock, (0, 0), (30, 150), (60, 160))
    assert told[-1] == "training pure: 160/200, 2:00 min left"


def test_a_run_that_goes_on_says_at_once_how_far_it_is(clock: Clock):
    """Its record has 150 steps before the model is loaded; a step takes 2 s."""
    told = lines(clock, (0.5, 150), (60, 150), (62, 151), (83, 161))
    assert told[-1] == "training pure: 161/200, 1:22 min left"


def test_a_run_that_falls_back_to_its_checkpoint_begins_anew(clock: Clock):
    """Its record has 170 steps, its last checkpoint is of step 150; a step takes 2 s."""
    told = lines(clock, (0.5, 170), (60, 150), (62, 151), (83, 161))
    assert told[-1] == "training pure: 161/200, 1:22 min left"


def test_the_end_tells_the_whole_time_and_is_told_once(clock: Clock):
    told = lines(clock, (0, 0), (60, 100), (120, 200), (121, 200))
    assert told == ["training pure: 0/200", "training pure: 100/200", "training pure: 200 in 2:00 min"]


def test_what_was_there_already_needs_no_line(clock: Clock):
    stream = io.StringIO()
    ProgressLine(stream)("training pure", 200, 200)
    assert stream.getvalue() == ""
