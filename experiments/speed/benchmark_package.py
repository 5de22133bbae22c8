"""This package's jobs of `benchmark.py`."""

import time
from collections.abc import Iterable

from benchmark_timing import (
    NUM_CLASSES,
    NUM_IMAGES,
    Laps,
    budgets,
    clock,
    finite,
    first_directions,
    hardening,
    line,
    num_updates,
    outside,
    scaled,
)


def start_jax(devices: int = 0) -> None:
    from moth_jax.parallel.devices import use_all_cores, use_devices

    if devices:
        import jax

        if jax.config.jax_num_cpu_devices in (None, -1, 0):
            jax.config.update("jax_num_cpu_devices", devices)
        use_devices(devices)
    else:
        use_all_cores()


def load(checkpoint: str):
    from moth_jax.models.weights import importing

    return importing.load(checkpoint)


def dataset_of(data_dir: str):
    from moth_jax import data

    return data.load("cifar10", dir=data_dir)


def samples(data_dir: str, victims: Iterable[int] = range(NUM_CLASSES)):
    """Return the first 100 test images of the classes, and their labels."""
    import numpy as np

    test = dataset_of(data_dir).test
    used = np.concatenate([test.of_class(k, NUM_IMAGES) for k in sorted(set(victims))])
    return test.batch(used), test.labels[used]


def matrix(
    *,
    checkpoint: str,
    data_dir: str,
    inversion: str,
    timed: int,
    precision: str = "float32",
    repeats: int = 3,
    together: int = 0,
    num_directions: int = 0,
    devices: int = 0,
) -> dict:
    """Time the matrix; `together` and `num_directions` 0: a chunk of the package's own choice."""
    start_jax(devices)
    from moth_jax.distance import measure
    from moth_jax.distance.chunks import chunk_size
    from moth_jax.inversion import create

    classifier, variables = load(checkpoint)
    method = create(inversion, precision=precision)
    together = chunk_size(together or None, 90, 1)
    rows = first_directions(90 if timed == 0 else num_directions or together)
    images, labels = samples(data_dir, [victim for victim, _ in rows])

    def run(num_steps: int) -> None:
        nonlocal matrix
        matrix = measure.distance_matrix(
            classifier.predict,
            images,
            labels,
            variables=variables,
            directions=rows,
            num_images=NUM_IMAGES,
            num_steps=num_steps,
            inversion=method,
            directions_per_chunk=together,
            progress=False,
        )

    matrix = None
    figures = line(run, method.budget.num_steps, timed=timed, repeats=repeats)
    chunks = -(-90 // together) / -(-len(rows) // together)
    logits = classifier.predict(variables, images[:NUM_IMAGES]).mean(0).tolist()
    return {
        **scaled(figures, chunks if num_directions == 0 else 1),
        "directions": len(rows),
        "together": together,
        "gradients_per_direction": method.budget.num_steps * NUM_IMAGES,
        "mean_size": finite(matrix.average()),
        "mean_logits": logits,
    }


def harden(*, checkpoint: str, data_dir: str, timed: int) -> dict:
    start_jax()
    from moth_jax.hardening import moth

    classifier, variables = load(checkpoint)
    dataset = dataset_of(data_dir)

    def run(num_steps: int) -> dict:
        config = moth.MothConfig(
            max_accuracy_drop=1.0, max_steps=num_updates(num_steps), **budgets(num_steps)
        )
        laps = Laps()
        moth.harden(
            classifier,
            variables,
            dataset,
            config,
            on_round=lambda state, records: laps(records[0]["phase"]),
            progress=False,
        )
        return laps.parts

    if timed == 0:
        first = clock(lambda: run(1))["seconds"]  # compiles
        single, parts = run(1), {}
        figures = clock(lambda: parts.update(run(0)))
        for unit in ("seconds", "cpu_seconds"):
            figures[f"warm_up_{unit}"] = sum(lap[unit] for lap in parts["warm-up"])
        return {
            **figures,
            **outside(single),
            "first_call_seconds": first,
            "timed_steps": "all",
        }
    return hardening(run, timed)


def first_step(*, checkpoint: str, data_dir: str, started: float) -> dict:
    """Return the seconds from the start of the process (`started`) to the end of the first step."""
    start_jax()
    from moth_jax.distance import measure
    from moth_jax.distance.chunks import chunk_size
    from moth_jax.inversion import NeuralCleanse

    imported = time.time() - started
    classifier, variables = load(checkpoint)
    rows = first_directions(chunk_size(None, 90, 1))
    images, labels = samples(data_dir)
    loaded = time.time() - started

    def step() -> None:
        measure.distance_matrix(
            classifier.predict,
            images,
            labels,
            variables=variables,
            directions=rows,
            num_steps=1,
            inversion=NeuralCleanse(),
            progress=False,
        )

    first = clock(step)
    return {
        "seconds": time.time() - started,
        "imported_seconds": imported,
        "loaded_seconds": loaded,
        "first_call_seconds": first["seconds"],
        "first_call_cpu_seconds": first["cpu_seconds"],
        "cpu_seconds": time.process_time(),
    }


def machine() -> dict:
    """Say what JAX and PyTorch compute on."""
    start_jax()
    import jax
    import torch

    return {
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "kind": jax.devices()[0].device_kind,
        "pytorch": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
