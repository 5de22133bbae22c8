"""The folder of a run: whose it is, and the small JSON files in it."""

import json
import shutil
from pathlib import Path

import ml_collections

from moth_jax.errors import InputError
from moth_jax.run.configuration import default_config
from moth_jax.run.workdir_lock import make_folder
from moth_jax.storage.files import _read_json, write_json

_RESULT_FILES = (
    "original.json",
    "hardening.json",
    "distance_before.npz",
    "distance_after.npz",
    "scan.npz",
    "scan.json",
    "robustness.json",
    "metrics.jsonl",
    "summary.json",
    "report.html",
)
_RESULT_FOLDERS = (
    "original",
    "hardened",
    "training",
    "hardening",
    "hardening_triggers",
    "distances",
    "scanning",
    "tensorboard",
)
# Fields that are no property of the results: the same run may go on with others.
_FREE_FIELDS = (
    "phase",
    "checkpoint_seconds",
    "distance.directions_per_chunk",
    "harden.trigger_memory_mb",
    "harden.trigger_capacity",  # of earlier versions
)
# Defaults of earlier versions that mean what None means now.
_FORMER_DEFAULTS = {"harden.patience": 10}
# What these ask for is made anew if their own fields differ.
_FREE_PARTS = ("scan.", "robustness.", "mesh.")


def claim(workdir: Path, config: ml_collections.ConfigDict, *, overwrite: bool) -> None:
    """Make `workdir` this run's, or find that it is.

    A run without any result (a path was mistyped, say) gives way to another configuration.

    Raises:
      InputError: it holds another run and `overwrite` is not set, or files of the same names that
        are of no run, or it cannot be written.
    """
    make_folder(workdir)
    path = workdir / "config.json"
    ours = _as_json(config)
    results = _results(workdir)
    if results and not path.exists():
        raise InputError(
            f"{workdir} holds {', '.join(item.name for item in results)}, but not the config.json "
            "of a run; choose another --workdir, or move them away"
        )
    if results and not overwrite:
        changed = changed_fields(_read_json(path), ours)
        if changed:
            raise InputError(
                f"{workdir} holds a run with another configuration (different: "
                f"{', '.join(changed)}); choose another --workdir, or --overwrite to start afresh"
            )
        return
    for item in results:
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
    # Last: whatever is left of an interrupted removal still belongs to the run it names.
    write_json(path, ours)


def _results(workdir: Path) -> list[Path]:
    """Return what a run has left in `workdir`; an empty record of figures is nothing."""
    folders = [path for name in _RESULT_FOLDERS if (path := workdir / name).exists()]
    files = [path for name in _RESULT_FILES if (path := workdir / name).exists()]
    return folders + [path for path in files if not path.is_file() or path.stat().st_size]


def changed_fields(theirs: dict, ours: dict) -> list[str]:
    """Return the fields that differ; those that an earlier version did not have had the default."""
    missing = object()
    theirs, ours, defaults = (
        {
            name: None if value == _FORMER_DEFAULTS.get(name, missing) else value
            for name, value in _flat(fields).items()
            if name not in _FREE_FIELDS and not name.startswith(_FREE_PARTS)
        }
        for fields in (theirs, ours, _as_json(default_config()))
    )
    theirs = {**{name: defaults[name] for name in ours.keys() & defaults.keys()}, **theirs}
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name, missing) != theirs.get(name, missing)
    )


def _as_json(config: ml_collections.ConfigDict) -> dict:
    return json.loads(config.to_json_best_effort())


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
