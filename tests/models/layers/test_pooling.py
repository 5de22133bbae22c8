import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.models.layers import pooling

torch = pytest.importorskip("torch")

# (window, strides, padding, dilation)
WINDOWS = [
    ((2, 2), None, 0, 1),
    ((3, 3), (2, 2), 1, 1),
    ((3, 3), (1, 1), 1, 1),
    ((3, 2), (2, 3), 1, 1),
    ((2, 2), (1, 2), 1, 2),
]


# Few values, so that many are equal within a window.
IMAGES = np.random.default_rng(0).integers(0, 4, (2, 9, 10, 3)).astype(np.float32)


def assert_equal_with_gradients(ours, theirs):
    """Values and, for a random cotangent, gradients by the images."""
    x = torch.tensor(IMAGES.transpose(0, 3, 1, 2), requires_grad=True)
    expected = theirs(x)
    y, pullback = jax.vjp(ours, jnp.asarray(IMAGES))
    np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 3, 1), atol=1e-6)
    cotangent = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    expected.backward(torch.tensor(cotangent))
    gradient = pullback(jnp.asarray(cotangent.transpose(0, 2, 3, 1)))[0]
    np.testing.assert_allclose(gradient, x.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(("window", "strides", "padding", "dilation"), WINDOWS)
def test_the_maximum_and_its_gradient_are_pytorchs_also_where_values_are_equal(
    window, strides, padding, dilation
):
    assert_equal_with_gradients(
        lambda x: pooling.max_pool(x, window, strides, padding, (dilation, dilation)),
        lambda x: torch.nn.functional.max_pool2d(x, window, strides, padding, dilation),
    )


@pytest.mark.parametrize("count_padding", [True, False])
@pytest.mark.parametrize(("window", "strides", "padding", "dilation"), WINDOWS[:4])
def test_the_mean_and_its_gradient_are_pytorchs(window, strides, padding, dilation, count_padding):
    assert_equal_with_gradients(
        lambda x: pooling.avg_pool(x, window, strides, padding, count_padding=count_padding),
        lambda x: torch.nn.functional.avg_pool2d(
            x, window, strides, padding, count_include_pad=count_padding
        ),
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 4), (9, 10), (12, 5)])
def test_adaptive_means_are_pytorchs(size):
    assert_equal_with_gradients(
        lambda x: pooling.adaptive_avg_pool(x, size),
        lambda x: torch.nn.functional.adaptive_avg_pool2d(x, size),
    )
