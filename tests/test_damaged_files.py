"""Every reader, given thousands of damaged files: a result or one line, nothing else, in time.

`FORMATS` has one row for each kind of file: how a valid one is written, how it is read, how often a
damaged copy is tried, and which damages. `pytest -n 0 -s` shows the counts; `-m slow` tries twenty
times as many. A row whose library is missing is skipped.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from moth_jax.data.decoding import decode_image, largest_value, make_framing
from moth_jax.data.sources.class_lists import read_class_list
from moth_jax.data.sources.gtsrb import read_list
from moth_jax.data.sources.npz import load_npz as load_npz_images
from moth_jax.data.sources.tfds import load_cifar10
from moth_jax.models.weights.files import read_weights
from moth_jax.storage.files import load_npy
from tests.helpers.mutations import mutated_json, mutated_parts, mutations, read_all
from tests.helpers.tfds_folders import prepare_cifar10

SLOW = 20


class Format(NamedTuple):
    """`write(path)` writes a valid file named `name`, and `read(path)` reads one."""

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    tries: int = 2000
    damage: Callable[[bytes, int, int], Iterator[bytes]] = mutations
    needs: str = ""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (2, 1, 3, 3), "conv.bias": (2,), "fc.weight": (3, 2), "fc.bias": (3,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_torch(path, **options):
    import torch

    tensors = {name: torch.tensor(array) for name, array in weights().items()}
    torch.save({**tensors, "steps": torch.tensor(3)}, path, **options)


def write_legacy_torch(path):
    write_torch(path, _use_new_zipfile_serialization=False)


def write_safetensors(path):
    from safetensors.numpy import save_file

    save_file(weights(), path, metadata={"accuracy": "0.9"})


def write_keras(path, **options):
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in weights().items():
            layer, _, weight = name.partition(".")
            place = f"model_weights/{layer}_1/{layer}_1/{weight}:0"
            file.create_dataset(place, data=array, **options)


def write_compressed_keras(path):
    write_keras(path, chunks=True, compression="gzip", shuffle=True, fletcher32=True)


def mutated_values(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` copies of a JSON file, one value of each changed."""
    rng = random.Random(seed)
    value = json.loads(content)
    return (json.dumps(mutated_json(value, rng)).encode() for _ in range(count))


def pixels(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype)


def write_npz(path):
    labels = np.arange(12) % 3
    names = np.array(["ant", "bee", "cöw"])
    parts = {"x_train": pixels(12, 4, 4, 3), "x_test": pixels(12, 4, 4, 3)}
    np.savez_compressed(path, y_train=labels, y_test=labels, class_names=names, **parts)


def write_picture(path):
    Image.fromarray(pixels(12, 10, 3)).save(path)


def write_deep_picture(path):
    Image.fromarray(pixels(12, 10, dtype=np.uint16)).save(path)


def read_picture(path):
    white = 4095 if largest_value(str(path), name=path.name) else 0
    return decode_image(path, make_framing(image_size=8, resize=8, white=white), name=path.name)


def write_test_list(path):
    rows = "".join(f"{k:05d}.ppm;53;54;6;5;48;49;{k}\n" for k in range(9))
    path.write_text("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows)


def write_numbers(path):
    path.write_text(json.dumps({"ant": 0, "bee": 1, "cöw": 2}))


def write_class_names(path):
    path.write_text(json.dumps({"0": ["n1", "ant"], "1": ["n2", "bee"], "2": "cöw"}))


FORMATS = {
    "npy": Format("x.npy", lambda path: np.save(path, pixels(6, 4, 4, 3)), load_npy),
    "npz": Format("x.npz", write_npz, lambda path: load_npz_images(file=str(path)), tries=1000),
    "parts of npz": Format(
        "x.npz",
        write_npz,
        lambda path: load_npz_images(file=str(path)),
        tries=1000,
        damage=mutated_parts,
    ),
    "PNG": Format("x.png", write_picture, read_picture),
    "PNG of 16 bits": Format("x.png", write_deep_picture, read_picture, tries=500),
    "JPEG": Format("x.jpg", write_picture, read_picture),
    "PPM": Format("x.ppm", write_picture, read_picture, tries=1000),
    "WebP": Format("x.webp", write_picture, read_picture, tries=500),
    "BMP": Format("x.bmp", write_picture, read_picture, tries=500),
    "list of GTSRB": Format("x.csv", write_test_list, lambda path: read_list(path, path.parent)),
    "class list": Format(
        "x.txt",
        lambda path: path.write_text("ant\nbee\nsea cöw\n"),
        lambda p: read_class_list(str(p)),
    ),
    "class list in JSON": Format("x.json", write_numbers, lambda path: read_class_list(str(path))),
    "values of a class list": Format(
        "x.json", write_class_names, lambda path: read_class_list(str(path)), damage=mutated_values
    ),
    "PyTorch": Format("w.pt", write_torch, read_weights, needs="torch"),
    "parts of PyTorch": Format(
        "w.pt", write_torch, read_weights, tries=1000, damage=mutated_parts, needs="torch"
    ),
    "safetensors": Format("w.safetensors", write_safetensors, read_weights),
    "HDF5 of Keras": Format("w.h5", write_keras, read_weights),
    "compressed HDF5": Format("w.h5", write_compressed_keras, read_weights, tries=500),
    "PyTorch before 2020": Format(
        "w.pth", write_legacy_torch, read_weights, tries=1500, needs="torch"
    ),
}


def try_damaged(case: Format, folder: Path, tries: int):
    if case.needs:
        pytest.importorskip(case.needs)
    path = folder / case.name
    case.write(path)
    assert case.read(path) is not None
    content = path.read_bytes()

    def read(damaged: bytes):
        path.unlink()  # to cut a file short makes some systems wait for the disk
        path.write_bytes(damaged)
        return case.read(path)

    counts = read_all(case.damage(content, tries, 0), read)
    assert counts.tried == tries
    assert counts.refused > 0
    return counts


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    print(f"{name}: {try_damaged(FORMATS[name], tmp_path, FORMATS[name].tries)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_twenty_times_as_many_damaged_files_are_read_or_refused(name, tmp_path):
    print(f"{name}: {try_damaged(FORMATS[name], tmp_path, SLOW * FORMATS[name].tries)}")


# Of a folder of TFDS each file in turn: a name, how often it is damaged, and how.
OF_TFDS = {
    "features.json": (400, mutations),
    "values of features.json": (400, mutated_values),
    "dataset_info.json": (300, mutations),
    "values of dataset_info.json": (300, mutated_values),
    "label.labels.txt": (100, mutations),
    "cifar10-train.array_record-00000-of-00001": (200, mutations),
}


def try_damaged_folder(folder, name, times):
    tries, damage = OF_TFDS[name]
    path = folder / name.removeprefix("values of ")

    def read(damaged: bytes):
        path.unlink()  # to cut a file short makes some systems wait for the disk
        path.write_bytes(damaged)
        return load_cifar10(dir=str(folder.parent.parent))

    return read_all(damage(path.read_bytes(), times * tries, 0), read)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_cifar10(tmp_path_factory.mktemp("tfds"))


@pytest.mark.parametrize("name", OF_TFDS)
def test_a_damaged_folder_of_tfds_is_read_or_refused_in_one_line(prepared, tmp_path, name):
    folder = shutil.copytree(prepared, tmp_path / "cifar10" / "3.0.2")
    counts = try_damaged_folder(folder, name, 1)
    print(f"{name}: {counts}")
    assert counts.refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TFDS)
def test_more_damaged_folders_of_tfds_are_read_or_refused(prepared, tmp_path, name):
    folder = shutil.copytree(prepared, tmp_path / "cifar10" / "3.0.2")
    print(f"{name}: {try_damaged_folder(folder, name, SLOW)}")
