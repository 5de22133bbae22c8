"""Finished parts of a measurement in a folder, so that an interrupted one goes on from there."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moth_jax.parallel.processes import broadcast_from_main, is_main, on_main
from moth_jax.storage.files import check_arrays, load_npz, save_npz
from moth_jax.triggers import (
    TRIGGER_LAYOUT,
    AnyTrigger,
    names_of_other_kinds,
    trigger_arrays,
    trigger_of,
)

Directions = Sequence[tuple[int, int]]
_ADVICE = "move it away, and its directions are measured again"
_LAYOUT = {
    "directions": ("iu", ("D", 2)),
    "sizes": ("f", ("D", "S")),
    "rates": ("f", ("D", "S")),
    "changed_pixels": ("f", ("D",)),
    "seconds": ("f", ()),
    **{name: (kinds, ("D", *shape[1:])) for name, (kinds, shape) in TRIGGER_LAYOUT.items()},
}


class Chunk(NamedTuple):
    """The results of some directions.

    Attributes:
      directions: [D, 2] victim, target.
      sizes, rates: [D, S] per seed.
      trigger: [D, ...], the smallest over the seeds.
      changed_pixels: [D], how many pixels it changes (`triggers.changed_pixels`); inf where none
        was found, NaN where it is not known.
      seconds: wall time.
    """

    directions: np.ndarray
    sizes: np.ndarray
    rates: np.ndarray
    trigger: AnyTrigger
    changed_pixels: np.ndarray
    seconds: float


class _Store:
    """Results in a folder, each a file that is there whole or not at all.

    The name of a file is a digest of its directions and of everything that its numbers depend on. A
    file that was written with other settings or inputs has another name, and is not found. It says
    that inside, too: a file of another measurement may have come to the name of one of this.

    Args:
      folder: where the files are; None keeps nothing.
      settings: what the measurement was asked for, as JSON can carry it.
      inputs: any tree of arrays: images, labels, and the model's variables or its logits.
    """

    def __init__(self, folder: str | Path | None, settings: dict, inputs):
        self._folder = None if folder is None else Path(folder)
        self._digest = ""
        if self._folder is not None:
            on_main(functools.partial(self._folder.mkdir, parents=True, exist_ok=True))
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            for leaf in jax.tree.leaves(inputs):
                digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
            self._digest = digest.hexdigest()

    def _name(self, directions: Directions | np.ndarray) -> str:
        named = hashlib.sha256(f"{self._digest} {np.asarray(directions).tolist()}".encode())
        return f"{named.hexdigest()[:24]}.npz"


class ChunkStore(_Store):
    """Chunks in a folder."""

    def load(self, directions: Directions) -> list[Chunk]:
        """Return the known results of `directions`, each once, in chunks of any size.

        They were measured with the same inputs, perhaps together with other directions.
        """
        return broadcast_from_main(self._load, directions)

    def _load(self, directions: Directions) -> list[Chunk]:
        missing, chunks = set(directions), []
        for path in [] if self._folder is None else sorted(self._folder.glob("*.npz")):
            arrays = load_npz(path, advice=_ADVICE)
            if str(arrays.pop("of", "")) != self._digest:
                continue
            # A chunk of an earlier version does not know how many pixels change.
            optional = ("changed_pixels", *names_of_other_kinds(arrays))
            check_arrays(path, arrays, _LAYOUT, what="chunk", optional=optional, advice=_ADVICE)
            stored = list(map(tuple, arrays["directions"].tolist()))
            if path.name != self._name(stored):
                continue
            rows = [i for i, direction in enumerate(stored) if direction in missing]
            missing -= set(stored)
            if rows:
                chunks.append(_rows(arrays, rows))
        return chunks

    def save(self, chunk: Chunk) -> None:
        """Keep a finished chunk."""
        if self._folder is not None and is_main():
            fields = chunk._asdict()
            trigger = fields.pop("trigger")
            save_npz(
                self._folder / self._name(chunk.directions),
                {
                    **fields,
                    **trigger_arrays(trigger),
                    "of": np.asarray(self._digest),
                },
            )


class BoundStore(_Store):
    """Certified bounds of victim classes in a folder."""

    def load(self, victim: int, targets: Sequence[int]) -> np.ndarray | None:
        """Return the bounds [T] of a victim's directions, None if they are not all known."""
        return None if self._folder is None else broadcast_from_main(self._load, victim, targets)

    def _load(self, victim: int, targets: Sequence[int]) -> np.ndarray | None:
        assert self._folder is not None
        directions = _from(victim, targets)
        path = self._folder / self._name(directions)
        if not path.exists():
            return None
        arrays = load_npz(path, advice=_ADVICE)
        layout = {"directions": ("iu", ("D", 2)), "bounds": ("f", ("D",)), "of": ("U", ())}
        check_arrays(path, arrays, layout, what="file of bounds", advice=_ADVICE)
        of_this = str(arrays["of"]) == self._digest
        same = of_this and np.array_equal(arrays["directions"], directions)
        return arrays["bounds"] if same else None

    def save(self, victim: int, targets: Sequence[int], bounds: np.ndarray) -> None:
        """Keep the bounds of a victim's directions."""
        if self._folder is not None and is_main():
            directions = _from(victim, targets)
            save_npz(
                self._folder / self._name(directions),
                {"directions": directions, "bounds": bounds, "of": np.asarray(self._digest)},
            )


def _from(victim: int, targets: Sequence[int]) -> np.ndarray:
    """Return the directions [T, 2] from a victim class."""
    return np.array([(victim, target) for target in targets])


def _rows(arrays: dict[str, np.ndarray], rows: list[int]) -> Chunk:
    """Return the chunk of some of the directions of a file."""
    unknown = np.full(len(arrays["directions"]), np.nan, np.float32)
    return Chunk(
        directions=arrays["directions"][rows],
        sizes=arrays["sizes"][rows],
        rates=arrays["rates"][rows],
        trigger=jax.tree.map(lambda leaf: leaf[rows], trigger_of(arrays)),
        changed_pixels=arrays.get("changed_pixels", unknown)[rows],
        seconds=float(arrays["seconds"]) * len(rows) / len(arrays["directions"]),
    )
