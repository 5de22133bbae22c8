"""Which arms are worth an inversion at all: those that clean images already lean towards."""

import functools
from collections import Counter

import jax
import numpy as np

from moth_jax.distance.subject import unit_images
from moth_jax.distance.universal import ArmImages
from moth_jax.scanning.options import ScanOptions
from moth_jax.types import LogitsFn, Variables

_BATCH_SIZE = 256


def prescreen(images: ArmImages, options: ScanOptions) -> list[tuple[int, int]]:
    """Return the arms (victim, target) that survive, the most promising first.

    A poisoned model is expected to lean towards its target on the victims' clean images. An arm
    survives if its target is among the k largest logits of at least `pair_share` of the victim's
    images (`universal_share` of those of all other classes), but at most `victims_per_target`
    pairs to one target do. In any case the best few do: `min_pairs` and `min_universal`.

    Note: The published shares alone drop the planted arm of models that were trained well: with a
      patch of success rate 99 % on the digits, the target was among the first two of 18 % of the
      other classes' images (third of ten targets), and that of a label-specific one of 72 % of its
      victim's (first of ninety pairs). The rank carries over, the share does not.
    Note: The published code groups images by predicted class, here by label: a scan is given clean
      images with true labels, and a class that is never predicted has images all the same. It ranks
      the pairs to a target by probability alone, here that decides between equal shares.
    """
    subject = images.subject
    logits, labels = _logits(images)
    count = options.top_k or _default_top_k(subject.num_classes)
    in_top = among_largest(logits, min(count, logits.shape[1]))
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = shifted / shifted.sum(1, keepdims=True)

    def lean(victim: int, target: int) -> tuple[float, float]:
        chosen = labels != target if victim == images.any else labels == victim
        return float(in_top[chosen, target].mean()), float(probability[chosen, target].mean())

    pairs = [(a, b) for a in subject.classes for b in subject.classes if a != b]
    universal = [(images.any, target) for target in subject.classes]
    leans = {arm: lean(*arm) for arm in universal + pairs}
    kept = _survivors(universal, leans, options.universal_share, options.min_universal, 1)
    kept += _survivors(
        pairs, leans, options.pair_share, options.min_pairs, options.victims_per_target
    )
    return sorted(kept, key=leans.__getitem__, reverse=True)


def _survivors(
    arms: list[tuple[int, int]],
    leans: dict[tuple[int, int], tuple[float, float]],
    needed: float,
    least: int,
    per_target: int,
) -> list[tuple[int, int]]:
    """Return those of `arms` with a share of `needed`, and in any case the `least` best ones."""
    kept, taken = [], Counter()
    for arm in sorted(arms, key=leans.__getitem__, reverse=True):
        if (leans[arm][0] >= needed or len(kept) < least) and taken[arm[1]] < per_target:
            kept.append(arm)
            taken[arm[1]] += 1
    return kept


def among_largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return [n, K] bool, the `count` largest of each row; of equal ones the first.

    >>> among_largest(np.array([[3.0, 1.0, 2.0]]), 2)
    array([[ True, False,  True]])
    """
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(logits.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def _default_top_k(num_classes: int) -> int:
    """The published rule."""
    return 2 if num_classes <= 8 else round(num_classes / 4)


def _logits(arm_images: ArmImages) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits [n, K] and labels [n] of the first images of every class."""
    subject = arm_images.subject
    used = np.concatenate([arm_images.indices(k, k) for k in subject.classes])
    # The last batch is filled up with repeats, so that one compilation serves all.
    size = min(_BATCH_SIZE, len(used))
    filled = np.resize(used, -(-len(used) // size) * size)
    logits = [
        _predict(subject.logits_fn, subject.variables, unit_images(subject.images[part]))
        for part in np.split(filled, len(filled) // size)
    ]
    return np.concatenate(logits)[: len(used)].astype(np.float64), subject.labels[used]


@functools.partial(jax.jit, static_argnames="logits_fn")
def _predict(logits_fn: LogitsFn, variables: Variables, images):
    return logits_fn(variables, images)
