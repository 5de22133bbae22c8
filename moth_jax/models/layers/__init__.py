"""Convolution and batch normalisation as layers, NHWC throughout."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moth_jax.models.layers.convolution import conv2d
from moth_jax.models.layers.windows import Padding, Pads, resolve_padding

__all__ = ["BatchNorm", "Conv", "Padding", "Pads", "conv2d", "resolve_padding"]


class Conv(nnx.Module):
    """A convolution layer: `kernel` [kh kw i o] and, if `use_bias`, `bias` [o]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: Padding = "SAME",
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None
        self.strides = (stride, stride)
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [n h w i] to features [n h' w' o]."""
        x = conv2d(x, self.kernel[...], self.strides, self.padding)
        return x if self.bias is None else x + self.bias[...].reshape(1, 1, 1, -1)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last; one multiply-add in inference mode.

    Running statistics move by 1 - `momentum` at each training batch. The running variance takes up
    the unbiased one, as in PyTorch and in TensorFlow's fused kernel (where imported weights come
    from) but not in `nnx.BatchNorm`; the batch is normalised by the biased one, as everywhere.
    """

    def __init__(self, num_features: int, *, momentum: float = 0.9, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [... c] by the running statistics, or by its own (which updates them)."""
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = self._update(x)
        scale = self.scale[...] * lax.rsqrt(var + self.epsilon)
        offset = self.bias[...] - mean * scale
        shape = (1,) * (x.ndim - 1) + (-1,)
        return x * scale.reshape(shape) + offset.reshape(shape)

    def _update(self, x):
        axes = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        mean = jnp.mean(x, axes)
        # Around the mean: E[x^2] - E[x]^2 cancels in float32 where the mean is large.
        var = jnp.mean(jnp.square(x - mean.reshape((1,) * len(axes) + (-1,))), axes)
        unbiased = var * (count / max(count - 1, 1))
        keep = self.momentum
        self.mean[...] = keep * self.mean[...] + (1 - keep) * lax.stop_gradient(mean)
        self.var[...] = keep * self.var[...] + (1 - keep) * lax.stop_gradient(unbiased)
        return mean, var
