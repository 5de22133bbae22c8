"""The searches of a class distance side by side, on models that none of them was made on.

    python experiments/studies/standard.py --shared=DIR --runs=DIR --beds=adversarial

`--shared` holds the checkpoints and images that `BEDS` names, and `--runs` a folder for each model
that is made here first:

    python -m moth_jax.main --config=configs/digits.py --workdir=RUNS/digits_cnn
    # and so for hardened_akamaster and hardened_adversarial, from their checkpoints:
    python -m moth_jax.main --config=configs/cifar10_cpu.py --workdir=RUNS/hardened_natural \\
        --config.model.checkpoint=DIR/checkpoints/moth_cifar10_resnet20_nat.h5 \\
        --config.data.dir=DIR/data/tfds

Each method measures the same directions on the same first images of each victim, at most 100; its
triggers are tried on images that it did not see as well. What a direction gave is written down as
soon as it is there, and a direction that is written down is not measured again: the results in the
repository are those of several sittings.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from moth_jax import data
from moth_jax.data import ImageDataset
from moth_jax.distance import distance_matrix
from moth_jax.inversion import standard
from moth_jax.models import Classifier, checkpoint
from moth_jax.models.weights import importing
from moth_jax.parallel import devices
from moth_jax.run.origin import commit, processor
from moth_jax.storage.files import read_json, write_json
from moth_jax.triggers import stamp, success_rate
from moth_jax.types import Variables

NUM_IMAGES = 100

SHARED = flags.DEFINE_string("shared", None, "Folder of checkpoints/ and data/.", required=True)
RUNS = flags.DEFINE_string("runs", None, "Folder of the runs that make models.")
BEDS_ = flags.DEFINE_list("beds", [], "Which of BEDS; all if none.")
METHODS_ = flags.DEFINE_list("methods", [], "Which of METHODS; all if none.")
MOST = flags.DEFINE_integer("directions", 90, "The first so many directions of each.")
OUT = flags.DEFINE_string("out", "experiments/results/standard", "Where the results are.")


class Method(NamedTuple):
    """A search: its name in `inversion.INVERSIONS`, and one seed for each time it is done."""

    inversion: str
    seeds: tuple[int, ...]


METHODS = {
    "published": Method("neural_cleanse", (0, 1, 2)),
    "trimmed": Method("trimmed", (0, 1, 2)),
    "pixel": Method("pixel", (0,)),
    "standard": Method("standard", (0,)),
}


class Bed(NamedTuple):
    """A model and images to measure it on.

    Attributes:
      model: the folder or file of the model.
      images: "test", or "train": the images that the authors themselves may have measured on.
      first: (victim, target), the directions that come first; the others follow as by chance.
    """

    model: str
    data: str = "cifar10"
    images: str = "test"
    first: tuple[tuple[int, int], ...] = ()


# airplane 0, automobile 1, bird 2, cat 3, deer 4, dog 5, frog 6, horse 7, ship 8, truck 9
_EIGHTEEN = (
    *((0, 2), (0, 4), (0, 6), (1, 6), (2, 3), (2, 6), (4, 2), (4, 7), (5, 2), (5, 3), (5, 8)),
    *((5, 9), (6, 2), (6, 9), (7, 1), (7, 3), (8, 4), (9, 3)),
)
BEDS = {
    "adversarial": Bed("checkpoints/moth_cifar10_resnet20_adv.h5", first=_EIGHTEEN),
    "natural": Bed("checkpoints/moth_cifar10_resnet20_nat.h5", first=_EIGHTEEN),
    "akamaster": Bed("checkpoints/akamaster_resnet20-12fca82f.th"),
    "adversarial_train": Bed(
        "checkpoints/moth_cifar10_resnet20_adv.h5", images="train", first=_EIGHTEEN
    ),
    "natural_train": Bed(
        "checkpoints/moth_cifar10_resnet20_nat.h5", images="train", first=_EIGHTEEN
    ),
    "hardened_natural": Bed("runs/hardened_natural/hardened"),
    "hardened_akamaster": Bed("runs/hardened_akamaster/hardened"),
    "hardened_adversarial": Bed("runs/hardened_adversarial/hardened"),
    "poisoned": Bed("checkpoints/wrn16_1_cifar10_badnets_nad.pth.tar"),
    "repaired": Bed("checkpoints/wrn16_1_cifar10_repaired_nad.pth.tar"),
    "digits_cnn": Bed("runs/digits_cnn/original", data="digits"),
}


def directions_of(bed: Bed) -> list[tuple[int, int]]:
    """Return all directions of ten classes: the bed's first ones, and the others as by chance."""
    others = [(a, b) for a in range(10) for b in range(10) if a != b and (a, b) not in bed.first]
    order = np.random.default_rng(0).permutation(len(others))
    return [*bed.first, *(others[i] for i in order)]


def model_of(bed: Bed) -> tuple[Classifier, Variables]:
    """Return the model of a bed."""
    root, _, rest = bed.model.partition("/")
    if root == "runs":
        saved = checkpoint.load_model(Path(RUNS.value) / rest)
        return saved.classifier, saved.variables
    return importing.load(Path(SHARED.value) / bed.model)


_MEASURED = {("cifar10", "test"): 1017}  # earlier results stand on these, a tenth of all
_MOST_HELD_OUT = 900


class Images(NamedTuple):
    """Of one victim class, each [n, h, w, c]: those to measure on, and those that are held out."""

    used: np.ndarray
    held_out: np.ndarray


def images_of(bed: Bed, victim: int) -> Images:
    """Return a victim's images: the first of a split, and up to 1,000 others."""
    dataset = dataset_of(bed)
    split = getattr(dataset, bed.images)
    indices = split.of_class(victim)
    used = indices[indices < _MEASURED.get((bed.data, bed.images), len(split))][:NUM_IMAGES]
    if bed.data == "digits":
        held_out = dataset.validation.batch(dataset.validation.of_class(victim))
    else:
        held_out = split.batch(np.setdiff1d(indices, used)[:_MOST_HELD_OUT])
    return Images(split.batch(used), held_out)


@functools.cache
def dataset_of(bed: Bed) -> ImageDataset:
    """Return the images of a bed."""
    if bed.data == "digits":
        return data.load("digits")
    return data.load(
        "cifar10", dir=str(Path(SHARED.value) / "data/tfds_full"), validation_fraction=5e-4
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """What a method gave in one direction; the fields of a result."""

    sizes: list[float]  # of each seed; or of each search of an ensemble
    success_rate: float
    held_out_success_rate: float | None
    seconds: float
    image_gradients: int
    commit: str


def measure(method: Method, model, images: Images, direction: tuple[int, int]) -> Found:
    """Return what a method gives in one direction."""
    classifier, variables = model
    victim, target = direction
    started = time.perf_counter()
    matrix = distance_matrix(
        classifier.predict,
        images.used,
        np.full(len(images.used), victim),
        variables=variables,
        directions=[direction],
        num_images=NUM_IMAGES,
        seeds=method.seeds,
        inversion=method.inversion,
        check_order=False,
        progress=False,
    )
    trigger = matrix.trigger(*direction)
    each = matrix.values_per_seed if matrix.values_per_search is None else matrix.values_per_search
    passes = matrix.details.get("num_steps", standard.PASSES) * len(method.seeds)
    return Found(
        sizes=[float(size) for size in each[:, victim, target]],
        success_rate=float(matrix.success_rate[direction]),
        held_out_success_rate=trigger
        and float(_rate(classifier.predict, variables, images.held_out, trigger, target)),
        seconds=time.perf_counter() - started,
        image_gradients=int(passes * len(images.used)),
        commit=commit(),
    )


@functools.partial(jax.jit, static_argnums=0)
def _rate(predict: Callable, variables, images, trigger, target):
    logits = predict(variables, stamp(images, trigger))
    return success_rate(logits, target, np.ones(len(images), np.float32))


def main(_) -> None:
    devices.use_all_cores()
    for name in BEDS_.value or BEDS:
        bed, path = BEDS[name], Path(OUT.value) / f"{name}.json"
        model, names = model_of(bed), dataset_of(bed).class_names
        for victim, target in directions_of(bed)[: MOST.value]:
            for chosen in METHODS_.value or METHODS:
                result = read_json(path)
                device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {processor()}"
                result |= {"model": bed.model, "images": f"{bed.data}, {bed.images}"}
                done = result.setdefault("methods", {}).setdefault(chosen, {})
                direction = f"{names[victim]} -> {names[target]}"
                if direction in done:
                    continue
                found = measure(METHODS[chosen], model, images_of(bed, victim), (victim, target))
                done[direction] = {**dataclasses.asdict(found), "device": device}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, result)
                print(name, chosen, direction, found.sizes, f"{found.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
