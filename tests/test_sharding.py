"""One process with four CPU devices does what this one does with one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toys import linear_classifier, row_images, row_variables

from moth_jax.distance import distance_matrix
from moth_jax.hardening import StepConfig, make_harden_step, random_triggers
from moth_jax.inversion import neural_cleanse
from moth_jax.sharding import num_devices, replicate, spread, use_all_cores
from moth_jax.training import TrainState, sgd

K = 3
CLASSIFIER = linear_classifier(K)
INVERSION = neural_cleanse(patience=3, verify_every=5)
LABELS = np.repeat(np.arange(K), 4).astype(np.int32)


def run_python(*arguments):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(directions_per_chunk, directions=None):
    """A distance matrix; each size of chunk is placed on the devices in its own way."""
    return distance_matrix(
        CLASSIFIER.predict,
        row_images(LABELS),
        LABELS,
        variables=row_variables(K),
        num_steps=20,
        minibatch_size=2,
        inversion=INVERSION,
        directions_per_chunk=directions_per_chunk,
        directions=directions,
        progress=False,
    )


def hardened(classes=(0, 1)):
    """The parameters after one hardening step on a pair, and the sizes of its triggers."""
    tx = sgd(0.1, momentum=0.9, weight_decay=0.01)
    variables = replicate(row_variables(K))
    step = make_harden_step(
        CLASSIFIER, INVERSION, tx, StepConfig(minibatch_size=4, max_trigger_share=1.0)
    )
    labels = np.repeat([*classes, 2], 4)
    state, info = step(
        TrainState(variables, tx.init(variables["params"])),
        row_images(labels),
        labels,
        np.ones((2, 4), np.float32),
        np.asarray(classes[::-1]),
        random_triggers(jax.random.key(0), 2, (4, 4, 1)),
        jax.random.key(1),
        num_steps=20,
        mask_weight=1e-3,
    )
    return np.asarray(state.variables["params"]["kernel"]), np.asarray(info.sizes)


def all_results(many):
    """What is compared; `many` directions go together in a chunk of the whole matrix."""
    kernel, sizes = hardened()
    return {
        "whole": measured(many).values,
        "fewer directions than devices": measured(2, [(0, 1), (2, 1)]).values,
        "kernel": kernel,
        "sizes": sizes,
    }


@pytest.fixture(scope="module")
def four_devices(tmp_path_factory):
    """What this file's `main` reports from a process with four devices."""
    path = tmp_path_factory.mktemp("sharding") / "results.npz"
    report = json.loads(run_python(__file__, str(path)).splitlines()[-1])
    with np.load(path) as file:
        return report, dict(file)


def test_results_on_four_devices_equal_those_on_one(four_devices):
    report, sharded = four_devices
    assert report["num_devices"] == 4
    assert num_devices() == 1
    for name, expected in all_results(many=2).items():
        assert np.isfinite(expected).any()
        np.testing.assert_allclose(sharded[name], expected, rtol=1e-4, err_msg=name)


def test_leading_axes_are_cut_among_the_devices_where_they_divide(four_devices):
    report, _ = four_devices
    assert report["shards"] == {"8": [2, 3], "6": [6, 3], "scalar": [], "replicated": [8, 3]}


def test_a_number_of_devices_that_was_set_is_left_alone(four_devices):
    report, _ = four_devices
    assert report["after_use_all_cores"] == 4


def test_every_core_can_be_made_a_device():
    code = (
        "import os, jax; from moth_jax.sharding import use_all_cores; use_all_cores(); "
        "print(jax.device_count() == len(os.sched_getaffinity(0)))"
    )
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not tell which cores a process may use")
    assert run_python("-c", code).split()[-1] == "True"


def test_one_device_holds_everything():
    tree = {"a": np.ones((3, 2)), "b": np.float32(1)}
    for placed in (spread(tree), replicate(tree)):
        jax.tree.map(np.testing.assert_array_equal, placed, tree)


def main(path):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    use_all_cores()
    report = {"after_use_all_cores": jax.config.jax_num_cpu_devices, "num_devices": num_devices()}
    placed = {name: spread(np.ones((int(name), 3))) for name in ("8", "6")}
    placed["scalar"] = spread(np.float32(1))
    placed["replicated"] = replicate(np.ones((8, 3)))
    shapes = {name: array.addressable_shards[0].data.shape for name, array in placed.items()}
    np.savez(path, **all_results(many=4))
    print(json.dumps({**report, "shards": shapes}))


if __name__ == "__main__":
    main(sys.argv[1])
