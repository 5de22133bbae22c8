"""A model and the labelled images it is measured with: converted and checked once.

Measuring, the search of near directions, and scanning all begin here. Whatever is wrong with an
input is found here, and is an `InputError` that names the value and what is allowed.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array

from moth_jax.data.checks import check_images, check_labels
from moth_jax.errors import InputError, listed
from moth_jax.types import LogitsFn, Variables

_NUM_PROBES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model, images of its classes, and the classes it is measured among.

    Attributes:
      logits_fn: (variables, images [n, h, w, c]) -> logits [n, K].
      variables: of the model; None where the function holds its own.
      images: [n, h, w, c], bytes from 0 to 255 or floats in [0, 1].
      labels: [n] integers.
      classes: label numbers of the classes to measure among, in the order of the results.
      names: theirs.
      probe_logits: [m, K], of the first images. They tell models apart whose variables are unknown.
    """

    logits_fn: LogitsFn
    variables: Variables
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probe_logits: np.ndarray

    @classmethod
    def of(
        cls,
        logits_fn: LogitsFn | Callable[[Array], Array],
        images: np.ndarray,
        labels: np.ndarray,
        *,
        variables: Variables | None = None,
        class_names: Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
    ) -> "Subject":
        """Return the checked subject; the arguments are those of `distance.distance_matrix`.

        Raises:
          InputError: at the first fault of images, labels, classes or the model's output.
        """
        call = with_variables(logits_fn, variables)
        check_images(images)
        logits = probe_logits(call, variables, images)
        num_classes = logits.shape[1]
        if num_classes < 2:
            raise InputError(f"a distance needs at least 2 classes, the model has {num_classes}")
        check_labels(labels, num_classes)
        if len(labels) != len(images):
            raise InputError(f"there are {len(images)} images but {len(labels)} labels")
        chosen = _chosen_classes(classes, num_classes)
        names = _names_of(chosen, class_names, num_classes)
        return cls(call, variables, images, np.asarray(labels), chosen, names, logits)

    @property
    def num_classes(self) -> int:
        """K, the number of the model's outputs."""
        return self.probe_logits.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def model(self):
        """What tells the model apart from others: its variables, or some of its logits."""
        return self.probe_logits if self.variables is None else self.variables

    def victims_images(
        self, num_images: int, directions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first images of each victim class [D, n, h, w, c] and their weights [D, n].

        All classes are padded to one n, so that one compilation serves every chunk.
        """
        capacity = min(num_images, int(np.bincount(self.labels).max()))
        chosen = [np.flatnonzero(self.labels == victim)[:num_images] for victim, _ in directions]
        return padded_images(self.images, chosen, capacity)


def with_variables(
    logits_fn: LogitsFn | Callable[[Array], Array], variables: Variables | None
) -> LogitsFn:
    """Return the caller's function as one of (variables, images)."""
    function: Callable[..., Array] = logits_fn
    if variables is not None:
        return function
    # A new function each time: what `logits_fn` closes over may have changed since it was compiled.
    return lambda variables, images: function(images)


def probe_logits(logits_fn: LogitsFn, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Return the logits [m, K] of the first images.

    Raises:
      InputError: the function does not return finite logits [n, K].
    """
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


def unit_images(images: np.ndarray) -> np.ndarray:
    """Return float32 images in [0, 1]; bytes range from 0 to 255."""
    scale = 255 if images.dtype == np.uint8 else 1
    return np.asarray(images, np.float32) / np.float32(scale)


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


def check_at_least_one(**options: int) -> None:
    """Raise `InputError` at the first option below 1."""
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _chosen_classes(classes: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
    """Return the classes to measure among, all of the model's if None.

    >>> _chosen_classes(None, 3), _chosen_classes([7, 2], 10)
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


def _names_of(
    classes: tuple[int, ...], class_names: Sequence[str] | None, num_classes: int
) -> tuple[str, ...]:
    """Return the names of `classes`, given theirs, those of all outputs, or none.

    >>> _names_of((2, 0), None, 3), _names_of((2, 0), ("a", "b", "c"), 3)
    (('2', '0'), ('c', 'a'))
    >>> _names_of((2, 0), ("third", "first"), 3)
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
