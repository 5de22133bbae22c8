"""The store of triggers that inversions start from (Section IV-B, "backdoor reuse")."""

import numpy as np

from moth_jax.triggers import Trigger


class TriggerBank:
    """Per direction the largest successful trigger seen, and per target the universal one.

    The bank is host state and bounded: past `capacity` directions the one that was used longest ago
    is forgotten, and starts from its target's universal trigger again. All of it is NumPy arrays
    (`arrays`), saved with the model.

    Attributes:
      arrays: universal_mask [K, h, w, 1], universal_pattern [K, h, w, c], universal_found [K];
        mask [M, h, w, 1], pattern [M, h, w, c], size [M], used [M] (a clock; -1 for a free slot),
        direction [M, 2].
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], capacity: int = 2048):
        h, w, c = image_shape
        slots = min(capacity, num_classes * (num_classes - 1))
        self.arrays = {
            "universal_mask": np.zeros((num_classes, h, w, 1), np.float32),
            "universal_pattern": np.zeros((num_classes, h, w, c), np.float32),
            "universal_found": np.zeros(num_classes, bool),
            "mask": np.zeros((slots, h, w, 1), np.float32),
            "pattern": np.zeros((slots, h, w, c), np.float32),
            "size": np.zeros(slots, np.float32),
            "used": np.full(slots, -1, np.int64),
            "direction": np.full((slots, 2), -1, np.int64),
        }

    def copy(self) -> "TriggerBank":
        """Return a bank that can be changed without changing this one."""
        return self.from_arrays(self.arrays)

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "TriggerBank":
        """Return the bank with copies of these `arrays`."""
        bank = cls.__new__(cls)
        bank.arrays = {name: np.array(array) for name, array in arrays.items()}
        return bank

    def keep_universal(self, target: int, trigger: Trigger) -> None:
        """Keep the universal trigger of a target class."""
        self.arrays["universal_mask"][target] = trigger.mask
        self.arrays["universal_pattern"][target] = trigger.pattern
        self.arrays["universal_found"][target] = True

    def keep(self, victim: int, target: int, trigger: Trigger, size: float) -> None:
        """Keep the trigger of a direction if it is larger than the one in store.

        Note: A direction's own trigger is kept even if the universal one was larger: sizes for one
          victim class and for all are not alike.
        """
        slot = self._slot(victim, target)
        if slot is None:
            slot = int(self.arrays["used"].argmin())
        elif size <= self.arrays["size"][slot]:
            return
        self.arrays["mask"][slot] = trigger.mask
        self.arrays["pattern"][slot] = trigger.pattern
        self.arrays["size"][slot] = size
        self.arrays["direction"][slot] = victim, target
        self._touch(slot)

    def start(self, victim: int, target: int) -> Trigger | None:
        """Return the trigger that inversions of a direction start from; None if there is none."""
        slot = self._slot(victim, target)
        if slot is not None:
            self._touch(slot)
            return Trigger(self.arrays["mask"][slot], self.arrays["pattern"][slot])
        if self.arrays["universal_found"][target]:
            return Trigger(
                self.arrays["universal_mask"][target], self.arrays["universal_pattern"][target]
            )
        return None

    def _slot(self, victim: int, target: int) -> int | None:
        slots = np.flatnonzero((self.arrays["direction"] == (victim, target)).all(1))
        return int(slots[0]) if slots.size else None

    def _touch(self, slot: int) -> None:
        self.arrays["used"][slot] = self.arrays["used"].max() + 1
