import dataclasses
import json
import shutil

import numpy as np
import pytest

from moth_jax import data
from moth_jax.data import ImageSplit
from moth_jax.evaluation import Adversary, pgd_accuracy
from moth_jax.models import checkpoint
from moth_jax.run.phases import Models, robustness
from tests.helpers.runs import (
    compilations_on_disk,
    finished_run,
    job_of,
    summary_of,
    tiny_config,
)
from tests.helpers.toys import row_dataset, row_split

ATTACK = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 2, "num_images": 40}


def attacked(**changes):
    """The configuration of the finished run, with an attack."""
    fields = {f"robustness__{name}": value for name, value in {**ATTACK, **changes}.items()}
    return tiny_config(phase="report", **fields)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, summary) of the finished run, attacked afterwards."""
    workdir = shutil.copytree(finished_run(), tmp_path_factory.mktemp("robustness") / "run")
    return workdir, summary_of(attacked(), workdir)


def attack(config, workdir, dataset=None):
    """Do the phase alone."""
    dataset = data.load("digits") if dataset is None else dataset
    robustness.measure_robustness(job_of(config, dataset, workdir), Models(workdir))


def test_an_attack_on_a_finished_run_adds_the_robustness_of_both_models(finished):
    workdir, told = finished
    summary = told.figures
    images = robustness.attacked_images(data.load("digits"), 40)
    for when, folder in (("before", "original"), ("after", "hardened")):
        classifier, variables = checkpoint.load_model(workdir / folder)
        adversary = Adversary(*(ATTACK[name] for name in ("epsilon", "step_size", "num_steps")))
        with compilations_on_disk():
            expected = pgd_accuracy(classifier.predict, variables, images, adversary=adversary)
        assert summary[f"robustness_{when}"] == expected < summary[f"accuracy_{when}"]
    assert summary["robustness"] == ATTACK
    assert json.loads((workdir / "summary.json").read_text())["robustness"] == ATTACK
    assert "Robustness (PGD)" in (workdir / "report.html").read_text()
    values = (f"{100 * summary[f'robustness_{when}']:.2f}" for when in ("before", "after"))
    assert f"robustness       {' -> '.join(values)} %" in told.describe()


def count_attacks(monkeypatch):
    """A list that grows by the options of every attack; each leaves a quarter of the images."""
    attacks = []
    monkeypatch.setattr(
        robustness, "pgd_accuracy", lambda *_, **options: attacks.append(options) or 0.25
    )
    return attacks


def test_an_attack_is_not_made_twice_but_anew_with_other_options(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    attacks = count_attacks(monkeypatch)
    attack(attacked(), workdir)
    assert not attacks
    attack(attacked(num_steps=3), workdir)
    assert [made["adversary"].num_steps for made in attacks] == [3, 3]
    assert robustness.load_robustness(workdir) == {
        "robustness": {**ATTACK, "num_steps": 3},
        "robustness_before": 0.25,
        "robustness_after": 0.25,
    }


def test_what_was_attacked_before_the_hardening_is_not_attacked_again(
    finished, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0] / "original", workdir / "original")
    attacks = count_attacks(monkeypatch)
    for folder in ("original", "hardened"):
        shutil.copytree(finished[0] / folder, workdir / folder, dirs_exist_ok=True)
        attack(attacked(), workdir)
    assert [made["label"] for made in attacks] == ["robustness before", "robustness after"]


def test_without_an_attack_there_is_no_robustness(tmp_path):
    attack(tiny_config(distance__victims=()), tmp_path, row_dataset())
    assert list(tmp_path.iterdir()) == []
    assert robustness.load_robustness(tmp_path) == {}


def test_the_attacked_images_of_a_sorted_test_set_are_of_all_classes_and_of_a_small_one_all():
    split = row_split([40, 40, 40])
    order = np.argsort(split.labels, kind="stable")
    dataset = dataclasses.replace(row_dataset(), test=split.subset(order))
    chosen = robustness.attacked_images(dataset, 30)
    assert len(chosen) == 30
    assert np.bincount(chosen.labels, minlength=3).min() > 3
    again = robustness.attacked_images(dataset, 30)
    np.testing.assert_array_equal(chosen.images, again.images)
    assert len(np.unique(chosen.images.reshape(30, -1), axis=0)) == 30
    everything = robustness.attacked_images(dataset, 1000)
    assert isinstance(everything, ImageSplit)
    assert len(everything) == len(dataset.test)
