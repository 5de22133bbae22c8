"""Speed of PyTorch models that run in JAX: inversion steps here against PyTorch's own.

    python experiments/speed/benchmark_bridge.py

torchvision's ResNet18 and MobileNet v2 with 10 classes at 64x64 pixels, random weights, one
minibatch of 32 images a step, gradients of inputs only: the published inversion as a plain PyTorch
loop (in its default memory layout and in channels-last) against this package on the converted
model, and on the native one where there is one. Each in a process of its own, one at a time.
Compilation and the first step are timed apart. Needs torchvision and an otherwise idle machine.
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from benchmark_timing import MALLOC

from moth_jax.run.origin import origin, processor

MODELS = flags.DEFINE_list("models", ["resnet18", "mobilenet_v2"], "Classifiers of torchvision.")
NATIVE = ("resnet18", "resnet34", "resnet50", "vgg11_bn", "vgg13_bn")
STEPS = flags.DEFINE_integer("steps", 40, "Timed steps.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "Timings; the median counts.")
SIZE = flags.DEFINE_integer("size", 64, "Pixels of an image's side.")
BATCH = flags.DEFINE_integer("batch", 32, "Images of a step.")
OUT = flags.DEFINE_string("out", "experiments/results/benchmark_bridge", "Folder.")
SIDE = flags.DEFINE_string("side", None, "Internal: what this process measures, and prints.")

NUM_CLASSES, TARGET = 10, 3


def module(name: str):
    """Return a classifier of torchvision with random weights, always the same."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch

    from tests.helpers.torchvision_shim import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name, num_classes=NUM_CLASSES).eval()


def images():
    """Return images [n, h, w, 3] in [0, 1], always the same."""
    import numpy as np

    return np.random.default_rng(0).random((BATCH.value, SIZE.value, SIZE.value, 3), np.float32)


def pytorch(name: str, layout: str) -> dict:
    """Return the figures of the PyTorch loop; `layout` is "default" or "channels_last"."""
    import pytorch_inversion
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory = {"default": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    model = module(name).requires_grad_(False).to(memory_format=memory)
    x = torch.from_numpy(images()).permute(0, 3, 1, 2).contiguous(memory_format=memory)
    figures = timed(lambda n: pytorch_inversion.invert(model, x, TARGET, num_steps=n))
    with torch.no_grad():
        return {**figures, "mean_logits": model(x).mean(0).tolist()}


def package(name: str, how: str) -> dict:
    """Return the figures of this package; `how` is "bridge" or "native"."""
    import jax
    import numpy as np

    from moth_jax import models
    from moth_jax.distance import class_distance
    from moth_jax.inversion import NeuralCleanse
    from moth_jax.models.weights import importing
    from moth_jax.parallel import devices

    devices.use_all_cores()
    shape = (SIZE.value, SIZE.value, 3)
    as_is = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    original = module(name)
    if how == "bridge":
        classifier, variables = models.from_torch(original, image_shape=shape, **as_is)
    else:
        spec = models.ModelSpec(name, NUM_CLASSES, shape, **as_is)
        classifier, outline = models.outline(spec)
        weights = {k: v.numpy() for k, v in original.state_dict().items()}
        variables = importing.import_weights(spec, outline, weights)

    def measure(num_steps: int) -> None:
        found = class_distance(
            classifier.predict,
            images(),
            TARGET,
            variables=variables,
            num_steps=num_steps,
            inversion=NeuralCleanse(),
        )
        jax.block_until_ready(found)

    figures = timed(measure)
    mean_logits = jax.jit(classifier.predict)(variables, images()).mean(0)
    return {**figures, "mean_logits": np.asarray(mean_logits).tolist()}


def timed(measure: Callable[[int], object]) -> dict:
    """Return the milliseconds of a step of `measure` (number of steps), the first call apart."""
    started = time.perf_counter()
    measure(1)
    first = time.perf_counter() - started
    measure(STEPS.value)
    wall, cpu = [], []
    for _ in range(REPEATS.value):
        before, before_cpu = time.perf_counter(), time.process_time()
        measure(STEPS.value)
        wall.append((time.perf_counter() - before) / STEPS.value * 1000)
        cpu.append((time.process_time() - before_cpu) / STEPS.value * 1000)
    return {
        "milliseconds": statistics.median(wall),
        "milliseconds_each": wall,
        "cpu_milliseconds": statistics.median(cpu),
        "first_call_seconds": first,
    }


def in_own_process(side: str) -> dict:
    """Return the figures of `side`, "MODEL:pytorch:LAYOUT" or "MODEL:package:HOW"."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
    environment = {**os.environ, **MALLOC}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return {"side": side, **json.loads(done.stdout.splitlines()[-1])}


def ratios(rows: list[dict]) -> dict[str, float]:
    """Return every row's time over that of the faster PyTorch; raise if the models differ."""
    for row in rows:
        pairs = zip(row["mean_logits"], rows[0]["mean_logits"], strict=True)
        if max(abs(a - b) for a, b in pairs) > 1e-3:
            raise ValueError(f"{row['side']} and {rows[0]['side']} do not run the same model")
    fastest = min(row["milliseconds"] for row in rows if ":pytorch:" in row["side"])
    return {row["side"]: row["milliseconds"] / fastest for row in rows}


def table(rows: list[dict], found: dict[str, float]) -> str:
    """Return the figures as text."""
    lines = [f"{'':34}{'ms a step':>10}{'ratio':>8}{'CPU ms':>9}{'first call s':>14}"]
    lines += [
        f"{row['side'].replace(':', ' '):34}{row['milliseconds']:10.1f}{found[row['side']]:8.2f}"
        f"{row['cpu_milliseconds']:9.0f}{row['first_call_seconds']:14.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def main(_) -> None:
    if SIDE.value:
        logging.set_verbosity(logging.ERROR)
        name, kind, variant = SIDE.value.split(":")
        print(json.dumps({"pytorch": pytorch, "package": package}[kind](name, variant)))
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Others use this machine (load {load:.1f}): these figures will not hold.")
    rows, found = [], {}
    for name in MODELS.value:
        sides = ["pytorch:default", "pytorch:channels_last", "package:bridge"]
        sides += ["package:native"] if name in NATIVE else []
        of_model = [in_own_process(f"{name}:{side}") for side in sides]
        found |= ratios(of_model)
        rows += of_model
    result = {
        **origin(),
        "device": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "load_at_start": load,
        "versions": {
            p: importlib.metadata.version(p) for p in ("torch", "torchvision", "jax", "jaxlib")
        },
        "size": SIZE.value,
        "batch": BATCH.value,
        "steps": STEPS.value,
        "ratios": found,
        "rows": rows,
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark_bridge.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows, found))


if __name__ == "__main__":
    app.run(main)
