import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.models.pytorch.tensors import (
    Tensor,
    from_images,
    images,
    permute,
    plain,
    pointwise,
    tensor,
    view,
)

orders = st.integers(1, 5).flatmap(lambda n: st.permutations(range(n)))


@st.composite
def tensors(draw):
    """A tensor whose axes lie in memory in any order."""
    order = tuple(draw(orders))
    sizes = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4]) for _ in order]))
    values = np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)
    return Tensor(jnp.asarray(values), order)


@given(tensors(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_view_shows_what_numpy_shows_of_the_array_in_the_programs_order(x, data):
    factors = [f for n in x.shape for f in ([n] if n != 4 else data.draw(st.sampled_from(FOURS)))]
    shape = [1]
    for factor in factors:
        if data.draw(st.booleans()):
            shape[-1] *= factor
        else:
            shape.append(factor)
    np.testing.assert_array_equal(plain(view(x, shape)), np.asarray(plain(x)).reshape(shape))


FOURS = ([4], [2, 2], [1, 4])


@given(tensors(), st.data())
@settings(max_examples=30, deadline=None)
def test_permuting_moves_nothing_in_memory(x, data):
    dims = data.draw(st.permutations(range(x.ndim)))
    moved = permute(x, dims)
    assert moved.array is x.array
    np.testing.assert_array_equal(plain(moved), np.asarray(plain(x)).transpose(dims))


def test_images_come_back_as_they_went_in():
    x = jnp.arange(120.0).reshape(2, 4, 5, 3)
    assert images(from_images(x)) is x
    np.testing.assert_array_equal(plain(from_images(x)), np.asarray(x).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (1, 3, 1, 1), (2, 3, 1, 1), (1, 1, 4, 5), (), (5,)], ids=str
)
def test_numbers_and_smaller_tensors_are_broadcast_as_the_program_counts_them(shape):
    x = jnp.arange(120.0).reshape(2, 4, 5, 3)
    other = np.arange(np.prod(shape)).reshape(shape)
    expected = np.asarray(x).transpose(0, 3, 1, 2) + other
    for sides in ((from_images(x), tensor(other)), (tensor(other), from_images(x))):
        np.testing.assert_array_equal(plain(pointwise(jnp.add, *sides)), expected)


def test_a_channel_shuffle_stays_channels_last():
    x = from_images(jnp.arange(48.0).reshape(1, 2, 2, 12))
    shuffled = view(permute(view(x, (1, 3, 4, 2, 2)), (0, 2, 1, 3, 4)), (1, 12, 2, 2))
    expected = np.asarray(plain(x)).reshape(1, 3, 4, 2, 2).swapaxes(1, 2).reshape(1, 12, 2, 2)
    np.testing.assert_array_equal(plain(shuffled), expected)
    assert shuffled.order == x.order
