import dataclasses
import json
import shutil

import numpy as np
import pytest

from moth_jax.distance.measure import DistanceMatrix
from moth_jax.errors import InputError
from moth_jax.report import Report, write_report
from moth_jax.scanning import Arm, Scan
from moth_jax.triggers import Trigger
from tests.helpers.runs import contents, do, finished_run, summary_of, tiny_config

TINY = {"phase": "scan", "scan__num_steps": 10, "scan__num_images": 9}

PAIRS = {**TINY, "scan__method": "pairs", "scan__num_steps": 3}


def scanned(workdir):
    return Scan.load(workdir / "scan.npz")


@pytest.fixture
def copy(tmp_path):
    """A finished run that may be changed."""
    return shutil.copytree(finished_run(), tmp_path / "run")


@pytest.mark.slow
def test_the_phase_scans_the_given_model_and_neither_measures_nor_hardens_it(tmp_path):
    config = tiny_config(model__checkpoint=str(finished_run() / "original"), **TINY)
    told = summary_of(config, tmp_path / "scan")
    assert sorted(path.name for path in (tmp_path / "scan").iterdir()) == [
        ".lock",
        "config.json",
        "images.npz",
        "metrics.jsonl",
        "original",
        "original.json",
        "report.html",
        "scan.json",
        "scan.npz",
        "summary.json",
    ]
    found = scanned(tmp_path / "scan")
    assert [arm.target for arm in found.arms] == list("0123456789")
    assert found.num_gradients == 10 * 10 * 9
    fields = json.loads((tmp_path / "scan" / "scan.json").read_text())
    assert fields["poisoned"] == found.poisoned == told.figures["scan"]["poisoned"]
    lines = [line for line in told.describe() if "scan  " in line or "neural_cleanse:" in line]
    assert len(lines) == 2
    assert any(verdict in lines[0] for verdict in ("looks clean", "looks poisoned", "undecided"))
    assert len(fields["arms"]) == 10
    page = (tmp_path / "scan" / "report.html").read_text()
    assert "<h2>Scan</h2>" in page
    assert "Mean class distance" not in page


@pytest.mark.slow
def test_a_scan_is_not_done_twice_but_anew_with_other_options(copy):
    do(tiny_config(**TINY), copy)
    before = contents(copy)
    first = scanned(copy)
    do(tiny_config(**TINY), copy)
    assert contents(copy)["scan.npz"] == before["scan.npz"]
    do(tiny_config(**{**TINY, "scan__num_steps": 8}), copy)
    assert scanned(copy).num_gradients < first.num_gradients
    assert contents(copy)["distance_before.npz"] == before["distance_before.npz"]


def test_distances_that_the_run_has_measured_are_scanned_without_a_gradient(copy):
    measured = DistanceMatrix.load(copy / "distance_before.npz")
    values = np.random.default_rng(0).uniform(5.0, 6.0, (10, 10)).astype(np.float32)
    np.fill_diagonal(values, np.nan)
    whole = dataclasses.replace(
        measured, values=values, success_rate=np.ones_like(values), triggers=None
    )
    whole.save(copy / "distance_before.npz")
    summary = do(tiny_config(**PAIRS), copy)
    found = scanned(copy)
    assert found.num_gradients == 0
    assert len(found.arms) == 90
    assert summary["scan"]["method"] == "pairs"
    assert found.details == measured.details
    asked = json.loads((copy / "scan.json").read_text())["asked"]
    assert asked["distances"] == {"split": "test", **measured.details}
    assert not {"num_steps", "num_images", "split", "success_bound"} & asked.keys()
    before = (copy / "scan.npz").stat().st_mtime_ns
    do(tiny_config(**{**PAIRS, "scan__num_steps": 9}), copy)  # which it does not depend on
    assert (copy / "scan.npz").stat().st_mtime_ns == before
    page = (copy / "report.html").read_text()
    assert "<h2>Scan</h2>" in page
    assert "Mean class distance" in page
    assert "Hardening raised" in page or "Hardening lowered" in page


def test_distances_of_some_directions_are_no_scan_and_all_are_measured_beside_them(copy):
    before = contents(copy)["distance_before.npz"]
    assert not DistanceMatrix.load(copy / "distance_before.npz").is_whole
    do(tiny_config(**PAIRS), copy)
    found = scanned(copy)
    assert len(found.arms) == 90
    assert found.num_gradients == 90 * 3 * 9
    assert found.details["num_steps"] == 3
    assert json.loads((copy / "scan.json").read_text())["asked"]["num_steps"] == 3
    assert contents(copy)["distance_before.npz"] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scan__method": "wanet"}, "unknown scan.method 'wanet'"),
        ({"scan__split": "holdout"}, "unknown scan.split 'holdout'"),
        ({"scan__num_steps": 0}, "scan.num_steps must be at least 1, got 0"),
        ({"classes": ("0", "1")}, "a scan needs at least 3 classes"),
    ],
)
def test_a_scan_that_cannot_be_done_is_refused_before_the_model_is_trained(
    tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        do(tiny_config(**{"phase": "scan", **changes}), tmp_path / "scan")
    assert not (tmp_path / "scan").exists()


# The section of the report.


def a_scan(**fields):
    masks = np.zeros((3, 4, 4, 1), np.float32)
    masks[:2, 0, 0] = 1
    arms = (
        Arm("any", "dog", 3.0, 0.0625, 0.98, 0.5, 0.5),
        Arm("cat", "<b>", 3.0, 0.0625, 1.0, 4.2, 4.2, ratio=np.inf),
        Arm("dog", "cat", np.inf, np.inf, 0.0),
    )
    base = {"reason": "", "details": {}, **fields}
    triggers = Trigger(masks, np.ones((3, 4, 4, 3), np.float32))
    return Scan("k_arm", True, 4.2, "anomaly index", 2.0, arms, triggers, 1234, 5.0, **base)


def page_of(tmp_path, scan, names=("cat", "dog", "<b>")):
    path = tmp_path / "report.html"
    examples = np.full((3, 4, 4, 3), 0.5, np.float32)
    report = Report(
        title="m", summary={"data": "d"}, scan=scan, examples=examples, class_names=names
    )
    write_report(path, report)
    return path.read_text()


def test_the_section_has_the_verdict_every_arm_and_the_pictures_of_the_most_suspicious(tmp_path):
    page = page_of(tmp_path, a_scan())
    assert "The model looks poisoned: &#x27;&lt;b&gt;&#x27; is reached from &#x27;cat&#x27;" in page
    assert "<b>" not in page.replace("<b>3.0</b>", "")
    assert page.index("the trigger from cat to") < page.index("the trigger from any to dog")
    assert page.count("</strong> suspect</th>") == 1
    assert page.count('alt="the trigger') == 2
    assert "none found" in page
    assert "∞" in page
    assert "Measuring took" not in page


def test_an_undecided_scan_says_why(tmp_path):
    page = page_of(tmp_path, a_scan(reason="only two were found"), names=())
    assert "only two were found" in page
    assert "image of class" not in page
