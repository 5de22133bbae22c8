"""The store of triggers that inversions start from (Section IV-B, "backdoor reuse")."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from moth_jax.hardening.trigger_store import TriggerStore
from moth_jax.triggers import Trigger

Key = tuple[int, int]
_ANY = -1  # the victim of a universal trigger


class _Held(NamedTuple):
    """A trigger in memory; its arrays are never changed, so that banks may share them."""

    trigger: Trigger
    size: float


class _Stored(NamedTuple):
    """A trigger on disk, under its digest."""

    digest: bytes
    size: float


class TriggerBank:
    """Per direction the largest successful trigger seen, and per target the universal one.

    Host state, bounded: past `max_bytes` the trigger that was used longest ago goes to disk, and
    comes back when it is used. Where a trigger is makes no difference to any number.

    Args:
      max_bytes: of triggers in memory; one of them always stays.
      folder: where the others go; None is a temporary folder.
    """

    def __init__(self, max_bytes: float = np.inf, folder: Path | None = None):
        self._max_bytes, self._store = max_bytes, TriggerStore(folder)
        self._held: dict[Key, _Held] = {}  # the one used longest ago comes first
        self._stored: dict[Key, _Stored] = {}

    def copy(self, max_bytes: float | None = None, folder: Path | None = None) -> "TriggerBank":
        """Return a bank that can be changed without changing this one.

        It costs a pointer per trigger. `max_bytes` and `folder` are those of this bank if not
        given; another folder is one that has the triggers of this bank that are on disk.
        """
        bank = TriggerBank(self._max_bytes if max_bytes is None else max_bytes, folder)
        if folder is None:
            bank._store = self._store
        bank._held, bank._stored = dict(self._held), dict(self._stored)
        return bank

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that a checkpoint needs.

        count [2]: M triggers held and S stored. Of those held, the one used longest ago first:
        direction [M, 2] (victim -1 for a universal one), size [M], mask [M, h, w, 1], pattern
        [M, h, w, c]. Of those on disk: stored_direction [S, 2], stored_size [S], stored_digest
        [S, 32]. What is in a temporary folder counts as held.
        """
        held = self._held
        if not self._store.lasts:
            read = self._store.read
            stored = {key: _Held(read(at.digest), at.size) for key, at in self._stored.items()}
            held = {**stored, **held}
        stored = self._stored if self._store.lasts else {}
        arrays = {"count": np.asarray([len(held), len(stored)])}
        # Orbax keeps no empty arrays.
        if held:
            arrays |= _keys("", held)
            arrays["mask"] = np.stack([entry.trigger.mask for entry in held.values()])
            arrays["pattern"] = np.stack([entry.trigger.pattern for entry in held.values()])
        if stored:
            digests = b"".join(entry.digest for entry in stored.values())
            arrays |= _keys("stored_", stored)
            arrays["stored_digest"] = np.frombuffer(digests, np.uint8).reshape(-1, 32).copy()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "TriggerBank":
        """Return the bank of these `arrays`, without a bound; `copy` gives it one and a folder."""
        bank = cls()
        num_held, num_stored = np.asarray(arrays["count"]).tolist()
        for i in range(num_held):
            key = tuple(np.asarray(arrays["direction"][i]).tolist())
            trigger = _own(Trigger(arrays["mask"][i], arrays["pattern"][i]))
            bank._held[key] = _Held(trigger, float(arrays["size"][i]))
        for i in range(num_stored):
            key = tuple(np.asarray(arrays["stored_direction"][i]).tolist())
            digest = np.asarray(arrays["stored_digest"][i]).tobytes()
            bank._stored[key] = _Stored(digest, float(arrays["stored_size"][i]))
        return bank

    @property
    def num_held(self) -> int:
        """How many triggers are in memory."""
        return len(self._held)

    def size(self, victim: int, target: int) -> float:
        """Return the size of a direction's own trigger; inf where there is none."""
        known = self._held.get((victim, target)) or self._stored.get((victim, target))
        return np.inf if known is None else known.size

    def __contains__(self, direction: Key) -> bool:
        """Whether a direction has a trigger of its own."""
        return direction in self._held or direction in self._stored

    def keep_universal(self, target: int, trigger: Trigger) -> None:
        """Keep the universal trigger of a target class."""
        self._put((_ANY, target), _Held(_own(trigger), 0.0))

    def keep(self, victim: int, target: int, trigger: Trigger, size: float) -> None:
        """Keep the trigger of a direction if it is larger than the one in store.

        Note: A direction's own trigger is kept even if the universal one was larger: sizes for one
          victim class and for all are not alike.
        """
        key = victim, target
        if key not in self or size > self.size(*key):
            self._put(key, _Held(_own(trigger), float(size)))

    def forget(self, victim: int, target: int) -> None:
        """Forget the trigger of a direction, if it has one; its target's universal one is left."""
        self._held.pop((victim, target), None)
        self._stored.pop((victim, target), None)

    def start(self, victim: int, target: int) -> Trigger | None:
        """Return the trigger that inversions of a direction start from; None if there is none."""
        for key in ((victim, target), (_ANY, target)):
            entry = self._held.get(key)
            if entry is None and key in self._stored:
                stored = self._stored[key]
                entry = _Held(_own(self._store.read(stored.digest)), stored.size)
            if entry is not None:
                self._put(key, entry)
                return entry.trigger
        return None

    def _put(self, key: Key, entry: _Held) -> None:
        """Hold `entry` as the one used last; what there is no room for goes to disk."""
        self._stored.pop(key, None)
        self._held.pop(key, None)
        self._held[key] = entry
        size = entry.trigger.mask.nbytes + entry.trigger.pattern.nbytes
        while len(self._held) > 1 and len(self._held) * size > self._max_bytes:
            oldest = next(iter(self._held))
            trigger, size_kept = self._held.pop(oldest)
            self._stored[oldest] = _Stored(self._store.write(trigger), size_kept)


def _keys(prefix: str, entries: dict) -> dict[str, np.ndarray]:
    sizes = [entry.size for entry in entries.values()]
    return {
        f"{prefix}direction": np.asarray(list(entries), np.int64),
        f"{prefix}size": np.asarray(sizes, np.float32),
    }


def _own(trigger: Trigger) -> Trigger:
    """Return a copy that nobody can change: a part of a batch would keep the whole batch alive."""
    copies = [np.array(part, np.float32) for part in (trigger.mask, trigger.pattern)]
    for part in copies:
        part.setflags(write=False)
    return Trigger(*copies)
