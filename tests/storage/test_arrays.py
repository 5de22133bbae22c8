"""Arrays in files whose headers and archives say what is not so."""

import io
import os
import time
import zipfile

import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.storage import files
from moth_jax.storage.files import load_npy, load_npz, save_npz


def npy(shape, descr="<f4", content=b"\0" * 16):
    """A file whose header says what it likes."""
    file = io.BytesIO()
    header = {"shape": shape, "descr": descr, "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


LYING = {
    "huge": (npy((10**12,)), r"speaks of 4000000000000 bytes, shape \(1000000000000,\) of float32"),
    "huge by its type": (npy((2,), f"<U{10**8}"), "speaks of 800000000 bytes"),
    "too large for any number": (npy((10**30, 10**30)), "speaks of 4000"),
    "short": (npy((5,)), "speaks of 20 bytes, .*, and 16 follow"),
    "with more after it": (npy((3,)), "speaks of 12 bytes, .*, and 16 follow"),
    "negative twice": (npy((-2, -2)), r"shape \(-2, -2\)"),
    "of nothing, without end": (npy((10**9,), "<U0", b""), r"shape \(1000000000,\) of <U0"),
    "of letters that there are not": (npy((2, 2), "<U1", b"\xff" * 16), "letters that there are"),
    "of fields": (npy((2,), [("a", "<f8")]), None),
}


@pytest.mark.parametrize(("content", "message"), LYING.values(), ids=LYING)
def test_no_header_is_believed(content, message, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    if message is None:  # it is true
        assert load_npy(tmp_path / "a.npy").shape == load_npz(tmp_path / "a.npz")["x"].shape
        return
    for load, name in ((load_npy, "a.npy"), (load_npz, "a.npz")):
        started = time.monotonic()
        with pytest.raises(InputError, match=rf"cannot read .*{name}: .*{message}"):
            load(tmp_path / name)
        assert time.monotonic() - started < 1


def test_a_small_file_does_not_unpack_to_much_unless_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNPACKED_LIMIT", 2**20)
    path = tmp_path / "zeros.npz"
    save_npz(path, {"x": np.zeros(2**21, np.uint8), "y": np.zeros(2**21, np.uint8)})
    with pytest.raises(InputError, match=r"zeros\.npz unpacks to 4194560 bytes, more than the 10"):
        load_npz(path, unpacked_limit=2**20)
    assert load_npz(path, unpacked_limit=2**23)["x"].shape == (2**21,)
    save_npz(path, {"x": np.random.default_rng(0).bytes(2**21)})  # no bomb
    load_npz(path, unpacked_limit=0)


def test_two_arrays_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy((4,)))
        archive.writestr("x", npy((4,)))
    with pytest.raises(InputError, match="several arrays of one name"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("load", [load_npy, load_npz])
def test_pipes_devices_and_folders_are_not_read(load, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(
            InputError, match="is no regular file, but a pipe, a device or a socket"
        ):
            load(path)
    with pytest.raises(InputError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path / "none")
