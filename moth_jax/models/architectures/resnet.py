"""ResNets for 32x32 images, in the two forms of the published checkpoints.

`CifarResNet` is the original one (He et al. 2015, section 4.2): normalise and activate after each
convolution, no parameters in the shortcuts; akamaster/pytorch_resnet_cifar10 has these weights.
`PreactResNet` is the one the MOTH authors trained in Keras: normalise and activate before each
convolution, biases in all of them, a 1x1 projection where the width grows.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moth_jax.models.layers import BatchNorm, Conv

WIDTHS = (16, 32, 64)


def stage_plan(blocks_per_stage: int) -> list[tuple[int, int, int]]:
    """Width in, width out and stride of every block, in order.

    >>> stage_plan(2)
    [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    """
    plan, before = [], WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for block in range(blocks_per_stage):
            plan.append((before, width, 2 if stage > 0 and block == 0 else 1))
            before = width
    return plan


class CifarBlock(nnx.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, width_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        # One row on every side also at stride 2, as in PyTorch: not the same pixels as "SAME".
        self.conv1 = Conv(width_in, width, stride=stride, padding=1, use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, padding=1, use_bias=False, rngs=rngs)
        self.bn2 = BatchNorm(width)
        self.stride = stride
        self.widening = width - width_in

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [n h w width_in] to [n ceil(h/stride) ceil(w/stride) width]."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self._shortcut(x))

    def _shortcut(self, x):
        """Option A of the paper: every second pixel, the new channels zero, half on either side."""
        if self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
        if self.widening:
            before = self.widening // 2
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.widening - before)))
        return x


class CifarResNet(nnx.Module):
    """ResNet of depth 6 `blocks_per_stage` + 2, post-activation, shortcuts without parameters."""

    def __init__(self, blocks_per_stage: int, *, num_classes: int, channels: int, rngs: nnx.Rngs):
        self.conv = Conv(channels, WIDTHS[0], padding=1, use_bias=False, rngs=rngs)
        self.bn = BatchNorm(WIDTHS[0])
        self.blocks = nnx.List(
            CifarBlock(*block, rngs=rngs) for block in stage_plan(blocks_per_stage)
        )
        self.head = nnx.Linear(WIDTHS[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K]."""
        x = nnx.relu(self.bn(self.conv(x)))
        for index, block in enumerate(self.blocks):
            x = checkpoint_name(block(x), f"block{index}")
        return self.head(x.mean((1, 2)))


class PreactBlock(nnx.Module):
    """shortcut + conv(relu(bn(conv(relu(bn(x)))))); a projection reads the activated input."""

    def __init__(self, width_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.bn1 = BatchNorm(width_in)
        self.conv1 = Conv(width_in, width, stride=stride, rngs=rngs)
        self.bn2 = BatchNorm(width)
        self.conv2 = Conv(width, width, rngs=rngs)
        grows = width != width_in
        self.projection = Conv(width_in, width, 1, stride=stride, rngs=rngs) if grows else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [n h w width_in] to [n ceil(h/stride) ceil(w/stride) width]."""
        y = nnx.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(y)
        y = self.conv1(y)
        y = self.conv2(nnx.relu(self.bn2(y)))
        return shortcut + y


class PreactResNet(nnx.Module):
    """Pre-activation ResNet of depth 6 `blocks_per_stage` + 2, as the MOTH authors built it."""

    def __init__(self, blocks_per_stage: int, *, num_classes: int, channels: int, rngs: nnx.Rngs):
        self.conv = Conv(channels, WIDTHS[0], rngs=rngs)
        self.blocks = nnx.List(
            PreactBlock(*block, rngs=rngs) for block in stage_plan(blocks_per_stage)
        )
        self.bn = BatchNorm(WIDTHS[-1])
        self.head = nnx.Linear(WIDTHS[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K]."""
        x = self.conv(x)
        for index, block in enumerate(self.blocks):
            x = checkpoint_name(block(x), f"block{index}")
        x = checkpoint_name(nnx.relu(self.bn(x)), "activated")
        return self.head(x.mean((1, 2)))
