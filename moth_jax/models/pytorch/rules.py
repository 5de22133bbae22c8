"""What each operator of a PyTorch program is in JAX: a table, one line an operator.

A rule takes the operator's arguments as PyTorch's schema orders and names them, tensors as
`tensors.Tensor`, everything in evaluation mode (dropout is the identity). Batch normalisation is
not here: what it does depends on the mode, so `interpreter` does it.
"""

import operator
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moth_jax.errors import InputError
from moth_jax.models.pytorch import rules_of_layers as layers
from moth_jax.models.pytorch import rules_of_shapes as shapes
from moth_jax.models.pytorch.tensors import Tensor, permute, pointwise, view, without_axes

_LARGEST_SIZE = 2**53


def _is_tensor(x) -> bool:
    return isinstance(x, Tensor)


def _binary(function: Callable) -> Callable:
    def rule(a, b, *, alpha=1):
        if alpha != 1:
            b = pointwise(lambda y: alpha * y, b) if _is_tensor(b) else alpha * b
        return pointwise(function, a, b)

    return rule


def _of_sizes(function: Callable) -> Callable:
    """An operator of Python on sizes, which may be symbolic (as in `jax.export`)."""

    def rule(*sizes):
        if any(isinstance(n, str | list | tuple | Tensor | None) for n in sizes):
            raise InputError(f"sizes are expected, got {sizes}")
        result = function(*sizes)
        if isinstance(result, int) and abs(result) > _LARGEST_SIZE:
            raise InputError(f"no tensor has the size {result}")
        return result

    return rule


def _item(values, index):
    if not (isinstance(values, list) and isinstance(index, int)):
        raise InputError(f"one of several results is expected, got {index!r} of a {type(values)}")
    return values[index]


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
        dims = range(x.ndim) if dim in (None, [], ()) else shapes.as_dims(dim)
        axes = tuple(x.axis(d) for d in dims)
        array = function(x.array, axis=axes, keepdims=keepdim)
        return Tensor(array, x.order) if keepdim else without_axes(array, x, list(dims))

    return rule


RULES: dict[str, Callable] = {
    "aten.conv2d.default": layers.conv2d,
    "aten.conv2d.padding": layers.conv2d,
    "aten.convolution.default": layers.any_convolution,
    "aten.linear.default": layers.linear,
    "aten.addmm.default": layers.addmm,
    "aten.mm.default": layers.matmul,
    "aten.bmm.default": layers.matmul,
    "aten.matmul.default": layers.matmul,
    "aten.scaled_dot_product_attention.default": layers.attention,
    "aten.max_pool2d.default": layers.max_pool2d,
    "aten.max_pool2d_with_indices.default": lambda *args: [layers.max_pool2d(*args)],
    "aten.avg_pool2d.default": layers.avg_pool2d,
    "aten.adaptive_avg_pool2d.default": layers.adaptive_avg_pool2d,
    "aten._adaptive_avg_pool2d.default": layers.adaptive_avg_pool2d,
    "aten.layer_norm.default": layers.layer_norm,
    "aten.native_layer_norm.default": layers.native_layer_norm,
    "aten.group_norm.default": layers.group_norm,
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
    "aten.cat.default": shapes.cat,
    "aten.stack.default": shapes.stack,
    "aten.split.Tensor": shapes.split,
    "aten.split_with_sizes.default": shapes.split,
    "aten.chunk.default": shapes.chunk,
    "aten.slice.Tensor": shapes.sliced,
    "aten.select.int": shapes.select,
    "aten.permute.default": permute,
    "aten.transpose.int": shapes.transpose,
    "aten.t.default": lambda x: shapes.transpose(x, 0, 1),
    "aten.numpy_T.default": lambda x: permute(x, range(x.ndim)[::-1]),
    "aten.view.default": view,
    "aten._unsafe_view.default": view,
    "aten.reshape.default": view,
    "aten.flatten.using_ints": shapes.flatten,
    "aten.unsqueeze.default": shapes.unsqueeze,
    "aten.squeeze.default": shapes.squeeze,
    "aten.squeeze.dim": shapes.squeeze,
    "aten.squeeze.dims": shapes.squeeze,
    "aten.expand.default": shapes.expand,
    "aten.pad.default": shapes.pad,
    "aten.constant_pad_nd.default": shapes.constant_pad,
    "aten.full.default": shapes.full,
    "aten.zeros.default": lambda size, **_: shapes.full(size, 0.0),
    "aten.ones.default": lambda size, **_: shapes.full(size, 1.0),
    "aten.sym_size.int": lambda x, dim: x.shape[dim],
    "aten.clone.default": shapes.same,
    "aten.contiguous.default": shapes.same,
    "aten.detach.default": shapes.same,
    "aten.detach_.default": shapes.same,
    "aten.alias.default": shapes.same,
    "aten.lift_fresh_copy.default": shapes.same,
    "aten._to_copy.default": shapes.same,
    "aten.to.dtype": shapes.same,
    "aten.dropout.default": shapes.same,
    "aten.dropout_.default": shapes.same,
    "aten.feature_dropout.default": shapes.same,
    "aten.native_dropout.default": lambda x, *_: [x],
    "operator.getitem": _item,
    "operator.add": _of_sizes(operator.add),
    "operator.sub": _of_sizes(operator.sub),
    "operator.mul": _of_sizes(operator.mul),
    "operator.floordiv": _of_sizes(operator.floordiv),
    "operator.neg": _of_sizes(operator.neg),
}
