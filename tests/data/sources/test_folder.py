import contextlib
import itertools
import json
import os
import shutil
import socket
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from moth_jax import data
from moth_jax.data.checks import check_every_class
from moth_jax.data.decoding import decode_image, make_framing
from moth_jax.data.fingerprints import fingerprints, image_names
from moth_jax.errors import InputError, printable

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


def test_of_streamed_images_headers_are_seen_at_once_and_pixels_when_asked_for(pets, monkeypatch):
    monkeypatch.setattr("moth_jax.data.dataset._MOST_LOOKED_AT", 2)
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


def counted(tmp_path, names, **options):
    """The class names of a folder with these class folders."""
    make(tmp_path / "counted", parts=("",), names=names)
    return load(tmp_path / "counted", **options).class_names


NUMBERED = {
    "numbers": [str(k) for k in range(11)],
    "numbers after letters": [f"class_{k}" for k in (1, 2, 10)],
    "numbers before letters": ["1_cat", "2_dog", "10_ship"],
    "numbers and a name": ["2", "10", "other"],
}


@pytest.mark.parametrize("names", NUMBERED.values(), ids=NUMBERED)
def test_the_order_of_numbered_folders_is_said_and_can_be_chosen(tmp_path, names):
    with pytest.warns(UserWarning, match=r"class \d+ is '.*10.*'; set class_order='number' .* 'na"):
        assert counted(tmp_path, names) == tuple(sorted(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "counted", class_order="name").class_names == tuple(sorted(names))
        assert load(tmp_path / "counted", class_order="number").class_names == tuple(names)


@pytest.mark.parametrize(
    "names", [NAMES, ["00", "01", "10"], ["0", "1", "9"], ["n01440764", "n03888257"], ["f16", "a5"]]
)
def test_nothing_is_said_of_an_order_that_is_plain(tmp_path, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counted(tmp_path, names) == tuple(sorted(names))


def test_an_unknown_order_is_refused(pets):
    with pytest.raises(InputError, match="unknown class_order 'natural'; choose one of"):
        load(pets, class_order="natural")


def test_a_name_in_two_forms_of_unicode_is_one_class_in_two_parts(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    make(tmp_path / "both", parts=("train",), names=("bar", composed))
    make(tmp_path / "both", parts=("test",), names=("bar", apart))
    assert load(tmp_path / "both").class_names == ("bar", composed)
    assert load(tmp_path / "both", class_list=(apart, "bar")).class_names == (composed, "bar")
    make(tmp_path / "both", parts=("train",), names=(apart,))
    with pytest.raises(InputError, match=r"two class folders of .* called 'café', in two forms"):
        load(tmp_path / "both")


BAD_NAMES = {
    "no UTF-8": (os.fsdecode(b"caf\xe9"), r"'caf\\udce9' of a class folder is no text in UTF-8"),
    "a new line": ("cat\nscan  looks clean", r"'cat\\nscan  looks clean' of a class folder"),
    "an escape code": ("cat\x1b[1A", r"'cat\\x1b\[1A' of a class folder"),
}


@pytest.mark.parametrize(("name", "message"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_a_folder_whose_name_cannot_be_written_is_refused_when_it_is_read(pets, name, message):
    try:
        (pets / "train" / "cat").rename(pets / "train" / name)
    except OSError:
        pytest.skip("the file system has no such names")
    with pytest.raises(InputError, match=message) as raised:
        load(pets)
    assert printable(str(raised.value)) == str(raised.value)


def test_the_name_of_a_data_set_can_be_shown(tmp_path):
    assert load(make(tmp_path / "pets\x1b[2J\n")).name == "pets\\x1b[2J\\n"


def link(path, target):
    """A damage: a link at a path to a target, both from the folder of images."""

    def damage(pets):
        (pets / path).symlink_to(pets / target)

    return damage


def chain(pets):
    """Folders that each link to the next twice: without care 2^30 paths."""
    places = [pets / "train" / "cat" / f"chain{k}" for k in range(31)]
    for folder in places:
        folder.mkdir()
    for folder, following in itertools.pairwise(places):
        for name in "ab":
            (folder / name).symlink_to(following)


LINKS = {
    "to the folder of images": (link("train/cat/all", "."), "'.*cat/all'"),
    "to its parent": (link("train/cat/more", "train"), "'.*cat/more'"),
    "to itself": (link("train/cat/self", "train/cat"), "'.*cat/self'"),
    "to another class": (link("train/cat/dogs", "train/dog"), "'.*dog.*'"),
    "to another part": (link("train/dog/test", "test/dog"), "'.*dog/test'"),
    "a class for another": (link("train/dog/x.png", "train/dog/0.png"), "'.*dog/x.png'"),
    "an image of another part": (link("test/dog/x.png", "train/cat/1.png"), "'.*dog/x.png'"),
    "two to one image": (
        lambda pets: [link(f"test/dog/{n}.png", "../cat.png")(pets) for n in "xy"],
        "'.*dog/y.png'",
    ),
    "in a chain": (chain, "'.*chain"),
}


@pytest.mark.parametrize(("damage", "named"), LINKS.values(), ids=LINKS)
def test_links_that_lead_to_an_image_again_are_named_and_never_followed_for_ever(
    pets, damage, named
):
    draw(pets.parent / "cat.png")
    damage(pets)
    started = time.monotonic()
    with pytest.raises(InputError, match=rf"links lead to \d+ .* a second time, .*: {named}"):
        load(pets)
    assert time.monotonic() - started < 2


def test_a_part_that_links_to_another_is_refused(pets):
    shutil.rmtree(pets / "val")
    (pets / "val").symlink_to(pets / "test")
    with pytest.raises(InputError, match="links lead to 3 folders and images a second time"):
        load(pets)


def test_a_link_to_an_image_elsewhere_is_followed(pets, tmp_path):
    (pets / "test" / "cat" / "0.png").rename(tmp_path / "elsewhere.png")
    (pets / "test" / "cat" / "0.png").symlink_to(tmp_path / "elsewhere.png")
    assert sizes(load(pets)) == (12, 12, 12)


def socket_at(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(os.path.relpath(path))


NO_FILES = {
    "a pipe": lambda path: os.mkfifo(path),
    "a socket": socket_at,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("make_it", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_and_left_out_if_asked(pets, make_it):
    make_it(pets / "train" / "cat" / "x.png")
    with pytest.raises(InputError, match=r"1 files .* or are pipes, .* nowhere: '.*cat/x.png'"):
        load(pets)
    with pytest.warns(UserWarning, match="left out: 1 files"):
        assert sizes(load(pets, skip_unreadable=True)) == (12, 12, 12)


def test_a_class_folder_that_is_a_link_to_nothing_is_no_class_less(pets):
    (pets / "train" / "bird").symlink_to("nowhere")
    with pytest.raises(InputError, match="train/bird is a link that leads nowhere; remove it"):
        load(pets)


FEW = {
    "one": (("",), 1, "each needs 3, and 'cat' has 1, 'dog' has 1, 'ship' has 1; add images"),
    "two": (("",), 2, "train and validation and test, .* same images: each needs 3, and 'cat' ha"),
    "one of each": (
        ("train", "test"),
        1,
        "train and validation, .*: each needs 2, and 'cat' has 1",
    ),
    "one to divide": (
        ("train", "val"),
        1,
        "validation and test, .*: each needs 2, and 'cat' has 1",
    ),
}


@pytest.mark.parametrize(("parts", "count", "message"), FEW.values(), ids=FEW)
def test_too_few_images_to_divide_are_counted_with_what_to_do(tmp_path, parts, count, message):
    with pytest.raises(InputError, match=message):
        load(make(tmp_path / "few", parts=parts, count=count))


def test_three_images_of_a_class_are_enough_and_one_in_each_part(tmp_path):
    assert sizes(load(make(tmp_path / "three", parts=("",), count=3))) == (3, 3, 3)
    assert sizes(load(make(tmp_path / "parts", count=1))) == (3, 3, 3)
    assert sizes(load(make(tmp_path / "two", parts=("train", "test"), count=2))) == (3, 3, 6)


def deepen(pets, white):
    """Make the images of 16 bits, of which some are used."""
    for path in pets.rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L"), np.uint16)
        Image.fromarray((grey.astype(np.int64) * white // 255).astype(np.uint16)).save(path)
    Image.fromarray(np.full([9, 12], white, np.uint16)).save(path)


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("white", [4095, 16383])
def test_white_of_16_bits_is_found_over_the_whole_folder_and_said(pets, white, limit):
    deepen(pets, white)
    with pytest.warns(
        UserWarning, match=rf"36 images have 16 bits and values up to {white}, .*pixe"
    ):
        found = load(pets, in_memory_limit=limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = load(pets, in_memory_limit=limit, pixel_max=white)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # images as dark as these may be wrong
        dark = load(pets, in_memory_limit=limit, pixel_max=65535)
    np.testing.assert_array_equal(images(found.train), images(given.train))
    assert found.train.batch(np.arange(12)).max() > 0.8
    assert dark.train.batch(np.arange(12)).max() < 0.3


def test_all_16_bits_are_nothing_to_speak_of_and_a_lower_white_is_refused(pets):
    deepen(pets, 65535)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images(load(pets).train).max() > 0.8
    with pytest.raises(
        InputError, match=r"images cannot be read: .*largest value is \d+, white is 40"
    ):
        load(pets, pixel_max=4095)
    with pytest.raises(InputError, match="pixel_max must be 0 or one of 255, 1023, 4095"):
        load(pets, pixel_max=1000)


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("parts", [("train", "val", "test"), ("test",)])
def test_images_that_were_divided_twice_are_found_also_where_they_are_streamed(pets, parts, limit):
    for part in parts:
        for path in (pets / part).rglob("*.png"):
            Image.fromarray(np.asarray(Image.open(path)) // 128).save(path)
    if len(parts) == 3:
        with pytest.raises(InputError, match="train images are uint8 with no value above 1"):
            load(pets, in_memory_limit=limit)
        return
    for path in (pets / "test").rglob("*.png"):
        Image.fromarray(2 * np.asarray(Image.open(path))).save(path)
    with (
        pytest.warns(UserWarning, match=r"test images are at most 0\.00784 where white is 1"),
        pytest.raises(
            InputError, match=r"brightest value is 0.9.* in train, 0.9.* 0.00784 in test"
        ),
    ):
        load(pets, in_memory_limit=limit)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_the_images_know_their_files(pets, limit):
    dataset = load(pets, in_memory_limit=limit)
    assert image_names(dataset.validation)[5] == "val/dog/1.png"


def test_a_file_that_was_written_again_has_another_fingerprint(pets):
    before = fingerprints(load(pets, in_memory_limit=0).test)
    os.utime(pets / "test" / "dog" / "1.png", ns=(1, 1))
    os.utime(pets / "test" / "dog" / "0.png")  # of the same size, at another time
    now = fingerprints(load(pets, in_memory_limit=0).test)
    assert np.flatnonzero(before != now).tolist() == [4, 5]
