import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures

import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.run import checkpoints, preemption
from moth_jax.run.checkpoints import RunCheckpoints, Saver, Timer
from moth_jax.storage import trees
from moth_jax.training import (
    TrainingConfig,
    TrainState,
    optimiser,
    train_state_arrays,
    train_state_from_arrays,
)
from tests.helpers.runs import ROOT
from tests.helpers.toys import assert_same_arrays, row_variables


def tree(step):
    return {"a": {"weights": np.full((64, 64), step, np.float32)}, "count": np.int64(step)}


def test_there_is_no_state_before_the_first_and_none_after_clearing(tmp_path):
    states = RunCheckpoints(tmp_path / "training")
    assert states.latest() is None
    states.clear()
    states.save(3, tree(3), {"epoch": 3})
    states.clear()
    assert (states.latest(), states.newest()) == (None, None)
    assert os.listdir(tmp_path) == []


def test_only_the_newest_state_is_kept_and_found(tmp_path):
    states = RunCheckpoints(tmp_path)
    for step in (2, 9, 10, 101):
        states.save(step, tree(step), {"epoch": step, "seconds": 0.1})
        arrays, metadata = states.latest()
        assert_same_arrays(arrays, tree(step))
        assert metadata == {"epoch": step, "seconds": 0.1}
        assert len(os.listdir(tmp_path)) == 1


def test_a_state_that_was_not_written_whole_is_passed_over_and_removed_with_the_next(tmp_path):
    states = RunCheckpoints(tmp_path)
    states.save(4, tree(4), {"epoch": 4})
    states.wait()
    half = shutil.copytree(tmp_path / "00000004", tmp_path / "00000009.orbax-checkpoint-tmp")
    shutil.rmtree(half / "state")
    assert_same_arrays(states.latest()[0], tree(4))
    states.save(5, tree(5), {"epoch": 5})
    states.wait()
    assert os.listdir(tmp_path) == ["00000005"]


def test_a_kill_while_states_are_written_leaves_a_whole_one(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from moth_jax.run.checkpoints import RunCheckpoints\n"
        "states = RunCheckpoints(sys.argv[1])\n"
        "for step in range(10**6):\n"
        "    tree = {'weights': np.full((300, 300), step, np.float32)}\n"
        "    states.save(step, tree, {'epoch': step})\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    while not any(int(path.name[:8]) >= 3 for path in tmp_path.iterdir()):
        assert writer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    arrays, metadata = RunCheckpoints(tmp_path).latest()
    assert metadata["epoch"] >= 2
    assert (arrays["weights"] == metadata["epoch"]).all()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_input_error_and_the_last_state_stays(tmp_path):
    states = RunCheckpoints(tmp_path)
    states.save(1, tree(1), {"epoch": 1})
    noise = {"weights": np.random.default_rng(0).random((200, 200))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        states.save(2, noise, {"epoch": 2})
        with pytest.raises(InputError, match=r"cannot write .*00000002.*free some space") as raised:
            states.save(3, noise, {"epoch": 3})  # says what became of the one before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert_same_arrays(states.latest()[0], tree(1))
    states.save(2, noise, {"epoch": 2})
    assert_same_arrays(states.latest()[0], noise)
    assert os.listdir(tmp_path) == ["00000002"]


def slow_writing(monkeypatch):
    """Let no state be written before the event is set that this returns."""
    may_write, write = threading.Event(), trees.save_tree

    def wait_and_write(*arguments):
        may_write.wait()
        write(*arguments)

    monkeypatch.setattr(checkpoints, "save_tree", wait_and_write)
    return may_write


def test_a_state_is_copied_before_it_is_written_in_the_background(tmp_path, monkeypatch):
    may_write = slow_writing(monkeypatch)
    states = RunCheckpoints(tmp_path)
    host, device = np.ones(5), jnp.ones(5)
    states.save(1, {"host": host, "device": device}, {"epoch": 1})
    assert os.listdir(tmp_path) == []
    host[:] = 2
    device.delete()  # as of a donated buffer
    may_write.set()
    assert_same_arrays(states.latest()[0], {"host": np.ones(5), "device": np.ones(5, np.float32)})


def test_states_are_written_one_after_the_other(tmp_path, monkeypatch):
    may_write = slow_writing(monkeypatch)
    states = RunCheckpoints(tmp_path)
    states.save(1, tree(1), {"epoch": 1})
    second = threading.Thread(target=states.save, args=(2, tree(2), {"epoch": 2}))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    may_write.set()
    second.join()
    states.wait()
    assert os.listdir(tmp_path) == ["00000002"]


@pytest.mark.parametrize("then", ["save", "wait", "latest", "clear"])
def test_a_fault_in_the_background_is_raised_by_whatever_comes_next(tmp_path, monkeypatch, then):
    def fail(*_):
        raise InputError("no space left")

    monkeypatch.setattr(checkpoints, "save_tree", fail)
    states = RunCheckpoints(tmp_path)
    states.save(1, tree(1), {"epoch": 1})
    arguments = (2, tree(2), {"epoch": 2}) if then == "save" else ()
    with pytest.raises(InputError, match="no space left"):
        getattr(states, then)(*arguments)
    states.wait()  # it is told once


@pytest.mark.parametrize("variables", [row_variables(), {**row_variables(), "batch_stats": {}}])
def test_the_state_of_a_training_comes_back_exactly_with_the_place_in_its_schedule(
    tmp_path, variables
):
    tx = optimiser(TrainingConfig(epochs=2, batch_size=10), 100)
    opt_state = tx.init(variables["params"])
    for _ in range(3):
        updates, opt_state = tx.update(variables["params"], opt_state, variables["params"])
    states = RunCheckpoints(tmp_path)
    states.save(1, train_state_arrays(TrainState(variables, opt_state)), {"epoch": 1})
    loaded = train_state_from_arrays(states.latest()[0], tx)
    assert_same_arrays(loaded.opt_state, opt_state)
    assert_same_arrays(loaded.variables, variables)
    expected, _ = tx.update(updates, opt_state, variables["params"])
    actual, _ = tx.update(updates, loaded.opt_state, variables["params"])
    assert_same_arrays(actual, expected)


# When they are saved


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
