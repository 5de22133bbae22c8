"""What the layers of a PyTorch program are in JAX: convolution, pooling, dense layers, norms.

Each function is the operator of its name, as PyTorch documents it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from moth_jax.errors import InputError
from moth_jax.models.layers import convolution, pooling, windows
from moth_jax.models.pytorch.tensors import Tensor, from_images, images, plain, tensor

# Beyond these no layer of a classifier goes, and each place of a window is a step of its own.
_LARGEST_SIDE = 1 << 14
_MOST_PLACES = 1 << 14


def _pair(value, least: int = 1) -> tuple[int, int]:
    """Two sizes from `least` on, of rows and columns."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    values = values * 2 if len(values) == 1 else values
    if len(values) != 2 or not all(
        isinstance(n, int) and least <= n <= _LARGEST_SIDE for n in values
    ):
        raise InputError(
            f"two whole numbers of {least} to {_LARGEST_SIDE} are expected, got {values}"
        )
    return values


def _window(value) -> tuple[int, int]:
    rows, columns = _pair(value)
    if rows * columns > _MOST_PLACES:
        raise InputError(f"a window of {rows} x {columns} has more than {_MOST_PLACES} places")
    return rows, columns


def _pads(value, span: tuple[int, int]) -> windows.Pads:
    """The padding on both sides, which is less than what the window spans."""
    rows, columns = _pair(value, least=0)
    if rows > span[0] or columns > span[1]:
        raise InputError(f"padding {(rows, columns)} is beyond a window that spans {span}")
    return (rows, rows), (columns, columns)


def conv2d(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
    x, dilation = images(x), _pair(dilation)
    span = windows.span(_window(w.shape[2:]), dilation)
    reach = span[0] + x.shape[1], span[1] + x.shape[2]
    y = convolution.conv2d(
        x,
        plain(w).transpose(2, 3, 1, 0),
        _window(stride),
        padding.upper() if isinstance(padding, str) else _pads(padding, reach),
        dilation=dilation,
        groups=groups,
    )
    return from_images(y if bias is None else y + plain(bias).reshape(1, 1, 1, -1))


def any_convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed or len(stride) != 2:
        raise InputError("only two-dimensional convolutions that are not transposed are supported")
    return conv2d(x, w, bias, stride, padding, dilation, groups)


def max_pool2d(x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    window, dilation = _window(kernel_size), _pair(dilation)
    strides = _window(stride) if stride else window
    span = windows.span(window, dilation)
    pads = _ceil_pads(images(x), span, strides, _pads(padding, span), ceil_mode)
    return from_images(pooling.max_pool(images(x), window, strides, pads, dilation))


def avg_pool2d(
    x,
    kernel_size,
    stride=(),
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    window = _window(kernel_size)
    strides = _window(stride) if stride else window
    x, pads = images(x), _pads(padding, window)
    wide = _ceil_pads(x, window, strides, pads, ceil_mode)
    if wide == pads or divisor_override:
        options = {"count_padding": count_include_pad, "divisor": divisor_override}
        return from_images(pooling.avg_pool(x, window, strides, wide, **options))
    # Windows that reach over the end: what lies beyond the padding is never counted.
    total = pooling.avg_pool(x, window, strides, wide, divisor=1)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    if count_include_pad:
        ones = windows.pad(ones, pads, 1)
        wide = tuple(
            (0, w[1] - p[1]) for w, p in zip(wide, pads, strict=True)
        )  # the padding is part of the ones now
    return from_images(total / pooling.avg_pool(ones, window, strides, wide, divisor=1))


def _ceil_pads(x, span, strides, pads, ceil_mode):
    """The padding, with what the last window needs at the end if it may reach over it."""
    if not ceil_mode:
        return pads
    wide = []
    for size, reach, stride, (low, high) in zip(x.shape[1:3], span, strides, pads, strict=True):
        count = -(-(size + low + high - reach) // stride) + 1
        if (count - 1) * stride >= size + low:  # the last window would start in the padding
            count -= 1
        wide.append((low, max((count - 1) * stride + reach - size - low, high)))
    return tuple(wide)


def adaptive_avg_pool2d(x, output_size):
    _, height, width, _ = images(x).shape
    rows, columns = output_size if len(output_size) == 2 else (*output_size, *output_size)
    size = _pair((height if rows is None else rows, width if columns is None else columns))
    return from_images(pooling.adaptive_avg_pool(images(x), size))


def linear(x, w, bias=None):
    y = jnp.tensordot(plain(x), plain(w), (-1, -1))
    return tensor(y if bias is None else y + _last(bias, y))


def _last(vector: Tensor, like: jax.Array) -> jax.Array:
    """A vector along the last axis of an array."""
    return plain(vector).reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def addmm(bias, a, b, *, beta=1, alpha=1):
    y = plain(a) @ plain(b)
    return tensor(beta * _last(bias, y) + alpha * y)


def matmul(a, b):
    a, b = plain(a), plain(b)
    return tensor(jnp.tensordot(a, b, 1) if b.ndim <= 2 else a @ b)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **_):
    if attn_mask is not None or is_causal:
        raise InputError("attention with a mask is not supported")
    q, k, v = plain(q), plain(k), plain(v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return tensor(jax.nn.softmax(scale * (q @ jnp.swapaxes(k, -1, -2)), axis=-1) @ v)


# Normalisation that knows no batch


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    y = plain(x)
    axes = tuple(range(y.ndim - len(normalized_shape), y.ndim))
    y = _standardised(y, axes, eps)
    y = y if weight is None else y * _last(weight, y)
    return tensor(y if bias is None else y + _last(bias, y))


def native_layer_norm(x, normalized_shape, weight, bias, eps):
    return [layer_norm(x, normalized_shape, weight, bias, eps)]


def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, *_):
    y = plain(x)
    grouped = y.reshape(y.shape[0], num_groups, -1)
    y = _standardised(grouped, (2,), eps).reshape(y.shape)
    shape = (1, -1) + (1,) * (y.ndim - 2)
    y = y if weight is None else y * plain(weight).reshape(shape)
    return tensor(y if bias is None else y + plain(bias).reshape(shape))


def _standardised(x, axes, eps):
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + eps)
