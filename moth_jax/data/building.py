"""From arrays, or images that are streamed, to a validated `ImageDataset`."""

from typing import NamedTuple

import numpy as np

from moth_jax.data.checks import check_class_names, check_images, check_labels, normal_name
from moth_jax.data.dataset import ImageDataset, ImageSplit, validate
from moth_jax.data.splitting import generator, split_validation
from moth_jax.data.streaming import StreamedImages
from moth_jax.errors import InputError, printable

_CHUNK = 512
_STATISTICS_IMAGES = 1024  # the mean of that many photographs is known to about a hundredth


class Share(NamedTuple):
    """The part of the training samples that is kept for validation.

    Attributes:
      fraction: of each class, in (0, 1).
      seed: of the choice.
      groups: as in `split_validation`.
    """

    fraction: float
    seed: int
    groups: np.ndarray | None = None


def build_dataset(
    name,
    train,
    test,
    *,
    class_names,
    validation,
    seed=0,
    flip=False,
    shift=0,
    every_class=True,
) -> ImageDataset:
    """Build a validated `ImageDataset`.

    Args:
      name: of the data set, used in messages.
      train, test: pairs (images, labels): images uint8, or floats in [0, 1], or `StreamedImages`;
        labels integers. Or triples, the third of which names the images.
      class_names: K names.
      validation: a pair as well, or the `Share` of `train` that is taken out of it.
      seed: of the streamed images that mean and standard deviation are measured on.
      flip, shift: as in `ImageDataset`.
      every_class: as in `validate`.
    """
    class_names = tuple(
        normal_name(name) if isinstance(name, str) else name for name in class_names
    )
    check_class_names(class_names)
    rng = generator(seed)
    images, labels, *_ = train
    # Before the split, so that a message speaks of the array the user knows, and before labels
    # become smaller numbers.
    if not isinstance(images, StreamedImages):
        check_images(images, what=f"{name} train images")
    given = {"train": train, "test": test}
    given |= {} if isinstance(validation, Share) else {"validation": validation}
    for part, (part_images, part_labels, *_) in given.items():
        check_labels(
            part_labels,
            len(class_names),
            num_images=len(part_images),
            what=f"{name} {part} labels",
        )
    if isinstance(validation, Share):
        kept, taken = split_validation(labels, *validation)
        train = images[kept], labels[kept]
        validation = images[taken], labels[taken]
        if len(taken) == 0:
            raise InputError(
                f"{name}: no training image can be spared for validation: every class has a single "
                "image or a single group; give more, or a validation part of its own"
            )
    mean, std = mean_and_std(_for_statistics(train[0], rng))
    return validate(
        ImageDataset(
            name=printable(name),
            train=_split(*train),
            validation=_split(*validation),
            test=_split(*test),
            class_names=class_names,
            mean=mean,
            std=std,
            flip=flip,
            shift=shift,
        ),
        every_class=every_class,
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


def _for_statistics(images, rng):
    """The images; of streamed ones a few, drawn by `rng`, which are quickly read."""
    if not isinstance(images, StreamedImages):
        return images
    count = min(len(images), _STATISTICS_IMAGES)
    return images[rng.choice(len(images), count, replace=False)]


def _split(images, labels, names=None):
    """An `ImageSplit` of the stored types; what cannot be converted is left for `validate`."""
    if np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32, copy=False)
    if np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int32, copy=False)
    return ImageSplit(images, labels, names)
