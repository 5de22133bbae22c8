"""ImageNet 2012 and Imagenette from TensorFlow Datasets, read without TensorFlow and streamed."""

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moth_jax.data.arrays import expanded
from moth_jax.data.building import build_dataset
from moth_jax.data.dataset import ImageDataset
from moth_jax.data.decoding import decode_image, make_framing
from moth_jax.data.sources.class_lists import IMAGENET, read_class_list
from moth_jax.data.sources.tfds import (
    DEFAULT_DIR,
    class_names,
    explained,
    open_builder,
    prepared_folder,
    shards,
)
from moth_jax.data.splitting import split_validation
from moth_jax.data.streaming import (
    DEFAULT_MEMORY,
    Listing,
    parallel_map,
    read_parts,
    version_of,
)
from moth_jax.errors import InputError, listed, require_choice
from moth_jax.storage.files import load_npz, save_npz

VARIANTS = ("160px", "160px-v2", "320px", "320px-v2", "full-size", "full-size-v2")

# As for a folder: a seed may only change what is trained on, and both parts are held out.
_SPLIT_SEED = 0


class _Source(NamedTuple):
    """A data set of TFDS: its name here and there, and what it takes to prepare it."""

    name: str
    builder: str
    needs: str

    def how_to_prepare(self) -> str:
        code = (
            f"import tensorflow_datasets as tfds; tfds.builder('{self.builder}', data_dir='DIR', "
            "file_format='array_record').download_and_prepare()"
        )
        return (
            f'prepare it on a machine with TensorFlow (python -c "{code}"; {self.needs}), and give '
            "DIR as the option dir; unpacked images are read with data.name=folder"
        )


_IMAGENET2012 = _Source(
    "imagenet2012",
    "imagenet2012",
    "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, for which one registers at "
    "https://image-net.org/download-images, must be in DIR/downloads/manual",
)


def load_imagenette(
    *,
    dir: str = DEFAULT_DIR,
    variant: str = "320px-v2",
    image_size: int = 224,
    resize: int = 0,
    interpolation: str = "bilinear",
    class_list: str | Sequence[str] = IMAGENET,
    validation_fraction: float = 0.1,
    seed: int = 0,
    in_memory_limit: int = DEFAULT_MEMORY,
    skip_unreadable: bool = False,
) -> ImageDataset:
    """Imagenette: ten easily told classes of ImageNet, about 9,500 images to train on.

    Validation and test come from the official validation images, as for `load_imagenet2012`.

    Note: the official validation images of the variants -v2 are three tenths of each class, most
    of which ImageNet's training part has too. Models of ImageNet have therefore seen them.

    Args:
      dir: the TFDS data folder; the images are read from `dir`/imagenette/`variant`/VERSION.
      variant: of the data set, by the length of the shorter side and the version of its split.
      image_size, resize, interpolation, in_memory_limit, skip_unreadable: as for `load_folder`.
      class_list: the head's classes, in which the ten are looked up by their synset, as for
        `load_folder`: "imagenet" gives them their numbers (0, 217, 482, ...) among 1,000; "" is
        for a head of these ten alone.
      validation_fraction: as for `load_imagenet2012`.
      seed: of the images that mean and std are measured on, where they are streamed.
    """
    require_choice("variant", variant, VARIANTS)
    return _load(
        _Source("imagenette", f"imagenette/{variant}", "it downloads the images itself"),
        dir,
        make_framing(image_size=image_size, resize=resize, interpolation=interpolation),
        class_list=class_list,
        validation_fraction=validation_fraction,
        seed=seed,
        in_memory_limit=in_memory_limit,
        skip_unreadable=skip_unreadable,
    )


def load_imagenet2012(
    *,
    dir: str = DEFAULT_DIR,
    image_size: int = 224,
    resize: int = 0,
    interpolation: str = "bilinear",
    class_list: str | Sequence[str] = IMAGENET,
    validation_fraction: float = 0.1,
    seed: int = 0,
    in_memory_limit: int = DEFAULT_MEMORY,
    skip_unreadable: bool = False,
) -> ImageDataset:
    """ImageNet 2012 (ILSVRC): 1,000 classes, 1,281,167 images to train on.

    Validation and test come from the official validation images; the official test images have no
    labels. Labels are read once, which takes a pass over all images, and kept in ~/.cache/moth_jax
    (or $XDG_CACHE_HOME/moth_jax).

    Args:
      dir: the TFDS data folder; the images are read from `dir`/imagenet2012/VERSION.
      image_size, resize, interpolation, in_memory_limit, skip_unreadable: as for `load_folder`.
      class_list: the head's classes, looked up by synset, as for `load_folder`.
      validation_fraction: share of each class's official validation images kept for validation;
        the rest is the test part.
      seed: of the images that mean and std are measured on, where they are streamed.
    """
    return _load(
        _IMAGENET2012,
        dir,
        make_framing(image_size=image_size, resize=resize, interpolation=interpolation),
        class_list=class_list,
        validation_fraction=validation_fraction,
        seed=seed,
        in_memory_limit=in_memory_limit,
        skip_unreadable=skip_unreadable,
    )


def _load(
    source,
    data_dir,
    framing,
    *,
    class_list,
    validation_fraction,
    seed,
    in_memory_limit,
    skip_unreadable,
) -> ImageDataset:
    folder = _folder(source, data_dir)
    train, held_out, classes = _listings(source, folder, framing, class_list)
    test, validation = split_validation(held_out.labels, validation_fraction, _SPLIT_SEED)
    images = read_parts(
        {"train": train, "validation": held_out.take(validation), "test": held_out.take(test)},
        framing.image_shape,
        in_memory_limit=in_memory_limit,
        skip_unreadable=skip_unreadable,
    )
    return build_dataset(
        source.name,
        images["train"],
        images["test"],
        validation=images["validation"],
        class_names=classes.names,
        seed=seed,
        flip=True,
        every_class=False,
    )


def _folder(source, data_dir):
    if not data_dir:
        raise InputError(f"{source.name}: no data folder given; {source.how_to_prepare()}")
    parent = expanded(data_dir, source.name) / source.builder
    folder = prepared_folder(parent)
    if folder is None:
        raise InputError(
            f"{source.name} is not prepared: no VERSION/dataset_info.json under {parent}; "
            f"{source.how_to_prepare()}"
        )
    return folder


def _listings(source, folder, framing, class_list):
    """The official training and validation images, and the classes of the head."""
    with explained(folder, source.how_to_prepare()):
        builder = open_builder(folder, source.how_to_prepare())
        missing = [split for split in ("train", "validation") if split not in builder.info.splits]
        if missing:
            raise InputError(f"{folder} has no split {listed(missing)}; {source.how_to_prepare()}")
        classes, numbers = _classes(source, class_names(builder.info.features["label"]), class_list)
        listings = [
            _listing(source, folder, builder, split, framing, numbers)
            for split in ("train", "validation")
        ]
    return *listings, classes


def _classes(source, synsets, class_list):
    """(the classes of the head, the number in it of each class of the data)."""
    if not class_list:
        class_list = synsets
    classes = read_class_list(class_list)
    unknown = [name for name in synsets if name not in classes.numbers]
    if unknown:
        raise InputError(
            f"{len(unknown)} of the {len(synsets)} classes of {source.name} are not in class_list: "
            f"{listed(unknown)}; it must name them by their synsets, as 'imagenet' does"
        )
    return classes, np.array([classes.numbers[name] for name in synsets], np.int32)


def _listing(source, folder, builder, split, framing, numbers):
    import tensorflow_datasets as tfds

    # TFDS would decode with OpenCV where that is installed, and give other pixels.
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    labels = _cached(_cache_path(folder, split), lambda: _read_labels(records), len(records))
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(numbers):
        raise InputError(f"{folder}: {split} has labels that are not in [0, {len(numbers)})")
    decode = functools.partial(_decode, records, framing, folder, split, source)
    files = builder.info.splits[split].shard_lengths, shards(builder, split)
    return Listing(
        range(len(records)),
        numbers[labels],
        decode,
        name=f"record {{}} of {split} in {folder}".format,
        version=functools.partial(_version, np.cumsum(files[0]), files[1]),
    )


def _version(ends, paths, row):
    """What tells the file that a record lies in from the one that was there before."""
    path = paths[np.searchsorted(ends, row, side="right")]
    return f"{path.name} {row} {version_of(path)}"


def _decode(records, framing, folder, split, source, row):
    with explained(folder, source.how_to_prepare()):
        encoded = records[row]["image"]
    name = f"record {row} of {split} in {folder}"
    return decode_image(io.BytesIO(encoded), framing, name=name)


def _read_labels(records):
    labels = parallel_map(lambda row: records[row]["label"], range(len(records)))
    return np.fromiter(labels, np.int32, len(records))


def _cache_path(folder, split):
    """Where the labels of a split are kept; another preparation of the data has another place."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    named = str(folder.resolve()).encode() + (folder / "dataset_info.json").read_bytes()
    return root / "moth_jax" / f"{split}_labels_{hashlib.sha256(named).hexdigest()[:24]}.npz"


def _cached(path, read, count):
    """The labels in the file `path`; if there are none, what `read()` returns is kept there."""
    with contextlib.suppress(InputError, KeyError):
        labels = load_npz(path)["labels"]
        if labels.shape == (count,) and labels.dtype == np.int32:
            return labels
    labels = read()
    # Without a place to keep them they are read again next time, which is slow but right.
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_npz(path, {"labels": labels})
    return labels
