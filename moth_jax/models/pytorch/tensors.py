"""Tensors that are counted as NCHW and kept as NHWC.

PyTorch programs number the axes of images as [n c h w]; convolutions here want the channels last.
A `Tensor` keeps its axes in memory in one order and counts them in another, so transposing moves no
data, and a channel split or merged by a program (as ShuffleNet does) stays where it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS_LAST = (0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Tensor:
    """`array` [axes in memory]; `order[i]` is the axis in memory of the program's axis i."""

    array: jax.Array
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes in the program's order."""
        return tuple(self.array.shape[axis] for axis in self.order)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.order)

    def axis(self, dim: int) -> int:
        """The axis in memory of the program's axis `dim`, which may count from the end."""
        return self.order[dim]


def tensor(array) -> Tensor:
    """An array whose axes lie as the program counts them."""
    array = jnp.asarray(array)
    return Tensor(array, tuple(range(array.ndim)))


def from_images(images: jax.Array) -> Tensor:
    """Images [n h w c] as the program's [n c h w].

    >>> from_images(jnp.zeros((2, 4, 5, 3))).shape
    (2, 3, 4, 5)
    """
    return Tensor(images, CHANNELS_LAST)


def images(x: Tensor) -> jax.Array:
    """The program's [n c h w] as images [n h w c]."""
    return ordered(x, CHANNELS_LAST)


def plain(x: Tensor) -> jax.Array:
    """The array in the program's order."""
    return ordered(x, tuple(range(x.ndim)))


def ordered(x: Tensor, order: tuple[int, ...]) -> jax.Array:
    """The array with the program's axis i at place `order[i]` in memory."""
    if x.order == order:
        return x.array
    return x.array.transpose([x.order[dim] for dim in np.argsort(order)])


def permute(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The program's axes in another order; nothing moves in memory."""
    return Tensor(x.array, tuple(x.order[dim] for dim in dims))


def pointwise(function: Callable, *operands) -> Tensor:
    """`function` of tensors (or numbers), broadcast as the program counts the axes.

    >>> image, bias = from_images(jnp.zeros((1, 2, 2, 3))), tensor(jnp.ones((3, 1, 1)))
    >>> pointwise(jnp.add, image, bias).shape
    (1, 3, 2, 2)
    """
    tensors = [x for x in operands if isinstance(x, Tensor)]
    largest = max(tensors, key=lambda x: (x.ndim, x.array.size))
    arrays = [
        ordered(_with_axes(x, largest.ndim), largest.order) if isinstance(x, Tensor) else x
        for x in operands
    ]
    return Tensor(function(*arrays), largest.order)


def _with_axes(x: Tensor, ndim: int) -> Tensor:
    """Ones before the program's first axis; in memory they come first, too."""
    extra = ndim - x.ndim
    if not extra:
        return x
    array = x.array.reshape((1,) * extra + x.array.shape)
    return Tensor(array, (*range(extra), *(axis + extra for axis in x.order)))


def without_axes(array: jax.Array, x: Tensor, dims: Sequence[int]) -> Tensor:
    """`array` is what is left of `x` when its axes `dims` are gone."""
    gone = sorted(x.axis(dim) for dim in dims)
    kept = [axis for axis in x.order if axis not in gone]
    return Tensor(array, tuple(axis - sum(g < axis for g in gone) for axis in kept))


def view(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` with another shape as the program counts it; moves only the axes that are merged.

    >>> image = from_images(jnp.arange(24).reshape(1, 2, 2, 6))
    >>> halves = view(image, (1, 2, 3, 2, 2))
    >>> halves.shape, halves.array.shape                 # the channels are split where they lie
    ((1, 2, 3, 2, 2), (1, 2, 2, 2, 3))
    >>> view(halves, (1, -1)).array.tolist() == [plain(image).reshape(-1).tolist()]
    True
    """
    shape = _resolved(shape, x.shape)
    groups = _groups(x.shape, shape)
    # In memory a group lies where its first axis lies, its members in the program's order.
    groups = sorted(groups, key=lambda group: min((x.order[dim] for dim in group[0]), default=0))
    array = x.array.transpose([x.order[dim] for olds, _ in groups for dim in olds])
    news = [dim for _, dims in groups for dim in dims]
    array = array.reshape([shape[dim] for dim in news])
    return Tensor(array, tuple(int(axis) for axis in np.argsort(news)))


def _resolved(shape, old):
    """`shape` with -1 replaced; a size that both begin with may be symbolic, as in `jax.export`."""
    shape = tuple(shape)
    if -1 not in shape:
        return shape
    if shape[0] != -1 and old and shape[0] == old[0]:
        return shape[0], *_resolved(shape[1:], old[1:])
    known = prod(n for n in shape if n != -1)
    return tuple(prod(old) // known if n == -1 else n for n in shape)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes of `old` and of `new` that hold the same numbers of elements.

    >>> _groups((2, 6, 4, 4), (2, 3, 2, 16))
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    groups, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        olds, news = [i], [j]
        size_old, size_new = old[i], new[j]
        while size_old != size_new:
            if size_old < size_new:
                olds.append(olds[-1] + 1)
                size_old *= old[olds[-1]]
            else:
                news.append(news[-1] + 1)
                size_new *= new[news[-1]]
        groups.append((olds, news))
        i, j = olds[-1] + 1, news[-1] + 1
    if not groups:
        groups.append(([], []))
    # What is left has size 1.
    groups[-1][0].extend(range(i, len(old)))
    groups[-1][1].extend(range(j, len(new)))
    return groups
