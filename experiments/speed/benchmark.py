"""Speed of measuring and hardening on this machine, and of a plain PyTorch loop beside it.

    python experiments/speed/benchmark.py --checkpoint=FILE.h5 --data_dir=DIR
    python experiments/speed/benchmark.py --checkpoint=FILE.h5 --data_dir=DIR --budget=full

The authors' CIFAR-10 ResNet20 (their Keras file), the same samples on both sides, every measurement
in a process of its own, one at a time; on whatever accelerator JAX and PyTorch find, else on the
CPU. It prints the time of the matrix (90 directions) and of a hardening (2 epochs of 50,000 images)
by this package and by PyTorch (eager, one direction after another, as published) with their ratios,
the time to the first step, peak memory, and how time grows with directions, classes and devices.

`quick` (the default; a quarter of an hour on two CPU cores) times some steps and scales them up to
the published numbers; the table says from how many. `accelerator` does this package's jobs whole,
which takes it minutes on a GPU, and scales PyTorch's up. `full` does all jobs whole. `smoke` shows
that everything runs, and measures nothing. Times are only as good as the machine is idle: a loaded
one is refused, unless --anyway. CPU seconds stand beside wall-clock seconds and suffer less from
load.

The work is the same to a few per cent, and the rest is at this package's expense: its four
minibatches are of 25 images where the published ones are of 32, 32, 32 and 4, and every 20 steps it
measures the kept trigger once more (a forward pass of all samples), which the published loop never
does.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags
from benchmark_timing import MALLOC, check_load, with_ratios

from moth_jax.run.origin import origin

# No JAX and no PyTorch here: this process must leave cores and memory to the one it measures.

PARTS = ("matrix", "harden", "first_step", "directions", "classes", "devices")
FOLDER = Path(__file__).parent
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
# By itself XLA leaves convolutions out of CUDA graphs, because not every one can be captured.
IN_GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION"


class Budget(NamedTuple):
    """What is timed; steps of 0 are whole jobs.

    `steps` and `harden_steps` are PyTorch's, those that begin with `own` this package's.
    """

    steps: int
    harden_steps: int
    own_steps: int
    own_trimmed_steps: int
    own_harden_steps: int
    repeats: int
    pytorch_directions: int
    scaling_steps: int
    directions: tuple[int, ...]
    classes: tuple[int, ...]
    rounds: int


BUDGETS = {
    "smoke": Budget(2, 2, 2, 2, 2, 1, 1, 2, (1, 2), (10,), 1),
    "quick": Budget(60, 20, 60, 30, 20, 3, 2, 10, (1, 2, 4, 8), (10, 43, 200, 1000), 12),
    "accelerator": Budget(40, 10, 0, 0, 0, 2, 1, 20, (1, 4, 16, 90), (10, 43, 200, 1000), 20),
    "full": Budget(0, 0, 0, 0, 0, 1, 90, 40, (1, 2, 4, 8, 16), (10, 43, 200, 1000), 20),
}

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The authors' Keras .h5 file.")
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS data sets.")
BUDGET = flags.DEFINE_enum("budget", "quick", list(BUDGETS), "How much is measured.")
CHOSEN = flags.DEFINE_list("parts", list(PARTS), f"Which parts of it: {', '.join(PARTS)}.")
ANYWAY = flags.DEFINE_bool("anyway", False, "Measure although others use the machine.")
OUT = flags.DEFINE_string("out", "experiments/results/benchmark", "Folder of the result.")


def side(name: str, job: str, *, environment: dict | None = None, **options) -> dict:
    """Return the figures of a process of its own."""
    where = {"checkpoint": CHECKPOINT.value, "data_dir": DATA_DIR.value} if job != "machine" else {}
    script = str(FOLDER / "benchmark_side.py")
    command = [sys.executable, script, name, job, json.dumps({**where, **options})]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **MALLOC, **(environment or {})},
    )
    return json.loads(done.stdout.splitlines()[-1])


def matrices(budget: Budget) -> dict:
    """Return the time of the matrix by each way."""
    pytorch = {
        "timed": budget.steps,
        "repeats": budget.repeats,
        "num_directions": budget.pytorch_directions,
    }
    rows = {
        "PyTorch": side("torch", "matrix", layout="default", **pytorch),
        "PyTorch, channels last": side("torch", "matrix", layout="channels_last", **pytorch),
    }
    for name, inversion, timed, precision in (
        ("this package", "neural_cleanse", budget.own_steps, "float32"),
        ("this package, trimmed inversion", "trimmed", budget.own_trimmed_steps, "float32"),
        ("the same, bfloat16", "trimmed", budget.own_trimmed_steps, "bfloat16"),
    ):
        rows[name] = side(
            "package",
            "matrix",
            inversion=inversion,
            precision=precision,
            timed=timed,
            repeats=budget.repeats,
        )
    check_same_model(rows)
    return with_ratios(rows)


def check_same_model(rows: dict) -> None:
    expected = next(iter(rows.values()))["mean_logits"]
    for name, row in rows.items():
        pairs = zip(row.pop("mean_logits"), list(expected), strict=True)
        if max(abs(a - b) for a, b in pairs) > 2e-2 * max(map(abs, expected)):
            raise ValueError(f"{name} does not run the same model")


def hardenings(budget: Budget, machine: dict) -> dict:
    """Return the time of a hardening by each way."""
    rows = {
        f"PyTorch{name}": side("torch", "harden", layout=layout, timed=budget.harden_steps)
        for name, layout in (("", "default"), (", channels last", "channels_last"))
    }
    ways = {"this package": {}}
    if machine["backend"] == "gpu":
        ways["this package, in CUDA graphs"] = {"XLA_FLAGS": f"{XLA_FLAGS} {IN_GRAPHS}".strip()}
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as cache:  # the second hardening need not compile
            environment = {"JAX_COMPILATION_CACHE_DIR": cache, **way}
            rows[name] = side(
                "package", "harden", timed=budget.own_harden_steps, environment=environment
            )
    return with_ratios(rows)


def first_steps() -> dict:
    """Return the seconds from the start of a process to the end of its first step."""
    rows = {"PyTorch": side("torch", "first_step", layout="default", started=time.time())}
    with tempfile.TemporaryDirectory() as cache:
        environment = {"JAX_COMPILATION_CACHE_DIR": cache}
        for name in ("this package, cold cache", "this package, warm cache"):
            rows[name] = side("package", "first_step", started=time.time(), environment=environment)
    return rows


def over_directions(budget: Budget) -> dict:
    """Return the seconds of one published direction, by how many run together."""
    rows = {}
    for count in budget.directions:
        figures = scaling_run(budget, together=count, num_directions=count)
        rows[count] = {**figures, **per_direction(figures, count)}
    return rows


def over_devices(budget: Budget, machine: dict, accelerator: bool) -> dict:
    """Return the same by the number of devices; on a CPU these are threads."""
    most = machine["devices"] if accelerator else max(machine["devices"], 2)
    counts = [n for n in (1, 2, 4, 8, 16) if n <= most]
    together = 8 * counts[-1] if accelerator else 2 * counts[-1]
    rows = {}
    for count in counts:
        figures = scaling_run(budget, together=together, num_directions=together, devices=count)
        rows[count] = {**figures, **per_direction(figures, together)}
    return rows


def scaling_run(budget: Budget, **options) -> dict:
    figures = side(
        "package",
        "matrix",
        inversion="neural_cleanse",
        timed=budget.scaling_steps,
        repeats=1,
        **options,
    )
    figures.pop("mean_logits")
    return figures


def per_direction(figures: dict, count: int) -> dict:
    return {name: figures[name] / count for name in ("seconds", "cpu_seconds")}


def over_classes(budget: Budget) -> dict:
    """Return what `benchmark_classes.py` measures: a hardening step by the number of classes."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(FOLDER / "benchmark_classes.py"), f"--out={out}"]
        command += [f"--classes={','.join(map(str, budget.classes))}", f"--rounds={budget.rounds}"]
        paths = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(next(Path(out).glob("*.json")).read_text())["results"]


def measures(budget: Budget, machine: dict) -> dict:
    """Return what measures each part."""
    accelerator = machine["backend"] != "cpu"
    return {
        "matrix": lambda: matrices(budget),
        "harden": lambda: hardenings(budget, machine),
        "first_step": first_steps,
        "directions": lambda: over_directions(budget),
        "classes": lambda: over_classes(budget),
        "devices": lambda: over_devices(budget, machine, accelerator),
    }


def provenance(load: float) -> dict:
    packages = ("torch", "jax", "jaxlib", "flax")
    return {
        **origin(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": load,
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def main(_) -> None:
    from benchmark_report import draw, text

    unknown = set(CHOSEN.value) - set(PARTS)
    if unknown:
        sys.exit(f"there is no part {min(unknown)!r}; the parts are {', '.join(PARTS)}")
    if CHECKPOINT.value is None and set(CHOSEN.value) != {"classes"}:
        sys.exit("--checkpoint=FILE.h5 is needed: the authors' moth_cifar10_resnet20_nat.h5")
    load = os.getloadavg()[0]
    check_load(load, len(os.sched_getaffinity(0)), ANYWAY.value)
    machine = side("package", "machine")
    result = {**provenance(load), "budget": BUDGET.value, "machine": machine}
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{machine['backend']}_{BUDGET.value}.json"
    for part, call in measures(BUDGETS[BUDGET.value], machine).items():
        if part in CHOSEN.value:
            result[part] = call()
            print(text(part, result[part]), end="\n\n", flush=True)
            # After every part, for a later one may be stopped.
            path.write_text(json.dumps(result, indent=2) + "\n")
            draw(result, path.with_suffix(".png"))
    print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    app.run(main)
