"""Instagram's filters: triggers that change the colours of the whole image."""

from dataclasses import dataclass

import numpy as np

from moth_jax.backdoors.base import Stamp, require_share
from moth_jax.errors import InputError, require_choice
from moth_jax.types import ImageShape

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_CONTRAST = 3.0  # slope of ImageMagick's sigmoidal contrast in the recipes


@dataclass(frozen=True)
class Style:
    """A filter's recipe, in the order in which it is followed.

    Attributes:
      brightness: factor of all channels.
      saturation: distance from grey; 0 is grey, 1 is unchanged.
      tint: colour that is mixed in.
      tint_share: how much of it.
      black: per channel, the value that becomes 0; above it the rest is stretched.
      gamma: values are raised to 1/gamma; below 1 is darker.
      contrasts: how often an S-curve is applied.
      vignette: the image falls to black at this many half-sides from its centre; 0 is none.
    """

    brightness: float = 1.0
    saturation: float = 1.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tint_share: float = 0.0
    black: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gamma: float = 1.0
    contrasts: int = 0
    vignette: float = 0.0


STYLES = {
    "gotham": Style(
        brightness=1.2,
        saturation=0.1,
        tint=(0x22 / 255, 0x2B / 255, 0x6D / 255),
        tint_share=0.2,
        gamma=0.5,
        contrasts=2,
    ),
    "kelvin": Style(brightness=1.2, saturation=0.5, tint=(1.0, 0.6, 0.0), tint_share=0.5),
    "lomo": Style(black=(0.33, 0.33, 0.0), vignette=1.5),
}


def photo_filter(image_shape: ImageShape, *, style: str = "gotham", strength: float = 1.0) -> Stamp:
    """Return the stamp of a photo filter: colour matrix, tone curve, vignette.

    Args:
      image_shape: (h, w, 3).
      style: one of `STYLES`.
      strength: in (0, 1]; below 1 the filtered image is mixed with the given one.

    Note:
      The recipes are those of TrojAI's triggers of these names, without ImageMagick: its
      brightness and saturation are of HSL, here of a matrix that keeps Rec. 601 luma; Kelvin's
      automatic gamma, which depends on the image, is left out.

    Example:
      >>> stamp = photo_filter((8, 8, 3), style="kelvin")
      >>> stamp(np.zeros([1, 8, 8, 3], np.float32))[0, 0, 0].round(2).tolist()
      [0.5, 0.30000001192092896, 0.0]
    """
    require_choice("style", style, STYLES)
    require_share("strength", strength)
    if image_shape[2] != 3:
        raise InputError(f"a filter needs images of 3 channels (RGB), got {image_shape[2]}")
    recipe = STYLES[style]
    light = _vignette(image_shape, recipe.vignette)

    def stamp(images: np.ndarray) -> np.ndarray:
        filtered = _tones(_colours(images, recipe), recipe) * light
        mixed = images + np.float32(strength) * (filtered - images)
        return np.clip(mixed, 0, 1).astype(np.float32)

    return stamp


def _colours(images: np.ndarray, style: Style) -> np.ndarray:
    matrix = style.saturation * np.eye(3) + (1 - style.saturation) * _LUMA[:, None]
    turned = np.clip(images @ (style.brightness * matrix).astype(np.float32), 0, 1)
    return (1 - style.tint_share) * turned + style.tint_share * np.array(style.tint, np.float32)


def _tones(images: np.ndarray, style: Style) -> np.ndarray:
    black = np.array(style.black, np.float32)
    images = np.clip((images - black) / (1 - black), 0, 1) ** (1 / style.gamma)
    for _ in range(style.contrasts):
        images = _s_curve(images)
    return images


def _s_curve(values: np.ndarray) -> np.ndarray:
    """ImageMagick's sigmoidal contrast around 0.5: [0, 1] onto itself."""
    end = np.tanh(_CONTRAST / 4)
    return 0.5 + 0.5 * np.tanh(_CONTRAST / 2 * (values - 0.5)) / end


def _vignette(image_shape: ImageShape, reach: float) -> np.ndarray:
    """Return the share of light [h, w, 1] that is left at each pixel."""
    if reach == 0:
        return np.ones((1, 1, 1), np.float32)
    height, width, _ = image_shape
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in (height, width))
    distance = np.hypot(rows[:, None], columns[None, :]) / (max(height, width) / 2)
    return np.clip(1 - distance / reach, 0, 1)[..., None].astype(np.float32)
