"""Whether a run's model file and images are still those that it began with.

A run that goes on assumes that its finished parts are of the same model and images. Paths do not
tell: another file may have come to the same place.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np

from moth_jax.data import ImageDataset
from moth_jax.data.fingerprints import PARTS, digests, fingerprints, image_names
from moth_jax.errors import InputError, listed
from moth_jax.models import checkpoint
from moth_jax.parallel.processes import broadcast_from_main, on_main
from moth_jax.storage.files import load_npz, save_npz
from moth_jax.storage.folders import current_folder

IMAGES = "images.npz"
_FRESH = "choose another --workdir, or --overwrite to start afresh"


def describe(source: str, dataset: ImageDataset) -> dict:
    """Return what identifies the model's file and the images, as JSON can carry it.

    `source` is the path of the file or of a checkpoint folder, "" for no model. All processes get
    what the main one finds: a copy of streamed images elsewhere has other times.
    """
    return {
        "checkpoint_sha256": _digest(source),
        "data": broadcast_from_main(lambda: digests(dataset, _fingerprints(dataset))),
    }


def keep_fingerprints(dataset: ImageDataset, path: Path) -> None:
    """Keep what tells each image from others, so that `check_unchanged` can name one."""
    on_main(lambda: save_npz(path, _fingerprints(dataset)))


def check_unchanged(
    recorded: dict, source: str, dataset: ImageDataset, kept: Path | None = None
) -> None:
    """Raise `InputError` if the model's file or the images are not those that a run began with.

    A file that is no longer there is not missed: the run has its own copy of the model.

    Args:
      recorded: what `describe` returned when it began.
      source: as for `describe`.
      dataset: the images as they are now.
      kept: the file of `keep_fingerprints`, which may be absent: then no image is named.
    """
    digest, now = recorded.get("checkpoint_sha256"), _digest(source)
    if digest and now and digest != now:
        raise InputError(f"{source} is not the model that this run began with; {_FRESH}")
    broadcast_from_main(_check_images, recorded.get("data"), dataset, kept)


def _check_images(recorded: dict | None, dataset: ImageDataset, kept: Path | None) -> None:
    prints = _fingerprints(dataset)
    ours = digests(dataset, prints)
    if recorded == ours:
        return
    before = {} if kept is None or not kept.exists() else load_npz(kept)
    told = [
        _difference(dataset, part, (recorded or {}).get(part), ours[part])
        + _named(dataset, part, prints[part], before.get(part))
        for part in PARTS
        if (recorded or {}).get(part) != ours[part]
    ]
    raise InputError(
        f"the images of {dataset.name} are not those of this run: {'; '.join(told)}; {_FRESH}"
    )


def _fingerprints(dataset: ImageDataset) -> dict[str, np.ndarray]:
    return {part: fingerprints(getattr(dataset, part)) for part in PARTS}


def _difference(dataset: ImageDataset, part: str, theirs: dict | None, ours: dict) -> str:
    """Return in which classes of a part the images differ."""
    before = (theirs or {}).get("classes", {})
    names = [
        name
        for name in dict.fromkeys((*dataset.class_names, *before))
        if before.get(name) != ours["classes"].get(name)
    ]
    if not names:
        return f"those of {part} are in another order"
    return f"{part} has other ones of {len(names)} classes ({listed(names)})"


def _named(dataset: ImageDataset, part: str, prints: np.ndarray, before: np.ndarray | None) -> str:
    """Return how many of a part's images are others than before, and the first few."""
    if before is None:
        return ""
    other = np.flatnonzero(~np.isin(prints, before))
    gone = int(np.sum(~np.isin(before, prints)))
    names = image_names(getattr(dataset, part))
    which = f": {listed([names[i] for i in other], str)}" if len(other) else ""
    return f", {len(other)} of {len(prints)} images are new or changed and {gone} are gone{which}"


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
