"""Image files as arrays: decoded, converted to RGB, resized and cropped as torchvision does."""

import contextlib
import os
import re
from typing import NamedTuple

import numpy as np

from moth_jax.errors import InputError, first_line, require_choice
from moth_jax.storage.files import open_regular

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".webp")
KINDS = "JPEG, PNG, PPM, BMP or WebP"
FITS = ("crop", "stretch")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")

# Named one by one: Pillow also reads formats that start other programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP")
_ORIENTATION = 0x0112
# Pixels of an image, as it is and as it is resized: 200 MB, in each of the threads that decode.
_MOST_PIXELS, _MOST_SIDE = 2**26, 2**13
# Of what values white may be in a file of 16 bits: 8, 10, 12, 14 and 16 of them are used.
WHITES = (255, 1023, 4095, 16383, 65535)
_DEEP = 65535
_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24
# Names of files that may hold 16 bits.
DEEP_EXTENSIONS = (".pgm", ".png", ".pnm", ".ppm")


class Framing(NamedTuple):
    """How an image of any size becomes image_size x image_size pixels.

    Attributes:
      image_size: side of the result.
      resize: length the shorter side is resized to before the centre is cut out; not used to
        stretch.
      fit: "crop" keeps the proportions and cuts off what is too long; "stretch" resizes the whole
        image and keeps its margin.
      interpolation: of the resizing, one of `INTERPOLATIONS`; always antialiased, as Pillow does.
      white: the value that stands for white in files of 16 bits, one of `WHITES`; 0 refuses them.
    """

    image_size: int
    resize: int
    fit: str
    interpolation: str
    white: int = 0

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
    white: int = 0,
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
    if not 1 <= image_size <= _MOST_SIDE:
        raise InputError(f"image_size must be 1 to {_MOST_SIDE} pixels, got {image_size}")
    if fit == "stretch" and resize:
        raise InputError(
            f"resize is the shorter side before the crop, and fit='stretch' does not crop: got "
            f"{resize}; leave it 0, or use fit='crop'"
        )
    resize = resize or round(image_size * 256 / 224)
    if resize > max(_MOST_SIDE, 2 * image_size):
        raise InputError(f"resize must be at most {_MOST_SIDE} pixels, got {resize}")
    if resize < image_size:
        raise InputError(
            f"resize must be 0 or at least image_size, {image_size}, got {resize}: the crop would "
            "reach beyond the image"
        )
    return Framing(image_size, resize, fit, interpolation, white)


def decode_image(file, framing: Framing, *, name: str) -> np.ndarray:
    """Return the image in `file`, a path or an open binary file, as uint8 [size, size, 3].

    Note: torchvision's `ImageFolder` does the same with `PIL.Image.convert("RGB")`, and these
    differ: images are turned upright as their EXIF orientation says (torchvision leaves them
    lying); transparency is laid over white (there, the colours hidden under it show); images of 16
    bits are scaled by their white (there, grey ones are white above 255).

    Raises:
      UnreadableImageError: naming `name`.
    """
    with _opened(file, name) as image:
        if _is_deep(image):
            image = _of_eight_bits(image, file, framing.white, name)
        image.load()
        return np.asarray(_framed(_as_rgb(_upright(image)), framing, name))


def check_header(file, *, name: str) -> None:
    """Raise `UnreadableImageError` if `file` does not begin as an image; its pixels are not read.

    This finds empty files and web pages saved as images, but no image that is cut short.
    """
    with _opened(file, name):
        pass


def largest_value(path: str, *, name: str) -> int:
    """Return the largest value in a file of 16 bits; 0 for one of 8 bits, whose white is known."""
    with open_regular(path) as file:
        head = file.read(_PNG_DEPTH + 1)
    if head.startswith(_PNG) and head[_PNG_DEPTH:] != b"\x10":
        return 0  # as most do: quickly found
    with _opened(path, name) as image:
        if not _is_deep(image) or 0 < _said_white(image) < _DEEP:
            return 0
        values = _deep_values(image, path, name)
        if values is not None:
            return int(values.max())
        image.load()
        return 256 * int(np.asarray(image)[..., :3].max()) + 255


@contextlib.contextmanager
def _opened(file, name):
    """The image in a regular file of one of the formats, no larger than an image may be.

    Whatever Pillow raises for it in the block is its `UnreadableImageError`.
    """
    from PIL import Image

    try:
        with contextlib.ExitStack() as stack:
            if isinstance(file, str | os.PathLike):
                file = stack.enter_context(open_regular(file))
            image = stack.enter_context(Image.open(file, formats=_FORMATS))
            width, height = image.size
            _check_pixels(width * height, f"{width} x {height} pixels", name)
            yield image
    except (UnreadableImageError, MemoryError):
        raise
    except InputError as error:
        raise UnreadableImageError(name, str(error).removeprefix(f"{name} is ")) from error
    except Exception as error:  # there is no list of what Pillow raises for damaged files
        raise UnreadableImageError(name, _reason(error)) from error


def _check_pixels(count, told, name):
    if count > _MOST_PIXELS:
        raise UnreadableImageError(name, f"{told} are more than the {_MOST_PIXELS:,} there may be")


def _reason(error):
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"no {KINDS} image"
    return getattr(error, "strerror", None) or first_line(error)


def _upright(image):
    """The image as its camera was held."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _orientation(image):
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1  # A damaged note about the camera is no damage to the picture.


def _as_rgb(image):
    from PIL import Image

    if image.mode == "F":
        raise ValueError("values that are no whole numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_deep(image):
    """Whether the file has 16 bits for each value, of which fewer may be used."""
    deep_layout = re.search(";16[BLN]", str(_layout(image)))
    return bool(image.mode.startswith("I") or deep_layout or _said_white(image) == _DEEP)


def _layout(image):
    """How the pixels lie in the file, in the words of Pillow's decoders."""
    arguments = image.tile[0].args if image.tile else ""
    return arguments[0] if isinstance(arguments, tuple) else arguments


def _said_white(image):
    """The white that a PPM file says, by which Pillow scales it; 0 for all other files."""
    says = image.tile and image.tile[0].codec_name.startswith("ppm")
    arguments = image.tile[0].args if says else ()
    return int(arguments[1]) if len(arguments) > 1 else 0


def _of_eight_bits(image, file, white, name):
    """An image of 16 bits with the value `white` as 255; turned as the file is."""
    from PIL import Image

    if 0 < _said_white(image) < _DEEP:
        white = _DEEP  # by now
    if white == 0:
        raise UnreadableImageError(
            name, "16 bits, and nothing says which value is white; write it with 8 bits"
        )
    if white == _DEEP and not image.mode.startswith("I"):
        return image  # of whose values Pillow keeps the upper halves
    values = _deep_values(image, file, name)
    if values is None:
        raise UnreadableImageError(name, "16 bits and transparency; write it with 8 bits")
    if values.max() > white:
        raise UnreadableImageError(name, f"its largest value is {values.max()}, white is {white}")
    scaled = (values.astype(np.int64) * 255 + white // 2) // white
    result = Image.fromarray(scaled.astype(np.uint8))
    result.getexif()[_ORIENTATION] = _orientation(image)
    return result


def _deep_values(image, file, name):
    """The values [h, w] or [h, w, 3] of an image of 16 bits, None where Pillow cannot tell."""
    if image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode != "RGB" or image.tile[0].codec_name == "ppm_plain":
        return None
    return 256 * _half(file, "16B", name) + _half(file, "16L", name)


def _half(file, order, name):
    """The upper half of each value of a file of 16 bits; told the wrong order, the lower half."""
    with _opened(file, name) as image:
        (tile,) = image.tile
        if tile.codec_name == "zip":
            image.tile = [tile._replace(args=f"RGB;{order}")]
        else:
            image.tile = [tile._replace(codec_name="raw", args=(f"RGB;{order}", 0, 1))]
        return np.asarray(image).astype(np.int64)


def _framed(image, framing, name):
    from PIL import Image

    size = framing.image_size
    resampling = Image.Resampling[framing.interpolation.upper()]
    if framing.fit == "stretch":
        return image.resize((size, size), resampling)
    width, height = image.size
    # Truncated, and the crop rounded half to even: as torchvision's Resize and CenterCrop do.
    longer = int(framing.resize * max(width, height) / min(width, height))
    _check_pixels(
        framing.resize * longer,
        f"{width} x {height} pixels, whose shorter side becomes {framing.resize},",
        name,
    )
    sides = (framing.resize, longer) if width <= height else (longer, framing.resize)
    image = image if sides == image.size else image.resize(sides, resampling)
    left, top = (round((side - size) / 2) for side in sides)
    return image.crop((left, top, left + size, top + size))
