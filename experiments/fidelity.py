"""Fidelity: the published class distances of the authors' ResNet20, measured again.

    python experiments/fidelity.py --checkpoint=FILE.h5 --published=FILE.npy --data_dir=DIR

Measures directions of the authors' naturally trained CIFAR-10 ResNet20 with the published schedule
(1,000 steps, 100 test images a class) and sets them against the published matrix. Goes on where it
was interrupted: finished chunks of directions are kept with the results. On two idle CPU cores a
direction takes about two minutes for each seed.
"""

import json
import platform
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from machine import command, commit

from moth_jax import data, distance, sharding
from moth_jax.inversion import neural_cleanse
from moth_jax.models import importing

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The authors' Keras .h5 file.", required=True)
PUBLISHED = flags.DEFINE_string("published", None, "Their distances, a .npy file [10, 9].")
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS data sets.")
ONE_SEED = flags.DEFINE_list("one_seed", ["bird", "cat", "ship"], "Victims measured with seed 0.")
THREE_SEEDS = flags.DEFINE_list("three_seeds", ["bird"], "Victims measured with seeds 0, 1, 2.")
MAX_DIRECTIONS = flags.DEFINE_integer("max_directions", 90, "Measure only the first so many.")
STEPS = flags.DEFINE_integer("steps", 1000, "Steps of an inversion.")
OUT = flags.DEFINE_string("out", "experiments/results/fidelity", "Where the result goes.")


def published_matrix(path: str) -> np.ndarray:
    """Return the published distances [10, 10], NaN on the diagonal, from their [10, 9]."""
    rows = np.load(path, allow_pickle=False)
    matrix = np.full((10, 10), np.nan)
    matrix[~np.eye(10, dtype=bool)] = rows.reshape(-1)
    return matrix


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two vectors without ties."""
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def against(published: np.ndarray, values: np.ndarray) -> dict:
    """Return how `values` [10, 10] stand to the published ones where both are known."""
    both = np.isfinite(values) & np.isfinite(published)
    ours, theirs = values[both], published[both]
    return {
        "directions": int(both.sum()),
        "not_found": int(np.isinf(values).sum()),
        "mean": float(ours.mean()),
        "published_mean_same_directions": float(theirs.mean()),
        "ratio_of_means": float(ours.mean() / theirs.mean()),
        "mean_scaled_to_all_directions": float(ours.mean() / theirs.mean() * np.nanmean(published)),
        "spearman": spearman(ours, theirs),
        "pearson": float(np.corrcoef(ours, theirs)[0, 1]),
    }


def main(_) -> None:
    sharding.use_all_cores()
    classifier, variables = importing.load(CHECKPOINT.value)
    dataset = data.load("cifar10", dir=DATA_DIR.value)
    images = dataset.test.batch(np.arange(len(dataset.test)))
    names = dataset.class_names
    measured = []
    # The single-seed rows serve as the first seed of the three, so they are measured once.
    for seeds, victims in [((0,), ONE_SEED.value), ((1, 2), THREE_SEEDS.value)]:
        rows = [names.index(name) for name in victims]
        directions = [(a, b) for a in rows for b in range(10) if a != b][: MAX_DIRECTIONS.value]
        if not directions:
            continue
        measured.append(
            distance.distance_matrix(
                classifier.predict,
                images,
                dataset.test.labels,
                variables=variables,
                class_names=names,
                directions=directions,
                num_steps=STEPS.value,
                seeds=seeds,
                inversion=neural_cleanse(),
                resume_dir=Path(OUT.value) / "chunks",
            )
        )
    three = np.concatenate([m.values_per_seed for m in measured])
    in_all = ~np.isnan(three).any(0)
    smallest = np.where(in_all, three.min(0), np.nan)
    result = {
        "command": command(),
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "one_seed_victims": ONE_SEED.value,
        "three_seed_victims": THREE_SEEDS.value,
        "details": [m.details for m in measured],
        "least_success_rate": float(np.nanmin([np.nanmin(m.success_rate) for m in measured])),
    }
    if PUBLISHED.value:
        published = published_matrix(PUBLISHED.value)
        result["single_seed"] = against(published, measured[0].values)
        result["smallest_of_three"] = against(published, smallest)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "fidelity.json").write_text(json.dumps(result, indent=2) + "\n")
    np.savez_compressed(
        out / "distances.npz",
        per_seed=three,
        smallest_of_three=smallest,
        success_rate=np.stack([m.success_rate for m in measured]),
        class_names=np.asarray(names),
    )
    print(json.dumps({k: v for k, v in result.items() if k != "details"}, indent=2))


if __name__ == "__main__":
    app.run(main)
