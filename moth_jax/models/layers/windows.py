"""The sliding windows of images [n h w c], as strided views of whole arrays, and back.

Pooling and depthwise convolution are a handful of such views combined element by element, which
XLA fuses into one pass on every device; its own window operations are 5 to 30 times slower on the
CPU inside a compiled loop.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
Padding = str | int | Sequence[Sequence[int]]


def resolve_padding(
    padding: Padding, size: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> Pads:
    """Rows and columns to add on each side, as ((top, bottom), (left, right)).

    `padding` is "VALID", "SAME" (TensorFlow's: as little as covers the image, the odd one at the
    bottom and right, so asymmetric at stride 2), one number for all four sides, or the pairs.

    >>> resolve_padding("SAME", (32, 32), (3, 3), (2, 2))
    ((0, 1), (0, 1))
    """
    if isinstance(padding, str):
        pairs = lax.padtype_to_pads(size, window, strides, padding)
    elif isinstance(padding, int):
        pairs = ((padding, padding), (padding, padding))
    else:
        pairs = padding
    (top, bottom), (left, right) = pairs
    return (int(top), int(bottom)), (int(left), int(right))


def span(window: Sequence[int], dilation: Sequence[int]) -> Pair:
    """Rows and columns from the first to the last place of a window with gaps.

    >>> span((3, 3), (2, 1))
    (5, 3)
    """
    height, width = (d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True))
    return height, width


def pad(x: jax.Array, pads: Pads, value: float = 0) -> jax.Array:
    """Images with `value` around them."""
    if not any(map(any, pads)):
        return x
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=value)


def places(window: Pair, dilation: Pair = (1, 1)) -> list[Pair]:
    """The places (row, column) of a window, row by row.

    >>> places((1, 2), (1, 3))
    [(0, 0), (0, 3)]
    """
    rows, columns = (range(0, k * d, d) for k, d in zip(window, dilation, strict=True))
    return [(row, column) for row in rows for column in columns]


def views(
    x: jax.Array, window: Pair, strides: Pair, dilation: Pair = (1, 1)
) -> dict[Pair, jax.Array]:
    """For each place of the window, the values [n h' w' c] it shows in all windows of `x`.

    >>> views(jnp.arange(4.0).reshape(1, 1, 4, 1), (1, 2), (1, 2))[0, 1].ravel().tolist()
    [1.0, 3.0]
    """
    size = span(window, dilation)
    last = [(n - k) // s * s for n, k, s in zip(x.shape[1:3], size, strides, strict=True)]
    return {
        (row, column): x[
            :, row : row + last[0] + 1 : strides[0], column : column + last[1] + 1 : strides[1]
        ]
        for row, column in places(window, dilation)
    }


def from_views(parts: Mapping[Pair, jax.Array], size: Sequence[int], strides: Pair) -> jax.Array:
    """Images [n *size c] with every part [n h' w' c] added where `views` takes it from.

    The transpose of `views`. Each class of places modulo the stride is summed on its own, without
    the zeros in between, and the classes are interleaved at the end.

    >>> part = jnp.ones((1, 1, 2, 1))
    >>> from_views({(0, 0): part, (0, 1): 2 * part}, (1, 4), (1, 2)).ravel().tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    coarse = -(-size[0] // strides[0]), -(-size[1] // strides[1])
    rows = []
    for row in range(strides[0]):
        columns = [_phase(parts, (row, column), coarse, strides) for column in range(strides[1])]
        rows.append(_interleave(columns, 2))
    return _interleave(rows, 1)[:, : size[0], : size[1]]


def _phase(parts, phase: Pair, coarse: Pair, strides: Pair) -> jax.Array:
    """The sum of all parts whose place is `phase` modulo the strides, on the coarse grid."""
    some = next(iter(parts.values()))
    total = jnp.zeros((some.shape[0], *coarse, some.shape[3]), some.dtype)
    for place, part in parts.items():
        if any((p - q) % s for p, q, s in zip(place, phase, strides, strict=True)):
            continue
        shift = [(p - q) // s for p, q, s in zip(place, phase, strides, strict=True)]
        edges = [(d, n - d - m, 0) for d, n, m in zip(shift, coarse, part.shape[1:3], strict=True)]
        total += lax.pad(part, jnp.zeros((), part.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return total


def _interleave(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    if len(parts) == 1:
        return parts[0]
    stacked = jnp.stack(parts, axis + 1)
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return stacked.reshape(shape)
