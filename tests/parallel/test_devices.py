"""Processes with four and eight CPU devices do what one with a single device does."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.evaluation import pgd_accuracy, predictions
from moth_jax.hardening.step import StepBatch, StepConfig, make_harden_step
from moth_jax.inversion import Budget, NeuralCleanse, start_triggers
from moth_jax.parallel.devices import (
    constrain,
    fetch,
    my_rows,
    num_devices,
    read_batch,
    replicate,
    spread,
    use_all_cores,
    use_devices,
)
from moth_jax.training import Adversary, TrainingConfig, TrainState, sgd, train
from tests.helpers.toys import (
    compilations,
    linear_classifier,
    row_dataset,
    row_distances,
    row_images,
    row_variables,
)

K = 3
CLASSIFIER = linear_classifier(K)
INVERSION = NeuralCleanse(patience=3, verify_every=5)
LABELS = np.repeat(np.arange(K), 4).astype(np.int32)


def run_python(*arguments):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(directions_per_chunk, labels=LABELS):
    """A distance matrix; each size of chunk is placed on the devices in its own way."""
    return row_distances(
        labels,
        num_steps=20,
        minibatch_size=2,
        inversion=INVERSION,
        directions_per_chunk=directions_per_chunk,
    )


def harden_step():
    """The step and its arguments: a pair with 12 samples of each class, a batch of 36."""
    tx = sgd(0.1, momentum=0.9, weight_decay=0.01)
    variables = replicate(row_variables(K))
    step = make_harden_step(
        CLASSIFIER,
        INVERSION,
        tx,
        StepConfig(max_trigger_share=1.0, adversary=Adversary(0.02, 0.01, 2)),
    )
    labels = np.repeat([0, 1, 2], 12)
    arguments = (
        TrainState(variables, tx.init(variables["params"])),
        StepBatch(row_images(labels), labels, np.ones((2, 12), np.float32)),
        np.asarray([1, 0]),
        start_triggers(jax.random.key(0), 2, (4, 4, 1), INVERSION),
        jax.random.key(1),
    )
    return step, arguments, {"budget": Budget(20, 1e-3, 12)}


def hardened():
    """The parameters after one hardening step, what it reports, and its program as text."""
    step, arguments, options = harden_step()
    program = step.lower(*arguments, **options).compile()
    state, info = fetch(program(*arguments, **options))
    results = {
        "kernel": state.variables["params"]["kernel"],
        "pair's sizes": info.sizes,
        "pair's triggers": info.trigger.mask,
        "loss": info.loss,
    }
    return results, program.as_text()


def trained():
    """The parameters of adversarial training, and what the model then says of test images."""
    dataset = row_dataset((14, 14, 14))
    config = TrainingConfig(epochs=2, batch_size=10, adversary=Adversary(0.02, 0.01, 2))
    variables = train(CLASSIFIER, row_variables(K), dataset, config, progress=False)
    attack = Adversary(0.3, 0.1, 3)
    return {
        "trained kernel": fetch(variables["params"]["kernel"]),
        "predictions": predictions(CLASSIFIER.predict, variables, dataset.test),
        "robustness": pgd_accuracy(CLASSIFIER.predict, variables, dataset.test, adversary=attack),
    }


@functools.cache
def on_devices(count):
    """What this file's `main` reports from a process with so many devices: (report, results)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.npz")
        report = json.loads(run_python(__file__, str(count), str(path)).splitlines()[-1])
        with np.load(path) as file:
            return report, dict(file)


@pytest.mark.parametrize("count", [4, 8])
def test_results_on_many_devices_equal_those_on_one(count):
    report, sharded = on_devices(count)
    assert report["num_devices"] == count
    _, expected = on_devices(1)
    for name in sharded:
        assert np.isfinite(expected[name]).any()
        np.testing.assert_allclose(
            sharded[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("count", [4, 8])
def test_the_samples_of_a_pair_and_the_batch_are_cut_among_all_devices(count):
    # Two directions of 12 samples, and 36 samples in the batch: so many go through the model.
    assert sorted(on_devices(count)[0]["rows"]) == sorted({24 // count, -(-36 // count)})


def test_the_program_that_is_asked_for_its_memory_is_the_one_that_measures():
    assert on_devices(4)[0]["programs"].count("jit(invert_with_seeds)") == 1


def test_some_of_the_devices_give_what_all_of_them_give():
    report, _ = on_devices(4)
    assert report["two_devices"] == {"num_devices": 2, "used": 2, "sum": 28.0}


def test_leading_axes_are_cut_among_the_devices_where_they_divide():
    report, _ = on_devices(4)
    assert report["shards"] == {
        "8": [2, 3],
        "6": [6, 3],
        "scalar": [],
        "replicated": [8, 3],
        "batch of 8": [2, 4, 4, 1],
        "batch of 6": [6, 4, 4, 1],
    }


def test_a_number_of_devices_that_was_set_is_left_alone():
    report, _ = on_devices(4)
    assert report["after_use_all_cores"] == 4


@pytest.mark.parametrize("count", [2, -1])
def test_more_devices_than_there_are_is_an_error_that_says_how_many(count):
    with pytest.raises(InputError, match=rf"mesh.devices must be in 1..1, .* got {count}"):
        use_devices(count)
    assert num_devices() == 1


def test_every_core_can_be_made_a_device():
    code = (
        "import os, jax; from moth_jax.parallel.devices import use_all_cores; use_all_cores(); "
        "print(jax.device_count() == len(os.sched_getaffinity(0)))"
    )
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not tell which cores a process may use")
    assert run_python("-c", code).split()[-1] == "True"


def test_one_device_holds_everything():
    tree = {"a": np.ones((3, 2)), "b": np.float32(1)}
    for placed in (spread(tree), replicate(tree)):
        jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert my_rows(3) == slice(0, 3)


def rows_through_the_model(program):
    """How many samples each device puts through the classifier at once, by a program's text."""
    results = {int(rows) for rows in re.findall(rf"f32\[(\d+),{K}\]\S* dot\(", program)}
    return sorted(results - {16})  # which is the gradient of the weights


def programs_of_a_measurement():
    """The names of those that are compiled, where a chunk is as large as the memory allows."""
    jax.clear_caches()
    with compilations() as names:
        measured(None, np.repeat(range(4), 4))
    return names


def on_two_devices():
    """What is computed once only two devices are to be used, after others were."""
    use_devices(2)
    double = jax.jit(lambda values: constrain(values).sum())
    placed = spread(np.arange(8.0))
    used = placed.sharding.num_devices
    return {"num_devices": num_devices(), "used": used, "sum": float(double(placed))}


def shapes_on_a_device():
    split = row_dataset().train
    placed = {name: spread(np.ones((int(name), 3))) for name in ("8", "6")}
    placed["scalar"] = spread(np.float32(1))
    placed["replicated"] = replicate(np.ones((8, 3)))
    for count in (8, 6):
        placed[f"batch of {count}"] = read_batch(split, np.arange(count))
    return {name: array.addressable_shards[0].data.shape for name, array in placed.items()}


def main(count, path):
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    use_all_cores()
    results, program = hardened()
    # With two in a chunk on eight devices, a direction has four of them.
    results["whole"] = measured(2 if count == 8 else 4).values
    results |= trained() if count < 8 else {}
    np.savez(path, **results)
    report = {
        "after_use_all_cores": jax.config.jax_num_cpu_devices,
        "num_devices": num_devices(),
        "rows": rows_through_the_model(program),
        "shards": shapes_on_a_device(),
    }
    if count == 4:
        report["programs"] = programs_of_a_measurement()
        report["two_devices"] = on_two_devices()
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
