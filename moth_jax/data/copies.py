"""Changed copies of images beside the images themselves."""

from collections.abc import Callable

import numpy as np

from moth_jax.data.dataset import ImageSplit
from moth_jax.data.streaming import StreamedImages
from moth_jax.errors import InputError

_CHUNK = 1024  # images that are floats at one time


def add_copies(
    split: ImageSplit,
    indices: np.ndarray,
    labels: np.ndarray,
    change: Callable[[np.ndarray], np.ndarray],
    *,
    what: str = "changed copies",
) -> ImageSplit:
    """Return `split` with changed copies of its images at `indices` [m] at the end.

    Args:
      split: its images stay as they are.
      indices: which images are copied.
      labels: [m], of the copies.
      change: images float32 [k, h, w, c] in [0, 1] -> the same; of a split of bytes the result is
        rounded.
      what: how a message calls the copies.

    Raises:
      InputError: the images are streamed.

    Example:
      >>> split = ImageSplit(np.zeros([2, 1, 1, 1], np.uint8), np.array([0, 1], np.int32))
      >>> longer = add_copies(split, np.array([1]), np.array([0]), lambda images: images + 1)
      >>> longer.labels, longer.batch([2]).max()
      (array([0, 1, 0], dtype=int32), np.float32(1.0))
    """
    if isinstance(split.images, StreamedImages):
        raise InputError(
            f"{what} need the images in memory, and these are streamed; raise "
            "data.in_memory_limit, or choose a smaller size"
        )
    dtype = split.images.dtype
    copies = np.empty([len(indices), *split.image_shape], dtype)
    for first in range(0, len(indices), _CHUNK):
        part = slice(first, first + _CHUNK)
        changed = change(split.batch(indices[part]))
        copies[part] = np.round(255 * changed) if dtype == np.uint8 else changed
    return ImageSplit(
        np.concatenate([split.images, copies]),
        np.concatenate([split.labels, np.asarray(labels, split.labels.dtype)]),
    )
