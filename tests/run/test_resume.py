import os
import re
import shutil
import signal
import stat
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.distance.store import ChunkStore
from moth_jax.models import checkpoint
from moth_jax.run import runner
from moth_jax.run.checkpoints import RunCheckpoints, Saver
from moth_jax.run.metrics import MetricWriter
from tests.helpers.runs import (
    FLAGS,
    command_server,
    contents,
    do,
    figures,
    finished_run,
    matrices,
    steps,
    tiny_config,
)
from tests.helpers.toys import StoppedError

PROGRESS_LINE = re.compile(r"\d\d:\d\d:\d\d \S")


@pytest.fixture(scope="module")
def reference():
    return finished_run()


@pytest.fixture(scope="module")
def command(reference):
    """The command line; its compilations are those of the reference."""
    return command_server()


@pytest.fixture
def measured(reference, tmp_path):
    """A run whose first distances are known and whose hardening has not begun."""
    workdir = shutil.copytree(reference, tmp_path / "measured")
    shutil.rmtree(workdir / "hardened")
    for name in ("hardening.json", "distance_after.npz", "summary.json", "report.html"):
        (workdir / name).unlink()
    return workdir


@pytest.fixture
def trained(measured):
    """A run whose model is trained and not measured."""
    (measured / "distance_before.npz").unlink()
    return measured


def assert_same_run(workdir, reference):
    """The figures, the record, the weights and the triggers are those of the reference."""
    assert figures(workdir) == figures(reference)
    assert steps(workdir) == steps(reference)
    assert sorted(os.listdir(workdir)) == sorted(os.listdir(reference))
    for folder in ("original", "hardened"):
        ours, theirs = (checkpoint.load_model(w / folder).variables for w in (workdir, reference))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for ours, theirs in zip(matrices(workdir), matrices(reference), strict=True):
        np.testing.assert_array_equal(ours.values_per_seed, theirs.values_per_seed)
        jax.tree.map(np.testing.assert_array_equal, ours.triggers, theirs.triggers)


def interrupt(monkeypatch, owner, name, call):
    """Raise `StoppedError` instead of the `call`-th call of a function."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise StoppedError
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


# (where in the run, what is not called any more, at which call of one process)
MOMENTS = [
    ("in the middle of the first epoch", RunCheckpoints, "save", 3),
    ("before the first record", MetricWriter, "write", 1),
    ("between the first epoch's record and its checkpoint", RunCheckpoints, "save", 1),
    ("after the first epoch's checkpoint", MetricWriter, "write", 2),
    ("before the trained model is written", checkpoint, "save_model", 1),
    ("before the second chunk of directions is written", ChunkStore, "save", 2),
    ("before the distances are written", DistanceMatrix, "save", 1),
    ("in the warm-up, between record and checkpoint", RunCheckpoints, "save", 4),
    ("after the last class of the warm-up", MetricWriter, "write", 8),
    ("between the records of a round", MetricWriter, "write", 2),
    ("between the records and the checkpoint of a round", RunCheckpoints, "save", 2),
    ("before the hardened model is written", checkpoint, "save_model", 1),
    ("before the checkpoints of the hardening are removed", RunCheckpoints, "clear", 2),
    ("in the second measurement", ChunkStore, "save", 3),
    ("before the summary", runner, "summarise", 1),
]


def test_a_run_interrupted_at_every_turn_ends_like_one_in_one_go(reference, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    for moment, owner, name, call in MOMENTS:
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, call)
            try:
                do(tiny_config(), workdir)
            except StoppedError:
                continue
            pytest.fail(f"there was no moment {moment}")
    do(tiny_config(), workdir)
    assert_same_run(workdir, reference)


def test_a_hardening_that_left_no_checkpoint_is_done_again_and_recorded_once(
    reference, measured, monkeypatch
):
    config = tiny_config(checkpoint_seconds=1e6)
    with monkeypatch.context() as patch:
        interrupt(patch, MetricWriter, "write", 15)
        with pytest.raises(StoppedError):
            do(config, measured)
    assert not (measured / "hardening").exists()
    do(config, measured)
    assert_same_run(measured, reference)


def hold_at(owner, name, call, file):
    """Let the command wait for its signal at the `call`-th call of a method."""
    hold = {"module": owner.__module__, "owner": owner.__name__, "name": name, "call": call}
    return {"hold": {**hold, "file": str(file)}, "when": str(file)}


def said(err):
    """What is said besides the progress."""
    return [line for line in err.splitlines() if not PROGRESS_LINE.match(line)]


def test_ctrl_c_is_one_line_and_an_exit_code_of_its_own_and_the_run_goes_on(command, tmp_path):
    workdir = tmp_path / "run"
    arguments = (*FLAGS, f"--workdir={workdir}", "--config.phase=train")
    second = hold_at(MetricWriter, "write", 2, tmp_path / "held")
    code, out, err = command(*arguments, send=signal.SIGINT, **second)
    assert (code, out) == (130, "")
    assert said(err) == ["moth_jax: interrupted; the same command goes on from here"]
    assert not (workdir / "original").exists()

    code, _, err = command(*arguments)
    assert code == 0
    assert "training: 1 of 2 epochs done, continuing" in err
    assert steps(workdir) == [("training", 1), ("training", 2)]


# How a run ends again and again: signal, at which call of a method, and where it is saved then.
SIGNALS = [
    (signal.SIGTERM, (Saver, "offer", 2), "training/00000002"),
    (signal.SIGKILL, (ChunkStore, "save", 2), ""),
    (signal.SIGTERM, (ChunkStore, "save", 3), "distances"),
    (signal.SIGUSR1, (Saver, "offer", 12), "hardening/00000016"),
]


def test_a_run_that_is_killed_or_asked_to_end_again_and_again_ends_like_one_in_one_go(
    command, reference, tmp_path
):
    workdir = tmp_path / "run"
    # Only signals save.
    arguments = (*FLAGS, f"--workdir={workdir}", "--config.checkpoint_seconds=1e6")
    for i, (number, call, saved) in enumerate(SIGNALS):
        code, out, err = command(*arguments, send=number, **hold_at(*call, tmp_path / f"held{i}"))
        assert (code, out) == (75 if saved else -number, ""), err
        where = f"saved in {workdir / saved}; the same command goes on from there"
        assert said(err) == ([f"moth_jax: ended by a signal; {where}"] if saved else [])
    code, out, err = command(*arguments)
    assert (code, out) == (0, ""), err
    assert_same_run(workdir, reference)


def test_a_process_that_passes_no_safe_point_in_time_saves_its_last_state_and_ends(
    command, tmp_path
):
    workdir = tmp_path / "run"
    arguments = (*FLAGS, f"--workdir={workdir}", "--config.checkpoint_seconds=1e6")
    hold = hold_at(MetricWriter, "write", 2, tmp_path / "held")
    hold["hold"]["forever"] = True
    code, out, err = command(*arguments, "--grace_seconds=0.2", send=signal.SIGTERM, **hold)
    assert (code, out) == (75, ""), err
    states = RunCheckpoints(workdir / "training")
    assert said(err)[-1].endswith(
        f"saved in {states.newest()}; the same command goes on from there"
    )
    # The second epoch is about to be recorded: all of its steps but the last.
    arrays, metadata = states.latest()
    assert metadata["epoch"] == 1
    assert int(states.newest().name) == 2 * len(arrays["losses"]) + 1


# Disks


def assert_refused(answer, *, says):
    """Exit code 2, and one line besides those of the progress."""
    code, out, err = answer
    assert (code, out, len(said(err))) == (2, "", 1), err
    assert said(err)[0].startswith("moth_jax: ")
    assert says in said(err)[0]


@pytest.mark.parametrize(
    ("state", "limit", "says"),
    [
        (None, 60_000, "/training/"),
        ("trained", 1_000, ""),
        ("measured", "record", ""),  # or the checkpoint that comes with it, which is no smaller
        ("measured", 100_000, "/hardening/"),
    ],
    ids=["training's checkpoint", "a chunk of distances", "the record", "hardening's checkpoint"],
)
def test_after_a_full_disk_the_run_goes_on_and_nothing_is_lost(
    command, reference, tmp_path, request, state, limit, says
):
    workdir = request.getfixturevalue(state) if state else tmp_path / "run"
    if limit == "record":
        limit = (workdir / "metrics.jsonl").stat().st_size + 50
    before = contents(workdir) if state else {}
    arguments = (*FLAGS, f"--workdir={workdir}")
    assert_refused(command(*arguments, file_size=limit), says=says)
    after = contents(workdir)
    kept = [name for name in before if not name.startswith(("metrics", "tensorboard"))]
    assert [name for name in kept if after.get(name) != before[name]] == []

    code, _, err = command(*arguments)
    assert code == 0, err
    assert_same_run(workdir, reference)


def test_a_disk_too_full_for_the_report_keeps_the_results(command, reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    (workdir / "report.html").unlink()
    before = contents(workdir)
    arguments = (*FLAGS, f"--workdir={workdir}")
    assert_refused(command(*arguments, file_size=20_000), says="report.html: File too large")
    assert contents(workdir) == before
    assert command(*arguments)[0] == 0
    assert (workdir / "report.html").exists()


@pytest.fixture
def folder_for_all():
    """A folder that any user may look into (pytest's own are closed)."""
    for installed in (sys.prefix, sys.base_prefix):
        closed = [
            p for p in (Path(installed), *Path(installed).parents) if not p.stat().st_mode & 1
        ]
        if closed:
            pytest.skip(f"another user cannot run the Python that is installed in {closed[0]}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_that_may_not_be_written_is_one_line_and_stays_as_it_is(
    command, reference, folder_for_all
):
    workdir = shutil.copytree(reference, folder_for_all / "run")
    (workdir / "report.html").unlink()
    for path in (folder_for_all, *folder_for_all.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = contents(workdir)
    for path in (folder_for_all / "new", workdir):
        answer = command(*FLAGS, f"--workdir={path}", nobody=True)
        assert_refused(answer, says="Permission denied")
    for path in (folder_for_all, workdir):
        path.chmod(0o755)
    assert contents(workdir) == before
    assert os.listdir(folder_for_all) == ["run"]
    code, _, err = command(*FLAGS, f"--workdir={workdir}")
    assert code == 0, err
