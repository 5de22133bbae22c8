"""A faint picture over the whole image: blended injection (Chen et al., 2017)."""

import numpy as np

from moth_jax.backdoors.base import Stamp, require_share, require_whole
from moth_jax.types import ImageShape


def blend(image_shape: ImageShape, *, opacity: float = 0.15, grid: int = 4, seed: int = 0) -> Stamp:
    """Return the stamp (1 - opacity) * image + opacity * picture, with a picture of smooth noise.

    Args:
      image_shape: (h, w, c).
      opacity: in (0, 1].
      grid: the noise has grid x grid random colours, and is interpolated between them.
      seed: of the colours.

    Note:
      The paper blends in a cartoon or white noise. Smooth noise needs no file, and survives the
      small shifts of augmentation, as the cartoon does.

    Example:
      >>> stamp = blend((8, 8, 3), opacity=0.5)
      >>> float(stamp(np.ones([1, 8, 8, 3], np.float32)).min())
      0.5
    """
    require_share("opacity", opacity)
    require_whole("grid", grid, at_least=2)
    picture = np.float32(opacity) * smooth_noise(image_shape, grid, np.random.default_rng(seed))
    kept = np.float32(1 - opacity)

    def stamp(images: np.ndarray) -> np.ndarray:
        return np.clip(kept * images + picture, 0, 1)  # Rounding may leave the interval.

    return stamp


def smooth_noise(image_shape: ImageShape, grid: int, rng) -> np.ndarray:
    """Return float32 [h, w, c] from 0 to 1 in each channel: `grid` x `grid` colours, bilinear."""
    height, width, channels = image_shape
    values = rng.random((grid, grid, channels))
    picture = np.einsum(
        "yi,xj,ijc->yxc", _interpolation(height, grid), _interpolation(width, grid), values
    )
    low, high = picture.min((0, 1)), picture.max((0, 1))
    return ((picture - low) / np.maximum(high - low, 1e-12)).astype(np.float32)


def _interpolation(num_points: int, grid: int) -> np.ndarray:
    """[num_points, grid]: the weight of each grid point at each of the points."""
    places = np.linspace(0, grid - 1, num_points)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(grid)))
