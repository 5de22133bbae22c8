"""Does a model look poisoned? Scanners that search for the triggers of a backdoor.

    from moth_jax.scanning import scan
    print(scan(predict, images, labels, variables=variables).describe())

A scanner searches for small triggers on its arms (a target from any class, or from one), and an arm
much easier than the others, or easy in one direction only, is the evidence of a backdoor.
`calibrate` fits the threshold to one's own clean models.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax import Array

from moth_jax.anomaly import anomaly_indices
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.distance.subject import Subject
from moth_jax.errors import InputError, require_choice
from moth_jax.options import check_option
from moth_jax.progress import Progress, as_progress
from moth_jax.scanning import k_arm, neural_cleanse, pairs
from moth_jax.scanning.base import Evidence, check_classes_have_images
from moth_jax.scanning.calibration import calibrate
from moth_jax.scanning.options import ScanOptions
from moth_jax.scanning.result import Arm, Scan
from moth_jax.typed import shown
from moth_jax.types import LogitsFn, Variables

__all__ = [
    "SCANNERS",
    "Arm",
    "Scan",
    "ScanOptions",
    "anomaly_indices",
    "calibrate",
    "scan",
    "scan_distances",
]

SCANNERS = {
    "neural_cleanse": neural_cleanse.SCANNER,
    "pairs": pairs.SCANNER,
    "k_arm": k_arm.SCANNER,
}


def scan(
    logits_fn: LogitsFn | Callable[[Array], Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    variables: Variables | None = None,
    method: str = "neural_cleanse",
    class_names: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    threshold: float | None = None,
    options: ScanOptions = ScanOptions(),  # noqa: B008, it is frozen
    check_order: bool = True,
    resume_dir: str | Path | None = None,
    progress: bool | Progress = True,
) -> Scan:
    """Return whether a classifier looks poisoned, and by what evidence.

    Args:
      logits_fn, images, labels, variables, class_names: as for `distance.distance_matrix`; clean
        images with their true labels.
      method: one of `SCANNERS`: "neural_cleanse" looks for a target that is easily reached from all
        other classes, "pairs" for one easily reached from one class, "k_arm" for both.
      classes: the label numbers of the classes to scan, at least three with images; all if not
        given.
      threshold: of the statistic, from `calibrate`; the method's own if not given.
      options: budgets and bounds.
      check_order: as for `distance.distance_matrix`.
      resume_dir: a folder for finished parts of "neural_cleanse" and "pairs"; an interrupted scan
        that is called again goes on from there.
      progress: a progress bar (True), nothing (False), or a `Progress`.

    Raises:
      InputError: what is wrong with the method, the images, the labels or the model's output.

    >>> import jax.numpy as jnp
    >>> def spots(images):             # the first four pixels of an image decide among four classes
    ...     return 20 * images.reshape(len(images), -1)[:, :4] * jnp.array([[1.0, 1.0, 1.0, 3.0]])
    >>> labels = np.repeat(np.arange(4), 3)
    >>> images = 0.3 * np.eye(4, 16, dtype="float32")[labels].reshape(-1, 4, 4, 1)
    >>> result = scan(spots, images, labels, options=ScanOptions(num_steps=60), progress=False)
    >>> result.arms[result.ranked()[0]].target
    '3'
    """
    require_choice("method", method, SCANNERS)
    _check(options, threshold)
    started = time.perf_counter()
    scanner = SCANNERS[method]
    subject = Subject.of(
        logits_fn,
        images,
        labels,
        variables=variables,
        class_names=class_names,
        classes=classes,
        num_images=options.num_images,
        check_order=check_order,
    )
    check_classes_have_images(subject.classes, subject.names, subject.labels)
    bound = options.success_bound or scanner.success_bound
    options = dataclasses.replace(options, success_bound=bound)
    found = scanner.search(
        subject, options, None if resume_dir is None else Path(resume_dir), as_progress(progress)
    )
    seconds = time.perf_counter() - started
    details = dataclasses.asdict(options)
    if len(subject.classes) < subject.num_classes:
        details["among"] = [len(subject.classes), subject.num_classes]
    return _decide(method, found, options, threshold, seconds, details)


def scan_distances(
    matrix: DistanceMatrix,
    *,
    image_shape: tuple[int, int, int] | None = None,
    threshold: float | None = None,
    options: ScanOptions = ScanOptions(),  # noqa: B008, it is frozen
) -> Scan:
    """Return what the scanner "pairs" says of distances that were measured before.

    `image_shape` (h, w, c) is needed if the matrix has no triggers. Raises `InputError` as `scan`.
    """
    _check(options, threshold)
    if image_shape is None:
        if matrix.triggers is None:
            raise InputError("the distances have no triggers to tell the image_shape; give it")
        image_shape = matrix.triggers.trigger.image_shape
    found = pairs.evidence(matrix, image_shape)
    return _decide("pairs", found, options, threshold, 0.0, dict(matrix.details))


def _check(options: object, threshold: object) -> None:
    if not isinstance(options, ScanOptions):
        raise InputError(f"options must be ScanOptions(...), got {shown(options)}")
    check_option("threshold", threshold, float | None)


def _decide(
    method: str,
    found: Evidence,
    options: ScanOptions,
    threshold: float | None,
    seconds: float,
    details: dict,
) -> Scan:
    """Return the verdict: by the statistic, by size alone where there is none, or none at all."""
    threshold = SCANNERS[method].threshold if threshold is None else float(threshold)
    suspicions = [arm.suspicion for arm in found.arms if not np.isnan(arm.suspicion)]
    statistic = max(suspicions, default=0.0 if not found.arms else float("nan"))
    if suspicions or not found.arms:
        poisoned = statistic > threshold
    else:
        small = any(
            arm.relative_size < options.max_size(arm.victim) for arm in found.arms if not arm.there
        )
        poisoned = True if small else None
    return Scan(
        method=method,
        poisoned=poisoned,
        statistic=float(statistic),
        statistic_name=SCANNERS[method].statistic,
        threshold=threshold,
        arms=found.arms,
        triggers=found.triggers,
        num_gradients=found.num_gradients,
        seconds=seconds,
        reason=found.reason,
        details=details,
    )
