"""The images that triggers of a size make of one image, and the most that a bound grows there.

A trigger with mask m [h, w, 1] and any pattern moves the pixel p of an image x by m_p times a point
of the box [−x_p, 1 − x_p], and 0 <= m <= 1, Σm <= s. A bound that grows by m_p·g_p is largest where
the s largest gains g are taken: a fractional knapsack. Over a box a convex function is largest at a
corner, of which a pixel of C channels has 2^C.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_MOST_CORNERS = 2048  # of all pixels; of more each channel is taken at its own largest end


def num_corners(shape: Sequence[int]) -> int:
    """Return how many corners of a pixel's box are told apart; 1 if none are."""
    height, width, channels = shape
    return 2**channels if height * width * 2**channels <= _MOST_CORNERS else 1


def moves(form: Array, image: Array) -> tuple[Array, Array]:
    """Return how far a linear form and its negative go at each corner of each pixel's box.

    Args:
      form, image: [h, w, c].

    Returns:
      Two of [e, h·w]; e corners.
    """
    low, high = -image * form, (1 - image) * form
    if num_corners(image.shape) == 1:
        both = jnp.maximum(low, high), jnp.maximum(-low, -high)
        up, down = (part.sum(-1).reshape(1, -1) for part in both)
        return up, down
    ends = jnp.stack([low, high]).reshape(2, -1, image.shape[-1])
    corners = np.indices((2,) * image.shape[-1]).reshape(image.shape[-1], -1)
    parts = [ends[corner, :, channel] for channel, corner in enumerate(corners)]
    up = jnp.stack(parts).sum(0)
    return up, -up


def largest(growth: Array, count: int) -> Array:
    """Return the `count` largest gains [*d, count], in order, of growths [*d, e, h·w]."""
    gains = jnp.maximum(growth.max(-2), 0)
    if count == 1:
        return gains.max(-1, keepdims=True)
    return lax.top_k(gains, min(count, gains.shape[-1]))[0]


def most(gains: Array, size: Array) -> Array:
    """Return how far the bounds of these gains grow [*d], at Σm <= size.

    >>> float(most(jnp.array([3.0, 2.0, 1.0]), jnp.array(1.5)))
    4.0
    """
    taken = jnp.clip(size - jnp.arange(gains.shape[-1]), 0, 1)
    return jnp.tensordot(gains, taken, 1, precision=lax.Precision.HIGHEST)


def least_size(gains: Array, value: Array) -> Array:
    """Return the Σm [*d] at which the bounds have grown by `value` [*d]; inf if they never do.

    >>> gains = jnp.array([3.0, 2.0, 1.0])
    >>> [float(least_size(gains, jnp.array(v))) for v in (-1.0, 1.5, 4.0, 7.0)]
    [0.0, 0.5, 1.5, inf]
    """
    sums = jnp.cumsum(gains, -1)
    before = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    reached = sums >= value[..., None]
    share = (value[..., None] - before) / jnp.where(gains > 0, gains, 1.0)
    places = lax.broadcasted_iota(gains.dtype, gains.shape, gains.ndim - 1)
    sizes = places + jnp.clip(share, 0, 1)
    return jnp.where(reached, sizes, jnp.inf).min(-1)
