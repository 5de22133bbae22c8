"""Universal triggers: one that sends the images of all other classes to a target.

An *arm* is a way into a class: (victim, target), where the victim may be any class.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moth_jax.distance.chunks import Measurement, chunk_size, measure_all
from moth_jax.distance.store import Chunk, ChunkStore
from moth_jax.distance.subject import Subject, padded_images
from moth_jax.inversion import Budget, Inversion
from moth_jax.progress import Progress

Arm = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class ArmImages:
    """Which images of a subject an arm is searched with.

    Attributes:
      subject: the model and its images.
      num_images: the most for one arm.
      seed: of the order of classes in a universal arm.
    """

    subject: Subject
    num_images: int
    seed: int

    @property
    def any(self) -> int:
        """The "label" of a universal trigger's victims: one past the last."""
        return self.subject.num_classes

    def universal(self) -> list[Arm]:
        """Return the arm (any, target) of every target."""
        return [(self.any, target) for target in self.subject.classes]

    def indices(self, victim: int, target: int) -> np.ndarray:
        """Return the indices of an arm's images.

        Those of a universal arm are the first of every other class, then the second, and so on. The
        classes are in random order.
        """
        labels = self.subject.labels
        if victim != self.any:
            return np.flatnonzero(labels == victim)[: self.num_images]
        others = [k for k in self.subject.classes if k != target]
        others = np.random.default_rng([self.seed, target]).permutation(others)
        rows = itertools.zip_longest(*(np.flatnonzero(labels == k) for k in others))
        dealt = (index for row in rows for index in row if index is not None)
        return np.fromiter(itertools.islice(dealt, self.num_images), np.int64)

    def draw(self, capacity: int, arms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images [D, capacity, h, w, c] and weights [D, capacity] of arms [D, 2]."""
        chosen = [self.indices(*arm) for arm in arms.tolist()]
        return padded_images(self.subject.images, chosen, capacity)

    def counts(self, arms: Sequence[Arm]) -> np.ndarray:
        """Return how many images each arm has."""
        counts = np.bincount(self.subject.labels, minlength=self.subject.num_classes)
        others = counts[list(self.subject.classes)].sum()
        have = [others - counts[b] if a == self.any else counts[a] for a, b in arms]
        return np.minimum(have, self.num_images)


def universal_triggers(
    images: ArmImages,
    *,
    budget: Budget,
    inversion: Inversion,
    arms_per_chunk: int = 0,
    resume_dir: Path | None,
    progress: Progress,
) -> Chunk:
    """Invert the universal trigger of every class of the subject, in the order of its classes.

    Args:
      images: of the arms.
      budget, inversion: of each search.
      arms_per_chunk: arms in one compiled call; 0 suits the device.
      resume_dir: a folder for finished parts; None keeps none.
      progress: where it is shown.
    """
    subject, arms = images.subject, images.universal()
    draw = functools.partial(images.draw, int(images.counts(arms).max()))
    measurement = Measurement.of(subject, draw, [images.seed], budget, inversion)
    settings = {**measurement.settings(), "num_images": images.num_images}
    store = ChunkStore(resume_dir, settings, (subject.images, subject.labels, subject.model))
    size = chunk_size(arms_per_chunk or None, len(arms), 1)
    with progress.task("universal triggers", total=len(arms), unit="targets") as task:
        return measure_all(measurement, arms, size, store, task, fit=not arms_per_chunk)
