"""The floor of trigger inversion on this machine, our distance from it, and where the time goes.

    python experiments/speed/floor.py --checkpoint=FILE.h5
    python experiments/speed/floor.py --checkpoint=FILE.h5 --images=16 --together=2

The first is an update of a matrix, the second one of a hardening's rounds, whose few images leave
an accelerator waiting for its host. Counts the operations and bytes of one image gradient of the
authors' ResNet20, measures what the machine does with a large product of matrices, with the
network's own 3x3 convolutions and with a copy, times the compiled inversion, and profiles it: how
many operations an update has, what they are, and how long they keep the device busy. On a CPU all
times are CPU seconds of one core, which other load disturbs little; elsewhere they are seconds.
"""

import collections
import functools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from operations import (
    CONVOLUTIONS,
    count_convolutions,
    forward_operations,
    gradient_bytes,
    operation_lines,
)

from moth_jax.run.origin import origin

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The authors' Keras .h5 file.", required=True)
TOGETHER = flags.DEFINE_integer("together", 0, "Directions together; 0: 1 on a CPU, 90 elsewhere.")
IMAGES = flags.DEFINE_integer("images", 100, "Images of a direction.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10, "Timed steps, each of all images.", lower_bound=2)
OUT = flags.DEFINE_string("out", "experiments/results/benchmark", "Folder of the result.")

MINIBATCH = 32  # the largest
# What the names of XLA's operations stand for; the first that matches.
KINDS = {
    "convolutions, and what is fused into them": r"ynn_fusion|convolution|conv_general|cudnn|gemm",
    "normalise and ReLU, forward": r"maximum",
    "normalise and ReLU, backward": r"multiply.*fusion|select.*fusion",
    "sums of residual branches": r"add.*fusion|fusion.*add",
    "copies and transposes": r"copy|transpose|broadcast|pad|slice|concatenate|bitcast",
}
_CONTAINERS = re.compile(r"^(while|cond|call|conditional|ThunkExecutor|end:|Threadpool|iota_|\$)")


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the least that a call takes; on a CPU, CPU seconds."""
    import jax

    now = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        before = now()
        jax.block_until_ready(call())
        taken.append(now() - before)
    return min(taken)


def num_minibatches() -> int:
    """Return the updates of a step."""
    return -(-IMAGES.value // MINIBATCH)


def rates(batch: int) -> dict:
    """Return what the machine does, in GFLOP/s and GB/s (on a CPU: of one core).

    The convolutions and the copy are of `batch` images.
    """
    import jax
    import jax.numpy as jnp

    from moth_jax.models.layers.convolution import conv2d

    size = 1536 if jax.default_backend() == "cpu" else 8192
    key = jax.random.key(0)
    square = jax.random.normal(key, (size, size))
    product = jax.jit(lambda a: a @ a)
    result = {"matmul_gflops": 2e-9 * size**3 / seconds(lambda: product(square))}
    for side, channels in ((32, 16), (16, 32), (8, 64)):
        x = jax.random.normal(key, (batch, side, side, channels))
        w = jax.random.normal(key, (3, 3, channels, channels))
        chain = jax.jit(lambda x, w: functools.reduce(lambda y, _: conv2d(y, w), range(8), x))
        work = 8 * 2e-9 * batch * side**2 * 9 * channels**2
        result[f"conv_{channels}_gflops"] = work / seconds(lambda x=x, w=w, f=chain: f(x, w))
    # As large as the largest activations of a minibatch, which a cache may hold.
    values = jnp.zeros((batch, 32, 32, 16))
    passes = 200
    copies = jax.jit(lambda v: jax.lax.fori_loop(0, passes, lambda _, v: v + 1, v))
    result["copy_gb_per_second"] = 2e-9 * passes * values.nbytes / seconds(lambda: copies(values))
    return result


def convolution_seconds(speeds: dict) -> float:
    """Return the seconds of an image gradient's convolutions alone, at the measured speeds."""
    total = 0.0
    for side, kernel, wide, out, count in CONVOLUTIONS:
        work = 2 * 2e-9 * side**2 * kernel**2 * wide * out * count  # forward, and to the input
        total += work / speeds[f"conv_{ {32: 16, 16: 32, 8: 64}[side] }_gflops"]
    return total


def inversion():
    """Return run(num_steps) of the published inversion, and its compiled program."""
    import jax
    import numpy as np

    from moth_jax.inversion import Budget, NeuralCleanse, Samples
    from moth_jax.inversion.directions import invert_with_seeds
    from moth_jax.models.weights import importing

    classifier, variables = importing.load(CHECKPOINT.value)
    together = TOGETHER.value or (1 if jax.default_backend() == "cpu" else 90)
    count = IMAGES.value
    images = np.random.default_rng(0).random((count, 32, 32, 3), np.float32)
    samples = Samples(
        np.broadcast_to(images, (together, *images.shape)),
        np.ones((together, count), np.float32),
        1 + np.arange(together, dtype=np.int32) % 9,
    )
    victims, seeds = np.zeros(together, np.int32), np.zeros(1, np.uint32)
    inputs = classifier.predict, variables, *jax.device_put((samples, victims, seeds))

    def options(num_steps: int) -> dict:
        return {"budget": Budget(num_steps, 1e-3, MINIBATCH), "inversion": NeuralCleanse()}

    def run(num_steps: int):
        return invert_with_seeds(*inputs, **options(num_steps))

    return run, invert_with_seeds.lower(*inputs, **options(1)).compile(), together


def profile(run: Callable[[int], object]) -> dict:
    """Return what an inversion of some steps spends its time on.

    The share of each kind of operation, how many operations an update has (with its part of the
    verifications), and the microseconds of all of them: how long an update keeps the device busy.
    On a CPU its cores together.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(STEPS.value))
        path = max(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        count, kinds = 0, collections.Counter()
        for line in operation_lines(planes):
            for event in line.events:
                if not _CONTAINERS.match(event.name):
                    kinds[_kind(event.name)] += event.duration_ns
                    count += 1
    total, updates = sum(kinds.values()), STEPS.value * num_minibatches()
    return {
        "shares": {kind: duration / total for kind, duration in kinds.most_common()},
        "operations_of_an_update": count / updates,
        "busy_microseconds_of_an_update": 1e-3 * total / updates,
    }


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def main(_) -> None:
    import jax
    from absl import logging

    logging.set_verbosity(logging.ERROR)

    run, program, together = inversion()
    per_step = (seconds(lambda: run(STEPS.value), 3) - seconds(lambda: run(1), 3)) / (
        STEPS.value - 1
    )
    minibatch = together * -(-IMAGES.value // num_minibatches())
    speeds = rates(minibatch)
    operations, moved = 2 * forward_operations(), gradient_bytes()
    measured = per_step / (IMAGES.value * together)
    floors = {
        "at the speed of a large matrix product": operations / speeds["matmul_gflops"] / 1e9,
        "at the speed of its own convolutions": convolution_seconds(speeds),
        "at the speed of a copy": moved / speeds["copy_gb_per_second"] / 1e9,
    }
    result = {
        **origin(),
        "device": jax.devices()[0].device_kind,
        "unit": "CPU seconds of one core" if jax.default_backend() == "cpu" else "seconds",
        "together": together,
        "images": IMAGES.value,
        "operations_per_image_gradient": operations,
        "bytes_per_image_gradient": moved,
        "convolutions": count_convolutions(program.as_text()),
        "rates": speeds,
        "floors": floors,
        "seconds_per_image_gradient": measured,
        "microseconds_of_an_update": 1e6 * per_step / num_minibatches(),
        "profile": profile(run),
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    images = "" if IMAGES.value == 100 else f"_{IMAGES.value}_images"
    path = out / f"floor_{jax.default_backend()}{images}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{operations / 1e6:.0f} MFLOP and {moved / 1e6:.1f} MB per image gradient")
    print(f"convolutions of an update: {result['convolutions']}")
    for name, rate in speeds.items():
        print(f"{name:24} {rate:8.1f}")
    print(f"microseconds per image gradient: {1e6 * measured:.1f} ({result['unit']})")
    for name, floor in floors.items():
        print(f"  {name:40} {1e6 * floor:8.1f}   {floor / measured:5.0%} of ours")
    spent = result["profile"]
    print(
        f"an update: {result['microseconds_of_an_update']:.0f} microseconds, "
        f"{spent['operations_of_an_update']:.0f} operations of together "
        f"{spent['busy_microseconds_of_an_update']:.0f}"
    )
    for kind, share in spent["shares"].items():
        print(f"  {kind:44} {share:6.1%}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    app.run(main)
