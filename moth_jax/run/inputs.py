"""What a run was given, the model's file and the images, told from what lies there later.

A run that goes on takes its finished parts for those of the same model and images. Paths say
nothing of that: another file may have come to the same place.
"""

import hashlib
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moth_jax.data import ImageDataset
from moth_jax.errors import InputError
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.storage.folders import current_folder

_NUM_PROBES = 8  # images of each split
_TOLERANCE = 0.02  # of their means in [0, 1]: another decoder rounds otherwise
_FRESH = "choose another --workdir, or --overwrite to start afresh"


def describe(config: ml_collections.ConfigDict, dataset: ImageDataset) -> dict:
    """Return what tells the model's file and the images apart, as JSON can carry it."""
    return {"checkpoint_sha256": _digest(config.model.checkpoint), "data": _signature(dataset)}


def check_unchanged(
    recorded: dict, config: ml_collections.ConfigDict, dataset: ImageDataset
) -> None:
    """Raise `InputError` if the run was given other things than those that lie there now.

    `recorded` is what `describe` returned when it began, of earlier versions {}. A file that is no
    longer there is not missed: the run has its own copy of the model.
    """
    digest, now = recorded.get("checkpoint_sha256"), _digest(config.model.checkpoint)
    if digest and now and digest != now:
        raise InputError(
            f"{config.model.checkpoint} is not the model that this run began with; {_FRESH}"
        )
    if "data" in recorded and not _is_same(recorded["data"], _signature(dataset)):
        raise InputError(f"the images of {dataset.name} are not those of this run; {_FRESH}")


def _digest(checkpoint: str) -> str | None:
    """Return the digest of a file, or of the weights in a checkpoint folder; None if not there."""
    path = current_folder(Path(checkpoint).expanduser()) if checkpoint else None
    if path is None or not broadcast_from_main(path.exists):
        return None
    if not path.is_dir():
        return broadcast_from_main(_digest_of_file, path)
    digest = hashlib.sha256()
    # Of the weights alone: the folder also holds dates, and distances that come later.
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint.load_model(path).variables)
    for place, leaf in leaves:
        digest.update(jax.tree_util.keystr(place).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _signature(dataset: ImageDataset) -> dict:
    """Return a digest of all labels, and the mean of the first images of each split."""
    splits = (dataset.train, dataset.validation, dataset.test)
    digest = hashlib.sha256()
    for split in splits:
        digest.update(np.asarray(split.labels, np.int64))
    probes = [split.batch(np.arange(min(_NUM_PROBES, len(split)))) for split in splits]
    means = [float(image.mean()) for images in probes for image in images]
    return {"labels": digest.hexdigest(), "means": means}


def _is_same(theirs: dict, ours: dict) -> bool:
    return theirs["labels"] == ours["labels"] and np.allclose(
        theirs["means"], ours["means"], rtol=0, atol=_TOLERANCE
    )
