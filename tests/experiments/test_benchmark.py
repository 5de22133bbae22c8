"""The benchmark: what it does with times, and that its smallest budget runs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.runs import ROOT

FOLDER = ROOT / "experiments" / "speed"
MEMORY = {"peak_memory": {"host_mb": 500.0}}


@pytest.fixture(scope="module", autouse=True)
def experiments():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def test_a_hardening_is_projected_from_two_short_ones():
    from benchmark_timing import hardening

    def run(num_steps):
        """A warm-up of 2 s and 0.01 s a step; a round of 1 s and 0.03 s a step of three."""
        first = {"seconds": 100.0, "cpu_seconds": 100.0}  # it compiles
        warm_up = {"seconds": 2 + 0.01 * num_steps, "cpu_seconds": 0.0}
        a_round = {"seconds": 1 + 0.03 * num_steps, "cpu_seconds": 0.0}
        return {"warm-up": [first, warm_up, warm_up], "hardening": [first, a_round, a_round]}

    projected = hardening(run, timed=20)
    assert projected["warm_up_seconds"] == pytest.approx(10 * (2 + 0.01 * 500))
    rounds = 782 / 3 * (1 + 0.01 * (200 + 50 + 50))
    assert projected["seconds"] == pytest.approx(70 + rounds)
    assert projected["outside_seconds"] == pytest.approx(10 * 2.01 + 782 / 3 * 1.03)


def test_ratios_are_to_the_fastest_pytorch():
    from benchmark_timing import with_ratios

    rows = {"PyTorch": 9.0, "PyTorch, channels last": 6.0, "this package": 2.0}
    rows = {name: {"seconds": s, "cpu_seconds": 2 * s} for name, s in rows.items()}
    assert with_ratios(rows)["this package"]["times_faster_seconds"] == pytest.approx(3.0)


def test_a_loaded_machine_is_refused_unless_told_otherwise(capsys):
    from benchmark_timing import check_load

    check_load(0.4, 2, False)
    with pytest.raises(SystemExit, match="others use this machine"):
        check_load(1.0, 2, False)
    check_load(1.0, 2, True)
    assert "CPU seconds only" in capsys.readouterr().out


def test_the_table_and_the_picture_say_what_was_extrapolated(tmp_path):
    from benchmark_report import draw, text

    row = {"seconds": 120.0, "cpu_seconds": 230.0, **MEMORY}
    rows = {
        "PyTorch": {**row, "timed_steps": 60, "directions": 2},
        "this package": {**row, "timed_steps": "all", "directions": 90},
    }
    shown = text("matrix", rows)
    assert "extrapolated from 60 steps of 2 directions" in shown
    assert "measured whole" in shown
    hardened = {**row, "outside_seconds": 30.0, "outside_cpu_seconds": 31.0}
    assert "outside the inversions" in text("harden", {"this package": hardened})
    result = {
        "machine": {"devices": 2, "kind": "cpu", "pytorch": "cpu"},
        "processor": "processor",
        "cores": 2,
        "load_at_start": 0.0,
        "matrix": rows,
        "classes": {"10": {"step_seconds": 0.1, "host_seconds": 0.01}},
    }
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_the_operations_of_the_network_are_those_of_its_shapes():
    from operations import count_convolutions, forward_operations

    stages = 442_368, 14_155_776, 13_107_200, 13_107_200  # products: the first layer, three stages
    assert forward_operations() == 2 * sum(stages)
    for update in "jit(f)/while/body/", "jit(f)/while/body/while/body/":  # one minibatch, several
        names = [f"{update}jvp()/"] * 3 + [f"{update}transpose(jvp())/"] * 5
        scores = ["jit(f)/jvp()/", "jit(f)/while/body/cond/branch_1_fun/"]
        program = "\n".join(
            f' %c = f32[] convolution(a, b), metadata={{op_name="{name}conv"}}'
            for name in names + scores
        )
        assert count_convolutions(program) == {"forward": 3, "to_input": 3, "to_weights": 2}


def test_a_profile_counts_the_operations_of_the_device_once():
    from operations import operation_lines

    def plane(name, *lines):
        return SimpleNamespace(name=name, lines=[SimpleNamespace(name=line) for line in lines])

    def names(*planes):
        return [line.name for line in operation_lines(planes)]

    host = plane("/host:CPU", "python", "tf_XLAEigen/1", "tf_XLAEigen/2")
    assert names(host, plane("Task Environment")) == ["tf_XLAEigen/1", "tf_XLAEigen/2"]
    gpu = plane("/device:GPU:0", "Stream #13(compute)", "XLA Modules", "XLA Ops")
    assert names(host, gpu) == ["XLA Ops"]
    streams = plane("/device:GPU:0", "Stream #13(compute)", "Steps")
    assert names(host, streams) == ["Stream #13(compute)"]


@pytest.mark.slow
def test_the_smallest_budget_runs_from_end_to_end(shared, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    command = [
        sys.executable,
        str(FOLDER / "benchmark.py"),
        f"--checkpoint={shared / 'checkpoints' / 'moth_cifar10_resnet20_nat.h5'}",
        f"--data_dir={shared / 'data' / 'tfds'}",
        f"--out={tmp_path / 'out'}",
        "--budget=smoke",
        "--anyway",
    ]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compilations")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "cpu_smoke.json").read_text())
    assert {"matrix", "harden", "first_step", "directions", "classes", "devices"} <= set(result)
    assert result["matrix"]["this package"]["times_faster_seconds"] > 0
    assert str(tmp_path) not in json.dumps(result)
    assert (tmp_path / "out" / "cpu_smoke.png").exists()


def test_distances_stand_beside_the_published_ones(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments" / "studies")
    from published import against, published_matrix

    rows = np.arange(10.0, 100.0).reshape(10, 9)
    np.save(tmp_path / "published.npy", rows)
    published = published_matrix(tmp_path / "published.npy")
    assert np.isnan(np.diag(published)).all()
    assert published[3, [0, 2, 4, 9]].tolist() == [37.0, 39.0, 40.0, 45.0]

    ours = np.full((10, 10), np.nan)
    ours[3, [0, 2, 4, 9]] = [74.0, 78.0, np.inf, 90.0]  # of one direction no trigger was found
    figures = against(published, ours)
    assert figures["directions"] == 3
    assert figures["not_found"] == 1
    assert figures["ratio_of_means"] == pytest.approx(2.0)
    assert figures["mean_scaled_to_all_directions"] == pytest.approx(2 * rows.mean())
    assert figures["spearman"] == pytest.approx(1.0)
    assert against(published, -ours)["spearman"] == pytest.approx(-1.0)
