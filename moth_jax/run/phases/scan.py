"""The phase "scan" of a run: does the given model look poisoned?"""

import shutil
from pathlib import Path

import ml_collections
import numpy as np

from moth_jax.data import ImageDataset, ImageSplit
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.errors import InputError
from moth_jax.models import Classifier
from moth_jax.parallel.processes import broadcast_from_main, load_if_exists, on_main
from moth_jax.progress import Progress
from moth_jax.run import configuration
from moth_jax.run.job import chosen_classes
from moth_jax.scanning import Scan, scan, scan_distances
from moth_jax.scanning.base import check_classes_have_images
from moth_jax.storage.files import read_json, write_json
from moth_jax.types import Variables


def check_scan(config: ml_collections.ConfigDict, dataset: ImageDataset) -> None:
    """Raise `InputError` unless there are classes and images to scan with."""
    classes = chosen_classes(config, dataset)
    names = tuple(dataset.class_names[k] for k in classes)
    check_classes_have_images(classes, names, _split(config, dataset).labels)


def scan_model(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    classifier: Classifier,
    variables: Variables,
    progress: Progress,
) -> Scan:
    """Scan the model, unless it was already scanned in the same way; write scan.npz and scan.json.

    If the run has measured the distances of all directions they are not measured again: "pairs" is
    then free, and of that measurement, whatever the options of the scan.
    """
    matrix = _measured(config, workdir, progress)
    asked = _asked(config, dataset, matrix)
    done = read_json(workdir / "scan.json").get("asked")
    if done == asked:
        return broadcast_from_main(Scan.load, workdir / "scan.npz")
    threshold = config.scan.threshold or None
    if matrix is not None:
        options = configuration.scan_options(config)
        found = scan_distances(
            matrix, image_shape=dataset.image_shape, threshold=threshold, options=options
        )
    else:
        found = _scan(config, dataset, workdir, classifier, variables, threshold, progress)
    on_main(found.save, workdir / "scan.npz")
    # Last: a scan is done once this is there.
    write_json(workdir / "scan.json", {**found.to_json(), "asked": asked})
    on_main(shutil.rmtree, workdir / "scanning", True)
    return found


def _measured(
    config: ml_collections.ConfigDict, workdir: Path, progress: Progress
) -> DistanceMatrix | None:
    """Return the distances that "pairs" need not measure; None if there are none, or not all."""
    if config.scan.method != "pairs":
        return None
    matrix = load_if_exists(DistanceMatrix.load, workdir / "distance_before.npz")
    if matrix is None:
        return None
    if matrix.is_whole:
        progress.note("scanning the distances of this run, as config.distance had them measured")
        return matrix
    progress.note(f"this run has the distances of {matrix.choice()}; a scan measures all of them")
    return None


def _asked(
    config: ml_collections.ConfigDict, dataset: ImageDataset, matrix: DistanceMatrix | None
) -> dict:
    """Return what a scan depends on: its options, or those of the distances that it is of."""
    options = {**config.scan.to_dict(), "seed": config.seed}
    if matrix is not None:
        used = ("method", "threshold", "max_pair_size")
        measured = {"split": config.distance.split, **matrix.details}
        options = {**{name: options[name] for name in used}, "distances": measured}
    classes = [dataset.class_names[k] for k in chosen_classes(config, dataset)]
    return {**options, "classes": classes}


def load_scan(workdir: Path) -> Scan | None:
    """Return the scan of a run, None if there is none."""
    return (
        load_if_exists(Scan.load, workdir / "scan.npz")
        if read_json(workdir / "scan.json")
        else None
    )


def _scan(config, dataset, workdir, classifier, variables, threshold, progress) -> Scan:
    classes, split = chosen_classes(config, dataset), _split(config, dataset)
    options = configuration.scan_options(config)
    per_class = options.num_images
    if config.scan.method == "neural_cleanse":  # which takes a few images of each other class
        per_class = -(-per_class // (len(classes) - 1))
    # No other image is used, and all of them may be more than fit in memory.
    used = np.sort(np.concatenate([split.of_class(k, per_class) for k in classes]))
    return scan(
        classifier.predict,
        split.batch(used),
        split.labels[used],
        variables=variables,
        method=config.scan.method,
        class_names=dataset.class_names,
        classes=classes,
        threshold=threshold,
        options=options,
        resume_dir=workdir / "scanning",
        progress=progress,
    )


def _split(config: ml_collections.ConfigDict, dataset: ImageDataset) -> ImageSplit:
    split = getattr(dataset, config.scan.split)
    if not len(split):
        raise InputError(f"there are no images in the split {config.scan.split!r}; choose another")
    return split
