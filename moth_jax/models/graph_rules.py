"""What each operator of a PyTorch program is in JAX: a table, one line an operator.

A rule takes the operator's arguments as PyTorch's schema orders and names them, tensors as
`tensors.Tensor`, everything in evaluation mode (dropout is the identity). Batch normalisation is
not here: what it does depends on the mode, so `graph` does it.
"""

import math
import operator
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moth_jax.errors import InputError
from moth_jax.models import pooling, windows
from moth_jax.models.convolution import conv2d
from moth_jax.models.tensors import (
    Tensor,
    from_images,
    images,
    ordered,
    permute,
    plain,
    pointwise,
    tensor,
    view,
    without_axes,
)


def _pair(value) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * 2 if len(values) == 1 else values


def _pads(value) -> windows.Pads:
    return tuple((p, p) for p in _pair(value))


# Convolution, pooling, dense layers


def _conv2d(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
    y = conv2d(
        images(x),
        plain(w).transpose(2, 3, 1, 0),
        _pair(stride),
        padding.upper() if isinstance(padding, str) else _pads(padding),
        dilation=_pair(dilation),
        groups=groups,
    )
    return from_images(y if bias is None else y + plain(bias).reshape(1, 1, 1, -1))


def _convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed or len(stride) != 2:
        raise InputError("only two-dimensional convolutions that are not transposed are supported")
    return _conv2d(x, w, bias, stride, padding, dilation, groups)


def _max_pool2d(x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    window, dilation = _pair(kernel_size), _pair(dilation)
    strides = _pair(stride) if stride else window
    span = windows.span(window, dilation)
    pads = _ceil_pads(images(x), span, strides, _pads(padding), ceil_mode)
    return from_images(pooling.max_pool(images(x), window, strides, pads, dilation))


def _avg_pool2d(
    x,
    kernel_size,
    stride=(),
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    window = _pair(kernel_size)
    strides = _pair(stride) if stride else window
    x, pads = images(x), _pads(padding)
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


def _adaptive_avg_pool2d(x, output_size):
    shape = images(x).shape[1:3]
    size = tuple(n if o is None else o for o, n in zip(_pair(output_size), shape, strict=True))
    return from_images(pooling.adaptive_avg_pool(images(x), size))


def _linear(x, w, bias=None):
    y = jnp.tensordot(plain(x), plain(w), (-1, -1))
    return tensor(y if bias is None else y + _last(bias, y))


def _last(vector: Tensor, like: jax.Array) -> jax.Array:
    """A vector along the last axis of an array."""
    return plain(vector).reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def _addmm(bias, a, b, *, beta=1, alpha=1):
    y = plain(a) @ plain(b)
    return tensor(beta * _last(bias, y) + alpha * y)


def _matmul(a, b):
    a, b = plain(a), plain(b)
    return tensor(jnp.tensordot(a, b, 1) if b.ndim <= 2 else a @ b)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **_):
    if attn_mask is not None or is_causal:
        raise InputError("attention with a mask is not supported")
    q, k, v = plain(q), plain(k), plain(v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return tensor(jax.nn.softmax(scale * (q @ jnp.swapaxes(k, -1, -2)), axis=-1) @ v)


# Normalisation that knows no batch


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    y = plain(x)
    axes = tuple(range(y.ndim - len(normalized_shape), y.ndim))
    y = _standardised(y, axes, eps)
    y = y if weight is None else y * _last(weight, y)
    return tensor(y if bias is None else y + _last(bias, y))


def _native_layer_norm(x, normalized_shape, weight, bias, eps):
    return [_layer_norm(x, normalized_shape, weight, bias, eps)]


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5, *_):
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


# Arithmetic


def _is_tensor(x) -> bool:
    return isinstance(x, Tensor)


def _binary(function: Callable) -> Callable:
    def rule(a, b, *, alpha=1):
        if alpha != 1:
            b = pointwise(lambda y: alpha * y, b) if _is_tensor(b) else alpha * b
        if not _is_tensor(a) and not _is_tensor(b):
            return function(a, b)
        return pointwise(function, a, b)

    return rule


def _unary(function: Callable) -> Callable:
    return lambda x, *_, **__: pointwise(function, x)


def _subtract_from(a, b, alpha=1):
    return _binary(operator.sub)(b, a, alpha=alpha)


def _divide(a, b, *, rounding_mode=None):
    if rounding_mode is not None:
        raise InputError(f"division with rounding_mode {rounding_mode!r} is not supported")
    return _binary(operator.truediv)(a, b)


def _clamp(x, min=None, max=None):  # PyTorch's names
    return pointwise(lambda y: jnp.clip(y, min, max), x)


def _hardtanh(x, min_val=-1.0, max_val=1.0):
    return pointwise(lambda y: _between(y, min_val, max_val), x)


def _between(x, low, high):
    """`clip` whose gradient at the bounds is 0, as PyTorch's relu6 and hardtanh have it."""
    return jnp.where((x > low) & (x < high), x, lax.stop_gradient(jnp.clip(x, low, high)))


def _gelu(x, *, approximate="none"):
    return pointwise(partial(jax.nn.gelu, approximate=approximate == "tanh"), x)


def _elu(x, alpha=1.0, scale=1.0, input_scale=1.0):
    return pointwise(lambda y: scale * jax.nn.elu(input_scale * y, alpha), x)


def _prelu(x, slope):
    slope = view(slope, (-1,) + (1,) * (x.ndim - 2))
    return pointwise(lambda y, k: jnp.where(y > 0, y, k * y), x, slope)


def _softmax(x, dim, *_, **__):
    return pointwise(partial(jax.nn.softmax, axis=x.axis(dim)), x)


def _log_softmax(x, dim, *_, **__):
    return pointwise(partial(jax.nn.log_softmax, axis=x.axis(dim)), x)


def _reduce(function: Callable) -> Callable:
    def rule(x, dim=None, keepdim=False, **_):
        dims = range(x.ndim) if dim in (None, [], ()) else _dims(dim)
        axes = tuple(x.axis(d) for d in dims)
        array = function(x.array, axis=axes, keepdims=keepdim)
        return Tensor(array, x.order) if keepdim else without_axes(array, x, list(dims))

    return rule


def _dims(dim):
    return list(dim) if isinstance(dim, list | tuple) else [dim]


# Shapes


def _cat(xs, dim=0):
    # Batch normalisation of a missing branch and the like leave empty vectors behind.
    xs = [x for x in xs if x.shape != (0,)]
    order = xs[0].order
    return Tensor(jnp.concatenate([ordered(x, order) for x in xs], order[dim]), order)


def _stack(xs, dim=0):
    dim = dim % (xs[0].ndim + 1)
    return tensor(jnp.stack([plain(x) for x in xs], dim))


def _split(x, size, dim=0):
    total = x.shape[dim]
    sizes = size if isinstance(size, list | tuple) else [size] * -(-total // size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_slice(x, dim, s, min(s + n, total)) for s, n in zip(starts, sizes, strict=True)]


def _chunk(x, chunks, dim=0):
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _slice(x, dim=0, start=None, end=None, step=1):
    start, stop, step = slice(start, end, step).indices(x.shape[dim])
    return Tensor(lax.slice_in_dim(x.array, start, stop, step, axis=x.axis(dim)), x.order)


def _select(x, dim, index):
    return without_axes(jnp.take(x.array, index, axis=x.axis(dim)), x, [dim])


def _transpose(x, a, b):
    dims = list(range(x.ndim))
    dims[a], dims[b] = dims[b], dims[a]
    return permute(x, dims)


def _flatten(x, start_dim=0, end_dim=-1):
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return view(x, (*x.shape[:start], -1, *x.shape[end + 1 :]))


def _unsqueeze(x, dim):
    dim = dim % (x.ndim + 1)
    return view(x, (*x.shape[:dim], 1, *x.shape[dim:]))


def _squeeze(x, dim=None):
    dims = {d % x.ndim for d in (range(x.ndim) if dim is None else _dims(dim))}
    return view(x, [n for d, n in enumerate(x.shape) if not (d in dims and n == 1)])


def _expand(x, size, **_):
    x = view(x, (1,) * (len(size) - x.ndim) + x.shape)
    shape = [n if s == -1 else s for s, n in zip(size, x.shape, strict=True)]
    return tensor(jnp.broadcast_to(plain(x), shape))


def _pad(x, pad, mode="constant", value=0.0):
    if mode != "constant":
        raise InputError(f"padding with mode {mode!r} is not supported")
    widths = [(0, 0)] * x.ndim
    for i in range(len(pad) // 2):  # from the last axis on
        widths[x.axis(-1 - i)] = (pad[2 * i], pad[2 * i + 1])
    config = [(low, high, 0) for low, high in widths]
    return Tensor(lax.pad(x.array, jnp.asarray(value or 0, x.array.dtype), config), x.order)


def _constant_pad(x, pad, value=0.0):
    return _pad(x, pad, value=value)


def _same(x, *_, **__):
    return x


def _full(size, value, **_):
    return tensor(jnp.full([int(n) for n in size], value, jnp.float32))


RULES: dict[str, Callable] = {
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.convolution.default": _convolution,
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.matmul.default": _matmul,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.max_pool2d.default": _max_pool2d,
    "aten.max_pool2d_with_indices.default": lambda *args: [_max_pool2d(*args)],
    "aten.avg_pool2d.default": _avg_pool2d,
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten._adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten.layer_norm.default": _layer_norm,
    "aten.native_layer_norm.default": _native_layer_norm,
    "aten.group_norm.default": _group_norm,
    "aten.relu.default": _unary(jax.nn.relu),
    "aten.relu_.default": _unary(jax.nn.relu),
    "aten.hardtanh.default": _hardtanh,
    "aten.hardtanh_.default": _hardtanh,
    "aten.relu6.default": lambda x: _hardtanh(x, 0.0, 6.0),
    "aten.leaky_relu.default": lambda x, slope=0.01: pointwise(
        partial(jax.nn.leaky_relu, negative_slope=slope), x
    ),
    "aten.prelu.default": _prelu,
    "aten.elu.default": _elu,
    "aten.gelu.default": _gelu,
    "aten.silu.default": _unary(jax.nn.silu),
    "aten.silu_.default": _unary(jax.nn.silu),
    "aten.mish.default": _unary(jax.nn.mish),
    "aten.sigmoid.default": _unary(jax.nn.sigmoid),
    "aten.tanh.default": _unary(jnp.tanh),
    "aten.hardsigmoid.default": _unary(lambda y: _between(y + 3, 0, 6) / 6),
    "aten.hardswish.default": _unary(jax.nn.hard_swish),
    "aten.hardswish_.default": _unary(jax.nn.hard_swish),
    "aten.softmax.int": _softmax,
    "aten._softmax.default": _softmax,
    "aten.log_softmax.int": _log_softmax,
    "aten._log_softmax.default": _log_softmax,
    "aten.add.Tensor": _binary(operator.add),
    "aten.add.Scalar": _binary(operator.add),
    "aten.add_.Tensor": _binary(operator.add),
    "aten.sub.Tensor": _binary(operator.sub),
    "aten.sub.Scalar": _binary(operator.sub),
    "aten.rsub.Scalar": _subtract_from,
    "aten.rsub.Tensor": _subtract_from,
    "aten.mul.Tensor": _binary(operator.mul),
    "aten.mul.Scalar": _binary(operator.mul),
    "aten.mul_.Tensor": _binary(operator.mul),
    "aten.div.Tensor": _divide,
    "aten.div.Scalar": _divide,
    "aten.div_.Tensor": _divide,
    "aten.pow.Tensor_Scalar": _binary(operator.pow),
    "aten.maximum.default": _binary(jnp.maximum),
    "aten.minimum.default": _binary(jnp.minimum),
    "aten.neg.default": _unary(operator.neg),
    "aten.abs.default": _unary(jnp.abs),
    "aten.exp.default": _unary(jnp.exp),
    "aten.log.default": _unary(jnp.log),
    "aten.sqrt.default": _unary(jnp.sqrt),
    "aten.rsqrt.default": _unary(lax.rsqrt),
    "aten.reciprocal.default": _unary(jnp.reciprocal),
    "aten.clamp.default": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.clamp_max.default": lambda x, high: _clamp(x, None, high),
    "aten.mean.dim": _reduce(jnp.mean),
    "aten.mean.default": _reduce(jnp.mean),
    "aten.sum.dim_IntList": _reduce(jnp.sum),
    "aten.sum.default": _reduce(jnp.sum),
    "aten.amax.default": _reduce(jnp.max),
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _chunk,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.permute.default": permute,
    "aten.transpose.int": _transpose,
    "aten.t.default": lambda x: _transpose(x, 0, 1),
    "aten.numpy_T.default": lambda x: permute(x, range(x.ndim)[::-1]),
    "aten.view.default": view,
    "aten._unsafe_view.default": view,
    "aten.reshape.default": view,
    "aten.flatten.using_ints": _flatten,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.default": _squeeze,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.expand.default": _expand,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _constant_pad,
    "aten.full.default": _full,
    "aten.zeros.default": lambda size, **_: _full(size, 0.0),
    "aten.ones.default": lambda size, **_: _full(size, 1.0),
    "aten.sym_size.int": lambda x, dim: x.shape[dim],
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "aten.detach.default": _same,
    "aten.detach_.default": _same,
    "aten.alias.default": _same,
    "aten.lift_fresh_copy.default": _same,
    "aten._to_copy.default": _same,
    "aten.to.dtype": _same,
    "aten.dropout.default": _same,
    "aten.dropout_.default": _same,
    "aten.feature_dropout.default": _same,
    "aten.native_dropout.default": lambda x, *_: [x],
    "operator.getitem": operator.getitem,
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.neg": operator.neg,
}
