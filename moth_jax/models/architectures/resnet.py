"""ResNets for 32x32 images, in the two forms of the published checkpoints.

`CifarResNet` is the original one (He et al. 2015, section 4.2): normalise and activate after each
convolution, no parameters in the shortcuts; akamaster/pytorch_resnet_cifar10 has these weights.
`PreactResNet` normalises and activates before each convolution, and has a 1x1 projection where the
width grows: the MOTH authors trained it in Keras, with biases in all convolutions. Wide ResNets
(Zagoruyko and Komodakis 2016) are the same without biases, and padded as in PyTorch.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moth_jax.models.layers import BatchNorm, Conv

WIDTHS = (16, 32, 64)


def stage_plan(blocks_per_stage: int, widening: int = 1) -> list[tuple[int, int, int]]:
    """Width in, width out and stride of every block, in order.

    >>> stage_plan(2)
    [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    """
    plan, before = [], WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for block in range(blocks_per_stage):
            plan.append((before, widening * width, 2 if stage > 0 and block == 0 else 1))
            before = widening * width
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

    def __init__(self, width_in: int, width: int, stride: int, *, as_torch: bool, rngs: nnx.Rngs):
        options = {"padding": 1, "use_bias": False} if as_torch else {}
        self.bn1 = BatchNorm(width_in)
        self.conv1 = Conv(width_in, width, stride=stride, **options, rngs=rngs)
        self.bn2 = BatchNorm(width)
        self.conv2 = Conv(width, width, **options, rngs=rngs)
        options = {**options, "padding": "VALID", "stride": stride}
        grows = width != width_in
        self.projection = Conv(width_in, width, 1, **options, rngs=rngs) if grows else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [n h w width_in] to [n ceil(h/stride) ceil(w/stride) width]."""
        y = nnx.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(y)
        y = self.conv1(y)
        y = self.conv2(nnx.relu(self.bn2(y)))
        return shortcut + y


class PreactResNet(nnx.Module):
    """Pre-activation ResNet with `blocks_per_stage` blocks in each of three stages.

    As the MOTH authors built it in Keras (depth 6 `blocks_per_stage` + 2); or, if `as_torch`, a
    wide ResNet (depth 6 `blocks_per_stage` + 4), whose stages are `widening` times as wide.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        widening: int = 1,
        *,
        as_torch: bool = False,
        num_classes: int,
        channels: int,
        rngs: nnx.Rngs,
    ):
        options = {"padding": 1, "use_bias": False} if as_torch else {}
        self.conv = Conv(channels, WIDTHS[0], **options, rngs=rngs)
        self.blocks = nnx.List(
            PreactBlock(*block, as_torch=as_torch, rngs=rngs)
            for block in stage_plan(blocks_per_stage, widening)
        )
        self.bn = BatchNorm(widening * WIDTHS[-1])
        self.head = nnx.Linear(widening * WIDTHS[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K]."""
        x = self.conv(x)
        for index, block in enumerate(self.blocks):
            x = checkpoint_name(block(x), f"block{index}")
        x = checkpoint_name(nnx.relu(self.bn(x)), "activated")
        return self.head(x.mean((1, 2)))
