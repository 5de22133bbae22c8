"""Checks of images, labels and class names; each fault is an `InputError` that says what to do."""

import unicodedata
import warnings
from collections import Counter

import numpy as np

from moth_jax.errors import InputError, listed, printable

_MOST_CONTRAST = 100.0  # between the brightest values of two parts
_DARKEST = 17 / 255  # the most that no set of images has as its brightest value
_FEW = 3  # images that are nearly black by chance


def check_images(images, *, image_shape=None, what: str = "images") -> None:
    """Raise `InputError` unless `images` can be given to a classifier of images in [0, 1].

    Args:
      images: array [n, h, w, c], uint8 or any float type with values in [0, 1].
      image_shape: the (h, w, c) expected; any with 1 to 4 channels if None.
      what: how the message names the array, such as "test images".

    Example:
      >>> check_images(np.zeros([2, 8, 8, 3], np.float32))
      >>> check_images(np.full([2, 8, 8, 3], 200.0))
      Traceback (most recent call last):
      ...
      moth_jax.errors.InputError: images must be in [0, 1], got 200 to 200: these look like \
0-255 pixels; divide by 255 or store them as uint8
    """
    images = np.asarray(images)
    _check_layout(images, image_shape, what)
    if images.dtype == np.uint8:
        highs = _highs(images)
        if highs.max() == 1:
            raise InputError(
                f"{what} are uint8 with no value above 1: uint8 images range over 0-255, so these "
                "look like images in [0, 1] that were cast; store them as float32"
            )
        _warn_of_dark(highs / 255, what)
    elif np.issubdtype(images.dtype, np.floating):
        highs = _highs(images)
        _check_range(images, highs, what)
        _warn_of_dark(highs, what)
    else:
        raise InputError(
            f"{what} must be uint8 (0-255) or floats in [0, 1], got dtype {images.dtype}; divide "
            "integers by the value that stands for white (255, or 65535 for 16 bits, or 4095 for "
            "12) and give the result as float32"
        )


def check_brightness(images, *, what: str) -> None:
    """Raise `InputError` if a part of a data set is much darker than another.

    A part that was divided by 255 once more than the others is in [0, 1], too.

    Args:
      images: {name of the part: valid images}.
      what: how the message names the data set.
    """
    brightest = {
        part: float(array.max()) / (255 if array.dtype == np.uint8 else 1)
        for part, array in images.items()
    }
    if min(brightest.values(), default=1.0) * _MOST_CONTRAST < max(brightest.values(), default=1.0):
        told = ", ".join(f"{value:.3g} in {part}" for part, value in brightest.items())
        raise InputError(
            f"{what}: where white is 1, the brightest value is {told}; give all parts in one range "
            "(was one divided by 255 twice?)"
        )


def check_labels(labels, num_classes: int, *, num_images=None, what: str = "labels") -> None:
    """Raise `InputError` unless `labels` is a vector of integers in [0, num_classes).

    Args:
      labels: array [n] of an integer type.
      num_classes: K, at least 2.
      num_images: the length expected; any if None.
      what: how the message names the array.

    Example:
      >>> check_labels([0, 1, 2], 3)
      >>> check_labels([0, 1, 7], 3)
      Traceback (most recent call last):
      ...
      moth_jax.errors.InputError: labels must be in [0, 3), got 7 (1 of 3 labels); \
give num_classes as the number of the model's outputs, or drop those samples
    """
    labels = np.asarray(labels)
    if num_classes < 2:
        raise InputError(f"at least 2 classes are needed to measure a distance, got {num_classes}")
    if labels.ndim == 2 and labels.shape[1] in (1, num_classes):
        remedy = "labels[:, 0]" if labels.shape[1] == 1 else "one-hot labels.argmax(1)"
        raise InputError(f"{what} must have shape [n], got {labels.shape}; give {remedy}")
    if labels.ndim != 1 or labels.size == 0:
        raise InputError(f"{what} must have shape [n] with n > 0, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{what} must be integers, got dtype {labels.dtype}; use .astype(numpy.int32) if they "
            "are whole numbers"
        )
    if num_images is not None and len(labels) != num_images:
        raise InputError(f"{what} must be one per image: {len(labels)} for {num_images} images")
    _check_label_range(labels, num_classes, what)


def normal_name(name: str) -> str:
    """Return the name in the normal form of Unicode (NFC) in which names are compared.

    Systems write the same letters in different ways: macOS takes the accents off the letters.

    >>> normal_name("cafe\\u0301") == "caf\\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name)


def check_class_names(class_names) -> None:
    """Raise `InputError` unless `class_names` are at least 2 distinct, non-empty strings.

    What a console would obey, or UTF-8 has no bytes for, is no part of a name.
    """
    if len(class_names) < 2:
        raise InputError(
            f"at least 2 classes are needed to measure a distance, got {len(class_names)}: "
            f"{list(class_names)}"
        )
    wrong = [name for name in class_names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise InputError(f"class names must be non-empty strings, got {listed(wrong)}")
    unprintable = [name for name in class_names if printable(name) != name]
    if unprintable:
        raise InputError(
            f"class names must be text without control characters, got {listed(unprintable, ascii)}"
        )
    counts = Counter(map(normal_name, class_names))
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise InputError(f"class names must be distinct, given more than once: {listed(twice)}")


def check_every_class(
    labels, class_names, *, classes=None, what: str = "labels", remedy: str = ""
) -> None:
    """Raise `InputError` naming those of `classes` (all if None) that `labels` has no sample of."""
    classes = range(len(class_names)) if classes is None else classes
    counts = np.bincount(labels, minlength=len(class_names))
    missing = [class_names[k] for k in classes if counts[k] == 0]
    if missing:
        remedy = remedy or "add images of them, or leave these classes out of the data"
        raise InputError(
            f"{what}: no samples of {len(missing)} of {len(classes)} classes: "
            f"{listed(missing)}; {remedy}"
        )


def _check_layout(images, image_shape, what):
    if images.ndim != 4:
        remedy = "; add an axis with images[..., None]" if images.ndim == 3 else ""
        if images.ndim == 3 and images.shape[2] in (1, 3, 4):
            remedy += ", or images[None] if it is one image"
        raise InputError(f"{what} must have shape [n, h, w, c], got {images.shape}{remedy}")
    if images.size == 0:
        raise InputError(f"{what} are empty: shape {images.shape}")
    if image_shape is not None and images.shape[1:] != tuple(image_shape):
        raise InputError(
            f"{what} must have shape [n, {', '.join(map(str, image_shape))}], got {images.shape}"
            f"{_channels_first_hint(images) or '; resize them, or use a model of that size'}"
        )
    if images.shape[3] > 4:
        raise InputError(
            f"{what} must have 1 to 4 channels in the last axis, got {images.shape[3]} "
            f"(shape {images.shape}){_channels_first_hint(images)}"
        )


def _channels_first_hint(images):
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        return (
            "; channels look first: use images.transpose(0, 2, 3, 1), of a PyTorch tensor "
            "images.permute(0, 2, 3, 1)"
        )
    return ""


def _highs(images):
    """The largest value of each image."""
    return images.max(axis=(1, 2, 3))


def _warn_of_dark(highs, what):
    """Warn of images whose white cannot be 1, given the largest value in [0, 1] of each.

    Images that were divided twice stay below 1/255, 12 bits in a file for 16 below 1/16, and the
    digits of scikit-learn, from 0 to 16, below 17/255 of bytes. A single black image is none.
    """
    high = float(highs.max())
    twice = (highs > 0) & (highs <= 1.01 / 255)
    if 0 < high <= _DARKEST:
        warnings.warn(
            f"{what} are at most {high:.3g} where white is 1: were they divided by 255 twice, or "
            "by another value than the one that stands for white?",
            stacklevel=3,
        )
    elif twice.sum() >= max(_FEW, len(highs) / 20):
        warnings.warn(
            f"{what}: {twice.sum()} of {len(highs)} are at most {highs[twice].max():.3g} where "
            f"white is 1, first at index {np.argmax(twice)}, others reach {high:.3g}: were these "
            "divided by 255 twice?",
            stacklevel=3,
        )


def _check_range(images, highs, what):
    # NaN and infinities show in the extremes, so the usual case allocates nothing.
    low, high = float(images.min()), float(highs.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = [i for i, image in enumerate(images) if not np.isfinite(image).all()]
        raise InputError(
            f"{what} have NaN or infinite values in {len(bad)} of {len(images)} images, first at "
            f"index {bad[0]}; drop or repair them"
        )
    if low >= 0 and high <= 1:
        return
    if low >= -1e-3 and high <= 1 + 1e-3:
        remedy = "this looks like rounding; use numpy.clip(images, 0, 1)"
    elif low >= 0 and 2 < high <= 255:
        remedy = "these look like 0-255 pixels; divide by 255 or store them as uint8"
    elif low < 0:
        remedy = (
            "these look normalised; give the images before normalisation, which belongs in the "
            "model"
        )
    else:
        remedy = "divide by the value that stands for white"
    raise InputError(f"{what} must be in [0, 1], got {low:.8g} to {high:.8g}: {remedy}")


def _check_label_range(labels, num_classes, what):
    outside = (labels < 0) | (labels >= num_classes)
    if not outside.any():
        return
    values = np.unique(labels[outside]).tolist()
    if labels.min() == 1 and labels.max() == num_classes:
        remedy = "they look counted from 1: subtract 1"
    else:
        remedy = "give num_classes as the number of the model's outputs, or drop those samples"
    raise InputError(
        f"{what} must be in [0, {num_classes}), got {listed(values)} ({int(outside.sum())} of "
        f"{len(labels)} labels); {remedy}"
    )
