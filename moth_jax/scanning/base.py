"""What all scanners share: the model under suspicion, and what they make of it."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moth_jax.anomaly import MIN_CLASSES
from moth_jax.distance.subject import padded_images
from moth_jax.errors import InputError, listed
from moth_jax.inversion import Inversion, NeuralCleanse
from moth_jax.progress import Progress
from moth_jax.scanning.options import ScanOptions
from moth_jax.scanning.result import ANY, Arm
from moth_jax.triggers import Trigger
from moth_jax.types import LogitsFn, Variables


class Evidence(NamedTuple):
    """What a scanner found.

    Attributes:
      arms: the rows of evidence, with their suspicion.
      triggers: those of the arms, stacked; None if they are not known.
      num_gradients: images whose gradient was taken.
      reason: why no arm has a suspicion; "" if one has.
    """

    arms: tuple[Arm, ...]
    triggers: Trigger | None
    num_gradients: int
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Suspect:
    """A model to scan, and images to scan it with; all checked.

    Attributes:
      logits_fn, variables: (variables, images) -> logits [n, K].
      seen: logits of a few images, which tell models apart whose variables are unknown.
      images, labels: [n, h, w, c] bytes or in [0, 1], and [n].
      classes: labels of the classes to scan, all of which have images.
      names: theirs.
      num_classes: K, with those that are not scanned.
    """

    logits_fn: LogitsFn
    variables: Variables
    seen: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[int, ...]
    names: tuple[str, ...]
    num_classes: int

    @property
    def any(self) -> int:
        """The "label" of a universal trigger's victims: one past the last."""
        return self.num_classes

    def name(self, label: int) -> str:
        """The name of a class, or "any"."""
        return ANY if label == self.any else self.names[self.classes.index(label)]

    def universal_arms(self) -> list[tuple[int, int]]:
        """Return (any, target) of every target."""
        return [(self.any, target) for target in self.classes]

    def sample(self, victim: int, target: int, num_images: int, seed: int) -> np.ndarray:
        """Return the indices of the images of an arm's victims, at most `num_images`.

        Those of a universal trigger are the first of every other class, then the second, and so
        on; the classes are in random order.
        """
        if victim != self.any:
            return np.flatnonzero(self.labels == victim)[:num_images]
        others = [k for k in self.classes if k != target]
        others = np.random.default_rng([seed, target]).permutation(others)
        rows = itertools.zip_longest(*(np.flatnonzero(self.labels == k) for k in others))
        dealt = (index for row in rows for index in row if index is not None)
        return np.fromiter(itertools.islice(dealt, num_images), np.int64)

    def draw(
        self, options: ScanOptions, capacity: int, arms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the images [D, capacity, h, w, c] and weights of arms [D, 2]."""
        chosen = [self.sample(*arm, options.num_images, options.seed) for arm in arms.tolist()]
        return padded_images(self.images, chosen, capacity)

    def num_samples(self, arms: Sequence[tuple[int, int]], options: ScanOptions) -> np.ndarray:
        """Return how many images each arm has."""
        counts = np.bincount(self.labels, minlength=self.num_classes)
        others = counts[list(self.classes)].sum()
        have = [others - counts[b] if a == self.any else counts[a] for a, b in arms]
        return np.minimum(have, options.num_images)

    def arm(self, victim: int, target: int, size: float, rate: float) -> Arm:
        """Return an arm's row, without a suspicion."""
        relative = float(size) / float(np.prod(self.images.shape[1:]))
        return Arm(self.name(victim), self.name(target), float(size), relative, float(rate))


class Scanner(NamedTuple):
    """A method of scanning.

    Attributes:
      search: (suspect, options, resume_dir, progress) -> Evidence.
      threshold: of the statistic, unless the user has a calibrated one.
      statistic: its name.
      success_bound: of the inversions, unless the options say otherwise.
    """

    search: Callable[[Suspect, ScanOptions, Path | None, Progress], Evidence]
    threshold: float
    statistic: str
    success_bound: float


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
