"""What the outputs of a model must be: finite logits, in the order of the labels."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.errors import InputError, listed

_NUM_PROBES = 8
_FAR = 1e3  # times the range of pixels: the logits of a network without bounds follow
# When a permutation explains predictions much better than the labels do.
_MOST_CLASSES = 0.9  # are then predicted as they should be, by most of their images
_LEAST_SHARE = 0.5  # of the images of the classes that change places
_TIMES = 4  # as many of them as are predicted as labelled
# A model that has learnt nothing may tell a few classes apart, in any order: its images of one
# class are alike. The fewer classes there are, the better the model must be in the new order.
_LEAST_OF_ALL, _MORE_OF_FEW = 0.5, 0.9  # the share of all images: the first + the second / classes
_DOUBTED = 2  # images that are taken to be wrong besides
_EVIDENCE = math.log(1000)
_MAX_LISTED = 50  # classes of an order that is written out


class Rows(NamedTuple):
    """What is asked of the logits of images, each [n].

    Attributes:
      predicted: the class of the largest logit.
      is_finite: whether all logits are.
      low, high, total: the least, the largest and the sum of the logits.
    """

    predicted: Any
    is_finite: Any
    low: Any
    high: Any
    total: Any


def rows_of(logits: Array) -> Rows:
    """Return what is asked of logits [n, K]."""
    return Rows(
        jnp.argmax(logits, axis=-1),
        jnp.isfinite(logits).all(-1),
        logits.min(-1),
        logits.max(-1),
        logits.sum(-1),
    )


def check_rows(
    rows: Rows, rows_of_images: Callable[[np.ndarray], Rows], image_shape: tuple
) -> None:
    """Raise `InputError` unless the model's outputs for its images are finite, and logits.

    Outputs of a few images may happen to look like probabilities. Those of noise then do not, and
    those of images that are far brighter than any grow.

    Args:
      rows: of all images.
      rows_of_images: images [n, h, w, c] -> theirs.
      image_shape: (h, w, c).
    """
    check_finite(rows.is_finite)
    if not _like_probabilities(rows):
        return
    noise = np.random.default_rng(0).random((_NUM_PROBES, *image_shape), np.float32)
    far = (noise - np.float32(0.5)) * np.float32(_FAR)
    for images in (noise, far):
        probes = jax.tree.map(np.asarray, rows_of_images(images))
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), rows, probes)
        if not _like_probabilities(rows):
            return
    if all(np.ptp(values) == 0 for values in (rows.predicted, rows.low, rows.high)):
        return  # a model that says the same of everything
    last = "softmax" if _sum_is_fixed(rows) else "sigmoid"
    raise InputError(
        f"the model returns probabilities, as after a {last}, not logits: leave out its {last}; "
        "distances, scans and hardening need logits"
    )


def check_finite(is_finite: np.ndarray, what: str = "images") -> None:
    """Raise `InputError` naming the images [n] whose logits are not finite."""
    bad = np.flatnonzero(~is_finite)
    if len(bad):
        raise InputError(
            f"the model returns NaN or infinite logits for {len(bad)} of {len(is_finite)} {what}, "
            f"at index {listed(bad.tolist())}: check its weights and its normalisation, or leave "
            "these images out"
        )


def _like_probabilities(rows: Rows) -> bool:
    """Whether all outputs are shares of 1 or of 100, or all are in [0, 1]."""
    in_range = rows.low.min() >= 0 and rows.high.max() <= 1
    return bool(in_range or (rows.low.min() >= 0 and _sum_is_fixed(rows)))


def _sum_is_fixed(rows: Rows) -> bool:
    return any(np.allclose(rows.total, whole, rtol=1e-2, atol=0) for whole in (1.0, 100.0))


def check_order(
    predicted: np.ndarray, labels: np.ndarray, num_classes: int, names: Mapping[int, str]
) -> None:
    """Raise `InputError` if labels in another order explain the predictions much better.

    Of each class the output that most of its images are predicted as is compared with its label. A
    model that is bad at some classes, or at all, is none of this: classes must change places, each
    with an output of its own, nearly all classes must be predicted well in the new order (the
    better the fewer they are), and there must be images enough to tell that from chance.

    Args:
      predicted, labels: [n], of clean images.
      num_classes: K.
      names: of the labels, where they are known.
    """
    moved = _moved(predicted, labels, num_classes)
    if not moved:
        return

    def name(k: int) -> str:
        known = names.get(k, str(k))
        return repr(known) if known == str(k) else f"{known!r} ({k})"

    order = np.arange(num_classes)
    order[list(moved)] = list(moved.values())
    before, after = np.mean(predicted == labels), np.mean(predicted == order[labels])
    places = listed(list(moved.items()), lambda pair: f"{name(pair[0])} as {name(pair[1])}")
    is_whole = num_classes <= _MAX_LISTED and len(set(order.tolist())) == num_classes
    remedy = f", as numpy.array({order.tolist()})[labels] does," if is_whole else ""
    raise InputError(
        f"labels and outputs do not match: {100 * before:.0f} % of the images are predicted as "
        f"labelled, {100 * after:.0f} % in another order of the classes: images of {places}; give "
        f"the labels in the order of the model's outputs{remedy} or, if they are right, set "
        "check_order to False"
    )


class _Common(NamedTuple):
    """What most images of a class are predicted as."""

    output: int
    share: float  # of the class's images
    own_share: float  # predicted as labelled
    count: int


def _moved(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[int, int]:
    """Return the labels of classes that change places, and their outputs; {} if none does."""
    common = _common(predicted, labels)
    # Each output is that of one class: its own, or the one with the largest share.
    ranked = sorted(common, key=lambda k: (common[k].output == k, common[k].share))
    class_of = {common[k].output: k for k in ranked}
    moved = {k: output for output, k in class_of.items() if output != k}
    moved = dict(sorted(moved.items()))
    is_closed = set(moved) == set(moved.values())
    if len(moved) < 2 or not (is_closed or 2 * len(moved) >= len(common)):
        return {}
    new, old = (np.mean([common[k][i] for k in moved]) for i in (1, 2))
    if len(class_of) < _MOST_CLASSES * len(common) or new < max(_LEAST_SHARE, _TIMES * old):
        return {}
    told = sum(own.count for own in common.values())
    share = np.mean([common[k][1 if k in moved else 2] for k in common]) * told / (told + _DOUBTED)
    if share < _LEAST_OF_ALL + _MORE_OF_FEW / len(common):
        return {}
    count = sum(common[k].count for k in moved)
    gain = [
        _log_likelihood(sum(common[k].count * common[k][i] for k in moved), count, num_classes)
        for i in (1, 2)
    ]
    # Chance has as many orders of these classes to choose from.
    surprise = gain[0] - gain[1] - len(moved) * math.log(num_classes)
    return moved if surprise > _EVIDENCE else {}


def _common(predicted: np.ndarray, labels: np.ndarray) -> dict[int, _Common]:
    """Return for each label what most of its images are predicted as; its own where they tie."""
    order = np.argsort(labels, kind="stable")
    present, first = np.unique(labels[order], return_index=True)
    common = {}
    parts = np.split(predicted[order], first[1:])
    for label, part in zip(present.tolist(), parts, strict=True):
        outputs, times = np.unique(part, return_counts=True)
        own = times[outputs == label].sum()
        output = label if own == times.max() else int(outputs[times.argmax()])
        common[label] = _Common(output, times.max() / len(part), own / len(part), len(part))
    return common


def _log_likelihood(hits: float, count: int, num_classes: int) -> float:
    """Return that of `count` predictions, `hits` of which are right, and the others anything."""
    share = max(hits / count, 1 / num_classes)
    missed = count - hits
    of_missed = missed * math.log((1 - share) / (num_classes - 1)) if missed else 0.0
    return hits * math.log(share) + of_missed
