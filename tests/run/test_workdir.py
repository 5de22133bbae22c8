import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from moth_jax.errors import InputError
from moth_jax.run import workdir as workdir_module
from moth_jax.run.workdir import locked
from tests.helpers.runs import do, tiny_config

HOLD = """
import sys, time
from pathlib import Path
from moth_jax.run.workdir import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(workdir_module, "_WAIT_SECONDS", 0.2)


def refused(workdir):
    """Whether the folder is another run's."""
    try:
        with locked(workdir):
            return False
    except InputError:
        return True


@pytest.fixture
def holder(tmp_path):
    """Another process that works in the folder "run"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_is_refused_while_another_process_works_in_its_folder(tmp_path, holder):
    workdir = tmp_path / "run"
    with pytest.raises(InputError, match=f"another process works in {workdir};.*--coordinator$"):
        do(tiny_config(), workdir, overwrite=True)
    assert os.listdir(workdir) == [".lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not refused(workdir)


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(workdir_module, "_WAIT_SECONDS", 60.0)
    ending = threading.Timer(0.5, holder.kill)
    ending.start()
    assert not refused(tmp_path / "run")
    assert ending.finished.is_set()


def test_runs_of_one_process_follow_each_other_and_keep_each_other_out(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            assert refused(tmp_path)
            assert not refused(tmp_path / "another")
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert not refused(tmp_path)


def test_a_process_that_a_run_has_started_does_not_keep_the_lock(tmp_path):
    with locked(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert not refused(tmp_path)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_where_the_file_system_knows_no_locks_a_run_goes_on_without(tmp_path, monkeypatch, number):
    def flock(file, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert not refused(tmp_path)


def test_any_other_fault_of_the_file_system_is_told(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="input/output"), locked(tmp_path):
        pass
