"""Labelled images: `ImageSplit`, `ImageDataset`, and what makes one valid."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moth_jax.data.checks import (
    check_brightness,
    check_class_names,
    check_every_class,
    check_images,
    check_labels,
)
from moth_jax.data.conversion import as_array, as_images, as_labels
from moth_jax.data.streaming import StreamedImages
from moth_jax.errors import InputError, listed
from moth_jax.types import ImageShape

_MOST_LOOKED_AT = 128  # streamed images of a part


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """One part of a data set.

    Attributes:
      images: an array [n, h, w, c], uint8 or float32 in [0, 1], or `StreamedImages`, which may be
        more than fit in memory. Only `data/` and poisoning look at it; all others ask for batches.
      labels: int32 [n].
      names: of the images, such as paths; None where they have none, or are streamed.

    Example:
      >>> split = ImageSplit(np.full([3, 2, 2, 1], 255, np.uint8), np.array([0, 1, 0], np.int32))
      >>> len(split), split.image_shape, split.batch([0, 2]).max(), split.of_class(0)
      (3, (2, 2, 1), np.float32(1.0), array([0, 2]))
    """

    images: np.ndarray | StreamedImages
    labels: np.ndarray
    names: Sequence[str] | None = None

    def __post_init__(self):
        if not isinstance(self.images, StreamedImages):
            object.__setattr__(self, "images", as_array(self.images, "images"))
        object.__setattr__(self, "labels", as_array(self.labels, "labels"))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        _, height, width, channels = self.images.shape
        return int(height), int(width), int(channels)

    def batch(self, indices) -> np.ndarray:
        """Images float32 [m, h, w, c] in [0, 1] at `indices` [m]."""
        return _as_unit(self.images[np.asarray(indices, np.int64)])

    def batches(self, batches: Sequence) -> Iterator[np.ndarray]:
        """Yield `batch(indices)` for each indices of `batches`.

        Streamed images of the next batch are decoded while the caller works on the last one.
        """
        if isinstance(self.images, StreamedImages):
            yield from map(_as_unit, self.images.batches(batches))
        else:
            yield from map(self.batch, batches)

    def subset(self, indices) -> "ImageSplit":
        """The images at `indices` [m] alone."""
        return ImageSplit(self.images[np.asarray(indices, np.int64)], self.labels[indices])

    def of_class(self, k: int, limit: int | None = None) -> np.ndarray:
        """Indices int64 of the first `limit` samples of class `k`, in order (all if None)."""
        return np.flatnonzero(self.labels == k)[:limit]


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images for training, validation and test, and what a model of them has to know.

    Attributes:
      name: of the data set.
      train, validation, test: the parts. Validation is for every decision made on the way; test
        is for the final numbers.
      class_names: K names, in label order.
      mean, std: per channel, of the training images in [0, 1].
      flip: whether a mirrored image keeps its class.
      shift: by how many pixels images are moved at most when they are augmented.
    """

    name: str
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    shift: int = 0

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        return self.train.image_shape

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The classes there are training samples of, ascending: all K, or fewer of a large head."""
        return tuple(np.unique(self.train.labels).tolist())


def as_split(given) -> ImageSplit:
    """Return an `ImageSplit`, also of a pair (images, labels) of arrays of any library.

    Raises:
      InputError: it is neither, or the images or labels cannot be used.
    """
    if isinstance(given, ImageSplit):
        return given
    if isinstance(given, tuple | list) and len(given) == 2:
        images, labels = as_images(given[0]), as_array(given[1], "labels")
        num_classes = max(2, int(labels.max(initial=0)) + 1)
        return ImageSplit(images, as_labels(labels, num_classes, num_images=len(images)))
    raise InputError(
        "images must be given as a pair (images, labels), or a part of an `ImageDataset`, such as "
        f"dataset.test; got {type(given).__name__}"
    )


def validate(dataset: ImageDataset, *, every_class: bool = True) -> ImageDataset:
    """Return `dataset` if a model can be trained and measured on it, else raise `InputError`.

    With `every_class`, each part must have samples of all K classes; else validation and test must
    have those of the training part, which are at least two.
    """
    check_class_names(dataset.class_names)
    looked_at = {}
    for part in ("train", "validation", "test"):
        split = getattr(dataset, part)
        what = f"{dataset.name} {part}"
        looked_at[part] = images = _looked_at(split.images)
        of = f"{what} images" if images is split.images else f"a sample of the {what} images"
        check_images(images, image_shape=dataset.image_shape, what=of)
        check_labels(
            split.labels, dataset.num_classes, num_images=len(split.images), what=f"{what} labels"
        )
        remedy = "add images of them, or a larger validation_fraction"
        check_every_class(
            split.labels,
            dataset.class_names,
            classes=None if every_class else dataset.present,
            what=what,
            remedy=remedy if part == "validation" else "",
        )
    check_brightness(looked_at, what=dataset.name)
    present = [dataset.class_names[k] for k in dataset.present]
    if len(present) < 2:
        raise InputError(
            f"{dataset.name} has images of a single class, {listed(present)}; a distance needs at "
            "least 2"
        )
    _check_description(dataset)
    return dataset


def _looked_at(images):
    """The images; of streamed ones some, all over the part, as to read them all takes hours."""
    if not isinstance(images, StreamedImages):
        return images
    count = min(len(images), _MOST_LOOKED_AT)
    return images[np.arange(count) * len(images) // count]


def _check_description(dataset):
    for name, values in (("mean", dataset.mean), ("std", dataset.std)):
        if len(values) != dataset.image_shape[2] or not np.isfinite(values).all():
            raise InputError(
                f"{name} must be {dataset.image_shape[2]} numbers, one per channel, got {values}"
            )
    if min(dataset.std) <= 0:
        raise InputError(
            f"std must be positive in every channel, got {dataset.std}: a channel has the same "
            "value everywhere; leave it out"
        )
    if not 0 <= dataset.shift < min(dataset.image_shape[:2]):
        raise InputError(
            f"shift must be in [0, {min(dataset.image_shape[:2])}) pixels for images of shape "
            f"{dataset.image_shape}, got {dataset.shift}"
        )


def _as_unit(images):
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32)
