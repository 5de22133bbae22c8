"""Whether a run's model file and images are still those that it began with.

A run that goes on assumes that its finished parts are of the same model and images. Paths do not
tell: another file may have come to the same place.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np

from moth_jax.data import ImageDataset
from moth_jax.errors import InputError
from moth_jax.models import checkpoint
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.storage.folders import current_folder

_NUM_PROBES = 8  # images of each split
_TOLERANCE = 0.02  # of their means in [0, 1]: another decoder rounds otherwise
_FRESH = "choose another --workdir, or --overwrite to start afresh"


def describe(source: str, dataset: ImageDataset) -> dict:
    """Return what identifies the model's file and the images, as JSON can carry it.

    `source` is the path of the file or of a checkpoint folder, "" for no model.
    """
    return {"checkpoint_sha256": _digest(source), "data": _signature(dataset)}


def check_unchanged(recorded: dict, source: str, dataset: ImageDataset) -> None:
    """Raise `InputError` if the model's file or the images are not those that a run began with.

    `recorded` is what `describe` returned when it began. A file that is no longer there is not
    missed: the run has its own copy of the model.
    """
    digest, now = recorded.get("checkpoint_sha256"), _digest(source)
    if digest and now and digest != now:
        raise InputError(f"{source} is not the model that this run began with; {_FRESH}")
    if "data" in recorded and not _is_same(recorded["data"], _signature(dataset)):
        raise InputError(f"the images of {dataset.name} are not those of this run; {_FRESH}")


def _digest(source: str) -> str | None:
    """Return the digest of a file, or of the weights in a checkpoint folder; None if not there."""
    path = current_folder(Path(source).expanduser()) if source else None
    if path is None or not broadcast_from_main(path.exists):
        return None
    if not path.is_dir():
        return broadcast_from_main(_digest_of_file, path)
    digest = hashlib.sha256()
    # The weights alone count: the folder also holds dates.
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint.load_model(path).variables)
    for place, leaf in leaves:
        digest.update(jax.tree_util.keystr(place).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _signature(dataset: ImageDataset) -> dict:
    """Return a digest of all labels, and the mean of the first images of each split."""
    splits = (dataset.train, dataset.validation, dataset.test)
    digest = hashlib.sha256()
    for split in splits:
        digest.update(np.asarray(split.labels, np.int64).tobytes())
    probes = [split.batch(np.arange(min(_NUM_PROBES, len(split)))) for split in splits]
    means = [float(image.mean()) for images in probes for image in images]
    return {"labels": digest.hexdigest(), "means": means}


def _is_same(theirs: dict, ours: dict) -> bool:
    return theirs["labels"] == ours["labels"] and np.allclose(
        theirs["means"], ours["means"], rtol=0, atol=_TOLERANCE
    )
