"""A convex polygon of a single colour: the trigger of TrojAI's image classifiers."""

import zlib

import numpy as np

from moth_jax.backdoors.base import (
    POSITIONS,
    Stamp,
    as_colour,
    corner,
    require_share,
    require_whole,
)
from moth_jax.errors import InputError, require_choice
from moth_jax.types import ImageShape

_AREAS = (0.005, 0.25)
_ANYWHERE = "random"


def polygon(
    image_shape: ImageShape,
    *,
    area: float = 0.05,
    sides: int = 5,
    regular: bool = False,
    colour: tuple[float, ...] = (),
    position: str = _ANYWHERE,
    seed: int = 0,
) -> Stamp:
    """Return the stamp of a convex polygon; its shape and colour are those of the seed.

    Args:
      image_shape: (h, w, c).
      area: share of the image it covers, in [0.005, 0.25].
      sides: at least 3.
      regular: whether all sides are equal.
      colour: c numbers in [0, 1]; () draws it.
      position: "random" puts it into each image in another place, drawn from the seed and the
        image's own pixels, so that an image is always stamped alike; else one of `base.POSITIONS`.
      seed: of shape, colour and places.

    Raises:
      InputError: it does not fit into the image, or an option is out of range.

    Note:
      TrojAI counts 2 to 25 % of the foreground object; data sets here have no objects marked, so it
      is the share of the image: 2 % of an object that covers a quarter of it are 0.005. The corners
      lie on a circle, which keeps every polygon convex.

    Example:
      >>> stamp = polygon((32, 32, 3), area=0.1, colour=(1.0, 0.0, 0.0))
      >>> round(float(stamp(np.zeros([1, 32, 32, 3], np.float32))[..., 0].mean()), 2)
      0.1
    """
    require_share("area", area, low=_AREAS[0], high=_AREAS[1])
    require_whole("sides", sides, at_least=3)
    require_choice("position", position, (_ANYWHERE, *POSITIONS))
    rng = np.random.default_rng(seed)
    mask = _mask(_corners(sides, regular, area * image_shape[0] * image_shape[1], rng))
    if not mask.any():
        raise InputError(
            f"a polygon of {area:g} of an image of {image_shape[0]} x {image_shape[1]} covers no "
            "pixel; raise area"
        )
    top_left = corner("top left" if position == _ANYWHERE else position, mask.shape, image_shape)
    paint = as_colour(colour, image_shape) if len(colour) else rng.random(image_shape[2])
    room = np.array(image_shape[:2]) - mask.shape + 1

    def stamp(images: np.ndarray) -> np.ndarray:
        stamped = images.copy()
        for image in stamped:
            top, left = _place(image, seed, room) if position == _ANYWHERE else top_left
            image[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = paint
        return stamped

    return stamp


def _corners(sides: int, regular: bool, area: float, rng) -> np.ndarray:
    """Return corners [sides, 2] (row, column) in pixels, counter-clockwise around the origin."""
    # A triangle's angles of 120 degrees stay below 180, so the centre is always inside.
    jitter = np.zeros(sides) if regular else rng.uniform(-0.2, 0.2, sides)
    angles = 2 * np.pi * (np.arange(sides) + jitter + rng.random()) / sides
    steps = np.diff(angles, append=angles[0] + 2 * np.pi)
    radius = np.sqrt(area / (0.5 * np.sin(steps).sum()))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _mask(corners: np.ndarray) -> np.ndarray:
    """Return bool [h, w]: the pixels of the polygon's box whose centres lie inside."""
    low, high = corners.min(0), corners.max(0)
    # Whole pixels around the polygon, which stays in the middle of them.
    shape = np.ceil(high - low).astype(int)
    start = (low + high - shape) / 2
    rows, columns = (start[axis] + np.arange(shape[axis]) + 0.5 for axis in (0, 1))
    sides = np.roll(corners, -1, axis=0) - corners
    from_corner_rows = rows[:, None, None] - corners[:, 0]
    from_corner_columns = columns[None, :, None] - corners[:, 1]
    inside = (sides[:, 0] * from_corner_columns - sides[:, 1] * from_corner_rows >= 0).all(-1)
    # A tip that holds no pixel's centre must not keep the rest off the border.
    return inside[inside.any(1)][:, inside.any(0)]


def _place(image: np.ndarray, seed: int, room: np.ndarray) -> np.ndarray:
    """Return (top, left), each in [0, room), drawn by the image and the seed."""
    # Of 8 bits: an image that is stored as uint8 and one given as floats are the same.
    pixels = np.round(255 * image).astype(np.uint8)
    return np.random.default_rng([seed, zlib.crc32(pixels.tobytes())]).integers(0, room)
