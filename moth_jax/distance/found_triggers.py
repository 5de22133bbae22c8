"""The triggers of a matrix: of the directions where one was found, not of all places."""

from typing import NamedTuple

import numpy as np

from moth_jax.triggers import Trigger


class FoundTriggers(NamedTuple):
    """The triggers of the directions where one was found.

    Attributes:
      directions: [M, 2] rows and columns of the matrix, in its order.
      mask, pattern: [M, h, w, 1] and [M, h, w, c].
    """

    directions: np.ndarray
    mask: np.ndarray
    pattern: np.ndarray

    @classmethod
    def of_dense(cls, triggers: Trigger, found: np.ndarray) -> "FoundTriggers":
        """Return those `found` [K, K] of triggers [K, K, ...]."""
        return cls(np.argwhere(found), triggers.mask[found], triggers.pattern[found])

    def at(self, directions: np.ndarray) -> Trigger:
        """Return the triggers of `directions` [D, 2], zeros where none was found."""
        place = {direction: i for i, direction in enumerate(map(tuple, self.directions.tolist()))}
        wanted = map(tuple, np.asarray(directions).tolist())
        places = np.asarray([place.get(direction, -1) for direction in wanted], np.int64)
        has = places >= 0

        def pick(kept: np.ndarray) -> np.ndarray:
            picked = np.zeros((len(places), *kept.shape[1:]), kept.dtype)
            picked[has] = kept[places[has]]
            return picked

        return Trigger(pick(self.mask), pick(self.pattern))
