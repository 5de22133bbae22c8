"""The triggers that inversions start from (Section IV-B, "backdoor reuse")."""

from typing import NamedTuple

import jax
import numpy as np

from moth_jax.triggers import Trigger

Direction = tuple[int, int]
_ANY = -1  # the victim of a universal trigger


class _Entry(NamedTuple):
    """A trigger and its size; the arrays are never changed, so that banks may share them."""

    trigger: Trigger
    size: float


class TriggerBank:
    """Per direction the largest successful trigger seen, and per target the universal one.

    Host state, bounded: past `max_bytes` the bank forgets the trigger that was used longest ago.
    Triggers are warm starts: an inversion whose trigger is forgotten starts from the universal one,
    or from a random one.

    Args:
      max_bytes: of all triggers together; the last one always stays.
    """

    def __init__(self, max_bytes: float = np.inf):
        self._max_bytes = max_bytes
        self._entries: dict[Direction, _Entry] = {}  # the one used longest ago comes first

    def copy(self, max_bytes: float | None = None) -> "TriggerBank":
        """Return a bank that can be changed without changing this one.

        It costs a pointer per trigger. `max_bytes` is this bank's if not given.
        """
        bank = TriggerBank(self._max_bytes if max_bytes is None else max_bytes)
        bank._entries = dict(self._entries)
        return bank

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that a checkpoint needs of M triggers, the one used longest ago first.

        direction [M, 2] (victim -1 for a universal one), size [M], mask [M, h, w, 1], pattern
        [M, h, w, c]; nothing of an empty bank, for Orbax keeps no empty arrays.
        """
        entries = self._entries.values()
        if not entries:
            return {}
        return {
            "direction": np.asarray(list(self._entries), np.int64),
            "size": np.asarray([entry.size for entry in entries], np.float32),
            "mask": np.stack([entry.trigger.mask for entry in entries]),
            "pattern": np.stack([entry.trigger.pattern for entry in entries]),
        }

    @classmethod
    def from_arrays(cls, arrays: dict) -> "TriggerBank":
        """Return the bank of these `arrays`, without a bound; `copy` gives it one."""
        bank = cls()
        directions = np.asarray(arrays.get("direction", ()), np.int64).tolist()
        for i, (victim, target) in enumerate(directions):
            trigger = Trigger(arrays["mask"][i], arrays["pattern"][i])
            bank._put((victim, target), trigger, float(arrays["size"][i]))
        return bank

    def keep_universal(self, target: int, trigger: Trigger) -> None:
        """Keep the universal trigger of a target class."""
        self._put((_ANY, target), trigger, 0.0)

    def keep(self, victim: int, target: int, trigger: Trigger, size: float) -> None:
        """Keep the trigger of a direction if it is larger than the one that is kept.

        Note: A direction's own trigger is kept even if the universal one was larger: sizes for one
          victim class and for all are not alike.
        """
        known = self._entries.get((victim, target))
        if known is None or size > known.size:
            self._put((victim, target), trigger, float(size))

    def forget(self, victim: int, target: int) -> None:
        """Forget the trigger of a direction, if it has one; its target's universal one stays."""
        self._entries.pop((victim, target), None)

    def start(self, victim: int, target: int) -> Trigger | None:
        """Return the trigger that inversions of a direction start from; None if there is none."""
        for key in ((victim, target), (_ANY, target)):
            if key in self._entries:
                # It is now the one used last.
                entry = self._entries[key] = self._entries.pop(key)
                return entry.trigger
        return None

    def _put(self, key: Direction, trigger: Trigger, size: float) -> None:
        """Keep a trigger as the one used last, and forget those that there is no room for."""
        self._entries.pop(key, None)
        entry = self._entries[key] = _Entry(_own(trigger), size)
        num_bytes = entry.trigger.mask.nbytes + entry.trigger.pattern.nbytes
        while len(self._entries) > 1 and len(self._entries) * num_bytes > self._max_bytes:
            self._entries.pop(next(iter(self._entries)))


def _own(trigger: Trigger) -> Trigger:
    """Return a copy that nobody can change: a part of a batch would keep the whole batch alive."""

    def own(part):
        copy = np.array(part, np.float32)
        copy.setflags(write=False)
        return copy

    return jax.tree.map(own, trigger)
