"""Static backdoor triggers: one mask and one pattern for every image (Definition III.1).

    x' = (1 - m) * x + m * p

Everything works in pixel space [0, 1], before the model's own normalisation, on any number of
leading axes: a `Trigger` may be one trigger or a batch of them.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.types import AnyArray, ImageShape


@flax.struct.dataclass
class Trigger:
    """A mask and a pattern, both in [0, 1].

    Attributes:
      mask: [*d, h, w, 1], how much of the pattern replaces each pixel; shared by the channels.
      pattern: [*d, h, w, c].
    """

    mask: AnyArray
    pattern: AnyArray


def stamp(images: Array | np.ndarray, trigger: Trigger) -> Array:
    """Return `images` [..., h, w, c] with `trigger` applied; pixels where the mask is 0 are kept.

    >>> trigger = Trigger(mask=jnp.ones((2, 2, 1)), pattern=jnp.full((2, 2, 3), 0.5))
    >>> float(stamp(jnp.zeros((4, 2, 2, 3)), trigger).mean())
    0.5
    """
    mask, pattern = (
        jax.lax.broadcast_to_rank(part, images.ndim) for part in (trigger.mask, trigger.pattern)
    )
    return (1 - mask) * images + mask * pattern


def trigger_size(trigger: Trigger) -> Array:
    """Return the size [*d] of a trigger: its mask summed over height, width and channels.

    This is the paper's unit, "aggregated pixels in the R, G and B channels": a mask of ones on a
    3x3 patch of an RGB image has size 27.

    >>> float(trigger_size(Trigger(mask=jnp.ones((3, 3, 1)), pattern=jnp.zeros((3, 3, 3)))))
    27.0
    """
    return trigger.pattern.shape[-1] * jnp.sum(trigger.mask, axis=(-3, -2, -1))


def random_trigger(key: Array, image_shape: ImageShape) -> Trigger:
    """Return a trigger with mask and pattern uniform in [0, 1]: where an inversion starts."""
    h, w, c = image_shape
    mask_key, pattern_key = jax.random.split(key)
    return Trigger(
        mask=jax.random.uniform(mask_key, (h, w, 1)),
        pattern=jax.random.uniform(pattern_key, (h, w, c)),
    )


def jitter(trigger: Trigger, key: Array, scale: float = 0.01) -> Trigger:
    """Return `trigger` with uniform noise of ±`scale` on mask and pattern, clipped to [0, 1].

    A variable at exactly 0 or 1 sits where tanh is flat and would never move again.
    """
    leaves, structure = jax.tree.flatten(trigger)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        jnp.clip(leaf + jax.random.uniform(k, leaf.shape, minval=-scale, maxval=scale), 0.0, 1.0)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def success_rate(logits: Array, target: Array, weights: Array) -> Array:
    """Return the weighted share of `logits` [n, K] whose largest entry is `target`; 0 if no weight.

    Args:
      logits: [n, K], of stamped images.
      target: the class (scalar, or [n]) that they should be taken for.
      weights: [n], 1 for a sample and 0 for padding.
    """
    hits = (jnp.argmax(logits, axis=-1) == target).astype(logits.dtype)
    return jnp.sum(hits * weights) / jnp.maximum(jnp.sum(weights), 1.0)
