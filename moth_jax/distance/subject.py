"""What a measurement is asked for, checked before anything is computed.

Every fault is an `InputError` that names the value and what is allowed.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array

from moth_jax.data.dataset import check_images, check_labels
from moth_jax.errors import InputError, listed
from moth_jax.types import LogitsFn, Variables

_NUM_PROBES = 8


def check_classifier(
    logits_fn: LogitsFn, variables: Variables, images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Check images, labels and the model's output; return the logits [m, K] of the first images.

    Raises:
      InputError: at the first fault.
    """
    check_images(images)
    logits = first_logits(logits_fn, variables, images)
    num_classes = logits.shape[1]
    if num_classes < 2:
        raise InputError(f"a distance needs at least 2 classes, the model has {num_classes}")
    check_labels(labels, num_classes)
    if len(labels) != len(images):
        raise InputError(f"there are {len(images)} images but {len(labels)} labels")
    return logits


def first_logits(logits_fn: LogitsFn, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Return the logits [m, K] of the first images, if they are logits."""
    compiled = jax.jit(logits_fn)
    logits = np.asarray(compiled(variables, unit_images(images[:_NUM_PROBES])))
    if logits.ndim != 2 or logits.shape[0] != min(_NUM_PROBES, len(images)):
        raise InputError(
            f"logits_fn must return logits [n, K] for images [n, h, w, c]; for "
            f"{images[:_NUM_PROBES].shape} it returned {logits.shape}"
        )
    if not np.isfinite(logits).all():
        raise InputError(
            "the model returns NaN or infinite logits: check its weights and its normalisation"
        )
    if _like_probabilities(logits):
        # Logits of a few images may happen to look so; those of noise then do not.
        noise = np.random.default_rng(0).random((_NUM_PROBES, *images.shape[1:]), np.float32)
        if _like_probabilities(np.asarray(compiled(variables, noise))):
            raise InputError(
                "the model returns probabilities: leave out its softmax, distances need logits"
            )
    return logits


def _like_probabilities(logits: np.ndarray) -> bool:
    """Whether every row is not negative and sums to 1."""
    return bool(logits.min() >= 0 and np.allclose(logits.sum(1), 1.0, atol=1e-3))


def check_at_least_one(**options: int) -> None:
    """Raise `InputError` at the first option below 1."""
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def check_classes(classes: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
    """Return the classes to measure among, label numbers of a model with `num_classes` outputs.

    >>> check_classes(None, 3), check_classes([7, 2], 10)
    ((0, 1, 2), (7, 2))
    """
    if classes is None:
        return tuple(range(num_classes))
    outside = [k for k in classes if not 0 <= k < num_classes]
    if outside:
        raise InputError(f"classes must be in 0..{num_classes - 1}, got {listed(outside)}")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise InputError(f"classes must name at least 2 different classes, got {listed(classes)}")
    return tuple(int(k) for k in classes)


def names_of(
    classes: tuple[int, ...], class_names: Sequence[str] | None, num_classes: int
) -> tuple[str, ...]:
    """Return the names of `classes`, given theirs, those of all outputs, or none.

    >>> names_of((2, 0), None, 3), names_of((2, 0), ("a", "b", "c"), 3)
    (('2', '0'), ('c', 'a'))
    >>> names_of((2, 0), ("third", "first"), 3)
    ('third', 'first')
    """
    given = range(num_classes) if class_names is None else class_names
    names = tuple(map(str, given))
    if len(names) == num_classes:
        return tuple(names[k] for k in classes)
    if len(names) != len(classes):
        chosen = f", {len(classes)} of them chosen" if len(classes) < num_classes else ""
        raise InputError(
            f"the model has {num_classes} classes{chosen}, but {len(names)} names were given"
        )
    return names


def check_directions(
    directions: Sequence[tuple[int, int]] | None,
    classes: tuple[int, ...],
    names: tuple[str, ...],
    labels: np.ndarray,
    num_classes: int,
) -> list[tuple[int, int]]:
    """Return the directions to measure, pairs of label numbers; every victim must have a sample."""
    if directions is None:
        directions = [(a, b) for a in classes for b in classes if a != b]
    if not len(directions):
        raise InputError("directions must name at least one (victim, target)")
    allowed = set(classes)
    for a, b in directions:
        if a == b or a not in allowed or b not in allowed:
            choices = listed(classes) if len(allowed) < num_classes else f"0..{num_classes - 1}"
            raise InputError(f"direction ({a}, {b}) needs two different classes in {choices}")
    empty = {a for a, _ in directions} - set(np.unique(labels).tolist())
    if empty:
        missing = [name for k, name in zip(classes, names, strict=True) if k in empty]
        raise InputError(
            f"no images of {len(empty)} victim classes: {', '.join(missing)}; add images or leave "
            "these directions out"
        )
    return [(int(a), int(b)) for a, b in directions]


def unit_images(images: np.ndarray) -> np.ndarray:
    """Return float32 images in [0, 1]; bytes are 0 to 255."""
    scale = 255 if images.dtype == np.uint8 else 1
    return np.asarray(images, np.float32) / np.float32(scale)


def victims_images(
    images: np.ndarray, labels: np.ndarray, num_images: int, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images of each victim class [D, n, h, w, c] and their weights [D, n].

    All classes are padded to one n, so that one compilation serves every chunk.
    """
    capacity = min(num_images, int(np.bincount(labels).max()))
    chosen = [np.flatnonzero(labels == victim)[:num_images] for victim, _ in directions]
    return padded_images(images, chosen, capacity)


def padded_images(
    images: np.ndarray, chosen: list[np.ndarray], capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `chosen` images of each direction [D, capacity, ...] and weights, 0 of padding."""
    padded = np.zeros((len(chosen), capacity, *images.shape[1:]), np.float32)
    weights = np.zeros((len(chosen), capacity), np.float32)
    for i, indices in enumerate(chosen):
        padded[i, : len(indices)] = unit_images(images[indices])
        weights[i, : len(indices)] = 1
    return padded, weights


def with_variables(
    logits_fn: LogitsFn | Callable[[Array], Array], variables: Variables | None
) -> LogitsFn:
    """Return the function of (variables, images) that the caller's is."""
    if variables is not None:
        return logits_fn
    # A new function each time: what `logits_fn` closes over may have changed since it was compiled.
    return lambda variables, images: logits_fn(images)
