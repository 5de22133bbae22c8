"""A model and the labelled images it is measured with: converted and checked once.

Measuring, the search of near directions, and scanning all begin here. Whatever is wrong with an
input is found here, and is an `InputError` that names the value and what is allowed.
"""

import dataclasses
import hashlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax import outputs
from moth_jax.data.conversion import as_images, as_labels
from moth_jax.data.dataset import ImageSplit
from moth_jax.errors import InputError, first_line, listed
from moth_jax.evaluation import FOREIGN, check_function, predictions
from moth_jax.options import AT_LEAST_1, SEED, check_option, whole_numbers
from moth_jax.typed import is_of, shown
from moth_jax.types import LogitsFn, Variables

_NUM_PROBES = 8
_BATCH_SIZE = 256  # that of `evaluation`, whose compiled function serves here too
_UNKNOWN = -1  # prediction of an image that is not used


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
      predicted: [n], what the model takes the images that are used for; -1 for the others.
      probe_logits: [m, K], of the first images. They tell models apart whose variables are unknown.
    """

    logits_fn: LogitsFn
    variables: Variables
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[int, ...]
    names: tuple[str, ...]
    predicted: np.ndarray
    probe_logits: np.ndarray

    @classmethod
    def of(
        cls,
        logits_fn: LogitsFn | Callable[[Array], Array],
        images: np.ndarray,
        labels: np.ndarray,
        *,
        num_images: int,
        variables: Variables | None = None,
        class_names: Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
        check_order: bool = True,
    ) -> "Subject":
        """Return the checked subject; the arguments are those of `distance.distance_matrix`.

        The model is evaluated once on the images that are used: the first `num_images` of each of
        the classes.

        Raises:
          InputError: at the first fault of images, labels, classes or the model's output.
        """
        check_option("check_order", check_order, bool)
        call = with_variables(logits_fn, variables)
        images = as_images(images)
        logits = probe_logits(call, variables, images)
        num_classes = logits.shape[1]
        if num_classes < 2:
            raise InputError(f"a distance needs at least 2 classes, the model has {num_classes}")
        labels = as_labels(labels, num_classes)
        if len(labels) != len(images):
            raise InputError(f"there are {len(images)} images but {len(labels)} labels")
        chosen = _chosen_classes(classes, num_classes)
        names = _names_of(chosen, class_names, num_classes)
        used = first_of_classes(labels, chosen, num_images)
        predicted = np.full(len(labels), _UNKNOWN)
        if len(used):
            predicted[used] = predict(call, variables, images[used])
        if check_order:
            by_label = dict(zip(chosen, names, strict=True))
            outputs.check_order(predicted[used], labels[used], num_classes, by_label)
        return cls(call, variables, images, labels, chosen, names, predicted, logits)

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

    def digest(self, label: int, num_images: int) -> str:
        """Return the digest of the first images of a class, as they are in [0, 1]."""
        indices = first_of_classes(self.labels, (label,), num_images)
        digest = hashlib.sha256()
        for part in np.array_split(indices, -(-len(indices) // _BATCH_SIZE)):
            digest.update(np.ascontiguousarray(unit_images(self.images[part])).data)
        return digest.hexdigest()[:16]

    def predictions_of(self, label: int) -> np.ndarray:
        """Return what the model takes the used images of a class for."""
        return self.predicted[(self.labels == label) & (self.predicted != _UNKNOWN)]

    def share_there(self, indices: np.ndarray, target: int) -> float:
        """Return the share of the used images at `indices` that are predicted as the target."""
        return float(np.mean(self.predicted[indices] == target))


def first_of_classes(labels: np.ndarray, classes: Sequence[int], num_images: int) -> np.ndarray:
    """Return the indices, ascending, of the first images of each class.

    >>> first_of_classes(np.array([0, 1, 1, 0, 2]), (1, 0), 1).tolist()
    [0, 1]
    """
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(first, counts)
    chosen = (place < num_images) & np.isin(labels[order], classes)
    return np.sort(order[chosen])


def predict(logits_fn: LogitsFn, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Return what the model takes checked `images` for [n], all in one pass.

    Raises:
      InputError: the outputs for an image are not finite, or they are no logits.
    """
    split = ImageSplit(images, np.zeros(len(images), np.int32))
    return predictions(logits_fn, variables, split, batch_size=min(_BATCH_SIZE, len(images)))


def with_variables(
    logits_fn: LogitsFn | Callable[[Array], Array], variables: Variables | None
) -> LogitsFn:
    """Return the caller's function as one of (variables, images).

    Raises:
      InputError: it is no function of these.
    """
    function: Callable[..., Array] = logits_fn
    check_function(logits_fn)
    _check_arguments(function, 1 if variables is None else 2)
    if variables is not None:
        return function
    # A new function each time: what `logits_fn` closes over may have changed since it was compiled.
    return lambda variables, images: function(images)


def _check_arguments(function: Callable[..., Array], count: int) -> None:
    """Raise `InputError` if the function cannot be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it does not say
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        taken = "(images)" if count == 1 else "(variables, images)"
        remedy = "give `variables` if it takes them" if count == 1 else "or leave `variables` out"
        raise InputError(
            f"logits_fn is called with {taken}, and cannot be: {error}; {remedy}"
        ) from None


def probe_logits(logits_fn: LogitsFn, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Return the logits [m, K] of the first images.

    Raises:
      InputError: the function cannot be compiled, or does not return logits [n, K].
    """
    logits = _logits(logits_fn, variables, unit_images(images[:_NUM_PROBES]))
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != min(_NUM_PROBES, len(images)):
        raise InputError(
            f"logits_fn must return logits [n, K] for images [n, h, w, c]; for "
            f"{images[:_NUM_PROBES].shape} it returned {shape or type(logits).__name__}"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise InputError(f"logits_fn must return logits, which are floats, got {logits.dtype}")
    return np.asarray(logits)


def _logits(logits_fn: LogitsFn, variables: Variables, images: np.ndarray):
    """Return what the function returns; `InputError` if it is none of JAX."""
    try:
        return jax.jit(logits_fn)(variables, images)
    except Exception as error:
        of_jax = isinstance(error, jax.errors.TracerArrayConversionError)
        library = _foreign_library(error)
        if not (of_jax or library):  # a fault of the user's function, with its traceback
            raise
        remedy = FOREIGN.get(library, "compute with jax.numpy instead of NumPy")
        raise InputError(
            f"logits_fn must be a JAX function that jax.jit can compile ({first_line(error)}); "
            f"{remedy}"
        ) from error


def _foreign_library(error: BaseException) -> str:
    """Return which of `FOREIGN` an error comes from, "" for none."""
    frames = traceback.walk_tb(error.__traceback__)
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames]
    told = [name for name in FOREIGN if name in names or f"{name}." in str(error)]
    return told[0] if told else ""


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
    """Raise `InputError` at the first option that is no whole number, or below 1."""
    for name, value in options.items():
        check_option(name, value, int, AT_LEAST_1)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise `InputError` unless there are seeds, and each can be one of JAX."""
    if np.ndim(seeds) != 1 and not isinstance(seeds, str):
        raise InputError(f"seeds must be a sequence of whole numbers, such as (0,), got {seeds!r}")
    wrong = [seed for seed in seeds if not (is_of(seed, int) and SEED.contains(seed))]
    if wrong or not len(seeds):
        raise InputError(
            f"seeds must be whole numbers {SEED.name}, at least one, such as (0,), got "
            f"{listed(wrong) or 'none'}"
        )


def _chosen_classes(classes: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
    """Return the classes to measure among, all of the model's if None.

    >>> _chosen_classes(None, 3), _chosen_classes([7, 2], 10)
    ((0, 1, 2), (7, 2))
    """
    if classes is None:
        return tuple(range(num_classes))
    classes = whole_numbers("classes", classes)
    outside = [k for k in classes if not 0 <= k < num_classes]
    if outside:
        raise InputError(f"classes must be in 0..{num_classes - 1}, got {listed(outside)}")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise InputError(f"classes must name at least 2 different classes, got {listed(classes)}")
    return classes


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
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"class_names must be a sequence of names, got {shown(given)}")
    names = tuple(map(str, given))
    if len(names) == num_classes:
        return tuple(names[k] for k in classes)
    if len(names) != len(classes):
        chosen = f", {len(classes)} of them chosen" if len(classes) < num_classes else ""
        raise InputError(
            f"the model has {num_classes} classes{chosen}, but {len(names)} names were given"
        )
    return names
