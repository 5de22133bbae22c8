"""What a scanner is, and what all scanners share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moth_jax.anomaly import MIN_CLASSES
from moth_jax.distance.subject import Subject
from moth_jax.distance.universal import ArmImages
from moth_jax.errors import InputError, listed
from moth_jax.inversion import Inversion, NeuralCleanse
from moth_jax.inversion.candidates import least_rate
from moth_jax.progress import Progress
from moth_jax.scanning.options import ScanOptions
from moth_jax.scanning.result import ANY, Arm
from moth_jax.triggers import AnyTrigger


class Evidence(NamedTuple):
    """What a scanner found.

    Attributes:
      arms: the rows of evidence, with their suspicion.
      triggers: those of the arms, stacked; None if they are not known.
      num_gradients: images whose gradient was taken.
      reason: why no arm has a suspicion; "" if one has.
    """

    arms: tuple[Arm, ...]
    triggers: AnyTrigger | None
    num_gradients: int
    reason: str = ""


class Scanner(NamedTuple):
    """A method of scanning.

    Attributes:
      search: (subject, options, resume_dir, progress) -> Evidence.
      threshold: of the statistic, unless the user has a calibrated one.
      statistic: its name.
      success_bound: of the inversions, unless the options say otherwise.
      explanation: what it searches for and how it decides, for the report: plain text.
    """

    search: Callable[[Subject, ScanOptions, Path | None, Progress], Evidence]
    threshold: float
    statistic: str
    success_bound: float
    explanation: str


def arm_images(subject: Subject, options: ScanOptions) -> ArmImages:
    """Return which images the arms of a scan are searched with."""
    return ArmImages(subject, options.num_images, options.seed)


def row_of(
    images: ArmImages, arm: tuple[int, int], size: float, rate: float, success_bound: float
) -> Arm:
    """Return an arm's row of evidence, without a suspicion."""
    subject = images.subject
    there = subject.share_there(images.indices(*arm), arm[1]) >= least_rate(success_bound)
    victim, target = (
        ANY if label == images.any else subject.names[subject.classes.index(label)] for label in arm
    )
    relative = float(size) / float(np.prod(subject.image_shape))
    return Arm(victim, target, float(size), relative, float(rate), there=there)


def inversion_of(options: ScanOptions) -> Inversion:
    """Return the method of inversion; `options.success_bound` is that of the method by now."""
    return NeuralCleanse(patience=options.patience, success_bound=options.success_bound)


def check_classes_have_images(
    classes: tuple[int, ...], names: tuple[str, ...], labels: np.ndarray
) -> None:
    """Raise `InputError` unless there are three classes or more, and images of each."""
    if len(classes) < MIN_CLASSES:
        raise InputError(
            f"a scan needs at least {MIN_CLASSES} classes, as a median of two says nothing; got "
            f"{listed(names)}"
        )
    present = set(np.unique(labels).tolist())
    empty = [name for k, name in zip(classes, names, strict=True) if k not in present]
    if empty:
        raise InputError(
            f"no images of {len(empty)} classes: {listed(empty)}; add images or choose the other "
            "classes"
        )
