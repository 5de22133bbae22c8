"""Fidelity: the published class distances of the authors' ResNet20, measured again.

    python experiments/studies/fidelity.py --checkpoint=FILE.h5 --published=FILE.npy --data_dir=DIR

Measures directions of the authors' naturally trained CIFAR-10 ResNet20 with the published schedule
(1,000 steps, 100 test images a class) and sets them against the published matrix. Goes on where it
was interrupted: finished chunks of directions are kept with the results. On two idle CPU cores a
direction takes about two minutes for each seed.
"""

import json
import platform
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from published import against, published_matrix

from moth_jax import data
from moth_jax.distance import measure
from moth_jax.inversion import NeuralCleanse
from moth_jax.models.weights import importing
from moth_jax.parallel import devices
from moth_jax.run.origin import origin

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The authors' Keras .h5 file.", required=True)
PUBLISHED = flags.DEFINE_string("published", None, "Their distances, a .npy file [10, 9].")
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS data sets.")
ONE_SEED = flags.DEFINE_list("one_seed", ["bird", "cat", "ship"], "Victims measured with seed 0.")
THREE_SEEDS = flags.DEFINE_list("three_seeds", ["bird"], "Victims measured with seeds 0, 1, 2.")
MAX_DIRECTIONS = flags.DEFINE_integer("max_directions", 90, "Measure only the first so many.")
STEPS = flags.DEFINE_integer("steps", 1000, "Steps of an inversion.")
OUT = flags.DEFINE_string("out", "experiments/results/fidelity", "Where the result goes.")


def main(_) -> None:
    devices.use_all_cores()
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
            measure.distance_matrix(
                classifier.predict,
                images,
                dataset.test.labels,
                variables=variables,
                class_names=names,
                directions=directions,
                num_steps=STEPS.value,
                seeds=seeds,
                inversion=NeuralCleanse(),
                resume_dir=Path(OUT.value) / "chunks",
            )
        )
    three = np.concatenate([m.values_per_seed for m in measured])
    in_all = ~np.isnan(three).any(0)
    smallest = np.where(in_all, three.min(0), np.nan)
    result = {
        **origin(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}, {platform.machine()}",
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
