"""Folders that are replaced so that a kill, or a full disk, leaves the old one or the new one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Give the block a path to write a folder to; after the block the folder is at `path`.

    What is at `path` stays until then. It is replaced by two renames. Between them, as after a kill
    at that moment, `current_folder` finds the old folder.
    """
    path = path.resolve()
    beside, old, new = _beside(path), _old(path), _beside(path) / "new"
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(beside, ignore_errors=True)
    if not path.exists():
        yield path
        return
    try:
        yield new
        path.rename(old)
        new.rename(path)
    finally:
        if path.exists():
            shutil.rmtree(beside, ignore_errors=True)


def current_folder(path: Path) -> Path:
    """Return where the folder `path` is: beside it, if `replaced_folder` was interrupted."""
    old = _old(path.resolve())
    return old if old.is_dir() and not path.exists() else path


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replacing")


def _old(path: Path) -> Path:
    return _beside(path) / "old"
