import io
import re
import sys

import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.progress import Progress, as_progress, console_progress, displays, silent_progress
from moth_jax.progress.displays import Lines


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def _lines_progress(clock):
    stream = io.StringIO()
    return Progress(Lines(stream, clock=clock), clock=clock), stream


def _texts(stream):
    """Lines without their time of day, which every line must begin with."""
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    return [line[9:] for line in lines]


def test_plain_lines_are_the_first_the_last_and_one_every_ten_seconds(clock):
    progress, stream = _lines_progress(clock)
    for total, seconds in ((100, 0.25), (2, 20)):
        with progress.task("hardening", total=total) as task:
            for _ in range(total):
                clock.wait(seconds)
                task.advance(1, accuracy=0.914)
    assert _texts(stream) == [
        "hardening: 0/100 steps, 0 %",
        "hardening: 40/100 steps, 40 %, 0:00:10 elapsed, 0:00:15 left · accuracy 0.914",
        "hardening: 80/100 steps, 80 %, 0:00:20 elapsed, 0:00:05 left · accuracy 0.914",
        "hardening: 100/100 steps, 100 % in 0:00:25 · accuracy 0.914",
        "hardening: 0/2 steps, 0 %",
        "hardening: 1/2 steps, 50 %, 0:00:20 elapsed, 0:00:20 left · accuracy 0.914",
        "hardening: 2/2 steps, 100 % in 0:00:40 · accuracy 0.914",
    ]


def test_every_plain_line_is_flushed_and_free_of_escape_codes(monkeypatch):
    flushed = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "flush", lambda: flushed.append(stream.getvalue()))
    with console_progress(stream).task("distances", total=2, unit="directions") as task:
        task.advance(2)
    assert [text.count("\n") for text in flushed] == [1, 2]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_a_resumed_task_starts_where_it_was_and_counts_only_its_own_work_for_the_time_left(clock):
    progress, stream = _lines_progress(clock)
    with progress.task("distances", total=90, unit="directions", completed=60) as task:
        assert task.remaining() is None
        clock.wait(10)
        task.advance(10)
        assert task.remaining() == pytest.approx(20)
    assert _texts(stream)[0] == "distances: 60 of 90 directions done, continuing"


def test_work_loaded_from_an_earlier_run_says_nothing_about_the_time_left(clock):
    progress, _ = _lines_progress(clock)
    with progress.task("distances", total=90) as task:
        task.skip(50, average=54.1)
        assert (task.completed, task.remaining(), task.figures) == (50, None, {"average": 54.1})
        clock.wait(10)
        task.advance(10)
        assert task.remaining() == pytest.approx(30)


def test_work_that_is_found_done_is_said_in_a_line(clock):
    progress, stream = _lines_progress(clock)
    with progress.task("distances", total=90, unit="directions") as task:
        task.resume(60, average=54.1)
        clock.wait(9)
        task.advance(30)
    with progress.task("distances", total=90, unit="directions") as task:
        task.resume(90)
    assert _texts(stream) == [
        "distances: 0/90 directions, 0 %",
        "distances: 60 of 90 directions done, continuing",
        "distances: 90/90 directions, 100 % in 0:00:09 · average 54.1",
        "distances: 0/90 directions, 0 %",
        "distances: 90/90 directions, 100 % in 0:00:00",
    ]


def test_the_first_advance_with_its_compilation_is_left_out_once_there_is_a_second(clock):
    progress, _ = _lines_progress(clock)
    with progress.task("hardening", total=10) as task:
        clock.wait(60)
        task.advance(1)
        assert task.remaining() == pytest.approx(9 * 60)
        clock.wait(2)
        task.advance(1)
        assert task.remaining() == pytest.approx(8 * 2)


def test_the_time_left_counts_down_between_advances_but_only_by_the_unit_in_progress(clock):
    progress, _ = _lines_progress(clock)
    with progress.task("distances", total=4) as task:
        for _ in range(2):
            clock.wait(100)
            task.advance(1)
        clock.wait(30)
        assert task.remaining() == pytest.approx(170)
        clock.wait(1000)
        assert task.remaining() == pytest.approx(100)


def test_advancing_by_nothing_changes_the_figures_only(clock):
    progress, stream = _lines_progress(clock)
    with progress.task("hardening", total=2) as task:
        clock.wait(11)
        task.advance(0, pair="cat↔dog", average=np.float32(54.1234))
        assert task.completed == 0
        assert task.remaining() is None
    assert _texts(stream)[1].endswith("0:00:11 elapsed · pair cat↔dog · average 54.12")


def test_a_task_that_fails_says_where_it_stopped_and_lets_the_error_pass(clock):
    progress, stream = _lines_progress(clock)

    def work():
        with progress.task("distances", total=90, unit="directions") as task:
            task.advance(27)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert _texts(stream)[-1] == "distances: stopped at 27/90 directions, 30 % in 0:00:00"


def test_a_task_of_unknown_or_no_length_is_shown_without_percent(clock):
    progress, stream = _lines_progress(clock)
    with progress.task("reading", unit="files") as task:
        task.advance(3)
    with progress.task("nothing to do", total=0):
        pass
    assert _texts(stream)[1] == "reading: 3 files in 0:00:00"
    assert _texts(stream)[3] == "nothing to do: 0/0 steps in 0:00:00"


def test_a_stream_that_cannot_carry_a_class_name_does_not_end_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console_progress(stream).note("cat↔dog")
    assert raw.getvalue().endswith(b"cat?dog\n")


def test_a_terminal_gets_a_bar_with_times_and_figures_and_notes_above_it():
    stream = Terminal()
    progress = console_progress(stream)
    with progress.task("distances before", total=90, unit="directions", completed=27) as task:
        task.advance(9, average=54.1, failures=0)
        task.advance(9, failures=1)
        progress.note("cat[/red]→dog: nothing found")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "27/90 directions" in text
    assert "━" in text
    assert "average 54.1 · failures 1" in text
    assert "cat[/red]→dog: nothing found" in text
    assert "distances before: 45/90 directions, 50 % in 0:00:00 · average 54.1" in text
    assert stream.getvalue().rstrip().endswith("\x1b[2K")  # the bar itself is gone at the end
    assert "\x1b[?25h" in stream.getvalue()  # and the cursor is back


def test_two_tasks_inside_each_other_share_the_terminal():
    stream = Terminal()
    progress = console_progress(stream)
    with (
        progress.task("hardening", total=2) as outer,
        progress.task("inner", unit="images") as task,
    ):
        task.advance(3)
        outer.advance(1)
    text = stream.getvalue()
    assert "inner: 3 images in 0:00:00" in text
    assert "hardening: 1/2 steps, 50 % in 0:00:00" in text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with console_progress(stream).task("hardening", total=1) as task:
        task.advance()
    assert "\x1b" not in stream.getvalue()


def test_a_notebook_gets_one_output_that_is_replaced_and_keeps_the_notes(monkeypatch):
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content)

    def display(content, display_id):
        shown.append(content)
        return Handle()

    ipython = type(sys)("IPython")
    ipython.get_ipython = lambda: type("Shell", (), {"kernel": None})()
    ipython_display = type(sys)("IPython.display")
    ipython_display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython_display)
    monkeypatch.setattr(displays, "_SECONDS_BETWEEN_REDRAWS", 0.0)
    progress = console_progress()
    with progress.task("distances", total=2) as task:
        progress.note("a note")
        task.advance(1, average=5.0)
    texts = [content._repr_mimebundle_([], [])["text/plain"] for content in shown]
    assert any("1/2 steps" in text and "average 5" in text for text in texts)
    assert "a note" in texts[-1]
    assert "distances: 1/2 steps, 50 % in 0:00:00" in texts[-1]
    assert "━" not in texts[-1]


def test_library_functions_take_true_false_none_or_a_progress(capfd):
    own = silent_progress()
    assert as_progress(own) is own
    for value in (False, None, own):
        as_progress(value).note("a note")
        with as_progress(value).task("quiet", total=3) as task:
            task.advance(3, loss=0.1)
        assert task.completed == 3
    assert capfd.readouterr() == ("", "")
    with as_progress(True).task("loud"):
        pass
    assert "loud" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"progress must be True, False or .* got 'yes'"):
        as_progress("yes")
