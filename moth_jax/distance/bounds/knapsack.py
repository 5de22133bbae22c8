"""The images that triggers of a size make of one image, and the largest a linear form gets there.

A trigger with mask m [h, w, 1] and any pattern moves an image x by δ with
m·(−x) <= δ <= m·(1 − x), 0 <= m <= 1 and Σm <= s. The maximum of a·δ over this set is a fractional
knapsack: a pixel of mask 1 brings gain = Σ_c max(a(1 − x), −ax), and the s largest gains are taken.
"""

import jax.numpy as jnp
from jax import Array, lax


def largest_gains(form: Array, image: Array, count: int) -> Array:
    """Return the `count` largest gains [*d, count], in order, of forms [*d, h, w, c]."""
    gain = jnp.maximum(form * (1 - image), -form * image).sum(-1)
    gain = gain.reshape(*gain.shape[:-2], -1)
    if count == 1:
        return gain.max(-1, keepdims=True)
    return lax.top_k(gain, min(count, gain.shape[-1]))[0]


def most(gains: Array, size: Array) -> Array:
    """Return the largest value [*d] of the forms of these gains, at Σm <= size.

    >>> float(most(jnp.array([3.0, 2.0, 1.0]), jnp.array(1.5)))
    4.0
    """
    taken = jnp.clip(size - jnp.arange(gains.shape[-1]), 0, 1)
    return (gains * taken).sum(-1)


def least_size(gains: Array, value: Array) -> Array:
    """Return the Σm [*d] at which the forms reach `value` [*d]; inf if they never do.

    >>> gains = jnp.array([3.0, 2.0, 1.0])
    >>> [float(least_size(gains, jnp.array(v))) for v in (-1.0, 1.5, 4.0, 7.0)]
    [0.0, 0.5, 1.5, inf]
    """
    sums = jnp.cumsum(gains, -1)
    before = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    reached = sums >= value[..., None]
    share = (value[..., None] - before) / jnp.where(gains > 0, gains, 1.0)
    sizes = jnp.arange(gains.shape[-1]) + jnp.clip(share, 0, 1)
    return jnp.where(reached, sizes, jnp.inf).min(-1)
