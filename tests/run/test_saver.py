import functools
import threading
import time
from concurrent import futures

import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.run import checkpoints, preemption
from moth_jax.run.checkpoints import RunCheckpoints, Saver, Timer


def test_a_checkpoint_is_due_once_in_an_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = Timer(30.0)
    due = []
    for seconds in (10, 25, 5, 30, 31):
        now[0] += seconds
        due.append(timer.due())
    assert due == [False, True, False, True, True]


def test_the_seconds_of_all_processes_are_counted(monkeypatch):
    clock, cpu = [100.0], [7.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: cpu[0])
    first = Timer(30.0)
    clock[0], cpu[0] = 110.0, 12.0
    assert first.spent() == {"seconds": 10.0, "cpu_seconds": 5.0}
    second = Timer(30.0, first.spent())
    clock[0], cpu[0] = 113.0, 12.5
    assert second.spent() == {"seconds": 13.0, "cpu_seconds": 5.5}


# States at safe points


def offers(folder, interval, steps):
    """Offer these steps; return those that were asked for their state."""
    asked = []

    def state(step):
        asked.append(step)
        return {"weights": np.full(3, step, np.float32)}, {"epoch": step}

    with Saver(RunCheckpoints(folder), Timer(interval)) as saver:
        for step in steps:
            saver.offer(step, functools.partial(state, step))
    return asked


def test_states_are_saved_when_that_is_due_with_the_seconds_spent(tmp_path):
    assert offers(tmp_path / "often", 0.0, range(1, 4)) == [1, 2, 3]
    arrays, metadata = RunCheckpoints(tmp_path / "often").latest()
    np.testing.assert_array_equal(arrays["weights"], 3.0)
    assert metadata["epoch"] == 3
    assert metadata["spent"].keys() == {"seconds", "cpu_seconds"}
    assert offers(tmp_path / "seldom", 1e6, range(1, 4)) == []
    assert RunCheckpoints(tmp_path / "seldom").latest() is None


def test_when_the_process_is_to_end_the_state_is_saved_at_once(tmp_path, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(preemption, "requested", lambda: next(answers))
    with pytest.raises(preemption.Preempted, match=f"{tmp_path}/00000002"):
        offers(tmp_path, 1e6, range(1, 4))
    assert RunCheckpoints(tmp_path).latest()[1]["epoch"] == 2


def test_a_state_that_was_offered_is_saved_where_the_work_ends_at_another_safe_point(tmp_path):
    """A task that advances raises a `Preempted` without a folder."""
    end = preemption.Preempted()

    def work():
        with Saver(RunCheckpoints(tmp_path), Timer(1e6)) as saver:
            saver.offer(7, lambda: ({"weights": np.ones(3)}, {"epoch": 7}))
            raise end

    with pytest.raises(preemption.Preempted):
        work()
    assert end.saved == tmp_path / "00000007"
    assert str(end).endswith(f"saved in {tmp_path}/00000007; the same command goes on from there")
    assert RunCheckpoints(tmp_path).latest()[1]["epoch"] == 7


def test_where_no_safe_point_comes_the_state_of_the_last_is_saved_once(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(preemption, "save_before_giving_up", given.append)
    saved = RunCheckpoints(tmp_path)
    with Saver(saved, Timer(1e6)) as saver:
        (save,) = given
        assert save() is None
        saver.offer(5, lambda: ({"weights": np.ones(3)}, {"epoch": 5}))
        written = [save(), save()]
    assert written == [tmp_path / "00000005"] * 2
    assert given == [save, None]


def test_a_state_saved_while_a_signal_waits_for_the_one_before_is_waited_for(tmp_path, monkeypatch):
    """Its fault would be lost otherwise: the thread of the signal would forget what is written."""
    given, waited, offered = [], threading.Event(), threading.Event()
    main, wait = threading.current_thread(), futures.wait

    def wait_long(writing):
        done = wait(writing)
        if threading.current_thread() is not main:
            waited.set()
            offered.wait(0.5)  # with the lock held, the main thread cannot get there before
        return done

    def write(path, *_):
        if path.name == "00000002":
            raise InputError("no space left")

    tmp_path.joinpath("00000001").mkdir()
    monkeypatch.setattr(checkpoints, "save_tree", write)
    monkeypatch.setattr(checkpoints.futures, "wait", wait_long)
    monkeypatch.setattr(preemption, "save_before_giving_up", given.append)
    states = [({"weights": np.ones(1)}, {"epoch": step}) for step in (1, 2)]

    def run():
        with Saver(RunCheckpoints(tmp_path), Timer(0.0)) as saver:
            saver.offer(1, lambda: states[0])
            signal = threading.Thread(target=given[0])
            signal.start()
            assert waited.wait(10)
            saver.offer(2, lambda: states[1])
            offered.set()
            signal.join()

    with pytest.raises(InputError, match="no space left"):
        run()


def test_a_fault_of_the_last_state_is_told_at_the_end_but_hides_no_other(tmp_path, monkeypatch):
    def fail(*_):
        raise InputError("no space left")

    monkeypatch.setattr(checkpoints, "save_tree", fail)
    with pytest.raises(InputError, match="no space left"):
        offers(tmp_path, 0.0, [1])
    steps = map({"first": 1}.__getitem__, ["first", "second"])
    with pytest.raises(KeyError):
        offers(tmp_path, 0.0, steps)
