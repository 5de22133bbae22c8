"""The methods of inversion side by side on a model's directions: size, success, gradients, time.

    python experiments/studies/inversions.py --checkpoint=FILE --name=keras_resnet20 --data_dir=DIR
    python experiments/studies/inversions.py --data=digits --checkpoint=DIR/original --name=digits

Each method measures the same directions on the same test images of each victim, at most 100, and
its triggers are tried on the class's validation images as well, which are a tenth of its
training images: no inversion saw them, but the network of a given CIFAR-10 model did.
`--published_seeds=0,1,2` measures the published schedule three times and takes the smallest, as the
paper does; with one seed it is what a third of those gradients give. `--published=FILE.npy` sets
the authors' own distances of that model beside them. Goes on where it was interrupted. On two CPU
cores a direction of CIFAR-10 takes about 12 seconds by the trimmed method, and two minutes for each
seed by the published one.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from published import against, published_matrix
from scipy.stats import spearmanr

from moth_jax import data
from moth_jax.distance import distance_matrix
from moth_jax.inversion import create
from moth_jax.models import Classifier, checkpoint
from moth_jax.models.weights import importing
from moth_jax.parallel import devices
from moth_jax.run.origin import origin, processor
from moth_jax.storage.files import write_json
from moth_jax.triggers import stamp, success_rate
from moth_jax.types import Variables

FOUR_CLASSES = {"cifar10": ("bird", "cat", "ship", "deer"), "digits": ("0", "1", "2", "3")}
REFERENCE = "neural_cleanse"
METHODS = {  # name and options
    "trimmed": ("trimmed", {}),
    "trimmed_bfloat16": ("trimmed", {"precision": "bfloat16"}),
    REFERENCE: ("neural_cleanse", {}),
    "pixel": ("pixel", {}),
}

DATA = flags.DEFINE_enum("data", "cifar10", ["cifar10", "digits"], "What the model is for.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Weights of a model, or a folder of one of this package.", required=True
)
NAME = flags.DEFINE_string("name", None, "What the results are called.", required=True)
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS data sets.")
VICTIMS = flags.DEFINE_list("victims", [], "Classes to measure from; four of the data if none.")
MOST = flags.DEFINE_integer("directions", 30, "The first so many of their directions.")
CHOSEN = flags.DEFINE_list("methods", ["trimmed", REFERENCE], f"Of {', '.join(METHODS)}.")
TRIMMED_SEEDS = flags.DEFINE_list("trimmed_seeds", ["0"], "Seeds of the trimmed method.")
PUBLISHED_SEEDS = flags.DEFINE_list("published_seeds", ["0"], "Seeds of the published schedule.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 100, "Images of each class.")
PUBLISHED = flags.DEFINE_string("published", None, "The authors' distances, a .npy file [10, 9].")
OUT = flags.DEFINE_string("out", "experiments/results/inversions", "Where the result goes.")


def loaded(path: Path) -> tuple[Classifier, Variables]:
    """Return the model in a file of weights, or in a folder of this package."""
    if path.is_dir():
        saved = checkpoint.load_model(path)
        return saved.classifier, saved.variables
    return importing.load(path)


def held_out_rates(predict, variables, matrix, directions, images, labels) -> list[float]:
    """Return the success rate of each direction's trigger on images that it never saw."""

    @jax.jit
    def rate(images, trigger, target):
        weights = np.ones(len(images), np.float32)
        return success_rate(predict(variables, stamp(images, trigger)), target, weights)

    found = [(a, b) for a, b in directions if np.isfinite(matrix.values[a, b])]
    return [float(rate(images[labels == a], matrix.trigger(a, b), b)) for a, b in found]


def measure(method: str, seeds: list[int], model, used, held_out, directions, folder) -> dict:
    """Return what a method gives, and what it takes."""
    classifier, variables = model
    name, options = METHODS[method]
    inversion = create(name, **options)
    started = time.process_time()
    matrix = distance_matrix(
        classifier.predict,
        *used,
        variables=variables,
        directions=directions,
        num_images=NUM_IMAGES.value,
        seeds=seeds,
        inversion=inversion,
        resume_dir=folder,
        label=method,
    )
    sizes = np.array([matrix.values[d] for d in directions])
    held = held_out_rates(classifier.predict, variables, matrix, directions, *held_out)
    found = np.isfinite(sizes)
    passes = inversion.budget.num_steps * len(seeds)
    return {
        "seeds": seeds,
        "mean": float(sizes[found].mean()),
        "not_found": int((~found).sum()),
        "success_rate": float(np.mean([matrix.success_rate[d] for d in directions])),
        "least_success_rate": float(np.min([matrix.success_rate[d] for d in directions])),
        "held_out_success_rate": float(np.mean(held)),
        # At most, where directions leave.
        "image_gradients_per_direction": passes * NUM_IMAGES.value,
        "updates_per_direction": passes * -(-NUM_IMAGES.value // inversion.budget.minibatch_size),
        "seconds": matrix.details["seconds"],
        "cpu_seconds_of_this_run": time.process_time() - started,
        "sizes": sizes.tolist(),
        "sizes_per_seed": np.array([matrix.values_per_seed[:, a, b] for a, b in directions]).T,
        "inversion": inversion.name,
    }


def of_reference(method: str) -> bool:
    """Return whether a method is the published schedule, in one way or another."""
    return METHODS[method][0] == REFERENCE


def compared(sizes: list[float], reference: list[float]) -> dict:
    """Return how sizes stand to others, over the directions that both found a trigger for."""
    both = np.array([sizes, reference])
    ours, theirs = both[:, np.isfinite(both).all(0)]
    return {
        "directions": len(ours),
        "ratio_of_means": float(np.mean(ours) / np.mean(theirs)),
        "spearman": float(spearmanr(ours, theirs).statistic),
    }


def as_matrix(sizes: list[float], directions: list[tuple[int, int]]) -> np.ndarray:
    """Return sizes as a matrix [10, 10], NaN where they were not measured."""
    matrix = np.full((10, 10), np.nan)
    for direction, size in zip(directions, sizes, strict=True):
        matrix[direction] = size
    return matrix


def main(_) -> None:
    devices.use_all_cores()
    model = loaded(Path(CHECKPOINT.value))
    options = {"dir": DATA_DIR.value} if DATA.value == "cifar10" else {}
    dataset = data.load(DATA.value, **options)
    names = dataset.class_names
    rows = [names.index(name) for name in VICTIMS.value or FOUR_CLASSES[DATA.value]]
    directions = [(a, b) for a in rows for b in range(10) if a != b][: MOST.value]
    used, held_out = (
        (split.batch(np.arange(len(split))), split.labels)
        for split in (dataset.test, dataset.validation)
    )
    out = Path(OUT.value)
    figures = {
        method: measure(
            method,
            [int(n) for n in (PUBLISHED_SEEDS if of_reference(method) else TRIMMED_SEEDS).value],
            model,
            used,
            held_out,
            directions,
            out / "chunks",
        )
        for method in CHOSEN.value
    }
    result = {
        **origin(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {processor()}",
        "model": NAME.value,
        "directions": [f"{names[a]} -> {names[b]}" for a, b in directions],
        "methods": figures,
    }
    if REFERENCE in figures:
        result["against_the_published_schedule"] = {
            method: compared(figure["sizes"], figures[REFERENCE]["sizes"])
            for method, figure in figures.items()
            if method != REFERENCE
        }
    if PUBLISHED.value:
        published = published_matrix(PUBLISHED.value)
        result["against_the_published_distances"] = {
            method: against(published, as_matrix(figure["sizes"], directions))
            for method, figure in figures.items()
        }
    write_json(out / f"{NAME.value}.json", jax.tree.map(_plain, result))
    print(json.dumps({k: v for k, v in result.items() if k != "methods"}, indent=2))
    for method, figure in figures.items():
        print(method, {k: v for k, v in figure.items() if not k.startswith("sizes")})


def _plain(leaf):
    return leaf.tolist() if isinstance(leaf, np.ndarray) else leaf


if __name__ == "__main__":
    app.run(main)
