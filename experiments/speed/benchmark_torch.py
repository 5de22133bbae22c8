"""PyTorch's jobs of `benchmark.py`: the same, on the same samples, eager."""

import os
import statistics
import time

from benchmark_package import dataset_of, samples
from benchmark_timing import (
    NUM_IMAGES,
    STEPS,
    Laps,
    budgets,
    clock,
    finite,
    first_directions,
    hardening,
    line,
    num_updates,
    scaled,
)


def load(checkpoint: str, layout: str):
    import pytorch_inversion
    import torch

    from moth_jax.models.weights import importing

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = True  # it may choose its fastest algorithms
    weights = importing.read_weights(checkpoint)
    model = pytorch_inversion.load_keras(weights, *importing.identify(weights)[1:])
    memory = {"default": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).to(memory_format=memory)

    def tensor(images):
        there = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        return there.contiguous(memory_format=memory)

    return model, tensor


def matrix(
    *,
    checkpoint: str,
    data_dir: str,
    layout: str,
    timed: int,
    repeats: int = 3,
    num_directions: int = 2,
) -> dict:
    import pytorch_inversion

    model, tensor = load(checkpoint, layout)
    rows = first_directions(90 if timed == 0 else num_directions)
    images, labels = samples(data_dir, [victim for victim, _ in rows])
    victims = {k: tensor(images[labels == k]) for k, _ in rows}

    def run(num_steps: int) -> None:
        nonlocal found
        found = [
            pytorch_inversion.invert(model, victims[victim], target, num_steps=num_steps)
            for victim, target in rows
        ]

    found = None
    figures = line(run, STEPS, timed=timed, repeats=repeats)
    sizes = [result.size for result in found if finite(result.size) is not None]
    return {
        **scaled(figures, 90 / len(rows)),
        "directions": len(rows),
        "gradients_per_direction": STEPS * NUM_IMAGES,
        "mean_size": statistics.mean(sizes) if sizes else None,
        "mean_logits": model(tensor(images[:NUM_IMAGES])).mean(0).tolist(),
    }


def harden(*, checkpoint: str, data_dir: str, layout: str, timed: int) -> dict:
    import numpy as np
    import pytorch_hardening
    import torch

    train = dataset_of(data_dir).train
    labels = torch.from_numpy(train.labels).long()

    def run(num_steps: int) -> dict:
        model, tensor = load(checkpoint, layout)
        images = tensor(train.batch(np.arange(len(train))))
        options = pytorch_hardening.Options(num_steps=num_updates(num_steps), **budgets(num_steps))
        laps = Laps()
        pytorch_hardening.harden(
            model,
            images,
            labels.to(images.device),
            options,
            on_round=lambda phase, sizes: laps(phase),
        )
        return laps.parts

    if timed == 0:
        return {**clock(lambda: run(0)), "timed_steps": "all"}
    return hardening(run, timed)


def first_step(*, checkpoint: str, data_dir: str, layout: str, started: float) -> dict:
    import pytorch_inversion

    imported = time.time() - started
    model, tensor = load(checkpoint, layout)
    images = tensor(samples(data_dir)[0][:NUM_IMAGES])
    loaded = time.time() - started
    first = clock(lambda: pytorch_inversion.invert(model, images, 1, num_steps=1))
    return {
        "seconds": time.time() - started,
        "imported_seconds": imported,
        "loaded_seconds": loaded,
        "first_call_seconds": first["seconds"],
        "first_call_cpu_seconds": first["cpu_seconds"],
        "cpu_seconds": time.process_time(),
    }
