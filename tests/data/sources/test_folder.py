import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from moth_jax import data
from moth_jax.data.checks import check_every_class
from moth_jax.data.decoding import decode_image, make_framing
from moth_jax.errors import InputError

NAMES = ("cat", "dog", "ship")
SMALL = {"image_size": 8, "resize": 8}


def draw(path, seed=0):
    """Write a tiny picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, [9, 12, 3], np.uint8)
    Image.fromarray(pixels).save(path)


def make(root, parts=("train", "val", "test"), names=NAMES, count=4, suffix="png"):
    """Write `count` pictures of each class into each part; parts=("",) for no parts."""
    for p, part in enumerate(parts):
        for n, name in enumerate(names):
            for i in range(count):
                draw(root / part / name / f"{i}.{suffix}", seed=100 * p + 10 * n + i)
    return root


@pytest.fixture
def pets(tmp_path):
    return make(tmp_path / "pets")


def load(root, **options):
    return data.load("folder", dir=str(root), **{**SMALL, **options})


def sizes(dataset):
    return len(dataset.train), len(dataset.validation), len(dataset.test)


def images(split):
    return split.batch(np.arange(len(split)))


def test_the_parts_are_those_of_the_folder_and_the_classes_its_folders_by_name(pets):
    dataset = load(pets, flip=True, shift=1)
    assert (dataset.name, dataset.class_names, dataset.present) == ("pets", NAMES, (0, 1, 2))
    assert sizes(dataset) == (12, 12, 12)
    assert dataset.image_shape == dataset.test.image_shape == (8, 8, 3)
    assert dataset.validation.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (dataset.flip, dataset.shift) == (True, 1)
    path = pets / "val" / "dog" / "2.png"
    expected = decode_image(path, make_framing(**SMALL), name="") / np.float32(255)
    np.testing.assert_array_equal(dataset.validation.batch([6])[0], expected)


@pytest.mark.parametrize(
    "names", [("Train", "validation", "TEST"), ("training", "valid", "testing")]
)
def test_the_parts_have_several_names(pets, names):
    for old, new in zip(("train", "val", "test"), names, strict=True):
        (pets / old).rename(pets / new)
    assert sizes(load(pets)) == (12, 12, 12)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "ppm", "bmp", "webp"])
def test_files_of_all_kinds_are_read(tmp_path, suffix):
    make(tmp_path, parts=("",), suffix=suffix)
    assert sum(sizes(load(tmp_path))) == 12


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("train", "test"), (24, 6, 30)),  # a fifth of train for validation
        (("train", "val"), (30, 6, 24)),  # val gives both: train has been seen by the model
        (("train",), (18, 6, 6)),
        (("",), (18, 6, 6)),
    ],
)
def test_what_is_missing_is_taken_out_of_what_is_there_class_by_class(tmp_path, parts, expected):
    make(tmp_path, parts=parts, count=10)
    dataset = load(tmp_path, validation_fraction=0.2)
    assert sizes(dataset) == expected
    splits = (dataset.train, dataset.validation, dataset.test)
    for split in splits:
        assert len(set(np.bincount(split.labels))) == 1
        check_every_class(split.labels, NAMES)
    every = np.concatenate([images(split) for split in splits])
    assert len(np.unique(every, axis=0)) == len(every) == 30 * len(parts)


@pytest.mark.parametrize("parts", [("train", "val"), ("train",), ("",)])
def test_the_seed_never_changes_the_test_images(tmp_path, parts):
    make(tmp_path, parts=parts, count=10)
    first, again, other = (load(tmp_path, seed=seed) for seed in (0, 0, 1))
    for part in ("train", "validation", "test"):
        one, two = getattr(first, part), getattr(again, part)
        np.testing.assert_array_equal(images(one), images(two))
    np.testing.assert_array_equal(images(first.test), images(other.test))
    assert parts == ("train", "val") or (images(first.train) != images(other.train)).any()


def test_images_may_lie_deeper_in_the_folder_of_their_class_and_beside_hidden_files(pets):
    draw(pets / "train" / "cat" / "images" / "more" / "x.png")
    for name in (".DS_Store", "Thumbs.db", ".ipynb_checkpoints/y.png"):
        (pets / "train" / "cat" / name).parent.mkdir(exist_ok=True)
        (pets / "train" / "cat" / name).write_bytes(b"litter")
    for name in ("README.md", "train/labels.csv", ".hidden/cat/1.png", "__MACOSX/cat/1.png"):
        (pets / name).parent.mkdir(parents=True, exist_ok=True)
        (pets / name).write_text("a note")
    assert sizes(load(pets)) == (13, 12, 12)


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path, parts=("",), names=("car", "plane", "train"), count=5)
    assert load(tmp_path).class_names == ("car", "plane", "train")


def test_a_link_to_a_folder_of_images_is_followed(pets, tmp_path):
    (pets / "test" / "cat").rename(tmp_path / "elsewhere")
    (pets / "test" / "cat").symlink_to(tmp_path / "elsewhere")
    assert sizes(load(pets)) == (12, 12, 12)


def test_a_class_list_gives_the_numbers_of_a_larger_head(pets):
    dataset = load(pets, class_list=("plane", "ship", "cat", "bird", "dog"), num_classes=5)
    assert dataset.num_classes == 5
    assert dataset.present == (1, 2, 4)
    assert dataset.test.labels.tolist() == [2] * 4 + [4] * 4 + [1] * 4


def test_folders_named_by_synset_have_their_numbers_in_the_head_of_imagenet(tmp_path):
    make(tmp_path, names=("n03888257", "n01440764"))
    dataset = load(tmp_path, class_list="imagenet")
    assert (dataset.num_classes, dataset.present) == (1000, (0, 701))
    assert dataset.class_names[701] == "n03888257"


def test_folders_may_go_by_different_names_of_one_class(pets, tmp_path):
    (pets / "train" / "cat").rename(pets / "train" / "n1")
    (tmp_path / "list.json").write_text(json.dumps([["n1", "cat"], ["n2", "dog"], ["n3", "ship"]]))
    dataset = load(pets, class_list=str(tmp_path / "list.json"))
    assert dataset.class_names == NAMES
    assert sorted(dataset.train.labels) == sorted(dataset.test.labels)


def test_further_classes_of_a_head_may_be_in_the_test_part_alone(pets):
    draw(pets / "test" / "bird" / "1.png")
    dataset = load(pets, class_list=(*NAMES, "bird"))
    assert (dataset.present, len(dataset.test)) == ((0, 1, 2), 13)


def adding(*paths):
    """A damage: pictures at places where they should not be."""

    def damage(pets):
        for path in paths:
            draw(pets / path)

    return damage


def empty_class(pets):
    for path in (*(pets / "val" / "dog").iterdir(), *(pets / "test" / "cat").iterdir()):
        path.unlink()


def stray_file(pets):
    (pets / "train" / "cat" / "notes.txt").write_text("a note")
    (pets / "train" / "dog" / "movie.gif").write_bytes(b"GIF89a")


def flat(*parts):
    """A damage: parts without class folders."""

    def damage(pets):
        for part in parts:
            shutil.rmtree(pets / part)
            draw(pets / part / "1.png")

    return damage


def several(pets):
    empty_class(pets)
    draw(pets / "train" / "bird" / "1.png")
    stray_file(pets)


BAD_FOLDERS = {
    "empty class": (
        empty_class,
        r"no images in 2 class folders: 'test/cat', 'validation/dog'; add .* or remove",
    ),
    "class only in train": (
        adding("train/bird/1.png"),
        "test has no .* 'bird'; add .*; validation has no folders of 1 .* 'bird'",
    ),
    "class only in test": (
        adding("test/bird/1.png"),
        "train has no folders of 1 classes that other parts have: 'bird'",
    ),
    "stray file": (
        stray_file,
        r"2 files .* not named as JPEG.*: '.*notes\.txt', '.*movie\.gif'; move .*skip_unr",
    ),
    "image beside parts": (
        adding("x.png"),
        r"1 images lie outside the class folders: '.*pets/x\.png'; move or remove",
    ),
    "image beside classes": (
        adding("val/x.png"),
        r"1 images lie outside the class folders: '.*pets/val/x\.png'",
    ),
    "class beside parts": (
        adding("cat/1.png"),
        "folders 'cat' lie beside train, validation and test; move them",
    ),
    "flat test": (
        flat("test"),
        "pets/test has no class folders; sort its images into one for each class",
    ),
    "only flat parts": (
        flat("train", "val", "test"),
        "test has no class folders; .*train has no class folders; .*val has no class",
    ),
    "two validation parts": (
        adding("validation/cat/1.png"),
        "'val', 'validation' mean the same part; keep one",
    ),
    "no train": (
        lambda pets: shutil.rmtree(pets / "train"),
        "there is test and validation but no train part; give the path of",
    ),
    "several": (several, "2 files .*; no images in 2 .*; test has no folders of 1 classes"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_message_that_names_all_faults(pets, damage, message):
    damage(pets)
    with pytest.raises(InputError, match=f"^image folder .*pets: .*{message}"):
        load(pets)


def test_class_folders_missing_from_the_list_are_named_with_what_the_list_has(pets):
    message = r"2 of 3 class folders .* 'cat', 'ship' \(it has 'Cat', 'dog', 'SHIP'\); rename"
    with pytest.raises(InputError, match=message):
        load(pets, class_list=("Cat", "dog", "SHIP"))


def test_another_number_of_classes_is_refused(pets):
    with pytest.raises(InputError, match="3 class folders for num_classes=1000; name the classes"):
        load(pets, num_classes=1000)
    with pytest.raises(InputError, match="class_list has 3 classes, but num_classes is 4"):
        load(pets, class_list=NAMES, num_classes=4)


def test_a_folder_that_may_not_be_listed_is_named(pets, monkeypatch):
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("train/cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"train/cat cannot be listed \(Permission denied\)"):
        load(pets)


@pytest.mark.parametrize("folder", ["nothing", "file.png", "empty"])
def test_what_is_no_folder_of_images_is_answered_with_what_is_needed(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    draw(tmp_path / "file.png")
    message = "empty has no class folders; make one" if folder == "empty" else "as the option dir"
    with pytest.raises(InputError, match=message):
        load(tmp_path / folder)


def test_a_single_class_is_refused(tmp_path):
    make(tmp_path, names=("cat",))
    with pytest.raises(InputError, match=r"at least 2 classes are needed .*'cat'"):
        load(tmp_path)


def spoil(pets):
    """Cut one image short, and make another a web page."""
    cut, page = pets / "train" / "cat" / "1.png", pets / "test" / "dog" / "0.png"
    cut.write_bytes(cut.read_bytes()[:150])
    page.write_text("<!DOCTYPE html>")


def test_of_streamed_images_headers_are_seen_at_once_and_pixels_when_asked_for(pets):
    spoil(pets)
    with pytest.raises(InputError, match=r"1 of 36 images cannot be read: .*dog/0\.png"):
        load(pets, in_memory_limit=0)
    draw(pets / "test" / "dog" / "0.png")
    (pets / "train" / "cat" / "1.png").rename(pets / "test" / "cat" / "9.png")
    dataset = load(pets, in_memory_limit=0)
    assert len(dataset.test.batch([0, 5])) == 2
    with pytest.raises(InputError, match=r"cat/9\.png cannot be read \(.*truncated.*; delete or"):
        dataset.test.batch(np.arange(13))


@pytest.mark.parametrize("limit", [0, 10**9])
def test_unreadable_images_and_stray_files_are_left_out_if_asked(pets, limit):
    spoil(pets)
    stray_file(pets)
    with pytest.warns(UserWarning, match="left out") as warned:
        dataset = load(pets, in_memory_limit=limit, skip_unreadable=True)
    assert sizes(dataset) == (11, 12, 11)
    messages = [str(warning.message) for warning in warned]
    assert any("2 files in class folders" in message for message in messages)
    assert any("2 of 36 images" in message for message in messages)
