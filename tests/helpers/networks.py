"""Small random networks of every known layer, and brute force over small triggers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moth_jax.models.layers import conv2d
from moth_jax.models.layers.pooling import avg_pool, max_pool

SHAPE = (4, 4, 1)
CLASSES = 3


def _channels(values, x):
    return jnp.asarray(values, jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def _dense(rng, x, width):
    weights = rng.normal(size=(x.shape[-1], width)) * np.sqrt(2 / x.shape[-1])
    return x @ jnp.asarray(weights, jnp.float32) + _channels(rng.normal(size=width) / 4, x)


def _conv(rng, x, width, strides=(1, 1), padding=1, groups=1):
    kernel = rng.normal(size=(3, 3, x.shape[-1] // groups, width)) * np.sqrt(2 / 9 / x.shape[-1])
    kernel = jnp.asarray(kernel, jnp.float32)
    bias = _channels(rng.normal(size=width) / 4, x)
    return conv2d(x, kernel, strides, padding, groups=groups) + bias


def _norm(rng, x):
    mean, bias = rng.normal(size=(2, x.shape[-1])) / 4
    variance, scale = rng.uniform(0.5, 2, (2, x.shape[-1]))
    mean, variance, scale, bias = (_channels(each, x) for each in (mean, variance, scale, bias))
    return (x - mean) * (scale * jax.lax.rsqrt(variance + 1e-5)) + bias


def _flat(x):
    return x.reshape(len(x), -1)


def _mlp(rng, x):
    return _dense(rng, nnx.relu(_dense(rng, nnx.relu(_dense(rng, _flat(x), 6)), 5)), CLASSES)


def _linear(rng, x):
    return _dense(rng, _flat((x - 0.3) / 0.4), CLASSES)


def _leaky(rng, x):
    x = nnx.leaky_relu(_dense(rng, _flat(x), 8), 0.2)
    return _dense(rng, jnp.where(x > 0, x, -0.3 * x), CLASSES)


def _clipped(rng, x):
    x = jnp.clip(_dense(rng, _flat(x), 8), -0.5, 0.7)
    return _dense(rng, jnp.abs(jnp.minimum(x, 0.3)) + nnx.relu6(x), CLASSES)


def _convolutions(rng, x):
    x = nnx.relu(_norm(rng, _conv(rng, x, 3)))
    x = nnx.relu(_norm(rng, _conv(rng, x, 4, (2, 2))))
    return _dense(rng, x.mean((1, 2)), CLASSES)


def _residual(rng, x):
    x = _conv(rng, x, 4)
    y = _conv(rng, nnx.relu(_norm(rng, x)), 4, groups=2)
    x = nnx.relu(x + y)
    shortcut = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1)))
    x = nnx.relu(shortcut + _conv(rng, x, 6, (2, 2)))
    return _dense(rng, _flat(avg_pool(x, (2, 2))), CLASSES)


def _pooled(rng, x):
    x = max_pool(nnx.relu(_conv(rng, x, 3)), (3, 3), (2, 2), 1)
    return _dense(rng, _flat(x), CLASSES)


def _pooled_by_jax(rng, x):
    x = nnx.max_pool(_conv(rng, x, 2), (2, 2), strides=(2, 2), padding="SAME")
    x = jnp.concatenate([nnx.avg_pool(x, (2, 2)), x.max((1, 2), keepdims=True)], -1)
    return _dense(rng, _flat(x), CLASSES)


NETWORKS = {
    "mlp": _mlp,
    "linear": _linear,
    "leaky": _leaky,
    "clipped": _clipped,
    "convolutions": _convolutions,
    "residual": _residual,
    "pooled": _pooled,
    "pooled_by_jax": _pooled_by_jax,
}


def network(kind, seed=0):
    """Return a logits function with random weights, always the same for a seed."""
    return lambda images: 2 * NETWORKS[kind](np.random.default_rng(seed), images)


def random_images(count, seed=0, shape=SHAPE):
    images = np.random.default_rng(seed + 1000).uniform(size=(count, *shape))
    return (np.round(images * 4) / 4).astype(np.float32)  # some at 0 and 1


def small_triggers(count, size, seed=0, shape=SHAPE):
    """Return masks [count, h, w, 1] with sums up to `size`, and patterns, most of them extreme."""
    rng = np.random.default_rng(seed + 2000)
    height, width, _ = shape
    order = np.argsort(rng.uniform(size=(count, height * width)), 1).argsort(1)
    budget = np.where(rng.uniform(size=(count, 1)) < 0.7, size, rng.uniform(0, size, (count, 1)))
    masks = np.clip(budget - order, 0, 1)
    spread = rng.uniform(size=masks.shape)
    spread = spread / spread.sum(1, keepdims=True) * np.minimum(budget, height * width / 4)
    masks = np.where(rng.uniform(size=(count, 1)) < 0.8, masks, np.minimum(spread, 1))
    patterns = rng.uniform(size=(count, *shape))
    extreme = rng.uniform(size=(count, 1, 1, 1)) < 0.8
    patterns = np.where(extreme, np.round(patterns), patterns)
    return masks.reshape(count, height, width, 1), patterns
