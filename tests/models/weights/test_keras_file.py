"""HDF5 files that read other files, stand for more than they hold, or hold no numbers."""

import time

import h5py
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.models.weights import keras_file
from moth_jax.models.weights.files import read_weights


def write(path, change=lambda file: None, **options):
    """A file of one layer as Keras 2 writes it, changed."""
    with h5py.File(path, "w", **options) as file:
        file["model_weights/conv2d_7/conv2d_7/kernel:0"] = np.arange(6, dtype=np.float32)
        change(file)
    return path


def external(file):
    at = file["model_weights/conv2d_7"]
    at.create_dataset("bias:0", (4,), np.uint8, external=[("/etc/hostname", 0, 4)])


def virtual(file):
    layout = h5py.VirtualLayout((6,), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "secret", (6,))
    file["model_weights/conv2d_7"].create_virtual_dataset("bias:0", layout)


def external_link(file):
    file["model_weights/conv2d_7/bias:0"] = h5py.ExternalLink("other.h5", "secret")


def external_group(file):
    file["model_weights/dense_1"] = h5py.ExternalLink("other.h5", "/")


def external_root(file):
    del file["model_weights"]
    file["model_weights"] = h5py.ExternalLink("other.h5", "/")


def soft_link(file):
    file["model_weights/conv2d_7/bias:0"] = h5py.SoftLink("/model_weights")


def hard_link_to_above(file):
    file["model_weights/conv2d_7/again"] = file["model_weights"]


def many_hard_links(file):
    group = file["model_weights"]
    for _ in range(10):
        inner = group.create_group("a")
        group["b"] = inner
        group = inner


def deep(file):
    file["model_weights/" + "a/" * 30 + "kernel:0"] = np.zeros(2, np.float32)


def references(file):
    file["model_weights/conv2d_7/bias:0"] = np.array([file.ref], h5py.ref_dtype)


def strings(file):
    file["model_weights/conv2d_7/bias:0"] = np.array([b"a", b"b"])


def long_strings(file):
    file["model_weights/conv2d_7/bias:0"] = ["one", "two"]


def empty_set(file):
    file["model_weights/conv2d_7/bias:0"] = h5py.Empty("f")


def compound(file):
    file["model_weights/conv2d_7/bias:0"] = np.zeros(2, [("a", "f4"), ("b", "f4")])


def ragged(file):
    kind = h5py.vlen_dtype(np.float32)
    file["model_weights/conv2d_7"].create_dataset("bias:0", (2,), kind)


def claims(file):
    file["model_weights/conv2d_7"].create_dataset("bias:0", (10**6, 10**6), "f4", chunks=(64, 64))


def never_written(file):
    file["model_weights/conv2d_7"].create_dataset("bias:0", (10**10,), "f4")


def bomb(file):
    at = file["model_weights/conv2d_7"]
    at.create_dataset("bias:0", data=np.zeros(2**26, "f4"), chunks=(2**20,), compression="gzip")


def one_huge_chunk(file):
    at = file["model_weights/conv2d_7"]
    at.create_dataset("bias:0", (4,), "f4", maxshape=(None,), chunks=(2**28,), compression="gzip")


def tiny_chunks(file):
    at = file["model_weights/conv2d_7"]
    at.create_dataset("bias:0", (2 * 10**7,), "f4", chunks=(1,))


def nested_model(file):
    file["model_weights/conv2d_7/inner/kernel:0"] = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (external, r"conv2d_7/bias:0 is or has numbers in another file \(/etc/hostname\)"),
        (virtual, "bias:0 is or has a virtual data set, which reads other files"),
        (external_link, "bias:0 is or has a link to another file"),
        (external_group, "dense_1 is or has a link to another file"),
        (external_root, "model_weights is or has a link to another file"),
        (soft_link, "bias:0 is or has a soft link"),
        (hard_link_to_above, "conv2d_7/kernel:0|again.* a second link to the same object"),
        (many_hard_links, "a second link to the same object"),
        (deep, "more than 16 groups in one another"),
        (references, "values of type reference, which are no numbers"),
        (strings, "values of type string, which are no numbers"),
        (long_strings, "values of type string, which are no numbers"),
        (empty_set, "bias:0 is or has an empty data set"),
        (compound, "which are no numbers"),
        (ragged, "which are no numbers"),
        (claims, "244,140,625 chunks, more than a file of this size has"),
        (
            never_written,
            r"arrays take 40,000,000,024 bytes, but has .*; if that is right, allow it",
        ),
        (bomb, "arrays take 268,435,480 bytes"),
        (one_huge_chunk, "chunks take 1,073,741,824 bytes"),
        (tiny_chunks, "20,000,000 chunks, more than a file of this size has"),
        (nested_model, "several arrays kernel in conv2d_7, a model in the model"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_no_file_of_weights_has_is_refused_before_it_is_read(
    tmp_path, monkeypatch, change, says
):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.arange(6, dtype=np.float32)
    path = write(tmp_path / "w.h5", change)
    read = []
    as_array = np.asarray
    monkeypatch.setattr(keras_file.np, "asarray", lambda x: read.append(x) or as_array(x))
    started = time.monotonic()
    with pytest.raises(InputError, match=says) as caught:
        read_weights(path)
    assert time.monotonic() - started < 2
    assert not read
    assert "\n" not in str(caught.value)


def test_a_filter_that_hdf5_would_load_a_library_for_is_refused(tmp_path):
    path = write(
        tmp_path / "w.h5", lambda file: file["model_weights"].create_dataset("b", (2,), "f4")
    )
    with h5py.File(path, "r+") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((2,))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((2,))
        h5py.h5d.create(file["model_weights"].id, b"c", h5py.h5t.IEEE_F32LE, space, properties)
    with pytest.raises(InputError, match="c is or has compression by an unknown filter, 32015"):
        read_weights(path)


def test_more_than_the_limit_is_read_if_the_user_allows_it(tmp_path, monkeypatch):
    path = write(tmp_path / "w.h5", bomb)
    monkeypatch.setenv("MOTH_JAX_MAX_BYTES", "268435480")
    assert read_weights(path)["conv2d_1/bias"].shape == (2**26,)
    monkeypatch.setenv("MOTH_JAX_MAX_BYTES", "plenty")
    with pytest.raises(InputError, match="MOTH_JAX_MAX_BYTES must be a number of bytes"):
        read_weights(path)


def compressed(file):
    at = file["model_weights/conv2d_7"]
    at.create_dataset("bias:0", data=np.arange(9.0), chunks=(4,), compression="gzip", shuffle=True)
    at["named type"] = np.dtype("f4")


@pytest.mark.parametrize("options", [{}, {"userblock_size": 512}, {"libver": "latest"}])
def test_honest_ways_to_store_numbers_are_read(tmp_path, options):
    weights = read_weights(write(tmp_path / "w.h5", compressed, **options))
    assert weights.keys() == {"conv2d_1/kernel", "conv2d_1/bias"}
    np.testing.assert_array_equal(weights["conv2d_1/bias"], np.arange(9, dtype=np.float32))
    assert weights["conv2d_1/bias"].dtype == np.float32
