"""The same as Neural Cleanse on the class distances: is one direction much nearer than the others?

A label-specific backdoor opens a way from its victim class alone, which a universal trigger, held
against all classes, need not find.
"""

import functools
from pathlib import Path

import numpy as np

from moth_jax.anomaly import MIN_CLASSES
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.distance.measure import distance_matrix
from moth_jax.distance.subject import Subject
from moth_jax.errors import InputError
from moth_jax.progress import Progress
from moth_jax.scanning.anomaly import with_anomaly_indices
from moth_jax.scanning.base import Evidence, Scanner, arm_images, inversion_of
from moth_jax.scanning.options import ScanOptions
from moth_jax.scanning.result import Arm


def search(
    subject: Subject, options: ScanOptions, resume_dir: Path | None, progress: Progress
) -> Evidence:
    """Measure every direction; the suspicion is the anomaly index over all of them."""
    predict = subject.logits_fn
    if subject.variables is None:  # then it is a function of the images alone to others
        predict = functools.partial(predict, None)
    matrix = distance_matrix(
        predict,
        subject.images,
        subject.labels,
        variables=subject.variables,
        class_names=subject.names,
        classes=subject.classes,
        num_images=options.num_images,
        num_steps=options.num_steps,
        minibatch_size=options.minibatch_size,
        mask_weight=options.mask_weight,
        seeds=(options.seed,),
        inversion=inversion_of(options),
        check_order=False,  # it was
        directions_per_chunk=options.arms_per_chunk or None,
        resume_dir=resume_dir,
        progress=progress,
    )
    arms = [(a, b) for a in subject.classes for b in subject.classes if a != b]
    gradients = int(options.num_steps * arm_images(subject, options).counts(arms).sum())
    return evidence(matrix, subject.image_shape)._replace(num_gradients=gradients)


def evidence(matrix: DistanceMatrix, image_shape: tuple[int, int, int]) -> Evidence:
    """Return the evidence that a distance matrix holds.

    Raises:
      InputError: it is of fewer than three classes, or not of all directions between them.
    """
    if matrix.num_classes < MIN_CLASSES:
        raise InputError(
            f"a scan needs distances between at least {MIN_CLASSES} classes, got "
            f"{', '.join(matrix.class_names)}"
        )
    if not matrix.is_whole:
        raise InputError(
            f"a scan needs the distances of all directions, got those of {matrix.choice()}; "
            "measure the others, too, or scan the model by method 'pairs'"
        )
    names, total = matrix.class_names, float(np.prod(image_shape))
    measured, there = np.argwhere(~np.isnan(matrix.values)), matrix.is_there()
    rows = [
        Arm(
            names[a],
            names[b],
            size=float(matrix.values[a, b]),
            relative_size=float(matrix.values[a, b]) / total,
            success_rate=float(matrix.success_rate[a, b]),
            there=bool(there[a, b]),
        )
        for a, b in measured
    ]
    rows, reason = with_anomaly_indices(rows)
    triggers = None if matrix.triggers is None else matrix.triggers.at(measured)
    return Evidence(rows, triggers, 0, reason)


SCANNER = Scanner(
    search,
    threshold=2.0,
    statistic="anomaly index",
    success_bound=0.9,
    explanation=(
        "For every victim and target the smallest trigger was searched that makes the model "
        "take images of the one for the other. The anomaly index says by how many deviations a "
        "size lies below the median of all."
    ),
)
