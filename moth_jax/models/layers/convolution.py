"""Convolution of NHWC images, with gradients that are fast inside compiled loops.

`conv2d` exists because of one trap: inside a compiled loop, XLA:CPU sends only convolutions written
as NHWC/HWIO without groups to its fast kernel, and the gradients that JAX derives are not written
so. Those of a ResNet20 are 3 to 40 times slower there (jax issue 12868;
`experiments/speed/narrow_convolutions.py`), and trigger inversion is nothing but such a loop. On
other devices XLA does everything, but for one gradient on NVIDIA's (`_cuda_input_gradient`).
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moth_jax.models.layers import windows
from moth_jax.models.layers.windows import Padding, Pads, Pair, resolve_padding

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """How a kernel moves over the images."""

    strides: Pair
    pads: Pads
    dilation: Pair
    groups: int


def conv2d(
    x: jax.Array,
    w: jax.Array,
    strides: Pair = (1, 1),
    padding: Padding = "SAME",
    *,
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> jax.Array:
    """Convolve images [n h w i] with a kernel [kh kw i/groups o].

    `padding` as in `windows.resolve_padding`. Values are those of `lax.conv_general_dilated`.
    Reverse-mode gradients are as fast inside `scan` or `while_loop` as outside; forward mode
    (`jax.jvp`) is not available.

    >>> conv2d(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)), strides=(2, 2)).shape
    (1, 3, 3, 4)
    """
    size = windows.span(w.shape[:2], dilation)
    pads = resolve_padding(padding, x.shape[1:3], size, strides)
    return _conv2d(x, w, Geometry(strides, pads, dilation, groups))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv2d(x, w, geometry):
    return lax.platform_dependent(
        x,
        w,
        cpu=partial(_on_cpu, _depthwise, _dense, geometry=geometry),
        default=partial(_xla, geometry=geometry),
    )


def _conv2d_forward(x, w, geometry):
    return _conv2d(x, w, geometry), (x, w)


def _conv2d_backward(geometry, residuals, g):
    x, w = residuals
    # Two separate choices, so that an unused weight gradient is dropped with everything it needs.
    gx = lax.platform_dependent(
        x,
        w,
        g,
        cpu=partial(_on_cpu, _depthwise_input_gradient, _dense_input_gradient, geometry=geometry),
        cuda=partial(_cuda_input_gradient, geometry=geometry),
        default=partial(_xla_input_gradient, geometry=geometry),
    )
    gw = lax.platform_dependent(
        x,
        w,
        g,
        cpu=partial(_on_cpu, _depthwise_weight_gradient, _dense_weight_gradient, geometry=geometry),
        default=partial(_xla_weight_gradient, geometry=geometry),
    )
    return gx, gw


_conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _xla(x, w, geometry):
    return lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.pads,
        rhs_dilation=geometry.dilation,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=geometry.groups,
    )


def _xla_input_gradient(x, w, g, *, geometry):
    return jax.linear_transpose(lambda x: _xla(x, w, geometry), x)(g)[0]


def _cuda_input_gradient(x, w, g, *, geometry):
    """XLA's, but for images of few channels several columns at once, as on the CPU (`_packed`).

    cuDNN gives every output pixel at least 32 channels of a tile and throws the rest away: half of
    them with 16 channels, nine tenths with the 3 of an image.
    """
    stepwise = geometry == Geometry((1, 1), geometry.pads, (1, 1), 1)
    if stepwise and x.shape[-1] < 32 and max(w.shape[:2]) > 1:
        return _dense_input_gradient(x, w, g, geometry)
    return _xla_input_gradient(x, w, g, geometry=geometry)


def _xla_weight_gradient(x, w, g, *, geometry):
    return jax.linear_transpose(lambda w: _xla(x, w, geometry), w)(g)[0]


# On the CPU: one kernel for depthwise convolutions, one for dense ones; others are taken apart.


def _on_cpu(depthwise, dense, *arrays, geometry):
    """Compute `depthwise` or `dense` of arrays (x, w or x, w, g), group by group if there are."""
    groups = geometry.groups
    if groups == arrays[0].shape[-1] > 1:
        return depthwise(*arrays, geometry)
    if groups > 1:
        # The last axis holds the channels in of x, and the channels out of w and g.
        parts = zip(*(jnp.split(array, groups, axis=-1) for array in arrays), strict=True)
        one = geometry._replace(groups=1)
        return jnp.concatenate([dense(*part, one) for part in parts], -1)
    return dense(*arrays, geometry)


# Depthwise: every channel has kernels [kh kw 1 m] of its own, m outputs side by side.


def _depthwise(x, w, geometry):
    x = _repeat(windows.pad(x, geometry.pads), w)
    shown = windows.views(x, w.shape[:2], geometry.strides, geometry.dilation)
    products = (view * tap for view, tap in zip(shown.values(), _taps(w), strict=True))
    return reduce(jnp.add, products)


def _depthwise_input_gradient(x, w, g, geometry):
    (top, bottom), (left, right) = geometry.pads
    _, height, width, channels = x.shape
    if geometry.strides == (1, 1) and g.shape[-1] == channels:
        reach = windows.span(w.shape[:2], geometry.dilation)
        pads = tuple(
            (k - 1 - low, k - 1 - high) for k, (low, high) in zip(reach, geometry.pads, strict=True)
        )
        return _depthwise(g, jnp.flip(w, (0, 1)), geometry._replace(pads=pads))
    all_places = windows.places(w.shape[:2], geometry.dilation)
    parts = {place: g * tap for place, tap in zip(all_places, _taps(w), strict=True)}
    size = height + top + bottom, width + left + right
    gradient = windows.from_views(parts, size, geometry.strides)
    gradient = gradient[:, top : top + height, left : left + width]
    multiplier = g.shape[-1] // channels
    return gradient if multiplier == 1 else gradient.reshape(*x.shape, multiplier).sum(-1)


def _depthwise_weight_gradient(x, w, g, geometry):
    x = _repeat(windows.pad(x, geometry.pads), w)
    shown = windows.views(x, w.shape[:2], geometry.strides, geometry.dilation)
    return jnp.stack([(view * g).sum((0, 1, 2)) for view in shown.values()]).reshape(w.shape)


def _repeat(x, w):
    multiplier = w.shape[-1] // x.shape[-1]
    return x if multiplier == 1 else jnp.repeat(x, multiplier, axis=-1)


def _taps(w):
    """The weights [1 1 1 o] of each place of a kernel [kh kw 1 o], row by row."""
    return list(w.reshape(-1, 1, 1, 1, w.shape[-1]))


# Dense: all channels in reach all channels out.


def _plain(x, w, strides, pads, *, spread_x=(1, 1), spread_w=(1, 1)):
    span = windows.span(w.shape[:2], spread_w)
    if any(n < k for n, k in zip(x.shape[1:3], span, strict=True)) and max(w.shape[:2]) <= 7:
        # The fast kernel takes no image that is smaller than the window, however it is padded, and
        # a last stage of 2x2 pixels would take 40 times as long.
        edges = [(*pad, spread - 1) for pad, spread in zip(pads, spread_x, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        return _by_places(x, w, strides, spread_w)
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        pads,
        lhs_dilation=spread_x,
        rhs_dilation=spread_w,
        dimension_numbers=_DIMENSIONS,
    )


def _by_places(x, w, strides, dilation):
    """A matrix product for each place of the window, without padding."""
    shown = windows.views(x, w.shape[:2], strides, dilation).values()
    matrices = w.reshape(-1, *w.shape[2:])
    pairs = zip(shown, matrices, strict=True)
    return reduce(jnp.add, (jnp.tensordot(view, matrix, 1) for view, matrix in pairs))


def _dense(x, w, geometry):
    if geometry.dilation != (1, 1):
        return _plain(x, w, geometry.strides, geometry.pads, spread_w=geometry.dilation)
    return _packed(x, w, geometry.strides, geometry.pads)


def _packed(x, w, strides, pads):
    """Compute several neighbouring output columns as channels of one.

    The CPU's kernel multiplies by whole vectors of output channels, and is half as fast with 16 of
    them (ResNet20's first stage) and a tenth as fast with 3 (the gradient of an image) as with 32.
    A wider kernel that holds `count` shifted copies of `w` gives `count` columns in one window. It
    multiplies some zeros, and is faster all the same.
    """
    height, width, out = w.shape[0], w.shape[1], w.shape[3]
    columns = (x.shape[2] + sum(pads[1]) - width) // strides[1] + 1
    shift = strides[1]
    # A window wider than the image is one that the fast kernel does not take.
    room = (x.shape[2] - width) // shift + 1
    count = _columns_per_window(height * width * w.shape[2], out, columns, room)
    if count == 1:
        return _plain(x, w, strides, pads)
    wide = jnp.concatenate(
        [
            jnp.pad(w, ((0, 0), (i * shift, (count - 1 - i) * shift), (0, 0), (0, 0)))
            for i in range(count)
        ],
        axis=-1,
    )
    y = _plain(x, wide, (strides[0], strides[1] * count), pads)
    return y.reshape(*y.shape[:2], columns, out)


def _columns_per_window(products: int, out: int, columns: int, room: int) -> int:
    """How many columns to pack: 32 channels' worth, 64 where each is the sum of few products."""
    wanted = min((64 if products < 64 else 32) // out, room)
    return max((p for p in (1, 2, 4, 8) if p <= wanted and columns % p == 0), default=1)


def _dense_input_gradient(x, w, g, geometry):
    """Convolve the cotangent, spread out by the stride, with the flipped and transposed kernel."""
    strides, dilation = geometry.strides, geometry.dilation
    edges = []
    for size, reach, stride, (low, _), out in _axes(x, w, g, geometry):
        before = reach - 1 - low
        edges.append((before, size + reach - 1 - before - _spread(out, stride)))
    flipped = jnp.flip(w, (0, 1)).swapaxes(2, 3)
    if strides == (1, 1) and dilation == (1, 1):
        return _packed(g, flipped, (1, 1), edges)
    return _plain(g, flipped, (1, 1), edges, spread_x=strides, spread_w=dilation)


def _dense_weight_gradient(x, w, g, geometry):
    """Convolve the images with the cotangent, spread out, their channels serving as the batch."""
    edges = [
        (low, reach - 1 + _spread(out, stride) - size - low)
        for size, reach, stride, (low, _), out in _axes(x, w, g, geometry)
    ]
    x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    gradient = _plain(x, g, geometry.dilation, edges, spread_w=geometry.strides)
    return gradient.transpose(1, 2, 0, 3)


def _axes(x, w, g, geometry):
    """Of rows, then columns: image size, reach of the kernel, stride, padding, output size."""
    reach = windows.span(w.shape[:2], geometry.dilation)
    return zip(x.shape[1:3], reach, geometry.strides, geometry.pads, g.shape[1:3], strict=True)


def _spread(size, stride):
    """The size of an array after spreading its elements out by a stride."""
    return (size - 1) * stride + 1
