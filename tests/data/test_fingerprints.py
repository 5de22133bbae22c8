"""What tells images from others."""

import numpy as np
import pytest

from moth_jax import data
from moth_jax.data.dataset import ImageSplit
from moth_jax.data.fingerprints import digests, fingerprints, image_names
from moth_jax.data.streaming import StreamedImages

IMAGES = np.random.default_rng(0).integers(0, 256, [6, 4, 4, 3], np.uint8)
LABELS = np.arange(6, dtype=np.int32) % 2


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_pixel_and_every_label_counts(dtype):
    images = (IMAGES / 255).astype(dtype) if dtype == np.float32 else IMAGES
    before = fingerprints(ImageSplit(images, LABELS))
    assert len(set(before.tolist())) == 6
    other = images.copy()
    other[4, 3, 3, 1] = other[4, 3, 3, 0]
    assert np.flatnonzero(fingerprints(ImageSplit(other, LABELS)) != before).tolist() == [4]
    labels = LABELS.copy()
    labels[2] = 1
    assert np.flatnonzero(fingerprints(ImageSplit(images, labels)) != before).tolist() == [2]


def test_streamed_images_are_told_by_name_and_version_and_not_read():
    versions = ["one", "two", "three"]

    def never(item):
        raise AssertionError(item)

    def split():
        images = StreamedImages(
            [0, 1, 2], never, (4, 4, 3), "image {}".format, versions.__getitem__
        )
        return ImageSplit(images, LABELS[:3])

    before = fingerprints(split())
    assert (fingerprints(split()) == before).all()
    versions[1] = "2"
    assert np.flatnonzero(fingerprints(split()) != before).tolist() == [1]
    assert image_names(split()) == ["image 0", "image 1", "image 2"]


def test_classes_and_the_order_have_digests():
    dataset = data.load("digits")
    prints = {
        part: fingerprints(getattr(dataset, part)) for part in ("train", "validation", "test")
    }
    before = digests(dataset, prints)
    assert list(before["test"]["classes"]) == [str(k) for k in range(10)]
    place = dataset.test.of_class(3)[1]
    prints["test"] = prints["test"].copy()
    prints["test"][place] += 1
    after = digests(dataset, prints)
    differing = [
        k for k, v in after["test"]["classes"].items() if before["test"]["classes"][k] != v
    ]
    assert differing == ["3"]
    assert after["train"] == before["train"]
    assert after["test"]["order"] == before["test"]["order"]


def test_images_without_files_are_named_by_their_places():
    assert image_names(ImageSplit(IMAGES, LABELS))[:2] == ["image 0", "image 1"]
