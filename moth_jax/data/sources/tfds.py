"""CIFAR-10 and SVHN from TensorFlow Datasets, read without TensorFlow."""

import contextlib
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moth_jax.data.arrays import expanded
from moth_jax.data.building import Share, build_dataset
from moth_jax.data.dataset import ImageDataset
from moth_jax.errors import InputError, first_line
from moth_jax.storage.files import open_regular

DEFAULT_DIR = "~/tensorflow_datasets"
_READ = 1024
_REACH_SECONDS = 10
_IMAGE_SHAPE, _NUM_CLASSES = (32, 32, 3), 10
_MOST_BYTES, _MOST_CLASSES = 2**24, 10**5  # of a description
# The classes of TFDS that describe the parts of a sample here, each with the field of its options.
# TFDS imports the module of whatever class a description names.
_FEATURES = {
    "tensorflow_datasets.core.features.class_label_feature.ClassLabel": "classLabel",
    "tensorflow_datasets.core.features.image_feature.Image": "image",
    "tensorflow_datasets.core.features.tensor_feature.Tensor": "tensor",
    "tensorflow_datasets.core.features.text_feature.Text": "text",
}
_SAMPLE = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
_NOTES = {"description", "valueRange"}


class _Source(NamedTuple):
    builder: str
    url: str


_CIFAR10 = _Source("cifar10", "https://www.cs.toronto.edu/~kriz/cifar.html")
_SVHN = _Source("svhn_cropped", "http://ufldl.stanford.edu/housenumbers/")


def load_cifar10(
    *,
    dir: str = DEFAULT_DIR,
    download: bool = False,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> ImageDataset:
    """CIFAR-10: [32, 32, 3], 10 classes of animals and vehicles.

    Images are in the order of their `id`, which is the order of the official batches.

    Args:
      dir: the TFDS data folder; the images are read from `dir`/cifar10/VERSION.
      download: whether to download and prepare them there if they are not.
      validation_fraction: share of the official training images kept for validation.
      seed: of that choice.
    """
    train, test, names = _read(_CIFAR10, "cifar10", dir, download)
    return build_dataset(
        "cifar10",
        train,
        test,
        class_names=names,
        validation=Share(validation_fraction, seed),
        flip=True,
        shift=4,
    )


def load_svhn(
    *,
    dir: str = DEFAULT_DIR,
    download: bool = False,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> ImageDataset:
    """Street View House Numbers, cropped (TFDS `svhn_cropped`): [32, 32, 3], the digits 0 to 9.

    Args:
      dir: the TFDS data folder; the images are read from `dir`/svhn_cropped/VERSION.
      download: whether to download and prepare them there if they are not.
      validation_fraction: share of the official training images kept for validation.
      seed: of that choice.
    """
    train, test, names = _read(_SVHN, "svhn", dir, download)
    return build_dataset(
        "svhn",
        train,
        test,
        class_names=names,
        validation=Share(validation_fraction, seed),
    )


def _read(source, name, data_dir, download):
    """((images, labels) of train, of test, class names)."""
    if not data_dir:
        raise InputError(f"{name}: no data folder given; {_how_to_prepare(name, DEFAULT_DIR)}")
    data_dir = expanded(data_dir, name)
    # Looked for before TFDS is asked: without a network its download retries for a long time.
    folder = prepared_folder(data_dir / source.builder)
    if folder is None and download:
        folder = _download(source, name, data_dir)
    if folder is None:
        raise InputError(
            f"{name} is not prepared: no {source.builder}/VERSION/dataset_info.json under "
            f"{data_dir}; {_how_to_prepare(name, data_dir)}"
        )
    with explained(folder, _how_to_prepare(name, data_dir)):
        return _read_folder(folder, name)


@contextlib.contextmanager
def explained(folder: Path, how_to_prepare: str):
    """Turn what TFDS raises for a damaged `folder` into an `InputError` with a remedy."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # there is no list of what TFDS and its readers raise
        raise InputError(
            f"{folder} cannot be read ({first_line(error)}); delete that folder and prepare it "
            f"again: {how_to_prepare}"
        ) from error


def open_builder(folder: Path, how_to_prepare: str) -> Any:
    """The TFDS builder of a prepared `folder`, if it can be read without TensorFlow."""
    _check_files(folder)
    _check_features(folder / "features.json")
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    if builder.info.file_format.value != "array_record":
        raise InputError(
            f"{folder} is stored as {builder.info.file_format.value}, which needs TensorFlow to "
            f"read; choose another folder: {how_to_prepare}"
        )
    for split in builder.info.splits:
        paths = shards(builder, split)
        outside = [path for path in paths if path.parent.resolve() != folder.resolve()]
        if outside:
            raise InputError(f"{folder}: its split {split!r} lies outside of it: {outside[0]}")
    return builder


def class_names(label: Any) -> list[str]:
    """The names of the classes of a feature, which makes them up where it has but their number."""
    if label.num_classes is None or label.num_classes > _MOST_CLASSES:
        raise InputError(
            f"there are {label.num_classes} classes, more than the {_MOST_CLASSES} there may be"
        )
    return label.names


def shards(builder: Any, split: str) -> list[Path]:
    """The files of a split, in the order of its records."""
    return [Path(file.filename) for file in builder.info.splits[split].file_instructions]


def _check_files(folder):
    for path in folder.iterdir():
        if not path.is_dir():
            open_regular(path).close()


def _check_features(path):
    """Raise `InputError` unless a sample is made of the features that TFDS itself has for it."""
    with open_regular(path) as file:
        content = json.loads(file.read(_MOST_BYTES))
    content = content if isinstance(content, dict) else {}
    features = content.get("featuresDict")
    features = features.get("features") if isinstance(features, dict) else None
    known = {"pythonClassName", "featuresDict"} | _NOTES
    if (
        content.get("pythonClassName") != _SAMPLE
        or not set(content) <= known
        or not isinstance(features, dict)
    ):
        raise InputError(f"{path} does not describe a sample by the features of TFDS")
    for name, feature in features.items():
        kind = feature.get("pythonClassName") if isinstance(feature, dict) else None
        if (
            not isinstance(kind, str)
            or kind not in _FEATURES
            or not set(feature) <= {"pythonClassName", _FEATURES[kind]} | _NOTES
            or not re.fullmatch("[A-Za-z0-9_]+", name)
        ):
            raise InputError(
                f"{path}: feature {name!r} is of {kind!r}, which is none of TFDS for images, labels"
                " and text; no other class is imported"
            )


def _read_folder(folder, name):
    builder = open_builder(folder, _how_to_prepare(name, "DIR"))
    features = builder.info.features
    shape, names = features["image"].shape, class_names(features["label"])
    if shape != _IMAGE_SHAPE or len(names) != _NUM_CLASSES:
        raise InputError(
            f"{folder} has images {shape} of {len(names)} classes, but those of {name} are "
            f"{_IMAGE_SHAPE} of {_NUM_CLASSES}; {_how_to_prepare(name, 'DIR')}"
        )
    train, test = (
        _read_split(builder.as_data_source(split=split), shape) for split in ("train", "test")
    )
    return train, test, names


def _read_split(source, image_shape):
    """(images uint8 [n, h, w, c], labels int32 [n]) in the order of the samples' ids."""
    images = np.empty([len(source), *image_shape], np.uint8)
    labels, ids = np.empty(len(source), np.int32), []
    for start in range(0, len(source), _READ):
        rows = range(start, min(start + _READ, len(source)))
        for i, record in zip(rows, source.__getitems__(list(rows)), strict=True):
            images[i], labels[i] = record["image"], record["label"]
            ids.append(record.get("id", b""))
    # TFDS shuffles when it prepares; the published measurements speak of the official order.
    order = np.argsort(np.array(ids), kind="stable")
    return images[order], labels[order]


def prepared_folder(parent: Path):
    """The newest version under `parent` that was prepared completely, or None."""
    found = [path.parent for path in parent.glob("*/dataset_info.json")]
    numbered = [path for path in found if path.name.replace(".", "").isdigit()]
    return max(numbered, key=lambda p: [int(n) for n in p.name.split(".")], default=None)


def _download(source, name, data_dir):
    try:
        request = urllib.request.Request(source.url, method="HEAD")
        urllib.request.urlopen(request, timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # An answer, if not a page: the server can be reached.
    except OSError as error:
        raise InputError(
            f"{name} cannot be downloaded: {source.url} cannot be reached ({error}); "
            f"{_how_to_prepare(name, data_dir)}"
        ) from error
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(source.builder, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except OSError as error:
        raise InputError(
            f"downloading {name} to {data_dir} failed ({error}); check the network and the disk "
            "and run the same command again"
        ) from error
    return prepared_folder(data_dir / source.builder)


def _how_to_prepare(name, data_dir):
    code = f"import moth_jax.data as d; d.load('{name}', dir='{data_dir}', download=True)"
    return (
        f'prepare it on a machine with a network (python -c "{code}") and copy the folder here, or '
        "give the folder you have as the option dir"
    )
