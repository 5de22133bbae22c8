"""Convolution and batch normalisation as the classifiers here use them, NHWC throughout.

`conv2d` exists because of one trap: inside a compiled loop, XLA:CPU sends only convolutions written
as NHWC/HWIO to its fast kernel, and the gradients that JAX derives are not written so. They are 8
to 150 times slower there (jax issue 12868), and trigger inversion is nothing but such a loop.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
Padding = str | int | Sequence[Sequence[int]]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def resolve_padding(
    padding: Padding, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> Pads:
    """Rows and columns of zeros to add on each side, as ((top, bottom), (left, right)).

    `padding` is "VALID", "SAME" (TensorFlow's: as little as covers the image, the odd one at the
    bottom and right, so asymmetric at stride 2), one number for all four sides, or the pairs.

    >>> resolve_padding("SAME", (32, 32), (3, 3), (2, 2))
    ((0, 1), (0, 1))
    """
    if isinstance(padding, str):
        pairs = lax.padtype_to_pads(size, kernel, strides, padding)
    elif isinstance(padding, int):
        pairs = ((padding, padding), (padding, padding))
    else:
        pairs = padding
    (top, bottom), (left, right) = pairs
    return (int(top), int(bottom)), (int(left), int(right))


def conv2d(
    x: jax.Array,
    w: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
) -> jax.Array:
    """Convolve images [n h w i] with a kernel [kh kw i o]; see `resolve_padding` for `padding`.

    Values are those of `lax.conv_general_dilated`. Reverse-mode gradients are as fast inside `scan`
    or `while_loop` as outside; forward mode (`jax.jvp`) is not available. No groups, no dilation.

    >>> conv2d(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)), strides=(2, 2)).shape
    (1, 3, 3, 4)
    """
    return _conv2d(x, w, strides, resolve_padding(padding, x.shape[1:3], w.shape[:2], strides))


def _plain_conv(x, w, strides, pads, *, spread_x=(1, 1), spread_w=(1, 1)):
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        pads,
        lhs_dilation=spread_x,
        rhs_dilation=spread_w,
        dimension_numbers=_DIMENSIONS,
    )


def _packed_conv(x, w, strides, pads):
    """Compute several neighbouring output columns as channels of one.

    The CPU kernel multiplies by whole vectors of output channels, and is half as fast with 16 of
    them (ResNet20's first stage) and a tenth as fast with 3 (the gradient of an image) as with 32.
    A wider kernel that holds `count` shifted copies of `w` gives `count` columns in one window. It
    multiplies some zeros, and is faster all the same.
    """
    height, width, out = w.shape[0], w.shape[1], w.shape[3]
    columns = (x.shape[2] + sum(pads[1]) - width) // strides[1] + 1
    count = _columns_per_window(height * width * w.shape[2], out, columns)
    if count == 1:
        return _plain_conv(x, w, strides, pads)
    shift = strides[1]
    wide = jnp.concatenate(
        [
            jnp.pad(w, ((0, 0), (i * shift, (count - 1 - i) * shift), (0, 0), (0, 0)))
            for i in range(count)
        ],
        axis=-1,
    )
    y = _plain_conv(x, wide, (strides[0], strides[1] * count), pads)
    return y.reshape(*y.shape[:2], columns, out)


def _columns_per_window(products: int, out: int, columns: int) -> int:
    """How many columns to pack: 32 channels' worth, 64 where each is the sum of few products."""
    wanted = (64 if products < 64 else 32) // out
    return max((p for p in (1, 2, 4, 8) if p <= wanted and columns % p == 0), default=1)


def _conv(x, w, strides, pads):
    return lax.platform_dependent(
        x,
        w,
        cpu=partial(_packed_conv, strides=strides, pads=pads),
        default=partial(_plain_conv, strides=strides, pads=pads),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(x, w, strides, pads):
    return _conv(x, w, strides, pads)


def _conv2d_forward(x, w, strides, pads):
    return _conv(x, w, strides, pads), (x, w)


def _conv2d_backward(strides, pads, residuals, g):
    x, w = residuals
    # Two separate choices, so that an unused weight gradient is dropped with everything it needs.
    gx = lax.platform_dependent(
        x,
        w,
        g,
        cpu=partial(_input_gradient, strides=strides, pads=pads),
        default=partial(_xla_input_gradient, strides=strides, pads=pads),
    )
    gw = lax.platform_dependent(
        x,
        w,
        g,
        cpu=partial(_weight_gradient, strides=strides, pads=pads),
        default=partial(_xla_weight_gradient, strides=strides, pads=pads),
    )
    return gx, gw


_conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _input_gradient(x, w, g, *, strides, pads):
    """Convolve the cotangent, spread out by the stride, with the flipped and transposed kernel."""
    edges = []
    for size, taps, stride, (low, _), out in _axes(x, w, g, strides, pads):
        before = taps - 1 - low
        edges.append((before, size + taps - 1 - before - _span(out, stride)))
    flipped = jnp.flip(w, (0, 1)).swapaxes(2, 3)
    if strides == (1, 1):
        return _packed_conv(g, flipped, (1, 1), edges)
    return _plain_conv(g, flipped, (1, 1), edges, spread_x=strides)


def _weight_gradient(x, w, g, *, strides, pads):
    """Convolve the images with the cotangent, spread out, their channels serving as the batch."""
    edges = [
        (low, taps - 1 + _span(out, stride) - size - low)
        for size, taps, stride, (low, _), out in _axes(x, w, g, strides, pads)
    ]
    x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    return _plain_conv(x, g, (1, 1), edges, spread_w=strides).transpose(1, 2, 0, 3)


def _axes(x, w, g, strides, pads):
    """Of rows, then columns: image size, kernel size, stride, padding, output size."""
    return zip(x.shape[1:3], w.shape[:2], strides, pads, g.shape[1:3], strict=True)


def _span(size, stride):
    """The size of an array after spreading its elements out by a stride."""
    return (size - 1) * stride + 1


def _xla_input_gradient(x, w, g, *, strides, pads):
    return jax.linear_transpose(lambda x: _plain_conv(x, w, strides, pads), x)(g)[0]


def _xla_weight_gradient(x, w, g, *, strides, pads):
    return jax.linear_transpose(lambda w: _plain_conv(x, w, strides, pads), w)(g)[0]


class Conv(nnx.Module):
    """A convolution layer: `kernel` [kh kw i o] and, if `use_bias`, `bias` [o]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None
        self.strides = (stride, stride)
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [n h w i] to features [n h' w' o]."""
        x = conv2d(x, self.kernel[...], self.strides, self.padding)
        return x if self.bias is None else x + self.bias[...].reshape(1, 1, 1, -1)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last; one multiply-add in inference mode.

    Running statistics move by 1 - `momentum` at each training batch. The running variance takes up
    the unbiased one, as in PyTorch and in TensorFlow's fused kernel (where imported weights come
    from) but not in `nnx.BatchNorm`; the batch is normalised by the biased one, as everywhere.
    """

    def __init__(self, num_features: int, *, momentum: float = 0.9, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [... c] by the running statistics, or by its own (which updates them)."""
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._update(x)
        scale = self.scale[...] * lax.rsqrt(var + self.epsilon)
        offset = self.bias[...] - mean * scale
        shape = (1,) * (x.ndim - 1) + (-1,)
        return x * scale.reshape(shape) + offset.reshape(shape)

    def _update(self, x):
        axes = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        mean = jnp.mean(x, axes)
        # Around the mean: E[x^2] - E[x]^2 cancels in float32 where the mean is large.
        var = jnp.mean(jnp.square(x - mean.reshape((1,) * len(axes) + (-1,))), axes)
        unbiased = var * (count / max(count - 1, 1))
        keep = self.momentum
        self.mean[...] = keep * self.mean[...] + (1 - keep) * lax.stop_gradient(mean)
        self.var[...] = keep * self.var[...] + (1 - keep) * lax.stop_gradient(unbiased)
        return mean, var
