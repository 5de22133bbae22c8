import pickle

import numpy as np
import pytest

from moth_jax.data.sources.npz import load_npz
from moth_jax.errors import InputError
from tests.helpers.pickles import Calls


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, [40, 6, 6, 3], np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, [12, 6, 6, 3], np.uint8),
        "y_test": np.arange(12) % 4,
    }
    return {name: array for name, array in (made | changes).items() if array is not None}


def load(tmp_path, options=None, **changes):
    np.savez_compressed(tmp_path / "my_images.npz", **arrays(**changes))
    return load_npz(file=str(tmp_path / "my_images.npz"), **(options or {}))


def test_a_plain_file_is_read_under_its_own_name(tmp_path):
    dataset = load(tmp_path, {"validation_fraction": 0.2, "flip": True, "shift": 1})
    assert dataset.name == "my_images"
    assert dataset.class_names == ("class 0", "class 1", "class 2", "class 3")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 8, 12)
    assert (dataset.flip, dataset.shift) == (True, 1)


def test_names_in_the_file_are_used_and_an_option_overrides_them(tmp_path):
    names = ["ant", "bee", "cow", "dog"]
    assert load(tmp_path, class_names=np.array(names)).class_names == tuple(names)
    assert load(tmp_path, class_names=np.array(names, "S")).class_names == tuple(names)
    options = {"class_names": list("wxyz")}
    assert load(tmp_path, options, class_names=np.array(names)).class_names == tuple("wxyz")


def test_one_hot_and_column_labels_mean_the_same_as_integers(tmp_path):
    plain = load(tmp_path)
    one_hot = load(tmp_path, y_train=np.eye(4)[np.arange(40) % 4])
    column = load(tmp_path, y_train=(np.arange(40) % 4)[:, None])
    assert (plain.train.labels == one_hot.train.labels).all()
    assert (plain.train.labels == column.train.labels).all()


def test_floats_and_integers_up_to_255_are_read_as_the_same_images_when_declared(tmp_path):
    plain = load(tmp_path)
    for dtype in (np.float32, np.float64, np.int64):
        changes = {name: arrays()[name].astype(dtype) for name in ("x_train", "x_test")}
        dataset = load(tmp_path, {"pixel_max": 255}, **changes)
        np.testing.assert_array_equal(dataset.test.batch([3]), plain.test.batch([3]))


def test_a_validation_part_in_the_file_is_used(tmp_path):
    dataset = load(tmp_path, x_val=arrays()["x_test"][:4], y_val=np.arange(4))
    assert (len(dataset.train), len(dataset.validation)) == (40, 4)


@pytest.mark.parametrize("key", ["group_train", "track_train"])
def test_groups_in_the_file_stay_together(tmp_path, key):
    images = np.repeat(np.arange(2, 22, dtype=np.uint8), 2)[:, None, None, None]
    images = np.broadcast_to(images, [40, 6, 6, 3]) + np.arange(3, dtype=np.uint8)
    labels = np.repeat(np.arange(20) % 4, 2)
    groups = np.repeat(np.arange(20), 2)
    dataset = load(tmp_path, x_train=images, y_train=labels, **{key: groups})
    shades = [set(part.images[:, 0, 0, 0]) for part in (dataset.train, dataset.validation)]
    assert not shades[0] & shades[1]


OBJECTS = np.empty(40, object)
BAD_ARRAYS = {
    "missing": ({"x_test": None, "y_test": None}, {}, "missing arrays 'x_test', 'y_test'"),
    "mistyped": ({"x_valid": np.zeros(1)}, {}, "unknown arrays 'x_valid'.*may hold x_val"),
    "half a validation part": ({"x_val": arrays()["x_test"]}, {}, "both x_val and y_val"),
    "object images": ({"x_train": OBJECTS}, {}, "Object arrays"),
    "object names": ({"class_names": np.array(["a", "b"], object)}, {}, "Object arrays"),
    "two-hot": ({"y_train": np.ones([40, 4])}, {}, "must be one-hot"),
    "text labels": ({"y_train": np.array(["cat", "dog"] * 20)}, {}, "must be integers"),
    "huge label": ({"y_train": np.arange(40) * 10**8}, {}, "largest label is 3900000000 with only"),
    "skipped label": ({"y_train": np.arange(40) % 4 * 2}, {}, "no samples of 3 of 7.*'class 1'"),
    "one class": ({"y_train": np.zeros(40, int)}, {}, "at least 2 classes.*got 1"),
    "too few names": ({}, {"class_names": ["a", "b"]}, r"labels must be in \[0, 2\), got 2, 3"),
    "white": ({}, {"pixel_max": 128}, "pixel_max.*must be one of 1, 255, .*65535, got 128"),
    "not 255": ({"x_train": np.full([40, 6, 6, 3], 0.5)}, {"pixel_max": 255}, "use pixel_max=1"),
    "text images": ({"x_train": np.full([40, 6, 6, 3], "a")}, {"pixel_max": 255}, "dtype <U1"),
}


@pytest.mark.parametrize(("changes", "options", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_faulty_arrays_are_refused(tmp_path, changes, options, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, options, **changes)


def whole(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", **arrays())
    return (tmp_path / "whole.npz").read_bytes()


def with_a_changed_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "a changed byte": with_a_changed_byte,
    "empty": lambda content: b"",
    "a web page": lambda content: b"<html>Not found</html>",
    "a pickle": lambda content: b"\x80\x04}q\x00.",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "images.npz"
    path.write_bytes(damage(whole(tmp_path)))
    with pytest.raises(InputError, match=r"cannot read .*images\.npz: .* fetch or write it again"):
        load_npz(file=str(path))


def test_a_pickle_is_never_opened(tmp_path):
    trap = Calls(open, str(tmp_path / "sprung"), "w")
    path = tmp_path / "images.npz"
    path.write_bytes(pickle.dumps(trap))
    with pytest.raises(InputError, match="not a zip file"):
        load_npz(file=str(path))
    np.savez(path, **arrays(y_train=np.array([trap], object)))
    with pytest.raises(InputError, match="running code"):
        load_npz(file=str(path))
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_a_single_array_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"not found at .*numpy\.savez_compressed"):
        load_npz(file=str(tmp_path / "absent.npz"))
    with pytest.raises(InputError, match="no path given"):
        load_npz()
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"an \.npz file with x_train, y_train, .*, is needed"):
        load_npz(file=str(tmp_path / "one.npy"))
    with pytest.raises(InputError, match="cannot read"):
        load_npz(file=str(tmp_path))


DEEP = {name: arrays()[name].astype(np.uint16) * 16 for name in ("x_train", "x_test")}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.float32])
@pytest.mark.parametrize("white", [4095, 65535])
def test_white_of_deep_arrays_is_given_and_never_cast(tmp_path, dtype, white):
    deep = {name: array.astype(dtype) for name, array in DEEP.items()}
    images = load(tmp_path, {"pixel_max": white}, **deep).test.images
    np.testing.assert_allclose(images, DEEP["x_test"] / white, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int64])
def test_white_of_whole_numbers_is_asked_for(tmp_path, dtype):
    deep = {name: array.astype(dtype) for name, array in DEEP.items()}
    with pytest.raises(
        InputError, match=r"x_train .* are u?int\d\d from 0 to 4080; give as pixel_max"
    ):
        load(tmp_path, **deep)
    with pytest.raises(InputError, match=r"must be in \[0, 1023\] .* got 0 to 4080"):
        load(tmp_path, {"pixel_max": 1023}, **deep)


def floats(name, divisor=255):
    return (arrays()[name] / divisor).astype(np.float32)


@pytest.mark.parametrize("part", ["x_train", "x_test", "x_val"])
def test_a_part_divided_once_more_is_refused(tmp_path, part):
    parts = {name: floats(name) for name in ("x_train", "x_test")}
    parts |= {"x_val": floats("x_test"), "y_val": arrays()["y_test"]}
    load(tmp_path, **parts)
    with pytest.raises(InputError, match="give all parts in one range"):
        load(tmp_path, **{**parts, part: parts[part] / np.float32(255)})


def test_whole_numbers_beside_floats_are_said(tmp_path):
    with pytest.warns(UserWarning, match="x_train are whole numbers and x_test floats; are white"):
        load(tmp_path, x_test=floats("x_test"))


@pytest.mark.parametrize("part", ["y_train", "y_test"])
def test_labels_that_do_not_fit_into_32_bits_do_not_become_others(tmp_path, part):
    labels = arrays()[part].astype(np.int64)
    labels[3] += 2**32
    with pytest.raises(InputError, match="4294967299"):
        load(tmp_path, **{part: labels})


@pytest.mark.parametrize("seed", [-1, 0.5, "x", True])
def test_a_seed_is_a_whole_number(tmp_path, seed):
    with pytest.raises(InputError, match=f"seed must be a whole number, 0 or more, got {seed!r}"):
        load(tmp_path, {"seed": seed})


BAD_NAMES = {
    "no UTF-8": (np.array([b"a", b"b", b"c", b"\xe9"]), "class_names must be text in UTF-8"),
    "a table": (
        np.array([["a", "b"], ["c", "d"]]),
        r"class_names must have shape \[K\], got \(2, 2\)",
    ),
    "one text": (np.array("abcd"), r"class_names must have shape \[K\], got \(\)"),
    "twice": (np.array(["a", "b", "a", "c"]), "more than once: 'a'"),
    "empty": (np.array(["a", "b", "", "c"]), "non-empty strings"),
    "an escape code": (np.array(["a", "b", "c", "\x1b[2J"]), r"'\\x1b\[2J'"),
}


@pytest.mark.parametrize(("names", "message"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_class_names_are_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, class_names=names)


def test_a_bomb_is_refused_unless_it_may_unpack(tmp_path, monkeypatch):
    black = np.zeros([2**12, 16, 16, 3], np.uint8)
    black[0] = 255
    options = {"unpacked_limit": 2**20}
    with pytest.raises(InputError, match=r"unpacks to .* more than the"):
        load(tmp_path, options, x_train=black, y_train=np.arange(2**12) % 4)
