"""Trees of arrays on disk (Orbax), with a checksum of every number.

Orbax writes a folder whole or not at all.
"""

import hashlib
import json
import os
import stat
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moth_jax.errors import InputError
from moth_jax.storage.folders import replaced_folder
from moth_jax.storage.orbax_process import helper


def save_tree(path: Path, tree: dict, metadata: dict) -> None:
    """Write a tree of arrays and a JSON dict to the folder `path`, replacing what is there.

    Raises:
      InputError: the folder cannot be written, as on a full disk.
    """
    # Host arrays, so that any number of devices can read them.
    _by_orbax(_write, path.absolute(), jax.tree.map(np.asarray, tree), metadata)


def load_tree(path: Path) -> tuple[dict, dict]:
    """Return the tree and the JSON dict that `save_tree` wrote.

    Raises:
      InputError: there is no such folder, or it is damaged.
    """
    return _by_orbax(_read, path.absolute())


def _by_orbax(function: Callable, *arguments):
    """Return `function(*arguments)`; Orbax must not wait for processes that do not call it."""
    return function(*arguments) if jax.process_count() == 1 else helper()(function, *arguments)


def _write(path: Path, tree: dict, metadata: dict) -> None:
    from orbax.checkpoint import v1 as ocp

    metadata = {**metadata, "sha256": _digest(tree, metadata)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_folder(path) as new:  # Orbax would remove the old one first
            ocp.save(str(new), tree, custom_metadata=metadata)
    except (ValueError, OSError) as error:  # TensorStore reports a full disk as a ValueError
        raise InputError(
            f"cannot write {path}: {_reason(error)}; free some space or check the permissions, "
            "then run the same command again"
        ) from error


def _read(path: Path) -> tuple[dict, dict]:
    from orbax.checkpoint import v1 as ocp

    if not path.is_dir():
        raise InputError(f"there is no checkpoint folder {path}")
    _check_files(path)
    try:
        saved = ocp.metadata(str(path))
        target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), saved.metadata)
        tree: Any = ocp.load(str(path), target)
        custom: Any = saved.custom_metadata or {}
        metadata: dict = dict(custom)
    except Exception as error:  # TensorStore, JSON and Orbax have many words for a damaged file
        raise _damaged(path, _reason(error)) from error
    if metadata.pop("sha256", None) != _digest(tree, metadata):
        raise _damaged(path, "wrong or missing checksum")
    return tree, metadata


def _check_files(path: Path) -> None:
    """Raise `InputError` unless the folder holds files and folders alone.

    Orbax would follow links to other files, and wait for pipes.
    """
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            mode = os.lstat(item := Path(folder, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise _damaged(path, f"{item.relative_to(path)} is a link, a pipe or a device")


def _digest(tree: dict, metadata: dict) -> str:
    """Return a checksum of all that is saved: in Orbax's files the numbers have none."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is no checkpoint of this package or is damaged ({reason}); give another folder, "
        "or, if it is of this package, move it away and write it again"
    )


def _reason(error: Exception) -> str:
    return textwrap.shorten(str(error), 200)
