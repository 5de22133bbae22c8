import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moth_jax.data.conversion import as_images, as_labels
from moth_jax.data.dataset import ImageSplit
from moth_jax.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
UNIT = PIXELS.astype(np.float32) / 255


class OfAnotherLibrary:
    """What has no more of an array than how to become one."""

    def __array__(self, dtype=None, copy=None):
        return PIXELS


GIVEN = {
    "NumPy": PIXELS,
    "JAX": jnp.asarray(PIXELS),
    "list": list(PIXELS),
    "list of JAX": [jnp.asarray(image) for image in PIXELS],
    "objects": np.array([*PIXELS, None], object)[:-1],
    "Pillow": [Image.fromarray(image) for image in PIXELS],
    "array interface": OfAnotherLibrary(),
}


@pytest.mark.parametrize("images", GIVEN.values(), ids=GIVEN)
def test_bytes_of_any_library_are_the_same_bytes(images):
    converted = as_images(images)
    assert isinstance(converted, np.ndarray)
    assert converted.dtype == np.uint8
    np.testing.assert_array_equal(converted, PIXELS)
    split = ImageSplit(images, [0, 1, 0])
    np.testing.assert_array_equal(split.batch([1]), UNIT[1:2])


@pytest.mark.parametrize("kind", ["bytes", "floats", "bfloat16", "needing a gradient"])
def test_tensors_become_arrays_of_the_same_range(kind):
    torch = pytest.importorskip("torch")
    whole = torch.tensor(UNIT)
    tensor = {
        "bytes": torch.tensor(PIXELS),
        "floats": whole,
        "bfloat16": whole.bfloat16(),
        "needing a gradient": torch.nn.Parameter(whole),
    }[kind]
    expected = PIXELS if kind == "bytes" else UNIT
    converted = as_images(tensor)
    assert converted.dtype == expected.dtype
    np.testing.assert_allclose(converted, expected, atol=4e-3)
    np.testing.assert_array_equal(as_images(list(tensor)), converted)
    np.testing.assert_array_equal(as_labels(torch.tensor([0, 2]), 3), [0, 2])


def test_tensors_with_channels_first_are_told_so_whatever_their_size():
    torch = pytest.importorskip("torch")
    for size in (2, 4, 32):
        with pytest.raises(InputError, match=r"channels .*first.*images\.permute\(0, 2, 3, 1\)"):
            as_images(torch.zeros(5, 3, size, size))


def test_grey_pillow_images_have_one_channel():
    grey = [Image.fromarray(image[..., 0]) for image in PIXELS]
    np.testing.assert_array_equal(as_images(grey), PIXELS[..., :1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images must be an array of NumPy.* got NoneType"),
        ("photo.png", "images must be an array of NumPy.* got str"),
        (["photo.png"], r"images\[0\] must be an array of NumPy.* got str"),
        ({"images": PIXELS}, "got dict"),
        ((image for image in PIXELS), "got generator"),
        ([PIXELS[0], UNIT[1]], r"images\[0\] is \(4, 5, 3\) of uint8, images\[1\].*float32"),
        ([PIXELS[0], PIXELS[1][:2]], r"images\[1\] is \(2, 5, 3\) of uint8"),
        ([Image.fromarray(PIXELS[0]).convert("P")], r"images\[0\] is a Pillow image of mode 'P'"),
        (PIXELS.astype(np.int64), r"must be uint8 \(0-255\) or floats in \[0, 1\].*int64"),
        (PIXELS.astype(np.float32), "0-255 pixels"),
        (PIXELS[0], r"images\[None\] if it is one image"),
        (np.ma.masked_array(UNIT, UNIT > 0.5), "images are masked in places"),
        (UNIT.astype(np.complex64), "dtype complex64"),
        (np.zeros(3, "M8[s]"), "of numbers; got datetime64"),
        ([], "must have shape"),
    ],
)
def test_what_is_no_array_of_images_is_refused_in_one_line(images, message):
    with pytest.raises(InputError, match=message) as fault:
        as_images(images)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "must be the numbers of the classes, got the text 'cat'"),
        (np.eye(3), r"give one-hot labels\.argmax\(1\)"),
        ([0.0, 1.0], "must be integers, got dtype float64"),
        (None, "labels must be an array of NumPy"),
        ([[0], [1]], re.escape("give labels[:, 0]")),
    ],
)
def test_what_are_no_labels_is_refused_in_one_line(labels, message):
    with pytest.raises(InputError, match=message):
        as_labels(labels, 3)


def test_labels_may_be_a_list_or_of_any_integer_type():
    for labels in ([0, 2, 1], range(3), jnp.arange(3), np.arange(3, dtype=np.uint64)):
        assert sorted(as_labels(labels, 3).tolist()) == [0, 1, 2]
        np.bincount(as_labels(labels, 3))
