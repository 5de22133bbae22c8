import dataclasses

import numpy as np
import pytest

from moth_jax.data.building import Share, build_dataset, mean_and_std
from moth_jax.data.dataset import ImageSplit, validate
from moth_jax.errors import InputError

NAMES = ("cat", "dog", "ship")
TENTH = Share(0.1, seed=0)


def pixels(n, shape=(4, 4, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, [n, *shape], np.uint8)


def made(validation=TENTH, **options):
    train = pixels(30), np.arange(30) % 3
    test = pixels(9, seed=1), np.arange(9) % 3
    return build_dataset("pets", train, test, class_names=NAMES, validation=validation, **options)


def changed(part, **fields):
    dataset = made()
    split = dataclasses.replace(getattr(dataset, part), **fields)
    return dataclasses.replace(dataset, **{part: split})


def test_a_dataset_knows_its_shape_classes_and_parts():
    dataset = made(flip=True, shift=2, validation=Share(0.2, seed=0))
    assert dataset.image_shape == (4, 4, 3)
    assert dataset.num_classes == 3
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (24, 6, 9)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert (dataset.flip, dataset.shift) == (True, 2)


def test_the_validation_part_comes_out_of_the_training_images_and_never_the_test_images():
    dataset = made()
    both = np.concatenate([dataset.train.images, dataset.validation.images])
    assert sorted(map(bytes, both)) == sorted(map(bytes, pixels(30)))
    assert (dataset.test.images == pixels(9, seed=1)).all()


def test_a_validation_part_that_is_given_is_used():
    given = pixels(6, seed=2), np.arange(6) % 3
    dataset = made(validation=given)
    assert len(dataset.train) == 30
    assert (dataset.validation.images == given[0]).all()


def test_mean_and_std_describe_the_training_part_in_unit_range():
    dataset = made()
    unit = dataset.train.images / 255
    np.testing.assert_allclose(dataset.mean, unit.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, unit.std((0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mean_and_std_in_chunks_equal_those_of_all_at_once(dtype):
    images = pixels(1300, (3, 5, 2))
    images = images if dtype == np.uint8 else (images / 255).astype(dtype)
    unit = images / 255 if dtype == np.uint8 else images.astype(np.float64)
    mean, std = mean_and_std(images)
    np.testing.assert_allclose(mean, unit.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(std, unit.std((0, 1, 2)), rtol=1e-9)


def test_a_batch_is_float32_in_unit_range_for_bytes_and_floats_alike():
    images = pixels(8)
    labels = np.zeros(8, np.int32)
    expected = (images[[5, 2]] / 255).astype(np.float32)
    for stored in (images, images.astype(np.float32) / 255):
        batch = ImageSplit(stored, labels).batch([5, 2])
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch, expected)


def test_the_samples_of_a_class_come_in_order_and_limited():
    split = ImageSplit(pixels(6), np.array([1, 0, 1, 1, 0, 1], np.int32))
    assert split.of_class(1).tolist() == [0, 2, 3, 5]
    assert split.of_class(1, limit=2).tolist() == [0, 2]
    assert split.of_class(2).tolist() == []
    assert split.of_class(1).dtype == np.int64


def test_doubles_are_stored_as_float32():
    train = pixels(30) / 255, np.arange(30) % 3
    dataset = build_dataset("pets", train, train, class_names=NAMES, validation=TENTH)
    assert dataset.train.images.dtype == dataset.test.images.dtype == np.float32


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("test", {"images": pixels(9, (8, 8, 3))}, r"pets test images .* shape \[n, 4, 4, 3"),
        ("validation", {"images": np.full([3, 4, 4, 3], 9.0)}, r"pets validation images.*0-255"),
        ("train", {"labels": np.zeros(27, int)}, r"pets train: no samples of 2.*'dog', 'ship'"),
        ("validation", {"labels": np.array([0, 1, 1])}, "validation: no samples.*'ship'.*fraction"),
        ("test", {"labels": np.arange(9) % 2}, "pets test: no samples of 1 of 3 classes: 'ship'"),
        ("test", {"labels": np.arange(8) % 3}, "one per image: 8 for 9 images"),
    ],
)
def test_a_faulty_part_is_refused_by_name(part, fields, message):
    with pytest.raises(InputError, match=message):
        validate(changed(part, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_names": ("cat",)}, "at least 2 classes"),
        ({"class_names": ("cat", "dog", "cat")}, "distinct"),
        ({"class_names": ("cat", "dog")}, r"in \[0, 2\), got 2"),
        ({"class_names": (*NAMES, "frog")}, "no samples of 1 of 4 classes: 'frog'"),
        ({"mean": (0.5,)}, "mean must be 3 numbers"),
        ({"std": (0.5, np.nan, 0.5)}, "std must be 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"shift": 4}, r"shift must be in \[0, 4\) pixels"),
        ({"shift": -1}, "got -1"),
    ],
)
def test_a_faulty_description_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        validate(dataclasses.replace(made(), **fields))


def test_a_single_image_per_class_cannot_be_split():
    train = pixels(3), np.arange(3)
    with pytest.raises(InputError, match="pets: no training image can be spared for validation"):
        build_dataset("pets", train, train, class_names=NAMES, validation=TENTH)


def test_a_class_with_one_image_is_named_because_validation_lacks_it():
    train = pixels(21), np.array([0, 1] * 10 + [2])
    with pytest.raises(InputError, match="pets validation: no samples of 1 of 3 classes: 'ship'"):
        build_dataset("pets", train, train, class_names=NAMES, validation=TENTH)
