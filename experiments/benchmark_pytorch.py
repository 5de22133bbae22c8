"""Speed of the published inversion: this package against a plain PyTorch loop.

    python experiments/benchmark_pytorch.py --checkpoint=FILE.h5 --data_dir=DIR

Same model (the authors' CIFAR-10 ResNet20), same 100 samples a class, same machine and cores, both
with gradients of inputs only, each variant in a process of its own, one process at a time: PyTorch
one direction after another, in its default memory layout and in channels-last, which is faster on a
CPU; this package one direction at a time, and several together. Ratios are to the faster PyTorch.
Compilation and the first step are timed apart. Needs the `torch` extra and an otherwise idle
machine; at the defaults it takes about ten minutes on two CPU cores.

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

from absl import app, flags, logging
from machine import MALLOC, processor

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


def samples() -> tuple[dict, tuple[str, ...]]:
    """Return the first 100 test images of every victim class, by its name, and all names."""
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


def pytorch(layout: str) -> dict:
    """Return the figures of the PyTorch loop; `layout` is "default" or "channels_last"."""
    import pytorch_inversion
    import torch

    from moth_jax.models import importing

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = importing.read_weights(CHECKPOINT.value)
    model = pytorch_inversion.load_keras(weights, *importing.identify(weights)[1:])
    images, names = samples()
    memory = {"default": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    model = model.to(memory_format=memory)
    images = {
        name: torch.from_numpy(v).permute(0, 3, 1, 2).contiguous(memory_format=memory)
        for name, v in images.items()
    }

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
        mean_logits = model(images[directions()[0][0]]).mean(0).tolist()
    return {**result, "gradients_per_step": gradients, "mean_logits": mean_logits}


def package(together: int) -> dict:
    """Return the figures of this package with so many directions in one compiled call."""
    import numpy as np

    from moth_jax import distance, sharding
    from moth_jax.models import importing

    sharding.use_all_cores()
    classifier, variables = importing.load(CHECKPOINT.value)
    images, names = samples()
    labels = np.repeat([names.index(name) for name in images], [len(v) for v in images.values()])
    stacked = np.concatenate(list(images.values()))
    rows = [(names.index(victim), names.index(target)) for victim, target in directions()]
    traced = set()

    def predict(variables, images):
        traced.add(len(images))  # while compiling: the sizes of everything the model is given
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
    minibatch = min(traced - {8})  # 8 images are for the check of the model's output
    mean_logits = classifier.predict(variables, images[directions()[0][0]]).mean(0).tolist()
    gradients = minibatch * -(-NUM_IMAGES // 32)
    return {**result, "gradients_per_step": gradients, "mean_logits": mean_logits}


def in_own_process(side: str) -> dict:
    """Return the figures of `side`, "pytorch:LAYOUT" or "package:COUNT"."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **MALLOC}
    )
    return {"side": side, **json.loads(done.stdout.splitlines()[-1])}


def compare(rows: list[dict]) -> dict:
    """Return every row's ratio to the faster PyTorch; raise if the models are not the same."""
    for row in rows:
        pairs = zip(row["mean_logits"], rows[0]["mean_logits"], strict=True)
        if max(abs(a - b) for a, b in pairs) > 1e-3:
            raise ValueError(f"{row['side']} and {rows[0]['side']} do not run the same model")
    fastest = min(row["seconds"] for row in rows if row["side"].startswith("pytorch"))
    return {row["side"]: row["seconds"] / fastest for row in rows}


def table(rows: list[dict], ratios: dict) -> str:
    """Return the figures as text."""
    headings = ("seconds", "ratio", "CPU s", "first call s", "peak MB", "gradients/step", "sizes")
    lines = [f"{'':28}" + "".join(f"{h:>{len(h) + 2}}" for h in headings)]
    for row in rows:
        figures = (
            f"{row['seconds']:.1f}",
            f"{ratios[row['side']]:.2f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['first_call_seconds']:.1f}",
            f"{row['peak_memory_mb']:.0f}",
            f"{row['gradients_per_step']:.0f}",
        )
        cells = [f"{f:>{len(h) + 2}}" for f, h in zip(figures, headings[:-1], strict=True)]
        sizes = " ".join(f"{d['size']:.0f}" for d in row["directions"])
        lines.append(f"{label(row['side']):28}{''.join(cells)}  {sizes}")
    return "\n".join(lines)


def label(side: str) -> str:
    name, _, variant = side.partition(":")
    if name == "pytorch":
        return "PyTorch" if variant == "default" else "PyTorch, channels last"
    return "this package, " + ("one at a time" if variant == "1" else f"{variant} together")


def report(rows: list[dict], ratios: dict, load: float) -> dict:
    """Return what is kept of the benchmark."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "command": "python experiments/benchmark_pytorch.py",
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "load_at_start": load,
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "jax", "jaxlib", "flax")},
        "unit": "seconds per direction and 1,000 steps",
        "steps": STEPS.value,
        "repeats": REPEATS.value,
        "direction_names": DIRECTIONS.value,
        "ratios": ratios,
        "rows": rows,
    }


def main(_) -> None:
    if SIDE.value:
        logging.set_verbosity(logging.ERROR)
        name, _, variant = SIDE.value.partition(":")
        print(json.dumps(pytorch(variant) if name == "pytorch" else package(int(variant))))
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Others use this machine (load {load:.1f}): these figures will not hold.")
    counts = ["1", *TOGETHER.value]
    sides = ["pytorch:default", "pytorch:channels_last", *(f"package:{n}" for n in counts)]
    rows = [in_own_process(side) for side in sides]
    ratios = compare(rows)
    result = report(rows, ratios, load)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark_pytorch.json").write_text(json.dumps(result, indent=2) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['device']}; {versions}; {result['unit']}\n{table(rows, ratios)}")


if __name__ == "__main__":
    app.run(main)
