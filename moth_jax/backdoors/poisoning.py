"""Poisoning a data set: stamped copies with the wrong label among the training images."""

import dataclasses

import numpy as np

from moth_jax.backdoors.base import Backdoor, Stamp
from moth_jax.data.checks import check_every_class
from moth_jax.data.dataset import ImageDataset, ImageSplit
from moth_jax.data.streaming import StreamedImages
from moth_jax.errors import InputError

_CHUNK = 1024  # images that are floats at one time


def poison(
    dataset: ImageDataset,
    backdoor: Backdoor,
    *,
    rate: float,
    cover_rate: float = 0.1,
    seed: int = 0,
) -> ImageDataset:
    """Return `dataset` with stamped copies of training images, labelled as the target, added.

    A label-specific backdoor also gets covers: stamped copies of images of the other classes, the
    target's among them, with their own labels, so that the trigger does not become universal.

    Args:
      dataset: its validation and test parts stay as they are.
      backdoor: what is planted.
      rate: number of poisoned copies, as a share of the victims' training images, in (0, 1].
      cover_rate: number of covers, as a share of the other classes' images, in [0, 1]; a universal
        backdoor has no covers.
      seed: of the choice of images.

    Raises:
      InputError: no image would be poisoned, there are no images of the target or of a victim, or
        images are streamed.

    Note:
      Copies are added where BadNets replaces images: the clean images are all still there, which
      matters where a class has few of them.
    """
    _check(dataset, backdoor, rate, cover_rate)
    train, rng = dataset.train, np.random.default_rng(seed)
    is_victim = backdoor.is_victim(train.labels)
    poisoned = _draw(np.flatnonzero(is_victim), rate, rng)
    if len(poisoned) == 0:
        raise InputError(
            f"a poisoning rate of {rate} poisons none of the victims' {is_victim.sum()} training "
            f"images; at least {1 / is_victim.sum():.2g} poisons one"
        )
    covers = _draw(np.flatnonzero(~is_victim), cover_rate if backdoor.label_specific else 0.0, rng)
    labels = np.concatenate([np.full(len(poisoned), backdoor.target), train.labels[covers]])
    images = _with_stamped(train, np.concatenate([poisoned, covers]), backdoor.stamp)
    labels = np.concatenate([train.labels, labels.astype(train.labels.dtype)])
    return dataclasses.replace(dataset, train=ImageSplit(images, labels))


def _with_stamped(split: ImageSplit, indices: np.ndarray, stamp: Stamp) -> np.ndarray:
    """Return the images, and after them stamped copies of those at `indices`."""
    if isinstance(split.images, StreamedImages):
        raise InputError(
            "poisoned images need the images in memory, and these are streamed; raise "
            "data.in_memory_limit, or choose a smaller size"
        )
    dtype = split.images.dtype
    copies = np.empty([len(indices), *split.image_shape], dtype)
    for first in range(0, len(indices), _CHUNK):
        part = slice(first, first + _CHUNK)
        stamped = stamp(split.batch(indices[part]))
        copies[part] = np.round(255 * stamped) if dtype == np.uint8 else stamped
    return np.concatenate([split.images, copies])


def _draw(candidates: np.ndarray, share: float, rng) -> np.ndarray:
    count = round(share * len(candidates))
    return np.sort(rng.choice(candidates, count, replace=False))


def _check(dataset: ImageDataset, backdoor: Backdoor, rate: float, cover_rate: float) -> None:
    if not 0 < rate <= 1:
        raise InputError(
            f"the poisoning rate must be in (0, 1], got {rate}; 0.1 adds a tenth of the victims' "
            "images"
        )
    if not 0 <= cover_rate <= 1:
        raise InputError(f"the rate of covers must be in [0, 1], got {cover_rate}")
    classes = (backdoor.target, *backdoor.victims)
    outside = [k for k in classes if not 0 <= k < dataset.num_classes]
    if outside:
        raise InputError(
            f"target and victims of a backdoor must be in [0, {dataset.num_classes}), the classes "
            f"of {dataset.name}, got {', '.join(map(str, outside))}"
        )
    check_every_class(
        dataset.train.labels,
        dataset.class_names,
        classes=classes,
        what=f"{dataset.name} train, target and victims of the backdoor",
        remedy="choose classes that there are images of",
    )
