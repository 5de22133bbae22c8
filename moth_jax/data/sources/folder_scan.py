"""What is in a folder of images: its parts, their class folders, the files in them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moth_jax.data.checks import normal_name
from moth_jax.data.decoding import EXTENSIONS, KINDS
from moth_jax.errors import InputError, listed, printable

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
        the class folder, as `normal_name` -> paths of its images, in order; folders without images
        are there too.
      strays: paths of the files in class folders that are no images.
      faults: what is wrong with the layout, each with a remedy.
      folders: the folders that were looked into, by their real paths.
      links: paths of the images that are links.
      repeats: paths of folders that were looked into before.
    """

    files: dict[str, dict[str, list[str]]]
    strays: list[str]
    faults: list[str]
    folders: set[str]
    links: list[str]
    repeats: list[str]


def scan(root: Path) -> Scan:
    """Find the images under `root`; faults are collected, so that they can be told together.

    Images of a class may lie in further folders within its folder, as for torchvision. Hidden files
    are passed over, and so are lists and notes beside the class folders. Links are followed, but
    no image is found twice.
    """
    found = Scan({}, [], [], set(), [], [])
    _look_into(root, found)
    repeats = found.repeats + _repeated_links(found.links, found.folders)
    if repeats:
        found.faults.append(
            f"links lead to {len(repeats)} folders and images a second time, or to where they are: "
            f"{listed(repeats)}; remove them"
        )
    return found._replace(faults=list(dict.fromkeys(found.faults)))


def _look_into(root, found):
    found.folders.add(os.path.realpath(root))
    folders, images = _entries(root, found.faults)
    named = {folder: part for folder in folders if (part := _part(folder))}
    # A class may be called "train": then images lie in it, and other classes beside it.
    parts = {folder: named[folder] for folder in named if _entries(folder, found.faults)[0]}
    if not parts and len(named) < max(1, len(folders)):
        found.files[WHOLE] = _classes(root, folders, images, found)
        return
    _check_beside([folder for folder in folders if folder not in parts], images, found.faults)
    for folder, part in parts.items():
        if part in found.files:
            names = [other.name for other in parts if parts[other] == part]
            found.faults.append(f"{listed(names)} mean the same part; keep one of them")
            continue
        found.folders.add(os.path.realpath(folder))
        found.files[part] = _classes(folder, *_entries(folder, found.faults), found)


def _repeated_links(links, folders):
    """Those of the links to images whose images are found without them, too."""
    places, repeated = set(), []
    for path in links:
        place = os.path.realpath(path)
        if place in places or os.path.dirname(place) in folders:
            repeated.append(path)
        places.add(place)
    return repeated


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
    classes = {}
    for path in folders:
        name = normal_name(path.name)
        if printable(name) != name:
            found.faults.append(
                f"the name {path.name!a} of a class folder is no text in UTF-8, or has control "
                "characters; rename it"
            )
        elif name in classes:
            found.faults.append(
                f"two class folders of {folder} are called {name!r}, in two forms of Unicode; make "
                "them one"
            )
        else:
            classes[name] = _images(path, found)
    return classes


def _outside(images):
    names = listed([str(path) for path in images])
    return f"{len(images)} images lie outside the class folders: {names}; move or remove them"


def _images(folder, found):
    """The paths of the images in `folder` and the folders in it, each after its own files."""
    images, waiting = [], [os.fspath(folder)]
    while waiting:
        path = waiting.pop()
        real = os.path.realpath(path)
        if real in found.folders:  # without this, links that form a circle have no end
            found.repeats.append(path)
            continue
        found.folders.add(real)
        folders = []
        for entry in _sorted_entries(path, found.faults):
            kind = _kind(entry)
            if kind == "folder":
                folders.append(entry.path)
            elif kind == "file" and _is_image(entry.name):
                images.append(entry.path)
                if entry.is_symlink():
                    found.links.append(entry.path)
            else:
                found.strays.append(entry.path)
        waiting += reversed(folders)
    return images


def _sorted_entries(path, faults):
    try:
        with os.scandir(path) as entries:
            shown = [entry for entry in entries if not _is_litter(entry.name)]
    except OSError as error:
        _teller(faults)(error)
        return []
    return sorted(shown, key=lambda entry: entry.name)


def _kind(entry):
    """ "folder", "file", or "other": a pipe, a device, a socket, or a link that leads nowhere."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # of a link to itself
        return "other"


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
        if path.is_symlink() and not path.exists():
            faults.append(f"{path} is a link that leads nowhere; remove it")
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
    return (
        f"{len(strays)} files in class folders are not named as {KINDS}, or are pipes, devices, "
        f"sockets or links that lead nowhere: {listed(strays)}"
    )


def check_faults(root: Path, faults: list[str]) -> None:
    """Raise one `InputError` that tells all `faults`, if there are any."""
    if faults:
        raise InputError(f"image folder {root}: {'; '.join(faults)}")
