"""Two processes do together what one does alone, and only one of them writes."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moth_jax.distance.measure import DistanceMatrix
from moth_jax.errors import InputError, require_choice
from moth_jax.parallel import processes
from moth_jax.parallel.devices import my_rows, num_devices, read_batch
from moth_jax.parallel.processes import (
    broadcast_from_main,
    check_same,
    is_main,
    load_if_exists,
    on_main,
    smallest,
)
from moth_jax.storage.orbax_process import Helper
from tests.helpers.runs import FLAGS, ROOT, do, figures, tiny_config
from tests.helpers.toys import row_split
from tests.parallel.test_devices import measured

SECONDS = 600
# Rounding differs with the order of sums, and inversions magnify it: few of them, of few steps.
FEW = {
    "classes": ("0", "1", "2"),
    "harden.max_steps": 6,
    "harden.max_trigger_share": 1.0,
    "harden.success_bound": 0.5,
}
FEW_FLAGS = (*FLAGS, *(f"--config.{name}={value!r}" for name, value in FEW.items()))


def start(process, port, *arguments):
    """One of two processes, with two devices."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
            "COORDINATOR": f"127.0.0.1:{port}",
            "PROCESS": str(process),
        },
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finished(processes):
    """(exit code, stdout, stderr) of each."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=SECONDS)
            ends.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ends


class RecordedSplit:
    """An `ImageSplit` that remembers which images were read."""

    def __init__(self):
        self.read = []
        self._split = row_split([4, 4, 4])

    def batches(self, batches):
        for indices in batches:
            self.read += np.asarray(indices).tolist()
            yield self._split.batch(indices)


def complaint(call, *arguments):
    """What an `InputError` of `call` says."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    return str(error.value)


def main(folder):
    """What a process sees; run by two of them."""
    process = int(os.environ["PROCESS"])
    processes.initialise(os.environ["COORDINATOR"], 2, process)
    file = Path(folder, f"{process}.txt")
    on_main(file.write_text, "of the writer")
    split = RecordedSplit()
    batch = read_batch(split, np.arange(11, 3, -1))
    check_same("what is the same", "x", np.arange(3))
    large = broadcast_from_main(lambda: np.arange(70_000))
    report = {
        "num_devices": num_devices(),
        "is_main": is_main(),
        "told": broadcast_from_main(lambda: f"by process {process}"),
        "told_much": large.tolist() == list(range(70_000)),
        "told_of_file": load_if_exists(Path.read_text, file),
        "told_of_no_file": load_if_exists(Path.read_text, Path(folder, "none")),
        "told_of_fault": complaint(
            broadcast_from_main, require_choice, "colour", process, ("red",)
        ),
        "different": complaint(check_same, "the configuration", str(process)),
        "smallest": smallest(10 - process),
        "read": split.read,
        "batch_sum": float(jax.jit(lambda images: images.sum())(batch)),
        "my_rows": [my_rows(8).start, my_rows(8).stop],
        "my_rows_of_indivisible": [my_rows(6).start, my_rows(6).stop],
        "matrix": measured(4).values[~np.eye(3, dtype=bool)].tolist(),
    }
    print(json.dumps(report))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the two processes saw, and their folder."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    ends = finished([start(i, port, __file__, folder) for i in range(2)])
    assert [code for code, _, _ in ends] == [0, 0], ends
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ends], folder


def test_a_matrix_of_two_processes_equals_that_of_one(two):
    expected = measured(2).values[~np.eye(3, dtype=bool)]
    for report in two[0]:
        assert report["num_devices"] == 4
        np.testing.assert_allclose(report["matrix"], expected, rtol=1e-4)


def test_only_process_0_writes_and_all_are_told_what_it_reads(two):
    reports, folder = two
    assert [report["is_main"] for report in reports] == [True, False]
    assert sorted(path.name for path in folder.iterdir()) == ["0.txt"]
    for report in reports:
        assert report["told"] == "by process 0"
        assert report["told_much"]
        assert report["told_of_file"] == "of the writer"
        assert report["told_of_no_file"] is None
        assert "colour 0" in report["told_of_fault"] or "'colour'" in report["told_of_fault"]
        assert report["smallest"] == 9


def test_a_difference_between_the_processes_is_an_error_in_all_of_them(two):
    for report in two[0]:
        assert report["different"] == (
            "the configuration must be the same in all 2 processes; another one than in process 0 "
            "is in 1"
        )


def test_every_process_reads_its_own_part_of_a_batch(two):
    reports, _ = two
    assert [report["read"] for report in reports] == [[11, 10, 9, 8], [7, 6, 5, 4]]
    assert [report["my_rows"] for report in reports] == [[0, 4], [4, 8]]
    assert [report["my_rows_of_indivisible"] for report in reports] == [[0, 6]] * 2
    whole = row_split([4, 4, 4]).batch(np.arange(4, 12)).sum()
    np.testing.assert_allclose([report["batch_sum"] for report in reports], whole, rtol=1e-5)


def test_one_process_is_the_writer_and_reads_for_itself(tmp_path):
    assert is_main()
    assert broadcast_from_main(math.sqrt, 4) == 2
    assert smallest(3) == 3
    check_same("anything", "x")
    on_main((tmp_path / "file").write_text, "there")
    assert load_if_exists(Path.read_text, tmp_path / "file") == "there"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "go together; not given: --process_id"),
        ((None, 2, None), "not given: --coordinator, --process_id"),
        (("host", 2, 0), "coordinator must be HOST:PORT"),
        (("host:1", 2, 2), "process_id must be in 0..1, got 2"),
        (("host:1", 0, 0), "num_processes must be at least 1, got 0"),
    ],
)
def test_impossible_processes_are_an_error_that_says_what_is_wanted(given, message):
    with pytest.raises(InputError, match=message):
        processes.initialise(*given)


@pytest.mark.parametrize("count", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_job_of_one_process_keeps_all_devices_to_itself(monkeypatch, count):
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    monkeypatch.setenv(count, "1")
    processes.initialise()
    monkeypatch.setenv(count, "4")
    processes.initialise(num_processes=1)


def test_the_helper_answers_and_passes_faults_on():
    helper = Helper()
    assert helper(math.sqrt, 4) == 2
    with pytest.raises(InputError, match="colour"):
        helper(require_choice, "colour", "blue", ("red",))
    assert helper(len, "abc") == 3


def commands(workdir, *flags):
    """The main command in two processes, of which the second has another folder."""
    port = free_port()
    together = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", *flags)
    return [
        start(
            i,
            port,
            "-m",
            "moth_jax.main",
            *FEW_FLAGS,
            *together,
            f"--process_id={i}",
            f"--workdir={folder}",
        )
        for i, folder in enumerate((workdir, f"{workdir}_unseen"))
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the same run in one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    do(tiny_config(**FEW), workdir)
    return workdir


def assert_same_run(workdir, expected):
    """Two runs' matrices and accuracies are the same."""
    for when in ("before", "after"):
        ours, theirs = (
            DistanceMatrix.load(folder / f"distance_{when}.npz") for folder in (workdir, expected)
        )
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-4)
    ours, theirs = figures(workdir), figures(expected)
    for name in ("accuracy_before", "accuracy_after", "harden_steps"):
        assert ours[name] == theirs[name]


@pytest.mark.slow
def test_the_command_in_two_processes_gives_what_it_gives_in_one(tmp_path, alone):
    workdir = tmp_path / "run"
    (code, _, err), (other_code, other_out, _) = finished(commands(workdir))
    assert (code, other_code) == (0, 0), err
    assert "test accuracy" in err
    assert "test accuracy" not in other_out
    assert not Path(f"{workdir}_unseen").exists()
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_what_two_processes_began_one_goes_on_with(tmp_path, alone):
    workdir = tmp_path / "run"
    processes = commands(workdir)
    deadline = time.monotonic() + SECONDS
    while not list((workdir / "hardening").glob("0000000[4-9]")):  # the warm-up is done
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finished(processes)
    assert not (workdir / "hardened").exists()
    do(tiny_config(**FEW), workdir)
    assert_same_run(workdir, alone)


if __name__ == "__main__":
    main(sys.argv[1])
