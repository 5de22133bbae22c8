import os
import signal
import threading
import time

import pytest

from moth_jax.errors import InputError
from moth_jax.run import preemption
from moth_jax.run.console import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_PREEMPTED
from moth_jax.run.preemption import Preempted

# The end of a thread stands for that of the process.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let SIGINT interrupt, as it does not in what a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """The exit codes and messages of this process, which goes on."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are received by the main thread")
    said = []

    def end(message, *, code):
        said.append((code, message))
        raise SystemExit  # of the thread

    monkeypatch.setattr(preemption, "end_at_once", end)
    monkeypatch.setattr(preemption, "_SAME_SECONDS", 0.1)
    return said


def until(true):
    deadline = time.monotonic() + 20
    while not true() and time.monotonic() < deadline:
        time.sleep(0.001)
    return true()


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_nothing_is_requested_without_a_signal_or_a_watch():
    assert not preemption.requested()
    preemption.save_before_giving_up(lambda: None)
    with preemption.watch():
        assert not preemption.requested()
        preemption.stop_here()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_seen_at_the_next_safe_point(number, tmp_path, ends):
    with preemption.watch():
        send(number)
        assert until(preemption.requested)
        with pytest.raises(
            Preempted, match=f"saved in {tmp_path}; the same command goes on"
        ) as end:
            preemption.stop_here(tmp_path)
        assert end.value.saved == tmp_path
        with pytest.raises(Preempted, match=r"by a signal; the same command goes on$"):
            preemption.stop_here()
    assert not preemption.requested()
    assert ends == []


def test_until_it_watches_a_signal_ends_the_process_with_the_same_exit_codes(ends):
    before = signal.getsignal(signal.SIGTERM)
    preemption.end_until_watched()
    for number, code in ((signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)):
        with pytest.raises(SystemExit):
            signal.raise_signal(number)
        assert ends[-1][0] == code
    with preemption.watch():
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        os.kill(os.getpid(), signal.SIGTERM)
        assert until(preemption.requested)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_was_done_on_a_signal_before_is_done_again_after_the_watch():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with preemption.watch():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_signals_at_once_are_one(ends):
    with preemption.watch():
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert until(preemption.requested)
        time.sleep(0.05)
    assert ends == []


@pytest.mark.parametrize(
    ("second", "code"), [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_a_second_signal_ends_the_process_at_once(second, code, ends):
    with preemption.watch():
        send()
        assert until(preemption.requested)
        time.sleep(0.15)
        try:
            send(second)
            assert until(lambda: ends)
        except KeyboardInterrupt:
            assert until(lambda: ends)
    assert ends == [(code, "ended at once; the same command goes on from the last checkpoint")]


def test_the_first_ctrl_c_is_left_to_python(ends):
    with preemption.watch(grace_seconds=0.0):
        with pytest.raises(KeyboardInterrupt):
            until(lambda: send(signal.SIGINT))
        assert not preemption.requested()
    assert ends == []


def test_without_a_safe_point_in_time_the_last_state_is_saved_by_another_thread(tmp_path, ends):
    threads = []

    def save():
        threads.append(threading.current_thread())
        return tmp_path / "00000007"

    with preemption.watch(grace_seconds=0.1):
        preemption.save_before_giving_up(save)
        started = time.monotonic()
        send()
        assert until(lambda: ends)
        assert time.monotonic() - started >= 0.1
    (code, message), *others = ends
    assert (code, others) == (EXIT_PREEMPTED, [])
    assert f"saved in {tmp_path}/00000007; the same command goes on from there" in message
    assert threads != [threading.main_thread()]


def test_where_nothing_can_be_saved_it_ends_all_the_same(ends):
    with preemption.watch(grace_seconds=0.0):
        send()
        assert until(lambda: ends)
    assert ends == [(EXIT_PREEMPTED, "ended by a signal; the same command goes on")]


def test_a_disk_that_is_full_by_then_is_told_as_ever(ends):
    def save():
        raise InputError("no space left")

    with preemption.watch(grace_seconds=0.0):
        preemption.save_before_giving_up(save)
        send()
        assert until(lambda: ends)
    assert ends == [(EXIT_BAD_INPUT, "no space left")]
