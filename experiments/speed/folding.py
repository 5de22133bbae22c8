"""What folding batch normalisation into the convolutions would save of an image gradient.

    python experiments/speed/folding.py --checkpoint=akamaster_resnet20-12fca82f.th

In akamaster's ResNet20 every normalisation follows a convolution. Its factor goes into the kernel
before it, so that an addition is left; both networks give the same logits. Times the gradient with
respect to the image in a compiled loop, as an inversion has it, of one and of the other in turns;
on a CPU in seconds of its cores.
"""

import functools
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from moth_jax.models.layers import BatchNorm
from moth_jax.models.weights import importing
from moth_jax.parallel import devices
from moth_jax.run.origin import origin
from moth_jax.storage.files import write_json

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Weights of akamaster's.", required=True)
RUNS = flags.DEFINE_integer("runs", 8, "Of each of the two, in turns.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 40, "Gradients in a run.", lower_bound=2)
BATCH = flags.DEFINE_integer("batch", 25, "Images of a gradient.")
OUT = flags.DEFINE_string("out", "experiments/results/benchmark", "Folder of the result.")


def folded(variables: dict) -> dict:
    """Return the variables with the factor of each normalisation in the kernel before it."""
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    epsilon = BatchNorm(1).epsilon
    for name in [name for name in params if name.endswith(".scale")]:
        norm = name.removesuffix(".scale")
        kernel = norm.replace("bn", "conv") + ".kernel"
        factor = params[name] / np.sqrt(stats[f"{norm}.var"] + epsilon)
        params[kernel] = params[kernel] * factor
        params[f"{norm}.bias"] = params[f"{norm}.bias"] - stats[f"{norm}.mean"] * factor
    return {**variables, "params": params}


def add_only(norm: BatchNorm, x: jax.Array) -> jax.Array:
    """Apply what is left of a normalisation that was folded."""
    return x + norm.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


def descent(predict):
    """Return run(variables, images): images that descended the loss of class 0 for some steps."""

    @jax.jit
    def run(variables, images):
        def loss(images):
            return -jax.nn.log_softmax(predict(variables, images))[:, 0].sum()

        step = jax.grad(loss)
        return jax.lax.fori_loop(0, STEPS.value, lambda _, x: x - 1e-6 * step(x), images)

    return run


def main(_) -> None:
    devices.use_all_cores()
    classifier, variables = importing.load(CHECKPOINT.value)
    images = jnp.asarray(np.random.default_rng(0).random((BATCH.value, 32, 32, 3), np.float32))
    # The programs are compiled here, each with its own normalisation.
    apart = descent(classifier.predict).lower(variables, images).compile()
    logits = classifier.predict(variables, images)
    with mock.patch.object(BatchNorm, "__call__", add_only):
        jax.clear_caches()
        together = descent(classifier.predict).lower(variables, images).compile()
        same = classifier.predict(folded(variables), images)
    np.testing.assert_allclose(logits, same, rtol=1e-3, atol=1e-3)
    calls = {
        "apart": functools.partial(apart, variables, images),
        "folded": functools.partial(together, folded(variables), images),
    }
    now = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for call in calls.values():
        jax.block_until_ready(call())
    taken = {name: [] for name in calls}
    for _ in range(RUNS.value):
        for name, call in calls.items():
            before = now()
            jax.block_until_ready(call())
            taken[name].append(1e3 * (now() - before) / (STEPS.value * BATCH.value))
    result = {
        **origin(),
        "device": jax.devices()[0].device_kind,
        "unit": "milliseconds an image gradient",
        "median": {name: statistics.median(values) for name, values in taken.items()},
        "least": {name: min(values) for name, values in taken.items()},
        "largest_difference_of_logits": float(jnp.abs(logits - same).max()),
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"folding_{jax.default_backend()}.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(main)
