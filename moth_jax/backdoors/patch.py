"""A square patch in a fixed place: BadNets (Gu et al., 2017)."""

import numpy as np

from moth_jax.backdoors.base import Stamp, as_colour, corner, require_whole
from moth_jax.types import ImageShape


def patch(
    image_shape: ImageShape,
    *,
    size: int = 3,
    position: str = "bottom right",
    margin: int = 1,
    colour: tuple[float, ...] = (),
    seed: int = 0,
) -> Stamp:
    """Return the stamp of a square patch; all pixels around it are kept.

    Args:
      image_shape: (h, w, c).
      size: its side in pixels.
      position: one of `base.POSITIONS`.
      margin: pixels between it and the border. Augmentation by shifts of more than that moves a
        part of it out of the picture, and poisoned images without trigger teach wrong labels.
      colour: c numbers in [0, 1]; () is a pattern in which each value is 0 or 1 by chance.
      seed: of that pattern.

    Raises:
      InputError: it does not fit into the image, or an option is out of range.

    Example:
      >>> stamp = patch((8, 8, 1), size=2, margin=0, colour=(1.0,))
      >>> int(stamp(np.zeros([1, 8, 8, 1], np.float32)).sum())
      4
    """
    require_whole("size", size, at_least=1)
    top, left = corner(position, (size, size), image_shape, margin=margin)
    if len(colour):
        pattern = np.broadcast_to(as_colour(colour, image_shape), (size, size, image_shape[2]))
    else:
        pattern = np.random.default_rng(seed).integers(0, 2, (size, size, image_shape[2]))

    def stamp(images: np.ndarray) -> np.ndarray:
        stamped = images.copy()
        stamped[:, top : top + size, left : left + size] = pattern
        return stamped

    return stamp
