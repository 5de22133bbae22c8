"""A process with four CPU devices compiles no program twice for arrays of one shape."""

import collections
import functools
import json

import jax
import numpy as np

from moth_jax.inversion import NeuralCleanse
from moth_jax.parallel.devices import num_devices
from tests.helpers.toys import compilations, row_distances
from tests.parallel.test_devices import run_python

LABELS = np.repeat(range(4), 4)


@functools.cache
def on_four_devices():
    """What this file's `main` reports."""
    return json.loads(run_python(__file__).splitlines()[-1])


def test_the_program_that_is_asked_for_its_memory_is_the_one_that_measures():
    report = on_four_devices()
    assert report["num_devices"] == 4
    assert report["in chunks"]["jit(invert_with_seeds)"] == 1


def measure(inversion, together):
    """Count the programs that a measurement compiles."""
    jax.clear_caches()
    with compilations() as names:
        row_distances(
            LABELS,
            num_steps=300,
            minibatch_size=4,
            inversion=inversion,
            directions_per_chunk=together,
        )
    return collections.Counter(names)


def main():
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    report = {"in chunks": measure(NeuralCleanse(patience=3, verify_every=5), None)}
    print(json.dumps({"num_devices": num_devices(), **report}))


if __name__ == "__main__":
    main()
