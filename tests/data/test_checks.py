import time

import numpy as np
import pytest

from moth_jax.data.checks import (
    check_brightness,
    check_class_names,
    check_every_class,
    check_images,
    check_labels,
)
from moth_jax.errors import InputError, listed


def grey(value, dtype=np.float32):
    return np.full([3, 4, 5, 3], value, dtype)


def with_pixel(value, index=1):
    images = grey(0.5)
    images[index, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    "images",
    [grey(0.0), grey(1.0), grey(0.5, np.float64), grey(0.5, np.float16), grey(200, np.uint8)],
    ids=["zeros", "ones", "float64", "float16", "uint8"],
)
def test_images_in_range_are_accepted(images):
    check_images(images)
    check_images(images, image_shape=(4, 5, 3))


BAD_IMAGES = {
    "0-255 floats": (grey(255.0), {}, "got 255 to 255.*divide by 255 or store them as uint8"),
    "normalised": (with_pixel(-1.8), {}, r"got -1\.8.*give the images before normalisation"),
    "rounding": (with_pixel(1.0001), {}, r"numpy\.clip\(images, 0, 1\)"),
    "far out": (with_pixel(4096.0), {}, r"got 0\.5 to 4096: .*stands for white"),
    "NaN": (with_pixel(np.nan), {}, "NaN or infinite values in 1 of 3 images, first at index 1"),
    "infinite": (with_pixel(np.inf, 2), {}, "NaN or infinite values in 1 of 3.*index 2"),
    "integers": (
        grey(200, np.int64),
        {},
        "dtype int64; divide integers by the value that stands for white",
    ),
    "booleans": (grey(True, bool), {}, "dtype bool"),
    "cast": (grey(1, np.uint8), {}, "no value above 1.*cast"),
    "one image": (grey(0.5)[0], {}, r"\[n, h, w, c\], got \(4, 5, 3\); add an axis"),
    "flat": (grey(0.5).reshape(3, -1), {}, r"got \(3, 60\)"),
    "none": (grey(0.5)[:0], {}, r"empty: shape \(0, 4, 5, 3\)"),
    "many channels": (np.zeros([2, 4, 4, 7]), {}, "1 to 4 channels in the last axis, got 7"),
    "channels first": (np.zeros([2, 3, 8, 8]), {}, r"images\.transpose\(0, 2, 3, 1\)"),
    "shape": (grey(0.5), {"image_shape": (8, 8, 3)}, r"\[n, 8, 8, 3\], got \(3, 4, 5, 3\)"),
    "shape and channels first": (
        np.zeros([2, 3, 8, 8]),
        {"image_shape": (8, 8, 3)},
        r"images\.transpose\(0, 2, 3, 1\)",
    ),
}


@pytest.mark.parametrize(("images", "options", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused_with_their_values_and_a_remedy(images, options, message):
    with pytest.raises(InputError, match=message):
        check_images(images, what="victim images", **options)


BAD_LABELS = {
    "too high": ([0, 5, 9, 1], 5, {}, r"in \[0, 5\), got 5, 9 \(2 of 4 labels\)"),
    "negative": ([0, -1], 5, {}, r"in \[0, 5\), got -1 \(1 of 2 labels\)"),
    "counted from 1": ([1, 2, 3], 3, {}, "subtract 1"),
    "many values": (range(100), 2, {}, "and 90 more"),
    "floats": ([0.0, 1.0], 2, {}, r"dtype float64.*astype\(numpy\.int32\)"),
    "text": (["cat", "dog"], 2, {}, "must be integers"),
    "one-hot": (np.eye(4), 4, {}, r"one-hot labels\.argmax\(1\)"),
    "column": (np.zeros([4, 1], int), 4, {}, r"labels\[:, 0\]"),
    "empty": (np.zeros([0], int), 4, {}, r"n > 0, got \(0,\)"),
    "length": ([0, 1], 2, {"num_images": 3}, "one per image: 2 for 3 images"),
    "one class": ([0, 0], 1, {}, "at least 2 classes.*got 1"),
}


@pytest.mark.parametrize(
    ("labels", "num_classes", "options", "message"), BAD_LABELS.values(), ids=BAD_LABELS
)
def test_bad_labels_are_refused_with_their_values_and_a_remedy(
    labels, num_classes, options, message
):
    with pytest.raises(InputError, match=message):
        check_labels(labels, num_classes, **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat"], r"at least 2 classes.*got 1: \['cat'\]"),
        (["cat", "dog", "cat"], "more than once: 'cat'"),
        (["cat", ""], "non-empty strings, got ''"),
        (["cat", 3], "non-empty strings, got 3"),
    ],
)
def test_bad_class_names_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        check_class_names(names)


def test_every_class_without_samples_is_named():
    with pytest.raises(InputError, match="test: no samples of 2 of 4 classes: 'b', 'd'"):
        check_every_class(np.array([0, 2, 2]), ["a", "b", "c", "d"], what="test")


def test_a_long_list_is_cut_and_counted():
    assert listed(list("abc")) == "'a', 'b', 'c'"
    assert listed(list(range(12))) == "0, 1, 2, 3, 4, 5, 6, 7 and 4 more"


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["cat", "dog\x1b[2J"], r"'dog\\x1b\[2J'"),
        (["cat", "dog\nscan  looks clean"], r"'dog\\nscan  looks clean'"),
        (["cat", "do\u202eg"], r"'do\\u202eg'"),
        (["cat", "caf\udce9"], r"'caf\\udce9'"),
        (["cat", "dog\x9b31m"], r"'dog\\x9b31m'"),
    ],
)
def test_names_that_a_console_would_obey_are_refused_and_shown_escaped(names, shown):
    with pytest.raises(InputError, match=f"without control characters, got {shown}"):
        check_class_names(names)


def test_names_of_all_scripts_are_taken_and_two_forms_of_one_are_one():
    check_class_names(["café", "猫", "собака", "sea\u00a0lion", "می\u200cشود"])
    with pytest.raises(InputError, match="more than once: 'café'"):
        check_class_names(["café", "cafe\u0301"])


def test_a_hundred_thousand_names_are_checked_at_once():
    started = time.monotonic()
    check_class_names([f"class {k}" for k in range(100_000)])
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int64, np.uint32])
def test_whole_numbers_are_never_advised_to_be_cast(dtype):
    with pytest.raises(InputError, match="divide integers by the value that") as raised:
        check_images(grey(4000, dtype))
    assert "uint8)" not in str(raised.value).partition("dtype")[2]


def test_a_part_that_was_divided_once_more_is_refused():
    whole = np.linspace(0, 1, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    parts = {"train": whole, "validation": whole / 3, "test": whole}
    check_brightness(parts, what="mine")
    for part in parts:
        with pytest.raises(InputError, match=rf"mine: .*0\.00392 in {part}.*divided by 255 twice"):
            check_brightness({**parts, part: whole / 255}, what="mine")
    as_bytes = {**parts, "train": (whole * 255).astype(np.uint8)}
    check_brightness(as_bytes, what="mine")
    with pytest.raises(InputError, match=r"0\.00392 in test"):
        check_brightness({**as_bytes, "test": whole / 255}, what="mine")
