"""Arrays that people have saved, as images, labels and class names."""

from pathlib import Path

import numpy as np

from moth_jax.data.checks import check_labels
from moth_jax.errors import InputError, listed
from moth_jax.storage.files import load_npz


def existing_path(path, *, what: str, remedy: str) -> Path:
    """`path` with ~ expanded, or `InputError` with `remedy` if nothing is there."""
    if not path:
        raise InputError(f"{what}: no path given; {remedy}")
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{what} not found at {path}; {remedy}")
    return path


def read_npz(path: Path, *, required, optional=()) -> dict[str, np.ndarray]:
    """The arrays of the .npz file `path`; object arrays, missing and unknown names are refused."""
    needed = f"an .npz file with {', '.join(required)}, as written by numpy.savez_compressed"
    arrays = load_npz(path, advice=f"{needed}, is needed: fetch or write it again")
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
      pixel_max: 1 or 255, for images that are not uint8.
      what: how messages name the array.
    """
    if pixel_max not in (1, 255):
        raise InputError(
            f"pixel_max, the value that stands for white, must be 1 or 255, got {pixel_max}"
        )
    numbers = np.issubdtype(images.dtype, np.number) and images.size > 0
    if images.dtype == np.uint8 or pixel_max == 1 or not numbers:
        return images
    low, high = images.min(), images.max()
    if low < 0 or high <= 1 or high > 255:
        raise InputError(
            f"{what} must be in [0, 255] and exceed 1 with pixel_max=255, got {low} to {high}; "
            "use pixel_max=1 for images in [0, 1]"
        )
    if np.issubdtype(images.dtype, np.integer):
        return images.astype(np.uint8)
    return images.astype(np.float32) / np.float32(255)


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
    if names is None or len(names) == 0:
        return tuple(f"class {k}" for k in range(num_classes))
    return tuple(n.decode() if isinstance(n, bytes) else str(n) for n in np.asarray(names).tolist())
