"""Checkpoints (Orbax): models that can be used alone, and runs that can be killed and resumed.

A model's checkpoint is a folder with its variables, what it takes to rebuild it (`ModelSpec`:
architecture, classes, normalisation) and, once they are measured, its class distances. A run's
checkpoint is a tree of arrays and a JSON dict. Orbax writes a folder whole or not at all.
"""

import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from moth_jax.addon import AddOnState
from moth_jax.distributed import by_writer, from_writer, is_writer, stored
from moth_jax.errors import InputError
from moth_jax.helper_process import helper
from moth_jax.matrix import DistanceMatrix
from moth_jax.models import Classifier, ModelSpec, Variables, outline
from moth_jax.models.functional import describe_mismatch
from moth_jax.moth import MothState
from moth_jax.replacing import replacing, standing
from moth_jax.scheduler import KArmState
from moth_jax.training import TrainState
from moth_jax.trigger_bank import TriggerBank

_FORMAT = "moth_jax model 1"
_DISTANCES = "distances.npz"
# What Orbax writes, beside a folder for each item.
_DESCRIPTION = "_CHECKPOINT_METADATA"
_PARTS = (_DESCRIPTION, "commit_success.txt", "orbax.checkpoint", _DISTANCES)


class SavedModel(NamedTuple):
    """A model from a checkpoint; `distances` is None if they were not measured."""

    classifier: Classifier
    variables: Variables
    distances: DistanceMatrix | None


def save_model(
    path: str | Path,
    classifier: Classifier,
    variables: Variables,
    distances: DistanceMatrix | None = None,
) -> None:
    """Write a model's checkpoint, replacing one that is there once it is whole.

    Raises:
      InputError: `check_replaceable`, or it cannot be written, as on a full disk.
    """
    by_writer(check_replaceable, Path(path))
    metadata = {"format": _FORMAT, "spec": classifier.spec.to_json()}
    by_writer(_save, Path(path), {"variables": variables}, metadata)
    if distances is not None:
        save_distances(path, distances)


def check_replaceable(path: Path) -> None:
    """Raise `InputError` if a model's checkpoint at `path` would remove anything but another one.

    Nothing, an empty folder, and a model's checkpoint with nothing else in it may be replaced.
    """
    there = standing(path)
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


def save_distances(path: str | Path, distances: DistanceMatrix) -> None:
    """Put class distances into a model's checkpoint that is there, whose weights stay untouched."""
    by_writer(distances.save, Path(path) / _DISTANCES)


def load_model(path: str | Path) -> SavedModel:
    """Read what `save_model` wrote.

    Raises:
      InputError: the folder is missing, damaged, or no checkpoint of a model (of a run, say), or
        its weights are not finite.
    """
    folder = from_writer(standing, Path(path))
    from_writer(_check_folder, folder)
    tree, metadata = from_writer(_load, folder)
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is no model checkpoint of this package")
    classifier, expected = outline(ModelSpec.from_json(metadata["spec"]))
    variables = _complete(tree["variables"])
    mismatch = describe_mismatch(_shapes(expected), _shapes(variables))
    if mismatch:
        raise InputError(
            f"{path} does not hold the weights of a {classifier.spec.arch}: {mismatch}"
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):
        raise InputError(
            f"{path} holds NaN or infinite weights: its training diverged; lower the learning rate"
        )
    distances = stored(DistanceMatrix.load, folder / _DISTANCES)
    return SavedModel(classifier, variables, distances)


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


def _complete(variables: Variables) -> Variables:
    """Put back the collections that a model has nothing of: Orbax keeps no empty ones."""
    return {"params": {}, "batch_stats": {}, **variables}


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    return {
        f"{kind}.{name}": tuple(leaf.shape)
        for kind, leaves in variables.items()
        for name, leaf in leaves.items()
    }


class RunCheckpoints:
    """The latest states of one phase of a run, in a folder; only the newest is kept.

    They are written in the background, one at a time. What went wrong with one is raised by the
    next call, whichever it is, as `InputError`.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        # Not Orbax's own saving in the background, which leaves a third of the time, and the
        # checksum, to the caller.
        self._background = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: futures.Future | None = None

    def save(self, step: int, arrays: dict, metadata: dict) -> None:
        """Keep a state; earlier ones are removed once it is on disk.

        Returns when there is a copy of the arrays, whose memory may then be used again.
        """
        if not is_writer():
            return
        self.wait()
        arrays = jax.tree.map(np.array, jax.device_get(arrays))
        self._writing = self._background.submit(self._write, step, arrays, metadata)

    def _write(self, step: int, arrays: dict, metadata: dict) -> None:
        newest = self._folder / f"{step:08d}"
        _save(newest, arrays, metadata)
        # Also what a kill or a full disk has left half-written.
        for other in self._folder.iterdir():
            if other != newest:
                shutil.rmtree(other)

    def wait(self) -> None:
        """Return once the last state is on disk."""
        writing = self._writing
        if writing is not None:
            futures.wait([writing])  # Ctrl-C may come here, and it is to be waited for again
            self._writing = None
            writing.result()

    def latest(self) -> tuple[dict, dict] | None:
        """Return (arrays, metadata) of the newest state; None if there is none."""
        self.wait()
        return from_writer(self._load_newest)

    def _load_newest(self) -> tuple[dict, dict] | None:
        newest = self.newest()
        return None if newest is None else _load(newest)

    def newest(self) -> Path | None:
        """Return where the newest state is on disk; None if there is none."""
        steps = (path for path in self._folder.glob("*") if path.name.isdigit())
        return max(steps, default=None)

    def clear(self) -> None:
        """Remove all states: the phase is done."""
        self.wait()
        by_writer(shutil.rmtree, self._folder, True)


def _save(path: Path, tree: dict, metadata: dict) -> None:
    # Host arrays, so that any number of devices can read them.
    _by_orbax(_save_tree, path.absolute(), jax.tree.map(np.asarray, tree), metadata)


def _load(path: Path) -> tuple[dict, dict]:
    return _by_orbax(_load_tree, path.absolute())


def _by_orbax(function: Callable, *arguments):
    """Return `function(*arguments)`; Orbax must not wait for processes that do not call it."""
    return function(*arguments) if jax.process_count() == 1 else helper()(function, *arguments)


def _save_tree(path: Path, tree: dict, metadata: dict) -> None:
    from orbax.checkpoint import v1 as ocp

    metadata = {**metadata, "sha256": _digest(tree, metadata)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:  # Orbax would remove the old one first
            ocp.save(new, tree, custom_metadata=metadata)
    except (ValueError, OSError) as error:  # TensorStore reports a full disk as a ValueError
        raise InputError(
            f"cannot write {path}: {_reason(error)}; free some space or check the permissions, "
            "then run the same command again"
        ) from error


def _load_tree(path: Path) -> tuple[dict, dict]:
    from orbax.checkpoint import v1 as ocp

    if not path.is_dir():
        raise InputError(f"there is no checkpoint folder {path}")
    # TensorStore, JSON and Orbax each have their own words for a damaged file.
    faults = (ValueError, OSError, KeyError, TypeError, ocp.errors.InvalidLayoutError)
    try:
        saved = ocp.metadata(path)
        target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), saved.metadata)
        tree, metadata = ocp.load(path, target), dict(saved.custom_metadata or {})
    except faults as error:
        raise _damaged(path, _reason(error)) from error
    if metadata.pop("sha256", None) != _digest(tree, metadata):
        raise _damaged(path, "wrong or missing checksum")
    return tree, metadata


def _digest(tree: dict, metadata: dict) -> str:
    """Return a checksum of all that is saved: in Orbax's files the numbers have none."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is no checkpoint of this package or is damaged ({reason}); remove it or write it "
        "again"
    )


def _reason(error: Exception) -> str:
    return textwrap.shorten(str(error), 200)


def train_state_arrays(state: TrainState) -> dict:
    """Return a `TrainState` as a tree of arrays with string keys."""
    leaves = jax.tree.leaves(state.opt_state)
    return {
        "variables": state.variables,
        "opt_state": {f"{i:04d}": leaf for i, leaf in enumerate(leaves)},
    }


def train_state_from_arrays(arrays: dict, tx: optax.GradientTransformation) -> TrainState:
    """Return the `TrainState` whose arrays these are; `tx` is the optimiser they came from."""
    variables = _complete(arrays["variables"])
    structure = jax.tree.structure(jax.eval_shape(tx.init, variables["params"]))
    leaves = [arrays["opt_state"][name] for name in sorted(arrays["opt_state"])]
    return TrainState(variables, jax.tree.unflatten(structure, leaves))


_PLAIN = (
    "step",
    "initial_accuracy",
    "accuracy",
    "accuracy_step",
    "kept_step",
    "stopped",
)


def state_arrays(state: AddOnState) -> tuple[dict, dict]:
    """Return the state of a method of hardening as (arrays, JSON)."""
    arrays = {"train": train_state_arrays(state.train), "kept": state.kept}
    metadata = {name: getattr(state, name) for name in _PLAIN}
    if isinstance(state, MothState):
        arrays["bank"] = state.bank.arrays
        arrays["warmup"] = {
            "sizes": state.warmup_sizes,
            "prior": state.warmup_prior,
            "universal_sizes": state.universal_sizes,
        }
        if state.scheduler is not None:
            arrays["scheduler"] = state.scheduler._asdict()
        return arrays, {**metadata, "warmed_up": state.warmed_up}
    return {**arrays, "memory": state.memory}, {**metadata, "prepared": state.prepared}


def _scheduler(arrays: dict) -> KArmState:
    """Return the scheduler; checkpoints of before `num_idle` have seen no idle round."""
    return KArmState(**{"num_idle": np.zeros_like(arrays["num_selected"]), **arrays})


def state_from_arrays(
    kind: type[AddOnState], arrays: dict, metadata: dict, tx: optax.GradientTransformation
) -> AddOnState:
    """Return the state of type `kind` that `state_arrays` took apart."""
    fields = {
        "train": train_state_from_arrays(arrays["train"], tx),
        "kept": _complete(arrays["kept"]),
        **{name: metadata[name] for name in _PLAIN},
    }
    if kind is MothState:
        warmup = arrays["warmup"]
        none = np.full(len(warmup["sizes"]), np.inf, np.float32)
        return MothState(
            **fields,
            scheduler=_scheduler(arrays["scheduler"]) if "scheduler" in arrays else None,
            bank=TriggerBank.from_arrays(arrays["bank"]),
            warmed_up=metadata["warmed_up"],
            warmup_sizes=warmup["sizes"],
            warmup_prior=warmup["prior"],
            # Those of before it have none.
            universal_sizes=warmup.get("universal_sizes", none),
        )
    # Orbax keeps no empty collections.
    return kind(**fields, memory=arrays.get("memory", {}), prepared=metadata["prepared"])
