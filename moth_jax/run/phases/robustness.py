"""The robustness of a run's models: test accuracy under PGD (Section V-A)."""

from pathlib import Path

import ml_collections
import numpy as np

from moth_jax.data import ImageDataset, ImageSplit
from moth_jax.evaluation import pgd_accuracy
from moth_jax.models import checkpoint
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.progress import Progress
from moth_jax.storage.files import read_json, write_json

_FOLDERS = {"before": "original", "after": "hardened"}
_SEED = 0  # not the run's: runs are compared on the same images and random starts


def measure_robustness(
    config: ml_collections.ConfigDict, dataset: ImageDataset, workdir: Path, progress: Progress
) -> None:
    """Attack each model there is that was not attacked so before; write robustness.json."""
    if config.robustness.epsilon == 0:
        return
    asked = _attack(config, dataset)
    path = workdir / "robustness.json"
    done = read_json(path)
    figures = done if done.get("asked") == asked else {"asked": asked}
    for when, folder in _FOLDERS.items():
        if when in figures or not broadcast_from_main((workdir / folder).exists):
            continue
        classifier, variables = checkpoint.load_model(workdir / folder)
        figures[when] = pgd_accuracy(
            classifier.predict,
            variables,
            attacked_images(dataset, asked["num_images"]),
            epsilon=asked["epsilon"],
            step_size=asked["step_size"],
            num_steps=asked["num_steps"],
            seed=_SEED,
            label=f"robustness {when}",
            progress=progress,
        )
        write_json(path, figures)


def load_robustness(workdir: Path) -> dict:
    """Return the summary's figures of the last attack on a run's models, {} if there was none."""
    figures = read_json(workdir / "robustness.json")
    if not figures:
        return {}
    attack = figures.pop("asked")
    return {"robustness": attack, **{f"robustness_{when}": v for when, v in figures.items()}}


def _attack(config: ml_collections.ConfigDict, dataset: ImageDataset) -> dict:
    """Return the options of the attack, with the number of images that there are."""
    options = config.robustness.to_dict()
    return {**options, "num_images": min(options["num_images"], len(dataset.test))}


def attacked_images(dataset: ImageDataset, num_images: int) -> ImageSplit:
    """Return so many test images (all, if there are fewer), drawn by a fixed seed.

    Not the first ones: the test sets of some data are sorted by class.
    """
    test = dataset.test
    if num_images >= len(test):
        return test
    chosen = np.random.default_rng(_SEED).choice(len(test), num_images, replace=False)
    return test.subset(np.sort(chosen))
