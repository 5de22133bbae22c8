"""What the ways of `models/convolution.py` gain over XLA's own, layer by layer, in a compiled loop.

    python experiments/speed/narrow_convolutions.py

Trigger inversion is a loop of forward convolutions and of gradients to their inputs. For the layers
of the authors' ResNet20 that keep their size: microseconds of one convolution of a minibatch,
forward and to the input, as XLA has it; written as a plain convolution (which XLA:CPU sends to its
fast kernel also in loops); and with several columns packed into one, where channels are few
(elsewhere that is the plain one). On a CPU these are of its cores' time.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from operations import CONVOLUTIONS

from moth_jax.models.layers import convolution
from moth_jax.models.layers.convolution import Geometry
from moth_jax.run.origin import origin
from moth_jax.storage.files import write_json

BATCH = flags.DEFINE_integer("batch", 0, "Images of a minibatch; 0: 25 on a CPU, 2,250 elsewhere.")
LENGTH = flags.DEFINE_integer("length", 8, "Convolutions in a loop.", lower_bound=1)
RUNS = flags.DEFINE_integer("runs", 5, "Of each loop; the median counts.", lower_bound=1)
OUT = flags.DEFINE_string("out", "experiments/results/benchmark", "Folder of the result.")

GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
# The layers that keep their size; the others are few.
LAYERS = [
    (side, kernel, wide, out)
    for side, kernel, wide, out, _ in CONVOLUTIONS
    if kernel == 3 and (wide == out or wide == 3)
]


def unpacked(function: Callable) -> Callable:
    """Return `function`, traced as if packing were never worth it."""

    def call(*arguments):
        with mock.patch.object(convolution, "_columns_per_window", return_value=1):
            return function(*arguments)

    return call


def ways() -> dict[str, dict[str, Callable]]:
    """Return the functions (x, w, g) -> array of each kind of convolution."""

    def forward(x, w, g):
        return convolution._dense(x, w, GEOMETRY)

    def to_input(x, w, g):
        return convolution._dense_input_gradient(x, w, g, GEOMETRY)

    return {
        "forward": {
            "XLA's own": lambda x, w, g: convolution._xla(x, w, GEOMETRY),
            "packed": forward,
        },
        "to the input": {
            "XLA's own": lambda x, w, g: convolution._xla_input_gradient(
                x, w, g, geometry=GEOMETRY
            ),
            "plain": unpacked(to_input),
            "packed": to_input,
        },
    }


def microseconds(way: Callable, x, w, g) -> tuple[float, np.ndarray]:
    """Return what one convolution of a loop takes, and its result."""

    @jax.jit
    def loop(x, w, g):
        def body(_, carry):
            # The weights hang on what came out, or XLA would do it once, before the loop.
            return 1e-20 * way(x, w + carry, g)[0, 0, 0, 0]

        return jax.lax.fori_loop(0, LENGTH.value, body, jnp.zeros(()))

    now = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(loop(x, w, g))
    taken = []
    for _ in range(RUNS.value):
        before = now()
        jax.block_until_ready(loop(x, w, g))
        taken.append(now() - before)
    return 1e6 * statistics.median(taken) / LENGTH.value, np.asarray(jax.jit(way)(x, w, g))


def main(_) -> None:
    batch = BATCH.value or (25 if jax.default_backend() == "cpu" else 2250)
    rows, rng = [], np.random.default_rng(0)
    for side, kernel, wide, out in LAYERS:
        x, w, g = (
            jnp.asarray(rng.standard_normal(shape, np.float32))
            for shape in (
                (batch, side, side, wide),
                (kernel, kernel, wide, out),
                (batch, side, side, out),
            )
        )
        for kind, functions in ways().items():
            row, expected = {"layer": f"{side}x{side}, {wide} to {out}", "kind": kind}, None
            for name, way in functions.items():
                row[name], result = microseconds(way, x, w, g)
                expected = result if expected is None else expected
                np.testing.assert_allclose(result, expected, rtol=2e-2, atol=0.2)  # TF32
            rows.append(row)
            print(
                f"{row['layer']:18} {kind:13}"
                + "".join(f"{name:>15} {row[name]:7.0f}" for name in functions),
                flush=True,
            )
    result = {
        **origin(),
        "device": jax.devices()[0].device_kind,
        "unit": "microseconds a convolution",
        "batch": batch,
        "rows": rows,
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"narrow_convolutions_{jax.default_backend()}.json"
    write_json(path, result)
    print(f"written: {path}")


if __name__ == "__main__":
    app.run(main)
