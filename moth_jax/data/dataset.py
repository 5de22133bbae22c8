"""Labelled images: `ImageSplit`, `ImageDataset`, and what makes one valid."""

from dataclasses import dataclass

import numpy as np

from moth_jax.data.checks import (
    check_class_names,
    check_every_class,
    check_images,
    check_labels,
)
from moth_jax.data.splitting import split_validation
from moth_jax.errors import InputError

__all__ = [
    "ImageDataset",
    "ImageSplit",
    "build_dataset",
    "check_images",
    "check_labels",
    "mean_and_std",
    "split_validation",
    "validate",
]

_CHUNK = 512


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """One part of a data set.

    Attributes:
      images: [n, h, w, c], uint8 or float32 in [0, 1]. Only `shape`, `dtype` and indexing with an
        array of indices are used outside `validate` and `mean_and_std`, so that a source which
        reads images when asked can stand here too.
      labels: int32 [n].

    Example:
      >>> split = ImageSplit(np.full([3, 2, 2, 1], 255, np.uint8), np.array([0, 1, 0], np.int32))
      >>> len(split), split.batch([0, 2]).max(), split.of_class(0)
      (3, np.float32(1.0), array([0, 2]))
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices) -> np.ndarray:
        """Images float32 [m, h, w, c] in [0, 1] at `indices` [m]."""
        images = self.images[np.asarray(indices, np.int64)]
        if images.dtype == np.uint8:
            return images.astype(np.float32) / np.float32(255)
        return images.astype(np.float32)

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
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return tuple(int(size) for size in self.train.images.shape[1:])


def validate(dataset: ImageDataset) -> ImageDataset:
    """Return `dataset` if a model can be trained and measured on it, else raise `InputError`."""
    check_class_names(dataset.class_names)
    for part in ("train", "validation", "test"):
        split = getattr(dataset, part)
        what = f"{dataset.name} {part}"
        check_images(split.images, image_shape=dataset.image_shape, what=f"{what} images")
        check_labels(
            split.labels, dataset.num_classes, num_images=len(split.images), what=f"{what} labels"
        )
        remedy = "add images of them, or a larger validation_fraction"
        check_every_class(
            split.labels,
            dataset.class_names,
            what=what,
            remedy=remedy if part == "validation" else "",
        )
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
    return dataset


def build_dataset(
    name,
    train,
    test,
    *,
    class_names,
    validation=None,
    groups=None,
    validation_fraction=0.1,
    seed=0,
    flip=False,
    shift=0,
) -> ImageDataset:
    """Build a validated `ImageDataset`.

    Args:
      name: of the data set, used in messages.
      train, test: pairs (images, labels): uint8, or floats in [0, 1]; integers.
      class_names: K names.
      validation: a pair as well, or None to take it out of `train`.
      groups: as in `split_validation`, for the training samples.
      validation_fraction: share of `train` taken, in (0, 1).
      seed: of that choice.
      flip: as in `ImageDataset`.
      shift: as in `ImageDataset`.
    """
    class_names = tuple(class_names)
    check_class_names(class_names)
    images, labels = train
    # Before the split, so that a message speaks of the array the user knows.
    check_images(images, what=f"{name} train images")
    check_labels(labels, len(class_names), num_images=len(images), what=f"{name} train labels")
    if validation is None:
        kept, taken = split_validation(labels, validation_fraction, seed, groups)
        train = images[kept], labels[kept]
        validation = images[taken], labels[taken]
        if len(taken) == 0:
            raise InputError(
                f"{name}: no training image can be spared for validation: every class has a single "
                "image or a single group; give more, or a validation part of its own"
            )
    mean, std = mean_and_std(train[0])
    return validate(
        ImageDataset(
            name=name,
            train=_split(*train),
            validation=_split(*validation),
            test=_split(*test),
            class_names=class_names,
            mean=mean,
            std=std,
            flip=flip,
            shift=shift,
        )
    )


def mean_and_std(images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in [0, 1] units, of images [n, h, w, c].

    Summed in float64 over a few hundred images at a time: the copies stay small for any n.

    Example:
      >>> mean_and_std(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
      ((0.5,), (0.5,))
    """
    total = np.zeros(images.shape[-1])
    square = np.zeros(images.shape[-1])
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    for start in range(0, len(images), _CHUNK):
        chunk = np.asarray(images[start : start + _CHUNK], np.float64) / scale
        total += chunk.sum((0, 1, 2))
        square += np.square(chunk).sum((0, 1, 2))
    count = np.prod(images.shape[:3])
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    return tuple(mean.tolist()), tuple(std.tolist())


def _split(images, labels):
    """An `ImageSplit` of the stored types; what cannot be converted is left for `validate`."""
    if np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32, copy=False)
    if np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int32, copy=False)
    return ImageSplit(images, labels)
