"""What is in a folder of images: its parts, their class folders, the files in them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moth_jax.data.decoding import EXTENSIONS, KINDS
from moth_jax.errors import InputError, listed

PARTS = ("train", "validation", "test")
WHOLE = "whole"

_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
# What systems leave behind in folders that people have looked into.
_LITTER = ("desktop.ini", "thumbs.db", "__macosx")


class Scan(NamedTuple):
    """The images of a folder.

    Attributes:
      files: part ("train", "validation", "test", or "whole" if the folder has no parts) -> name of
        the class folder -> paths of its images, in order; folders without images are there too.
      strays: paths of the files in class folders that are no images.
      faults: what is wrong with the layout, each with a remedy.
    """

    files: dict[str, dict[str, list[str]]]
    strays: list[str]
    faults: list[str]


def scan(root: Path) -> Scan:
    """Find the images under `root`; faults are collected, so that they can be told together.

    Images of a class may lie in further folders within its folder, as for torchvision. Hidden files
    are passed over, and so are lists and notes beside the class folders.
    """
    found = Scan({}, [], [])
    folders, images = _entries(root, found.faults)
    named = {folder: part for folder in folders if (part := _part(folder))}
    # A class may be called "train": then images lie in it, and other classes beside it.
    parts = {folder: named[folder] for folder in named if _entries(folder, found.faults)[0]}
    if not parts and len(named) < max(1, len(folders)):
        found.files[WHOLE] = _classes(root, folders, images, found)
        return found
    _check_beside([folder for folder in folders if folder not in parts], images, found.faults)
    for folder, part in parts.items():
        if part in found.files:
            names = [other.name for other in parts if parts[other] == part]
            found.faults.append(f"{listed(names)} mean the same part; keep one of them")
            continue
        found.files[part] = _classes(folder, *_entries(folder, found.faults), found)
    return found


def _part(folder):
    return _NAMES.get(folder.name.lower())


def _check_beside(others, images, faults):
    for folder in others:
        if _part(folder):
            faults.append(f"{folder} has no class folders; sort its images into one for each class")
    classes = [folder.name for folder in others if not _part(folder)]
    if classes:
        faults.append(
            f"folders {listed(classes)} lie beside train, validation and test; move them into the "
            "parts they belong to, or elsewhere"
        )
    if images:
        faults.append(_outside(images))


def _classes(folder, folders, images, found):
    """{name of the class folder: paths of its images}."""
    if images:
        found.faults.append(_outside(images))
    elif not folders:
        found.faults.append(f"{folder} has no class folders; make one for each class")
    return {path.name: _images(path, found) for path in folders}


def _outside(images):
    names = listed([str(path) for path in images])
    return f"{len(images)} images lie outside the class folders: {names}; move or remove them"


def _images(folder, found):
    """The paths of the images in `folder` and the folders in it."""
    images = []
    told = _teller(found.faults)
    for path, folders, files in os.walk(folder, followlinks=True, onerror=told):
        folders[:] = sorted(name for name in folders if not _is_litter(name))
        for name in sorted(files):
            if not _is_litter(name):
                (images if _is_image(name) else found.strays).append(os.path.join(path, name))
    return images


def _entries(folder, faults):
    """(folders, images) in `folder`, in the order of their names."""
    try:
        entries = sorted(path for path in folder.iterdir() if not _is_litter(path.name))
    except OSError as error:
        _teller(faults)(error)
        return [], []
    folders, files = [], []
    for path in entries:
        (folders if path.is_dir() else files).append(path)
    return folders, [path for path in files if _is_image(path.name)]


def _teller(faults: list[str]) -> Callable[[OSError], None]:
    def tell(error):
        faults.append(f"{error.filename} cannot be listed ({error.strerror}); give yourself access")

    return tell


def _is_litter(name):
    return name.startswith(".") or name.lower() in _LITTER


def _is_image(name):
    return name.lower().endswith(EXTENSIONS)


def describe_strays(strays: list[str]) -> str:
    """What messages say of `Scan.strays`."""
    return f"{len(strays)} files in class folders are not named as {KINDS}: {listed(strays)}"


def check_faults(root: Path, faults: list[str]) -> None:
    """Raise one `InputError` that tells all `faults`, if there are any."""
    if faults:
        raise InputError(f"image folder {root}: {'; '.join(faults)}")
