"""The phase that measures class distances."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import ml_collections
import numpy as np

from moth_jax.data import ImageDataset, ImageSplit
from moth_jax.distance.directions import DirectionChoice
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.distance.nearest import nearest_directions
from moth_jax.models import Classifier
from moth_jax.parallel.processes import load_if_exists, on_main
from moth_jax.progress import Progress
from moth_jax.run import configuration
from moth_jax.run.job import chosen_classes, directions
from moth_jax.types import Variables


def measure(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    when: str,
    classifier: Classifier,
    variables: Variables,
    progress: Progress,
) -> DistanceMatrix:
    """Measure the class distances "before" or "after", and put them into the model's checkpoint."""
    path = workdir / f"distance_{when}.npz"
    measured = load_if_exists(DistanceMatrix.load, path)
    if measured is not None:
        return measured
    options = config.distance.to_dict()
    for field in ("victims", "targets", "num_directions", "nearest"):
        del options[field]  # read by `directions`
    for field in ("inversion", "precision", "patience", "success_bound"):
        del options[field]  # read by `distance_inversion`
    split = getattr(dataset, options.pop("split"))
    classes = chosen_classes(config, dataset)
    chosen = directions(config, dataset)
    if config.distance.nearest:
        chosen = _nearest(config, workdir, classifier, variables, split, chosen, classes, progress)
    victims = {victim for victim, _ in chosen.directions}
    images, labels = _first_images(split, victims, options["num_images"])
    matrix = measure.distance_matrix(
        classifier.predict,
        images,
        labels,
        variables=variables,
        class_names=dataset.class_names,
        classes=classes,
        directions=chosen,
        directions_per_chunk=options.pop("directions_per_chunk") or None,
        inversion=configuration.distance_inversion(config),
        resume_dir=workdir / "distances",
        label=f"distances {when}",
        progress=progress,
        **options,
    )
    on_main(matrix.save, path)
    on_main(shutil.rmtree, workdir / "distances")
    return matrix


def _first_images(
    split: ImageSplit, labels: Iterable[int], num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images of each label, and their labels, in the order of the split.

    No other image is used, and all of them may be more than fit in memory.
    """
    used = np.sort(np.concatenate([split.of_class(k, num_images) for k in labels]))
    return split.batch(used), split.labels[used]


def _nearest(
    config: ml_collections.ConfigDict,
    workdir: Path,
    classifier: Classifier,
    variables: Variables,
    split: ImageSplit,
    candidates: DirectionChoice,
    classes: tuple[int, ...],
    progress: Progress,
) -> DirectionChoice:
    """Return the nearest of the candidates: those of the given model, after hardening too."""
    before = load_if_exists(DistanceMatrix.load, workdir / "distance_before.npz")
    if before is not None:
        pairs = np.asarray(classes)[np.argwhere(~np.isnan(before.values))]
        return DirectionChoice(list(map(tuple, pairs.tolist())), before.details["selection"])
    given = {name: candidates.details.get(name, ()) for name in ("victims", "targets")}
    return nearest_directions(
        classifier.predict,
        *_first_images(split, classes, config.distance.num_images),
        config.distance.nearest,
        variables=variables,
        classes=classes,
        **given,
        num_images=config.distance.num_images,
        success_bound=config.distance.success_bound,
        seed=config.seed,
        resume_dir=workdir / "distances" / "universal",
        progress=progress,
    )
