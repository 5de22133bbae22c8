import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.run.metrics import MetricWriter, _line, read_metrics
from moth_jax.storage.files import strict_json, write_atomically


def _refuse_constant(name):
    raise AssertionError(f"{name} is no strict JSON")


def _lines(workdir):
    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=_refuse_constant) for line in text.splitlines()]


def _scalars(workdir):
    """{(tag, step): value} of all TensorBoard events, read from the record format."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for path in (workdir / "tensorboard").iterdir():
        content, start = path.read_bytes(), 0
        while start < len(content):
            size = int.from_bytes(content[start : start + 8], "little")
            event = Event.FromString(content[start + 12 : start + 12 + size])
            start += 12 + size + 4
            for value in event.summary.value:
                assert (value.tag, event.step) not in scalars
                scalars[value.tag, event.step] = value.simple_value
    return scalars


def test_every_record_is_a_strict_json_line_and_infinite_figures_are_floats_when_read(tmp_path):
    with MetricWriter(tmp_path) as metrics:
        metrics.write("train", 1, loss=np.float32(0.5), accuracy=float("nan"))
        figures = {"size": np.inf, "lowest": -math.inf, "victim": np.int32(3)}
        metrics.write("harden", np.int64(2), pair="cat↔dog", **figures)
    first, second = _lines(tmp_path)
    assert first["phase"] == "train"
    assert (first["step"], first["loss"], first["accuracy"]) == (1, 0.5, None)
    assert first["time"] > 1e9
    assert (second["step"], second["size"], second["pair"]) == (2, "inf", "cat↔dog")
    assert second["victim"] == 3
    _, read = read_metrics(tmp_path / "metrics.jsonl")
    assert (read["size"], read["lowest"]) == (math.inf, -math.inf)


def test_a_line_is_on_disk_when_write_returns_even_if_the_process_is_killed_then(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from moth_jax.run.metrics import MetricWriter\n"
        "metrics = MetricWriter(sys.argv[1])\n"
        "metrics.write('harden', 0, loss=1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert [record["loss"] for record in _lines(tmp_path)] == [1.0]


WHOLE = _line({"phase": "train", "step": 1, "time": 1.0}, "").decode()


@pytest.mark.parametrize(
    "torn",
    ['{"phase": "tra', '{"phase": "tra\n', "\0\0\0\0\n", "\n", "3\n", "{}\n"],
    ids=["torn", "broken", "zeros", "empty", "number", "no record"],
)
def test_a_broken_last_line_is_ignored_by_the_reader_and_cut_by_the_next_writer(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    for whole, known in (("", []), (WHOLE, [1])):
        path.write_text(whole + torn)
        assert [record["step"] for record in read_metrics(path)] == known
        with MetricWriter(tmp_path) as metrics:
            metrics.write("train", 2)
        assert [record["step"] for record in _lines(tmp_path)] == [*known, 2]


@pytest.mark.parametrize("broken", ['{"ph', "3", "{}"])
def test_a_damaged_line_in_the_middle_is_reported_with_what_to_do(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{WHOLE}{broken}\n{WHOLE}")
    with pytest.raises(InputError, match=r"line 2 of .*metrics.jsonl is damaged.* remove the"):
        read_metrics(path)


def test_there_are_no_metrics_where_there_is_no_file(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("keep", "begin"),
    [
        ({"harden": 1}, 2),
        (lambda record: record["phase"] == "train" or record["step"] <= 1, 2),
        ({"harden": -1}, 0),
    ],
    ids=["last steps", "predicate", "a phase dropped whole"],
)
def test_a_resumed_run_leaves_the_record_of_an_uninterrupted_one(tmp_path, keep, begin):
    with MetricWriter(tmp_path) as metrics:
        for step in range(3):
            metrics.write("train", step, loss=1.0)
        for step in range(5):
            metrics.write("harden", step, loss=9.0 if step >= begin else 2.0)
    with MetricWriter(tmp_path) as metrics:
        metrics.rewind(keep)
        for step in range(begin, 6):
            metrics.write("harden", step, loss=2.0)
    expected = [("train", s, 1.0) for s in range(3)] + [("harden", s, 2.0) for s in range(6)]
    assert [(r["phase"], r["step"], r["loss"]) for r in _lines(tmp_path)] == expected
    assert _scalars(tmp_path) == {(f"{p}/loss", s): loss for p, s, loss in expected}
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_tensorboard_gets_finite_numbers_only_those_of_lists_numbered(tmp_path):
    lists = {"sizes": [40.0, math.inf], "directions": [["cat", "dog"]]}
    with MetricWriter(tmp_path) as metrics:
        metrics.write("harden", 7, loss=0.25, pair="cat↔dog", accuracy=math.nan, **lists)
    assert _scalars(tmp_path) == {("harden/loss", 7): 0.25, ("harden/sizes/0", 7): 40.0}
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert lists.items() <= record.items()


def test_figures_cannot_take_the_names_of_the_fixed_fields(tmp_path):
    with MetricWriter(tmp_path) as metrics, pytest.raises(ValueError, match="phase, step, time"):
        metrics.write("harden", 1, time=3.0)


def test_a_workdir_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*metrics.jsonl"):
        MetricWriter(tmp_path / "file" / "run")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_input_error_that_says_to_run_again(tmp_path):
    with MetricWriter(tmp_path) as metrics, open("/dev/full", "ab", buffering=0) as full:
        metrics._file.close()
        metrics._file = full
        with pytest.raises(InputError, match=r"No space left.*run the same command again"):
            metrics.write("train", 1)


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "summary.json"
    path.mkdir()  # cannot be replaced by a file
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["summary.json"]


def test_strict_json_takes_arrays_scalars_and_paths():
    import jax.numpy as jnp

    value = {1: jnp.array([1.0, jnp.nan]), "path": pathlib.Path("a/b"), "n": None}
    assert strict_json(value) == {"1": [1.0, None], "path": "a/b", "n": None}
    assert strict_json([np.bool_(True), np.int64(3), (-math.inf,)]) == [True, 3, ["-inf"]]
    json.dumps(strict_json({"dtype": np.float32(1.5)}), allow_nan=False)
