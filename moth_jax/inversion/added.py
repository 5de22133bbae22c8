"""The trimmed search for a trigger that is added: where an ensemble begins.

    x' = clip(x + δ, 0, 1)

A mask and a pattern hold each other still: where the mask is small the pattern hardly matters, and
where the pattern is wrong the mask has no reason to grow. One variable for each value of the image
has neither, and finds another, and on robust networks a much smaller, set of pixels. As a mask and
a pattern (`triggers.replacing`) it is a good start.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from moth_jax.inversion.trimmed import Trimmed
from moth_jax.options import POSITIVE_SHARE, option
from moth_jax.triggers import AddedTrigger
from moth_jax.types import ImageShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimmedAddition(Trimmed):
    """`Trimmed`, of triggers that are added.

    The size that it makes small is C·Σ max_c |δ|: the mask of an image whose every pixel has room
    for a change of 1.

    Attributes:
      start_scale: the first values are uniform in ±start_scale.

    Note: It is no distance: the size of a mask that such a trigger needs is larger. So it is not
      in `INVERSIONS`.
    """

    start_scale: float = option(0.1, POSITIVE_SHARE)

    method: ClassVar[str] = "trimmed_addition"
    kind: ClassVar[type] = AddedTrigger

    def start(self, key: Array, image_shape: ImageShape) -> AddedTrigger:
        """Return small random changes."""
        return AddedTrigger(
            jax.random.uniform(key, image_shape, minval=-self.start_scale, maxval=self.start_scale)
        )

    def _size(self, trigger: AddedTrigger) -> Array:
        return trigger.delta.shape[-1] * self._penalty(trigger)

    def _penalty(self, trigger: AddedTrigger) -> Array:
        return jnp.sum(jnp.max(jnp.abs(trigger.delta), axis=-1))

    def _moved(self, value: Array, update: Array) -> Array:
        """Return the values after an update; one that would change its sign stops at 0.

        There a penalty of |δ| holds it, where it would swing about 0.
        """
        moved = jnp.clip(value + update, -1.0, 1.0)
        return jnp.where(value * moved < 0, 0.0, moved)
