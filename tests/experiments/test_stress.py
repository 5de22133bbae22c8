"""The experiment that kills a run again and again."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.helpers.runs import FIELDS, ROOT

SCRIPT = ROOT / "experiments" / "studies" / "stress.py"


@pytest.fixture(scope="module")
def stress():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import stress
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return stress


def test_a_folder_tells_how_far_its_run_is(stress, tmp_path):
    places = [stress.place(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n")
    places.append(stress.place(tmp_path))
    (tmp_path / "original").mkdir()
    (tmp_path / "distances").mkdir()
    (tmp_path / "distances" / "a.npz").touch()
    places.append(stress.place(tmp_path))
    (tmp_path / "distance_before.npz").touch()
    places.append(stress.place(tmp_path))
    assert places == [(0, 0), (0, 2), (1, 1), (2, 2)]


def test_moments_are_spread_over_a_run_as_its_seconds_are(stress):
    seen = [(0.0, (0, 0)), (1.0, (0, 1)), (3.0, (1, 0)), (10.0, (5, 0))]
    moments = stress.draw_moments(seen, 2000, seed=0)
    assert moments == stress.draw_moments(seen, 2000, seed=0)
    assert moments != stress.draw_moments(seen, 2000, seed=1)
    assert moments == sorted(moments, key=lambda moment: (moment.place, moment.seconds))
    counts = Counter(moment.place for moment in moments)
    assert counts[0, 0] == pytest.approx(200, abs=60)
    assert counts[1, 0] == pytest.approx(1400, abs=100)
    assert max(moment.seconds for moment in moments) < 7
    assert Counter(moment.signal.name for moment in moments)["SIGTERM"] in range(400, 600)


def test_trees_are_the_same_only_bit_by_bit(stress):
    import numpy as np

    tree = {"a": np.array([1.0, np.nan]), "b": ["x", None]}
    assert stress.same(tree, {"a": np.array([1.0, np.nan]), "b": ["x", None]})
    assert not stress.same(tree, {**tree, "a": np.array([np.nextafter(1.0, 2.0), np.nan])})
    assert not stress.same(tree, {**tree, "b": ["y", None]})
    assert not stress.same(tree, {"a": tree["a"]})


@pytest.mark.slow
def test_a_run_killed_twice_ends_like_one_in_one_go(tmp_path):
    fields = {**FIELDS, "checkpoint_seconds": 0.0, "robustness.epsilon": 0.0}
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "--kills=2",
            f"--workdir={tmp_path / 'runs'}",
            f"--out={tmp_path / 'stress.json'}",
            *(f"--field={name}={value!r}" for name, value in fields.items()),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "stress.json").read_text())
    assert (result["different"], result["same_in_one_go_again"]) == ([], True)
    assert len(result["kills"]) == 2
    assert "different from the run in one go: nothing" in done.stdout
