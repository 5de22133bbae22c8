"""Image files as arrays: decoded, converted to RGB, resized and cropped as torchvision does."""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from moth_jax.errors import InputError, require_choice

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".webp")
KINDS = "JPEG, PNG, PPM, BMP or WebP"
FITS = ("crop", "stretch")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")

# Named one by one: Pillow also reads formats that start other programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP")
_ORIENTATION = 0x0112


class Framing(NamedTuple):
    """How an image of any size becomes image_size x image_size pixels.

    Attributes:
      image_size: side of the result.
      resize: length the shorter side is resized to before the centre is cut out; not used to
        stretch.
      fit: "crop" keeps the proportions and cuts off what is too long; "stretch" resizes the whole
        image and keeps its margin.
      interpolation: of the resizing, one of `INTERPOLATIONS`; always antialiased, as Pillow does.
    """

    image_size: int
    resize: int
    fit: str
    interpolation: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return (self.image_size, self.image_size, 3)


class UnreadableImageError(InputError):
    """An image cannot be decoded; `reason` says why, without the name."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"{name} cannot be read ({reason}); delete or replace it, or give skip_unreadable=True"
        )
        self.name, self.reason = name, reason


def make_framing(
    *,
    image_size: int = 224,
    resize: int = 0,
    fit: str = "crop",
    interpolation: str = "bilinear",
) -> Framing:
    """Return a checked `Framing`; `resize=0` stands for 256/224 of the image size.

    That ratio is what most of torchvision's weights expect: 256 for 224 pixels, 342 for 299. Some
    expect another, such as 232 for its newer ones: see the weights' `transforms()`.

    Example:
      >>> make_framing(image_size=299).resize
      342
    """
    require_choice("fit", fit, FITS)
    require_choice("interpolation", interpolation, INTERPOLATIONS)
    if image_size < 1:
        raise InputError(f"image_size must be at least 1 pixel, got {image_size}")
    if fit == "stretch" and resize:
        raise InputError(
            f"resize is the shorter side before the crop, and fit='stretch' does not crop: got "
            f"{resize}; leave it 0, or use fit='crop'"
        )
    resize = resize or round(image_size * 256 / 224)
    if resize < image_size:
        raise InputError(
            f"resize must be 0 or at least image_size, {image_size}, got {resize}: the crop would "
            "reach beyond the image"
        )
    return Framing(image_size, resize, fit, interpolation)


def decode_image(file, framing: Framing, *, name: str) -> np.ndarray:
    """Return the image in `file`, a path or an open binary file, as uint8 [size, size, 3].

    Note: torchvision's `ImageFolder` does the same with `PIL.Image.convert("RGB")`, and these
    differ: images are turned upright as their EXIF orientation says (torchvision leaves them
    lying); transparency is laid over white (there, the colours hidden under it show); grey images
    of 16 bits keep their range (there, all above 255 is white).

    Raises:
      UnreadableImageError: naming `name`.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=_FORMATS) as image:
            image.load()
    except _damage() as error:
        raise UnreadableImageError(name, _reason(error)) from error
    return np.asarray(_framed(_as_rgb(_upright(image)), framing))


def check_header(file, *, name: str) -> None:
    """Raise `UnreadableImageError` if `file` does not begin as an image; its pixels are not read.

    This finds empty files and web pages saved as images, but no image that is cut short.
    """
    from PIL import Image

    try:
        Image.open(file, formats=_FORMATS).close()
    except _damage() as error:
        raise UnreadableImageError(name, _reason(error)) from error


def _damage():
    """What Pillow raises for files that are cut short, damaged, enormous, or something else."""
    from PIL import Image

    parsing = (EOFError, IndexError, KeyError, OverflowError, SyntaxError, TypeError, ValueError)
    return (OSError, struct.error, zlib.error, Image.DecompressionBombError, *parsing)


def _reason(error):
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"no {KINDS} image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _upright(image):
    """The image as its camera was held."""
    from PIL import ImageOps

    try:
        lying = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if lying else image
    except _damage():
        return image  # A damaged note about the camera is no damage to the picture.


def _as_rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits: `convert` would clip them to 255 instead of scaling them.
        grey = (np.asarray(image, np.int64) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _framed(image, framing):
    from PIL import Image

    size = framing.image_size
    resampling = Image.Resampling[framing.interpolation.upper()]
    if framing.fit == "stretch":
        return image.resize((size, size), resampling)
    width, height = image.size
    # Truncated, and the crop rounded half to even: as torchvision's Resize and CenterCrop do.
    longer = int(framing.resize * max(width, height) / min(width, height))
    sides = (framing.resize, longer) if width <= height else (longer, framing.resize)
    image = image if sides == image.size else image.resize(sides, resampling)
    left, top = (round((side - size) / 2) for side in sides)
    return image.crop((left, top, left + size, top + size))
