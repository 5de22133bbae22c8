"""Checkpoints of models (Orbax), each of which can be used alone.

A checkpoint is a folder with the variables and what it takes to rebuild the model (`ModelSpec`:
architecture, classes, normalisation).
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moth_jax.errors import InputError
from moth_jax.models import Classifier, ModelSpec, outline
from moth_jax.models.classifier import complete, describe_mismatch, flat
from moth_jax.parallel.processes import broadcast_from_main, on_main
from moth_jax.storage.folders import current_folder
from moth_jax.storage.trees import load_tree, save_tree
from moth_jax.types import Variables

_FORMAT = "moth_jax model 1"
# What Orbax writes, beside a folder for each item.
_DESCRIPTION = "_CHECKPOINT_METADATA"
_PARTS = (_DESCRIPTION, "commit_success.txt", "orbax.checkpoint")


class SavedModel(NamedTuple):
    """A model from a checkpoint."""

    classifier: Classifier
    variables: Variables


def save_model(path: str | Path, classifier: Classifier, variables: Variables) -> None:
    """Write a model's checkpoint; one that is there is replaced once the new one is whole.

    Raises:
      InputError: as `check_replaceable`; or it cannot be written, as on a full disk.
    """
    on_main(check_replaceable, Path(path))
    metadata = {"format": _FORMAT, "spec": classifier.spec.to_json()}
    on_main(save_tree, Path(path), {"variables": variables}, metadata)


def check_replaceable(path: Path) -> None:
    """Raise `InputError` if a model's checkpoint at `path` would remove anything but another one.

    Nothing, an empty folder, and a model's checkpoint with nothing else in it may be replaced.
    """
    there = current_folder(path)
    if not there.exists():
        return
    if not there.is_dir():
        raise InputError(f"{path} is a file, and a checkpoint is a folder; give another path")
    names = {item.name for item in there.iterdir()}
    items = _items_of_model(there)
    if names and items is None:
        raise InputError(
            f"{path} is a folder that is no checkpoint of this package; give another path"
        )
    others = sorted(names.difference(_PARTS, items or ()))
    if others:
        raise InputError(
            f"{path} is a checkpoint with other things in it ({', '.join(others)}); move them "
            "away, or give another path"
        )


def _items_of_model(folder: Path) -> set[str] | None:
    """Return the items in a model's checkpoint, damaged or not; None if it is not one."""
    try:
        described = json.loads((folder / _DESCRIPTION).read_text())
        if described["custom_metadata"]["format"] == _FORMAT:
            return set(described["item_handlers"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def load_model(path: str | Path) -> SavedModel:
    """Read what `save_model` wrote.

    Raises:
      InputError: the folder is missing, damaged, or no checkpoint of a model (of a run, say), or
        its weights are not finite.
    """
    folder = broadcast_from_main(current_folder, Path(path))
    broadcast_from_main(_check_folder, folder)
    tree, metadata = broadcast_from_main(load_tree, folder)
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is no model checkpoint of this package")
    classifier, expected = outline(ModelSpec.from_json(metadata["spec"]))
    variables = complete(tree["variables"])
    mismatch = describe_mismatch(_shapes(expected), _shapes(variables))
    if mismatch:
        raise InputError(
            f"{path} does not hold the weights of a {classifier.spec.arch}: {mismatch}"
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise InputError(
            f"{path} holds NaN or infinite weights: its training diverged; lower the learning rate"
        )
    return SavedModel(classifier, variables)


def _check_folder(folder: Path) -> None:
    """Raise `InputError`, without the advice to remove it, for a folder that is someone else's."""
    if not folder.is_dir() or (folder / _DESCRIPTION).exists():
        return
    if any((folder / name).is_dir() for name in ("original", "hardened")):
        raise InputError(f"{folder} is the folder of a run; give original or hardened in it")
    raise InputError(
        f"{folder} is no checkpoint of this package, which holds {_DESCRIPTION}; give another "
        "folder, or write that one again"
    )


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flat(variables).items()}
