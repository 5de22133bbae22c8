"""Speed of the published inversion: this package against a plain PyTorch loop.

    python experiments/benchmark_pytorch.py --checkpoint=FILE.h5 --data_dir=DIR

Same model (the authors' CIFAR-10 ResNet20), same 100 samples a class, same machine and cores, both
with gradients of inputs only, one process each and one at a time: PyTorch one direction after
another, this package one at a time, and several together. Compilation and the first steps are timed
apart. Needs the `torch` extra and an otherwise idle machine; at the defaults it takes about ten
minutes on two CPU cores.

The work is the same to a few per cent, and the rest is at this package's expense: its four
minibatches are of 25 images where the published ones are of 32, 32, 32 and 4, and every 20 steps it
measures the kept trigger once more (a forward pass of all samples), which the published loop never
does.
"""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

# No JAX and no PyTorch here: this process must leave cores and memory to the one it measures.

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The authors' Keras .h5 file.", required=True)
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS data sets.")
STEPS = flags.DEFINE_integer("steps", 60, "Timed steps of a direction.", lower_bound=1)
DIRECTIONS = flags.DEFINE_list(
    "directions",
    ["bird:horse", "airplane:automobile", "bird:frog", "cat:dog"],
    "Directions, victim:target.",
)
TOGETHER = flags.DEFINE_list("together", ["2", "4"], "How many directions to run together.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timings of all directions; the median counts.")
OUT = flags.DEFINE_string("out", "experiments/results/benchmark_pytorch", "Where the result goes.")
SIDE = flags.DEFINE_string("side", None, "Internal: what this process measures, and prints.")

NUM_IMAGES = 100
# PyTorch gets memory for every activation from malloc. glibc by default returns blocks of this size
# to the system at once, and each step then faults in all of its pages anew, which can double
# PyTorch's time. Both sides run with the same setting, so that the kernel is not what is compared.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def samples() -> tuple[dict[str, "np.ndarray"], tuple[str, ...]]:  # noqa: F821
    """Return the first 100 test images of every victim class by name, and all names."""
    from moth_jax import data

    dataset = data.load("cifar10", dir=DATA_DIR.value)
    victims = sorted({victim for victim, _ in directions()})
    rows = {name: dataset.class_names.index(name) for name in victims}
    test = dataset.test
    images = {name: test.batch(test.of_class(k, NUM_IMAGES)) for name, k in rows.items()}
    return images, dataset.class_names


def directions() -> list[tuple[str, str]]:
    return [tuple(direction.split(":")) for direction in DIRECTIONS.value]


def timed(measure: Callable[[int], list[dict]]) -> dict:
    """Return what `measure` (steps -> a result per direction) takes, the first call apart."""
    started = time.perf_counter()
    measure(1)
    first = time.perf_counter() - started
    wall, cpu = [], []
    for _ in range(REPEATS.value):
        before, before_cpu = time.perf_counter(), time.process_time()
        results = measure(STEPS.value)
        scale = 1000 / (STEPS.value * len(directions()))
        wall.append((time.perf_counter() - before) * scale)
        cpu.append((time.process_time() - before_cpu) * scale)
    return {
        "seconds": statistics.median(wall),
        "seconds_each": wall,
        "cpu_seconds": statistics.median(cpu),
        "first_call_seconds": first,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "directions": results,
    }


def pytorch() -> dict:
    import pytorch_inversion
    import torch

    from moth_jax.models import importing

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = importing.read_weights(CHECKPOINT.value)
    model = pytorch_inversion.load_keras(weights, *importing.identify(weights)[1:])
    images, names = samples()
    images = {k: torch.from_numpy(v).permute(0, 3, 1, 2).contiguous() for k, v in images.items()}

    def measure(num_steps: int) -> list[dict]:
        return [
            pytorch_inversion.invert(
                model, images[victim], names.index(target), num_steps=num_steps
            )._asdict()
            for victim, target in directions()
        ]

    result = timed(measure)
    gradients = result["directions"][0]["image_gradients"] / STEPS.value
    with torch.no_grad():
        first_logits = model(images[directions()[0][0]]).sum(0).tolist()
    return {**result, "gradients_per_step": gradients, "first_logits": first_logits}


def package(together: int) -> dict:
    import numpy as np

    from moth_jax import distance, sharding
    from moth_jax.models import importing

    together > 1 and sharding.use_all_cores()
    classifier, variables = importing.load(CHECKPOINT.value)
    images, names = samples()
    labels = np.repeat([names.index(name) for name in images], [len(v) for v in images.values()])
    stacked = np.concatenate(list(images.values()))
    rows = [(names.index(victim), names.index(target)) for victim, target in directions()]
    traced = []

    def predict(variables, images):
        traced.append(len(images))  # at compilation: the sizes of the minibatches
        return classifier.predict(variables, images)

    def measure(num_steps: int) -> list[dict]:
        matrix = distance.distance_matrix(
            predict,
            stacked,
            labels,
            variables=variables,
            directions=rows,
            num_images=NUM_IMAGES,
            num_steps=num_steps,
            directions_per_chunk=together,
            progress=False,
        )
        return [
            {"size": float(matrix.values[row]), "success_rate": float(matrix.success_rate[row])}
            for row in rows
        ]

    result = timed(measure)
    gradients = min(n for n in traced if n > 8) * -(-NUM_IMAGES // 32)
    first_logits = classifier.predict(variables, images[directions()[0][0]]).sum(0).tolist()
    return {**result, "gradients_per_step": gradients, "first_logits": first_logits}


def measure_in_own_process(side: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **MALLOC}
    )
    return {"side": side, **json.loads(done.stdout.splitlines()[-1])}


def table(rows: list[dict]) -> str:
    """Return the figures as text; the ratio is to PyTorch's time."""
    lines = [
        f"{'':30}{'s/direction':>12}{'ratio':>7}{'CPU s':>8}{'first s':>9}{'MB':>7}"
        f"{'gradients/step':>16}  sizes"
    ]
    for row in rows:
        count = row["side"].partition(":")[2]
        label = f"this package, {count} together" if count else "PyTorch, one after another"
        ratio = row["seconds"] / rows[0]["seconds"]
        sizes = " ".join(f"{d['size']:.0f}" for d in row["directions"])
        lines.append(
            f"{label.replace('1 together', 'one at a time'):30}{row['seconds']:12.1f}{ratio:7.2f}"
            f"{row['cpu_seconds']:8.0f}{row['first_call_seconds']:9.1f}{row['peak_memory_mb']:7.0f}"
            f"{row['gradients_per_step']:16.0f}  {sizes}"
        )
    return "\n".join(lines)


def processor() -> str:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return models[0].split(":")[1].strip() if models else platform.processor()


def main(_) -> None:
    if SIDE.value:
        count = SIDE.value.partition(":")[2]
        print(json.dumps(package(int(count)) if count else pytorch()))
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Others use this machine (load {load:.1f}): these figures will not hold.")
    rows = [
        measure_in_own_process(s)
        for s in ("pytorch", "jax:1", *map("jax:{}".format, TOGETHER.value))
    ]
    result = {
        "command": "python experiments/benchmark_pytorch.py",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "load_at_start": load,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "jax", "jaxlib", "flax")},
        "python": platform.python_version(),
        "unit": "seconds per direction and 1,000 steps",
        "steps": STEPS.value,
        "repeats": REPEATS.value,
        "directions": DIRECTIONS.value,
        "ratios": {r["side"]: r["seconds"] / rows[0]["seconds"] for r in rows[1:]},
        "rows": rows,
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark_pytorch.json").write_text(json.dumps(result, indent=2) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['device']}; {versions}; {result['unit']}\n{table(rows)}")


if __name__ == "__main__":
    app.run(main)
