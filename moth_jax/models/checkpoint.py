"""Checkpoints of models (Orbax), each of which can be used alone.

A checkpoint is a folder with the variables and what it takes to rebuild the model (`ModelSpec`:
architecture, classes, normalisation).
"""

from pathlib import Path
from typing import NamedTuple

from moth_jax.errors import InputError
from moth_jax.models import Classifier, ModelSpec, outline
from moth_jax.models.classifier import complete, describe_mismatch, flat
from moth_jax.models.values import check_values
from moth_jax.parallel.processes import broadcast_from_main, on_main
from moth_jax.storage.files import open_regular, parse_json
from moth_jax.storage.folders import current_folder
from moth_jax.storage.trees import load_tree, save_tree
from moth_jax.types import Variables

_FORMAT = "moth_jax model 1"
# What Orbax writes, beside a folder for each item.
_DESCRIPTION = "_CHECKPOINT_METADATA"
_PARTS = (_DESCRIPTION, "commit_success.txt", "orbax.checkpoint")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".th", ".h5")  # in a folder of another program


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
        with open_regular(folder / _DESCRIPTION) as file:
            described = parse_json(file.read())
        if described["custom_metadata"]["format"] == _FORMAT:
            return set(described["item_handlers"])
    except (InputError, OSError, ValueError, LookupError, TypeError):
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
    try:
        classifier, expected = outline(ModelSpec.from_json(metadata.get("spec")))
    except InputError as error:
        raise InputError(f"{path} describes no model of this package: {error}") from error
    variables = complete(tree.get("variables", {}))
    mismatch = describe_mismatch(_shapes(expected), _shapes(variables))
    if mismatch:
        raise InputError(
            f"{path} does not hold the weights of a {classifier.spec.arch}: {mismatch}"
        )
    check_values(flat(variables), path, advice="if its training diverged, lower the learning rate")
    return SavedModel(classifier, variables)


def _check_folder(folder: Path) -> None:
    """Raise `InputError`, without the advice to write it again, for a folder of something else."""
    if not folder.is_dir() or _items_of_model(folder) is not None:
        return
    if any((folder / name).is_dir() for name in ("original", "hardened")):
        raise InputError(f"{folder} is the folder of a run; give original or hardened in it")
    is_orbax = any((folder / name).exists() for name in (_DESCRIPTION, "_METADATA"))
    what = "model checkpoint" if is_orbax else "checkpoint"
    weights = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file())
    way_out = f"give the file {weights[0]} in it" if weights else "give another folder"
    raise InputError(
        f"{folder} is no {what} of this package, or its {_DESCRIPTION} is damaged; {way_out}"
    )


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flat(variables).items()}
