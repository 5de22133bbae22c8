from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from moth_jax.models.layers import BatchNorm, Conv, conv2d, convolution, resolve_padding, windows


def lax_conv(x, w, strides, padding, dilation=(1, 1), groups=1):
    span = windows.span(w.shape[:2], dilation)
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        resolve_padding(padding, x.shape[1:3], span, strides),
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def example(size, kernel, out=4, channels=3, dtype=np.float64, lead=(2,), groups=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*lead, *size, channels)).astype(dtype)
    w = rng.normal(size=(*kernel, channels // groups, out)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(w)


@partial(jax.jit, static_argnums=(0, 4, 5))
def values_and_gradients(conv, x, w, g, strides, padding):
    y, pull = jax.vjp(lambda x, w: conv(x, w, strides, padding), x, w)
    return y, *pull(g)


def assert_same_conv_and_gradients(x, w, strides, padding, **options):
    conv, xla = partial(conv2d, **options), partial(lax_conv, **options)
    shape = jax.eval_shape(lambda x, w: xla(x, w, strides, padding), x, w).shape
    g = np.random.default_rng(1).normal(size=shape)
    ours = values_and_gradients(conv, x, w, g, strides, padding)
    want = values_and_gradients(xla, x, w, g, strides, padding)
    for got, expected in zip(ours, want, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, atol=1e-11)


CASES = [
    # size, kernel, strides, padding: one row per way in which the arithmetic can go wrong
    ((8, 8), (3, 3), (1, 1), "SAME"),
    ((8, 8), (3, 3), (2, 2), "SAME"),  # asymmetric: (0, 1)
    ((9, 7), (3, 3), (2, 2), "SAME"),
    ((8, 8), (3, 3), (2, 2), 1),  # the last padded column is never read
    ((9, 7), (3, 3), (2, 2), "VALID"),
    ((9, 8), (3, 3), (3, 2), 0),  # rows left over
    ((8, 8), (1, 1), (1, 1), 0),
    ((8, 7), (1, 1), (2, 2), "SAME"),  # the last row is never read
    ((8, 8), (1, 1), (1, 1), 1),  # more padding than kernel: negative edges in the gradient
    ((6, 5), (2, 4), (1, 2), ((0, 2), (1, 0))),
    ((5, 6), (5, 5), (2, 1), 2),
    ((3, 3), (3, 3), (1, 1), "VALID"),  # a single output
    ((2, 2), (3, 3), (1, 1), 1),  # a window larger than the image
    ((2, 3), (5, 5), (2, 2), 2),
]


GROUPED = [
    # channels, out, groups, kernel, strides, padding, dilation
    (4, 4, 4, 3, (1, 1), 1, (1, 1)),  # depthwise
    (4, 8, 4, 3, (1, 1), 1, (1, 1)),  # two outputs a channel
    (4, 4, 4, 3, (2, 2), 1, (1, 1)),
    (4, 8, 4, 5, (2, 3), "SAME", (1, 1)),
    (4, 4, 4, 3, (2, 2), 2, (2, 2)),
    (4, 4, 4, 3, (1, 1), 2, (2, 2)),
    (4, 6, 2, 3, (1, 1), 1, (1, 1)),  # two groups
    (4, 6, 2, 3, (2, 2), 1, (1, 1)),
    (4, 6, 1, 3, (1, 1), 2, (2, 2)),  # gaps in the kernel
    (4, 6, 1, 3, (2, 2), "SAME", (2, 1)),
    (1, 4, 1, 3, (1, 1), 1, (1, 1)),  # one channel is no depthwise convolution
]


@pytest.mark.parametrize(
    ("channels", "out", "groups", "kernel", "strides", "padding", "dilation"), GROUPED
)
def test_grouped_and_dilated_convolutions_and_their_gradients_equal_those_of_xla(
    channels, out, groups, kernel, strides, padding, dilation
):
    with jax.enable_x64(True):
        x, w = example((9, 10), (kernel, kernel), out, channels, groups=groups)
        assert_same_conv_and_gradients(x, w, strides, padding, dilation=dilation, groups=groups)


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES)
@pytest.mark.parametrize("out", [4, 48])  # of which the CPU packs up to 8 columns, and none
def test_conv2d_and_its_gradients_equal_those_of_xla(size, kernel, strides, padding, out):
    with jax.enable_x64(True):
        x, w = example(size, kernel, out)
        assert_same_conv_and_gradients(x, w, strides, padding)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_conv2d_under_vmap_equals_a_loop(strides):
    with jax.enable_x64(True):
        x, w = example((8, 8), (3, 3), 16, lead=(4, 2))

        @jax.jit
        def gradients(x, w):
            return jax.grad(lambda x, w: jnp.sin(conv2d(x, w, strides)).sum(), (0, 1))(x, w)

        batched = jax.vmap(gradients, (0, None))(x, w)
        looped = [gradients(image, w) for image in x]
        for got, want in zip(batched, zip(*looped, strict=True), strict=True):
            np.testing.assert_allclose(got, np.stack(want), atol=1e-11)
        many_kernels = jax.vmap(gradients)(x, jnp.stack([w, 2 * w, -w, w]))
        looped = [gradients(image, k * w) for image, k in zip(x, (1, 2, -1, 1), strict=True)]
        for got, want in zip(many_kernels, zip(*looped, strict=True), strict=True):
            np.testing.assert_allclose(got, np.stack(want), atol=1e-11)


def lowered_convolutions(conv, platform):
    """How each convolution of a loop over `conv` and its gradients is written for a platform."""
    x, w = example((8, 8), (3, 3), 3, dtype=np.float32)

    def descend(_, xw):
        gradients = jax.grad(lambda xw: jnp.square(conv(*xw, (2, 2), "SAME")).sum())(xw)
        return jax.tree.map(lambda a, g: a - 0.01 * g, xw, gradients)

    loop = jax.jit(lambda xw: lax.fori_loop(0, 3, descend, xw))
    text = loop.trace((x, w)).lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    return sorted(line.split(") ", 1)[1] for line in lines)


def test_convolutions_inside_a_loop_are_written_as_the_fast_kernel_of_the_cpu_wants_them():
    ours = lowered_convolutions(conv2d, "cpu")
    assert len(ours) == 3
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in ours)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_on_an_accelerator_convolutions_are_left_as_jax_derives_them(platform):
    ours = lowered_convolutions(conv2d, platform)
    assert ours == lowered_convolutions(lax_conv, platform)
    assert ours != lowered_convolutions(conv2d, "cpu")


def test_on_a_gpu_gradients_of_narrow_images_are_several_columns_at_once():
    def widths(channels, kernel, platform):  # of what the convolutions of an input gradient give
        x, w = example((8, 8), kernel, 48, channels, np.float32)
        gradient = jax.jit(jax.grad(lambda x: jnp.square(conv2d(x, w)).sum()))
        text = gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        return [int(line.split("x")[-2]) for line in lines]

    assert widths(3, (3, 3), "cuda") == [48, 3 * 4]  # as many columns as an image of 8 has room for
    assert widths(16, (3, 3), "cuda") == [48, 32]
    assert widths(32, (3, 3), "cuda") == [48, 32]
    assert widths(16, (1, 1), "cuda") == [48, 16]
    assert widths(16, (3, 3), "tpu") == [48, 16]


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES)
def test_the_input_gradient_of_a_gpu_equals_that_of_xla(size, kernel, strides, padding):
    with jax.enable_x64(True):
        x, w = example(size, kernel)
        pads = resolve_padding(padding, size, kernel, strides)
        geometry = convolution.Geometry(strides, pads, (1, 1), 1)
        g = jax.eval_shape(lambda: lax_conv(x, w, strides, padding))
        g = jnp.asarray(np.random.default_rng(1).normal(size=g.shape))
        ours = convolution._cuda_input_gradient(x, w, g, geometry=geometry)
        want = convolution._xla_input_gradient(x, w, g, geometry=geometry)
        np.testing.assert_allclose(ours, want, atol=1e-11)


def test_an_unused_weight_gradient_is_not_computed():
    x, w = example((8, 8), (3, 3), dtype=jnp.float32)

    def convolutions(argnums):
        gradient = jax.jit(jax.grad(lambda x, w: jnp.square(conv2d(x, w)).sum(), argnums))
        text = gradient.lower(x, w).compile().as_text()
        return sum(" convolution(" in line for line in text.splitlines())

    assert convolutions(0) == convolutions((0, 1)) - 1


def test_same_padding_is_tensorflows():
    assert resolve_padding("SAME", (32, 31), (3, 3), (2, 2)) == ((0, 1), (1, 1))
    assert resolve_padding("VALID", (32, 32), (3, 3), (1, 1)) == ((0, 0), (0, 0))
    assert resolve_padding(1, (32, 32), (3, 3), (1, 1)) == ((1, 1), (1, 1))


def test_a_convolution_adds_its_bias():
    conv = Conv(3, 4, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(4.0)
    assert np.array_equal(conv(jnp.zeros((1, 5, 5, 3)))[0, 2, 2], np.arange(4))
    assert Conv(3, 4, use_bias=False, rngs=nnx.Rngs(0)).bias is None


def test_batch_norm_gives_mean_zero_and_variance_one_in_training():
    norm = BatchNorm(3)
    x = 100 + 5 * jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    y = norm(x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)


def test_batch_norm_in_inference_uses_the_running_statistics_and_keeps_them():
    norm = BatchNorm(2)
    norm.mean[...], norm.var[...] = jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0])
    norm.use_running_average = True
    x = jax.random.normal(jax.random.key(0), (5, 2))
    want = (x - jnp.array([[1.0, 2.0]])) / jnp.sqrt(jnp.array([[4.0, 9.0]]) + 1e-5)
    np.testing.assert_allclose(norm(x), want, atol=1e-6)
    assert np.array_equal(norm.mean[...], [1, 2])


@pytest.mark.parametrize("shape", [(16, 4, 4, 3), (7, 3)])
def test_batch_norm_statistics_and_gradients_equal_pytorchs(shape):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(2, 3, shape)
    axes = (0, len(shape) - 1, *range(1, len(shape) - 1))  # channels second
    theirs = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(3).double()
    their_x = torch.tensor(x.transpose(axes), requires_grad=True)
    their_y = theirs(their_x)
    their_y.pow(3).sum().backward()
    with jax.enable_x64(True):
        norm = BatchNorm(3)
        graph, state = nnx.split(norm)
        state = jax.tree.map(lambda a: a.astype(jnp.float64), nnx.as_pure(state))

        def run(x):
            model = nnx.merge(graph, state)
            y = model(x)
            return (y**3).sum(), (y, model.mean[...], model.var[...])

        gradient, (y, mean, var) = jax.grad(run, has_aux=True)(jnp.asarray(x))
    np.testing.assert_allclose(y.transpose(axes), their_y.detach(), atol=1e-10)
    np.testing.assert_allclose(gradient.transpose(axes), their_x.grad, atol=1e-8)
    np.testing.assert_allclose(mean, theirs.running_mean, atol=1e-10)
    np.testing.assert_allclose(var, theirs.running_var, atol=1e-10)  # both the unbiased one
