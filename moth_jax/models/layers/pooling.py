"""Pooling over windows of NHWC images, as fast inside compiled loops as outside."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from moth_jax.models.layers import windows
from moth_jax.models.layers.windows import Padding, Pair


def max_pool(
    x: jax.Array,
    window: Pair,
    strides: Pair | None = None,
    padding: Padding = 0,
    dilation: Pair = (1, 1),
) -> jax.Array:
    """The largest value of each window of images [n h w c]; `strides` default to the window.

    `padding` as in `windows.resolve_padding`; padded places never win. The gradient goes to the
    first of equal values in a window, row by row, as in PyTorch.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    strides = window if strides is None else strides
    size = windows.span(window, dilation)
    pads = windows.resolve_padding(padding, x.shape[1:3], size, strides)
    return _max_pool(x, window, strides, pads, dilation)


def avg_pool(
    x: jax.Array,
    window: Pair,
    strides: Pair | None = None,
    padding: Padding = 0,
    *,
    count_padding: bool = True,
    divisor: int | None = None,
) -> jax.Array:
    """The mean of each window of images [n h w c]; `strides` default to the window.

    Padded zeros count as values, as in PyTorch, unless `count_padding` is False; `divisor` replaces
    the number of values.

    >>> avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, :, :, 0].tolist()
    [[2.5, 4.5], [10.5, 12.5]]
    """
    strides = window if strides is None else strides
    if tuple(window) == x.shape[1:3] and not padding and divisor is None:
        return x.mean((1, 2), keepdims=True)
    pads = windows.resolve_padding(padding, x.shape[1:3], window, strides)
    total = _sums(x, window, strides, pads)
    if divisor is None and not count_padding and any(map(any, pads)):
        ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
        return total / _sums(ones, window, strides, pads)
    return total / (divisor or window[0] * window[1])


def adaptive_avg_pool(x: jax.Array, size: Pair) -> jax.Array:
    """The means over `size` nearly equal, possibly overlapping parts of images [n h w c].

    Part i of m along an axis of n covers floor(i n / m) to ceil((i + 1) n / m), as in PyTorch.

    >>> adaptive_avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (1, 1)).tolist()
    [[[[7.5]]]]
    """
    if tuple(size) == (1, 1):
        return x.mean((1, 2), keepdims=True)
    for axis, count in ((1, size[0]), (2, size[1])):
        length = x.shape[axis]
        if length == count:
            continue
        means = [
            lax.slice_in_dim(x, i * length // count, -(-(i + 1) * length // count), axis=axis).mean(
                axis, keepdims=True
            )
            for i in range(count)
        ]
        x = jnp.concatenate(means, axis)
    return x


def _sum_views(x, window, strides, pads) -> jax.Array:
    return reduce(jnp.add, windows.views(windows.pad(x, pads), window, strides).values())


def _sums_backward(window, strides, pads, size, g):
    (top, bottom), (left, right) = pads
    height, width = size
    parts = {place: g for place in windows.places(window)}
    padded = height + top + bottom, width + left + right
    return (windows.from_views(parts, padded, strides)[:, top : top + height, left : left + width],)


_sums = jax.custom_vjp(_sum_views, nondiff_argnums=(1, 2, 3))
_sums.defvjp(
    lambda x, window, strides, pads: (_sums(x, window, strides, pads), x.shape[1:3]),
    _sums_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _max_pool(x, window, strides, pads, dilation):
    shown = windows.views(windows.pad(x, pads, -jnp.inf), window, strides, dilation)
    return reduce(jnp.maximum, shown.values())


def _max_pool_forward(x, window, strides, pads, dilation):
    y = _max_pool(x, window, strides, pads, dilation)
    return y, (x, y)


def _max_pool_backward(window, strides, pads, dilation, residuals, g):
    x, y = residuals
    padded = windows.pad(x, pads, -jnp.inf)
    parts, free = {}, jnp.ones((), bool)
    for place, shown in windows.views(padded, window, strides, dilation).items():
        largest = free & (shown == y)
        free = free & ~largest
        parts[place] = jnp.where(largest, g, 0)
    gradient = windows.from_views(parts, padded.shape[1:3], strides)
    (top, _), (left, _) = pads
    return (gradient[:, top : top + x.shape[1], left : left + x.shape[2]],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
