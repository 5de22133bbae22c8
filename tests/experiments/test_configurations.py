"""What the experiments configure, without the training: models other than the natural ones."""

import functools
import json
import os
import subprocess
import sys

import pytest

from moth_jax.hardening import METHODS
from moth_jax.run.configuration import node_of
from tests.helpers.runs import ROOT

# The scripts find each other in their folder, and define the flags of a process of their own.
SCRIPT = """
import json, sys
from types import SimpleNamespace
from absl import flags
import comparison, lab, table5_removal
from moth_jax.run.configuration import check

flags.FLAGS(sys.argv)
found = []

def model(name, problem, seed=0, *, change):
    config = lab.configured(problem, seed)
    change(config)
    check(config)
    found.append(json.loads(config.to_json_best_effort()))

comparison.model = table5_removal.model = model
comparison.natural = table5_removal.natural = lambda *_: SimpleNamespace(folder=lab.Path("natural"))
for problem in ("cifar10-resnet20", "cifar10-small_cnn"):
    comparison.adversarially_trained(problem)
    table5_removal.poisoned(problem, "patch", False)
print(json.dumps(found))
"""
ARCHITECTURES = ["preact_resnet20", "preact_resnet20", "small_cnn", "small_cnn"]


@functools.cache
def configurations(*options):
    """Those of an adversarially trained and of a poisoned model, of two problems."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'experiments' / 'paper'}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", [(), ("--cifar10_model=weights.h5",)])
def test_at_full_scale_the_other_models_are_trained_from_scratch_whatever_is_given(options):
    models = [config["model"] for config in configurations("--scale=full", *options)]
    assert [model["name"] for model in models] == ARCHITECTURES
    assert not any(model["checkpoint"] or model["fine_tune"] for model in models)


def test_at_scale_cpu_the_other_models_are_natural_ones_trained_on():
    models = [config["model"] for config in configurations("--scale=cpu")]
    assert {model["checkpoint"] for model in models} == {"natural/original"}
    assert all(model["fine_tune"] for model in models)


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
def test_an_adversarially_trained_model_is_hardened_with_its_adversary_by_every_method(scale):
    trained, poisoned = configurations(f"--scale={scale}")[:2]
    adversary = trained["training"]["adversary"]
    assert adversary == {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 7}
    assert [trained[node_of(method)]["adversary"] for method in METHODS] == [adversary] * len(
        METHODS
    )
    assert poisoned["training"]["adversary"]["epsilon"] == 0
