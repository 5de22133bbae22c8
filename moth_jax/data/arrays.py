"""Arrays that people have saved, as images, labels and class names."""

import os
import warnings
from pathlib import Path

import numpy as np

from moth_jax.data.checks import check_labels, normal_name
from moth_jax.data.decoding import WHITES as DEEP_WHITES
from moth_jax.errors import InputError, first_line, listed
from moth_jax.storage.files import UNPACKED_LIMIT, load_npz

# What stands for white: in [0, 1], and in images of 8, 10, 12, 14 and 16 bits.
WHITES = (1, *DEEP_WHITES)


def existing_path(path, *, what: str, remedy: str) -> Path:
    """`path` with ~ expanded, or `InputError` with `remedy` if nothing is there."""
    if not path:
        raise InputError(f"{what}: no path given; {remedy}")
    path = expanded(path, what)
    if not os.path.exists(path):  # also where the name is too long for one
        raise InputError(f"{what} not found at {path}; {remedy}")
    return path


def expanded(path, what: str) -> Path:
    """`path` with ~ expanded."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # there is no such user
        raise InputError(f"{what}: {path}: {first_line(error)}; give the whole path") from error


def read_npz(
    path: Path, *, required, optional=(), unpacked_limit: int = UNPACKED_LIMIT
) -> dict[str, np.ndarray]:
    """The arrays of the .npz file `path`; object arrays, missing and unknown names are refused.

    `unpacked_limit` is as for `load_npz`.
    """
    needed = f"an .npz file with {', '.join(required)}, as written by numpy.savez_compressed"
    arrays = load_npz(
        path,
        advice=f"{needed}, is needed: fetch or write it again",
        unpacked_limit=unpacked_limit,
    )
    missing = [name for name in required if name not in arrays]
    unknown = [name for name in arrays if name not in (*required, *optional)]
    faults = [f"missing arrays {listed(missing)}"] if missing else []
    faults += [f"unknown arrays {listed(unknown)}"] if unknown else []
    if faults:
        also = f", and may hold {', '.join(optional)}" if optional else ""
        raise InputError(
            f"{path}: {' and '.join(faults)}; the file must hold {', '.join(required)}{also}"
        )
    return arrays


def as_pixels(images: np.ndarray, pixel_max: float, what: str) -> np.ndarray:
    """Images as uint8 unchanged, or as float32 in [0, 1] given the value that stands for white.

    Args:
      images: an array of images, or of anything else: only its type and range are looked at.
      pixel_max: one of `WHITES`, for images that are not uint8.
      what: how messages name the array.
    """
    if pixel_max not in WHITES:
        raise InputError(
            "pixel_max, the value that stands for white, must be one of "
            f"{', '.join(map(str, WHITES))}, got {pixel_max!r}"
        )
    is_integer = np.issubdtype(images.dtype, np.integer)
    numbers = (is_integer or np.issubdtype(images.dtype, np.floating)) and images.size > 0
    if images.dtype == np.uint8 or not numbers:
        return images
    low, high = images.min(), images.max()
    if is_integer and pixel_max == 1:
        raise InputError(
            f"{what} are {images.dtype} from {low} to {high}; give as pixel_max the value that "
            f"stands for white: {', '.join(map(str, WHITES[1:]))} are those of 8, 10, 12, 14 and "
            "16 bits"
        )
    if pixel_max == 1:
        return images
    if low < 0 or high <= 1 or high > pixel_max:
        raise InputError(
            f"{what} must be in [0, {pixel_max:g}] and exceed 1 with pixel_max={pixel_max:g}, got "
            f"{low} to {high}; use pixel_max=1 for images in [0, 1]"
        )
    if is_integer and pixel_max == 255:
        return images.astype(np.uint8)
    return images.astype(np.float32) / np.float32(pixel_max)


def warn_of_mixed_types(arrays) -> None:
    """Warn of images {name: array} some of which are whole numbers and others floats."""
    whole, floats = (
        [name for name, array in arrays.items() if np.issubdtype(array.dtype, kind)]
        for kind in (np.integer, np.floating)
    )
    if whole and floats:
        warnings.warn(
            f"{listed(whole, str)} are whole numbers and {listed(floats, str)} floats; are white "
            "and black the same in all of them?",
            stacklevel=2,
        )


def as_class_labels(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels [n] from labels [n], a column [n, 1] or one-hot rows [n, K]."""
    if labels.ndim != 2:
        return labels
    if labels.shape[1] == 1:
        return labels[:, 0]
    if not (np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
        raise InputError(
            f"{what} of shape {labels.shape} must be one-hot: a single 1 in each row; give integer "
            "labels [n] instead"
        )
    return labels.argmax(1)


def count_classes(labels: np.ndarray, what: str) -> int:
    """K, taken from the largest of the labels [n], which are checked to be integers."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        check_labels(labels, 2, what=what)
    num_classes = int(labels.max(initial=0)) + 1
    if num_classes > len(labels):
        raise InputError(
            f"{what}: the largest label is {num_classes - 1} with only {len(labels)} images, so "
            "some classes have no samples; number the classes 0, 1, 2 and so on"
        )
    return num_classes


def as_class_names(names, num_classes: int) -> tuple[str, ...]:
    """Names as text, or "class 0" and so on if there are none."""
    names = np.asarray([] if names is None else names)
    if names.size == 0:
        return tuple(f"class {k}" for k in range(num_classes))
    if names.ndim != 1:
        raise InputError(f"class_names must have shape [K], got {names.shape}")
    try:
        return tuple(
            normal_name(n.decode() if isinstance(n, bytes) else str(n)) for n in names.tolist()
        )
    except UnicodeDecodeError as error:
        raise InputError(f"class_names must be text in UTF-8 ({error})") from error
