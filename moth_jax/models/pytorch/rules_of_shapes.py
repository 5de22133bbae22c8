"""What a PyTorch program does to the shapes of tensors; most of it moves nothing in memory.

Each function is the operator of its name, as PyTorch documents it.
"""

import jax.numpy as jnp
from jax import lax

from moth_jax.errors import InputError
from moth_jax.models.pytorch.tensors import (
    Tensor,
    ordered,
    permute,
    plain,
    tensor,
    view,
    without_axes,
)

_MOST_PARTS = 1 << 12


def as_dims(dim):
    return list(dim) if isinstance(dim, list | tuple) else [dim]


def cat(xs, dim=0):
    # Batch normalisation of a missing branch and the like leave empty vectors behind.
    xs = [x for x in xs if x.shape != (0,)]
    order = xs[0].order
    return Tensor(jnp.concatenate([ordered(x, order) for x in xs], order[dim]), order)


def stack(xs, dim=0):
    dim = dim % (xs[0].ndim + 1)
    return tensor(jnp.stack([plain(x) for x in xs], dim))


def split(x, size, dim=0):
    total = x.shape[dim]
    count = len(size) if isinstance(size, list | tuple) else -(-total // size)
    if not 0 < count <= _MOST_PARTS:
        raise InputError(f"an axis of {total} cannot be split into parts of {size}")
    sizes = size if isinstance(size, list | tuple) else [size] * -(-total // size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [sliced(x, dim, s, min(s + n, total)) for s, n in zip(starts, sizes, strict=True)]


def chunk(x, chunks, dim=0):
    return split(x, -(-x.shape[dim] // chunks), dim)


def sliced(x, dim=0, start=None, end=None, step=1):
    if step < 1:
        raise InputError(f"a slice cannot have the step {step}")
    start, stop, step = slice(start, end, step).indices(x.shape[dim])
    return Tensor(lax.slice_in_dim(x.array, start, stop, step, axis=x.axis(dim)), x.order)


def select(x, dim, index):
    if not -x.shape[dim] <= index < x.shape[dim]:
        raise InputError(f"there is no place {index} in an axis of {x.shape[dim]}")
    return without_axes(jnp.take(x.array, index, axis=x.axis(dim)), x, [dim])


def transpose(x, a, b):
    dims = list(range(x.ndim))
    dims[a], dims[b] = dims[b], dims[a]
    return permute(x, dims)


def flatten(x, start_dim=0, end_dim=-1):
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return view(x, (*x.shape[:start], -1, *x.shape[end + 1 :]))


def unsqueeze(x, dim):
    dim = dim % (x.ndim + 1)
    return view(x, (*x.shape[:dim], 1, *x.shape[dim:]))


def squeeze(x, dim=None):
    dims = {d % x.ndim for d in (range(x.ndim) if dim is None else as_dims(dim))}
    return view(x, [n for d, n in enumerate(x.shape) if not (d in dims and n == 1)])


def expand(x, size, **_):
    x = view(x, (1,) * (len(size) - x.ndim) + x.shape)
    shape = [n if s == -1 else s for s, n in zip(size, x.shape, strict=True)]
    return tensor(jnp.broadcast_to(plain(x), shape))


def pad(x, widths, mode="constant", value=0.0):
    if mode != "constant":
        raise InputError(f"padding with mode {mode!r} is not supported")
    edges = [(0, 0, 0)] * x.ndim
    for i in range(len(widths) // 2):  # from the last axis on
        axis, low, high = x.axis(-1 - i), widths[2 * i], widths[2 * i + 1]
        if low + high + x.array.shape[axis] < 0 or -min(low, high) > x.array.shape[axis]:
            raise InputError(f"padding {(low, high)} leaves nothing of {x.array.shape[axis]}")
        edges[axis] = (low, high, 0)
    return Tensor(lax.pad(x.array, jnp.asarray(value or 0, x.array.dtype), edges), x.order)


def constant_pad(x, widths, value=0.0):
    return pad(x, widths, value=value)


def same(x, *_, **__):
    return x


def full(size, value, **_):
    return tensor(jnp.full([int(n) for n in size], value, jnp.float32))
