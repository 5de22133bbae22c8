"""A run on some of the classes: which they are, and what it leaves."""

import dataclasses
import json

import numpy as np
import pytest

from moth_jax import data
from moth_jax.data.dataset import ImageSplit
from moth_jax.distance.measure import DistanceMatrix
from moth_jax.errors import InputError
from moth_jax.evaluation import predictions
from moth_jax.models import checkpoint
from tests.helpers.runs import do, finished_run, job_of, matrices, tiny_config

CHOSEN = ("7", "1", "4")
LABELS = (7, 1, 4)
DIGITS = data.load("digits")


def without(label):
    """The digits without the images of a class."""

    def keep(split):
        kept = np.flatnonzero(split.labels != label)
        return ImageSplit(split.batch(kept), split.labels[kept])

    parts = {part: keep(getattr(DIGITS, part)) for part in ("train", "validation", "test")}
    return dataclasses.replace(DIGITS, **parts)


def job(dataset=DIGITS, **changes):
    """The job of a tiny run that measures all directions but for `changes`."""
    return job_of(tiny_config(**{"distance__victims": (), **changes}), dataset)


# Which classes


def test_the_chosen_classes_are_those_named_in_their_order_or_all_there_are_images_of():
    assert job(classes=CHOSEN).classes == LABELS
    assert job(classes=(7, 1)).classes == (7, 1)
    assert job().classes == tuple(range(10))
    assert job(without(3)).classes == (0, 1, 2, 4, 5, 6, 7, 8, 9)


def test_a_part_of_the_classes_is_one_only_if_there_are_images_of_others():
    assert job(classes=CHOSEN).is_subset
    assert not job().is_subset
    assert not job(without(3), classes=(9, 8, 7, 6, 5, 4, 2, 1, 0)).is_subset


def test_directions_are_those_among_the_chosen_classes():
    def directions(**options):
        fields = {f"distance__{name}": value for name, value in options.items()}
        return job(classes=CHOSEN, **fields).directions.directions

    assert directions() == [(a, b) for a in LABELS for b in LABELS if a != b]
    assert directions(victims=("4", "1")) == [(1, 7), (1, 4), (4, 7), (4, 1)]
    assert directions(victims=(4, 1)) == directions(victims=("4", "1"))  # by number or by name
    assert directions(targets=("4", "1")) == [(7, 1), (7, 4), (1, 4), (4, 1)]
    assert set(directions(num_directions=2)) < {(a, b) for a in LABELS for b in LABELS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("7",)}, "classes must name at least 2 different classes, got 7"),
        ({"classes": ("7", "7")}, "classes must name at least 2 different classes, got 7, 7"),
        (
            {"classes": CHOSEN, "distance__victims": (), "distance__targets": ("2",)},
            "distance.targets must be among the chosen classes, got 2; add them",
        ),
        (
            {"distance__nearest": 1, "distance__num_directions": 1, "classes": ("0", "1")},
            "nearest and distance.num_directions are two ways .* got 1 and 1",
        ),
        ({"classes": ("0", "1"), "distance__nearest": 3}, r"nearest must be in 0\.\.2, got 3"),
        ({"classes": ("1", "7")}, "victims must be among the chosen classes, got 0; add them"),
        ({"classes": ("0", "1", "3")}, "no training images of '3'"),
        (
            {"classes": ("0", "1"), "distance__num_directions": 3},
            r"num_directions must be in 0\.\.2, got 3",
        ),
    ],
)
def test_a_choice_that_cannot_be_is_a_clear_error(changes, message):
    with pytest.raises(InputError, match=message):
        job_of(tiny_config(**changes), without(3))


def test_of_many_classes_only_the_first_are_listed():
    names = tuple(f"c{k}" for k in range(1000))
    many = dataclasses.replace(DIGITS, class_names=names)
    with pytest.raises(InputError, match=r"unknown classes in classes: x; .*c49 and 950 more$"):
        job(many, classes=("x", "c1"))


# A whole run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on three of the digits, of the model of the finished run."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    checkpoint = str(finished_run() / "original")
    changes = {"classes": CHOSEN, "distance__victims": (), "model__checkpoint": checkpoint}
    do(tiny_config(**changes), folder)
    return folder


@pytest.fixture(scope="module")
def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_the_matrices_are_over_the_chosen_classes_and_agree_with_the_whole_ones(workdir):
    before, after = matrices(workdir)
    for matrix in (before, after):
        assert matrix.class_names == CHOSEN
        assert matrix.num_measured() == 6
        assert matrix.details["classes"] == list(LABELS)
    whole = DistanceMatrix.load(finished_run() / "distance_before.npz")
    for i, j in ((1, 0), (1, 2)):
        np.testing.assert_allclose(
            before.values[i, j], whole.values[LABELS[i], LABELS[j]], rtol=1e-4
        )


def test_the_nearest_directions_of_the_given_model_are_measured_before_and_after(tmp_path):
    changes = {
        "model__checkpoint": str(finished_run() / "original"),
        "distance__victims": (),
        "distance__targets": ("1", "3"),
        "distance__nearest": 3,
        "harden__max_steps": 3,
    }
    do(tiny_config(classes=("0", "1", "3", "8"), **changes), tmp_path)
    before, after = matrices(tmp_path)
    np.testing.assert_array_equal(np.isnan(before.values), np.isnan(after.values))
    assert before.num_measured() == 3
    assert np.isnan(before.values[:, [0, 3]]).all()
    said = "3 nearest of 6 directions into 2 classes, as universal triggers find them"
    assert json.loads((tmp_path / "summary.json").read_text())["directions"] == said
    assert said in (tmp_path / "report.html").read_text()


def test_hardening_was_among_the_chosen_classes(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    targets = [record["target"] for record in records if record["phase"] == "warm-up"]
    assert targets == list(CHOSEN)
    steps = [record for record in records if record["phase"] == "hardening"]
    assert len(steps) == 12
    assert {name for r in steps for d in r["directions"] for name in d} <= set(CHOSEN)
    selected = json.loads((workdir / "hardening.json").read_text())["num_selected"]
    assert np.shape(selected) == (3, 3)


def test_the_summary_has_the_accuracy_on_all_on_the_chosen_and_on_the_other_classes(
    workdir, summary
):
    is_chosen = np.isin(DIGITS.test.labels, LABELS)
    for when, folder in (("before", "original"), ("after", "hardened")):
        model = checkpoint.load_model(workdir / folder)
        predicted = predictions(model.classifier.predict, model.variables, DIGITS.test)
        right = predicted == DIGITS.test.labels
        assert summary[f"accuracy_{when}"] == right.mean()
        assert summary[f"accuracy_chosen_{when}"] == right[is_chosen].mean()
        assert summary[f"accuracy_others_{when}"] == right[~is_chosen].mean()
    assert summary["classes"] == list(CHOSEN)
    assert "On the other classes" in (workdir / "report.html").read_text()


def test_a_run_on_all_classes_says_nothing_of_parts():
    summary = json.loads((finished_run() / "summary.json").read_text())
    assert not [name for name in summary if "chosen" in name or "others" in name]
    assert "classes" not in summary
