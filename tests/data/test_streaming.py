import dataclasses
import threading

import numpy as np
import pytest

from moth_jax.data import streaming
from moth_jax.data.building import build_dataset, mean_and_std
from moth_jax.data.dataset import ImageDataset, ImageSplit, validate
from moth_jax.data.decoding import UnreadableImageError
from moth_jax.data.streaming import Listing, StreamedImages, parallel_map, read_parts
from moth_jax.errors import InputError

SHAPE = (4, 5, 3)
ARRAY = np.random.default_rng(0).integers(0, 256, [40, *SHAPE], np.uint8)
LABELS = np.arange(40, dtype=np.int32) % 4
NAMES = ("ant", "bee", "cat", "dog")


def decode(item):
    if item in (3, 7, 38):
        raise UnreadableImageError(f"image {item}", "cut short")
    return ARRAY[item]


def streamed(n=40):
    return StreamedImages(range(n), ARRAY.__getitem__, SHAPE)


def listing(items, decode=ARRAY.__getitem__):
    return Listing(list(items), LABELS[list(items)], decode)


@pytest.mark.parametrize("indices", [[5], [39, 0, 17, 0], np.arange(40)[::-1], []])
def test_streamed_images_are_bit_for_bit_those_of_the_array(indices):
    indices = np.asarray(indices, np.int64)
    images = streamed()
    assert (len(images), images.shape, images.dtype) == (40, ARRAY.shape, ARRAY.dtype)
    np.testing.assert_array_equal(images[indices], ARRAY[indices])


def test_a_streamed_split_gives_the_batches_of_the_split_in_memory_one_by_one():
    streams, holds = (ImageSplit(images, LABELS) for images in (streamed(), ARRAY))
    batches = [np.array([8, 2, 2]), np.array([31]), np.arange(20)]
    for split in (streams, holds):
        for indices, images in zip(batches, split.batches(batches), strict=True):
            assert images.dtype == np.float32
            np.testing.assert_array_equal(images, holds.batch(indices))
            np.testing.assert_array_equal(images, streams.batch(indices))
        assert list(split.batches([])) == []
        assert split.image_shape == SHAPE
        assert split.of_class(2).tolist() == list(range(2, 40, 4))


def test_the_next_batch_is_decoded_while_the_last_one_is_used():
    decoded, ready = [], threading.Event()

    def note(item):
        decoded.append(item)
        if len(decoded) == 16:
            ready.set()
        return ARRAY[item]

    batches = StreamedImages(range(40), note, SHAPE).batches(
        [range(8), range(8, 16), range(16, 24)]
    )
    next(batches)
    assert ready.wait(timeout=10)
    batches.close()


def test_results_come_in_order_whichever_thread_is_first():
    gate = threading.Event()

    def slow_first(item):
        if item == 0:
            gate.wait(timeout=10)
        else:
            gate.set()
        return item

    assert list(parallel_map(slow_first, range(6))) == list(range(6))


def test_threads_end_when_only_some_results_are_asked_for():
    before = threading.active_count()
    results = parallel_map(lambda item: item, range(1000))
    assert next(results) == 0
    results.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=10)
    assert threading.active_count() <= before


def test_a_fault_found_while_streaming_is_raised_where_the_image_is_asked_for():
    images = StreamedImages(range(40), decode, SHAPE)
    np.testing.assert_array_equal(images[[2, 4]], ARRAY[[2, 4]])
    with pytest.raises(InputError, match=r"^image 3 cannot be read \(cut short\); delete"):
        images[[2, 3]]


@pytest.mark.parametrize("spare", [0, -1])
def test_images_are_held_in_memory_only_if_all_parts_fit(spare):
    parts = {"train": listing(range(30)), "test": listing(range(30, 40))}
    read = read_parts(parts, SHAPE, in_memory_limit=ARRAY.nbytes + spare)
    kind = np.ndarray if spare == 0 else StreamedImages
    for part in parts:
        images, labels, _ = read[part]
        assert isinstance(images, kind)
        np.testing.assert_array_equal(images[np.arange(len(images))], ARRAY[parts[part].items])
        np.testing.assert_array_equal(labels, parts[part].labels)


def look(item):
    if item == 7:
        raise UnreadableImageError("image 7", "empty")


@pytest.mark.parametrize("limit", [0, ARRAY.nbytes])
def test_unreadable_images_of_all_parts_are_named_and_counted_together(limit):
    parts = {"train": listing(range(30), decode), "test": listing(range(30, 40), decode)}
    found = "1 of 40 .*: image 7 .empty" if limit == 0 else "3 of 40 .*: image 3 .cut.*7.*image 38"
    with pytest.raises(InputError, match=f"{found}.*; delete or replace them, or .*skip_unread"):
        read_parts(parts, SHAPE, in_memory_limit=limit, look=look)


@pytest.mark.parametrize("limit", [0, ARRAY.nbytes])
def test_unreadable_images_are_left_out_if_asked_and_said_to_be(limit):
    parts = {"train": listing(range(30), decode), "test": listing(range(30, 40), decode)}
    with pytest.warns(UserWarning, match="left out: 3 of 40 images cannot be read: image 3"):
        read = read_parts(parts, SHAPE, in_memory_limit=limit, skip_unreadable=True)
    images, labels, _ = read["train"]
    kept = [i for i in range(30) if i not in (3, 7)]
    np.testing.assert_array_equal(images[np.arange(28)], ARRAY[kept])
    np.testing.assert_array_equal(labels, LABELS[kept])
    assert len(read["test"][0]) == len(read["test"][1]) == 9


def test_a_negative_limit_is_refused():
    with pytest.raises(InputError, match="in_memory_limit must be 0 or more bytes, got -1"):
        read_parts({}, SHAPE, in_memory_limit=-1)


def built(images, **options):
    part = images, LABELS
    return build_dataset("pets", part, part, validation=part, class_names=NAMES, **options)


def test_a_streamed_data_set_is_described_as_one_in_memory():
    one, other = built(streamed()), built(ARRAY)
    assert one.image_shape == other.image_shape == SHAPE
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12)
    np.testing.assert_allclose(one.std, other.std, rtol=1e-12)


def test_mean_and_std_of_streamed_images_are_those_of_a_drawn_sample(monkeypatch):
    monkeypatch.setattr("moth_jax.data.building._STATISTICS_IMAGES", 10)
    first, again, other = (built(streamed(), seed=seed).mean for seed in (0, 0, 1))
    assert first == again != other
    drawn = np.random.default_rng(0).choice(40, 10, replace=False)
    assert first == mean_and_std(ARRAY[drawn])[0]


def with_labels(**labels) -> ImageDataset:
    dataset = built(ARRAY)
    splits = {part: ImageSplit(ARRAY, np.resize(values, 40)) for part, values in labels.items()}
    return dataclasses.replace(dataset, **splits)


def test_classes_present_are_those_of_the_training_images():
    assert built(ARRAY).present == (0, 1, 2, 3)
    assert with_labels(train=[3, 1]).present == (1, 3)


def test_a_head_may_have_classes_without_images_only_where_that_is_allowed():
    few = with_labels(train=[1, 3], validation=[1, 3], test=[0, 1, 3])
    validate(few, every_class=False)
    with pytest.raises(InputError, match="pets train: no samples of 2 of 4 classes: 'ant', 'cat'"):
        validate(few)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_class_with_training_images_must_be_in_the_other_parts(part):
    parts = {"train": [1, 3], "validation": [1, 3], "test": [1, 3]} | {part: [0, 1]}
    with pytest.raises(InputError, match=f"pets {part}: no samples of 1 of 2 classes: 'dog'"):
        validate(with_labels(**parts), every_class=False)


def test_a_single_class_is_refused():
    few = with_labels(train=[2], validation=[2], test=[2])
    with pytest.raises(InputError, match="pets has images of a single class, 'cat'"):
        validate(few, every_class=False)


def test_as_many_threads_decode_as_there_are_cores_for_this_process(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    assert streaming._num_cores() == 3
