"""torchvision's ResNets and wide ResNets (He et al. 2015, section 4.1), and one for small images.

These are "version 1.5": a bottleneck has its stride in the 3x3 convolution, not in the first 1x1.
"""

from functools import partial

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moth_jax.models.layers import BatchNorm, Conv
from moth_jax.models.layers.pooling import max_pool

STEM_WIDTH = 64
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # per stage


def has_bottlenecks(depth: int) -> bool:
    """Whether the blocks of a ResNet of this depth have three convolutions instead of two."""
    return depth >= 50


def block_plan(depth: int) -> list[tuple[int, int, int]]:
    """Width in, width out and stride of every block, in order.

    >>> block_plan(18)[:4]
    [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    >>> block_plan(50)[:4]
    [(64, 256, 1), (256, 256, 1), (256, 256, 1), (256, 512, 2)]
    """
    plan, before = [], STEM_WIDTH
    for stage, count in enumerate(BLOCKS[depth]):
        width = (4 if has_bottlenecks(depth) else 1) * 64 * 2**stage
        for block in range(count):
            plan.append((before, width, 2 if stage > 0 and block == 0 else 1))
            before = width
    return plan


def projects(width_in: int, width: int, stride: int) -> bool:
    """Whether a block of this plan has a projection for its shortcut."""
    return stride > 1 or width_in != width


class Projection(nnx.Module):
    """The shortcut where width or size changes: bn(conv(x)), 1x1."""

    def __init__(self, width_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = Conv(width_in, width, 1, stride=stride, padding=0, use_bias=False, rngs=rngs)
        self.bn = BatchNorm(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [n h w width_in] to [n ceil(h/stride) ceil(w/stride) width]."""
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), both convolutions 3x3."""

    def __init__(self, width_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        # One row on every side also at stride 2, as in PyTorch: not the same pixels as "SAME".
        self.conv1 = Conv(width_in, width, stride=stride, padding=1, use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, padding=1, use_bias=False, rngs=rngs)
        self.bn2 = BatchNorm(width)
        plan = (width_in, width, stride)
        self.shortcut = Projection(*plan, rngs=rngs) if projects(*plan) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [n h w width_in] to [n ceil(h/stride) ceil(w/stride) width]."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """As `BasicBlock` with three convolutions, 1x1, 3x3 and 1x1.

    The inner two are a quarter as wide as the output, times `widening`.
    """

    def __init__(
        self, width_in: int, width: int, stride: int, *, widening: int = 1, rngs: nnx.Rngs
    ):
        inner = width // 4 * widening
        self.conv1 = Conv(width_in, inner, 1, padding=0, use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(inner)
        self.conv2 = Conv(inner, inner, stride=stride, padding=1, use_bias=False, rngs=rngs)
        self.bn2 = BatchNorm(inner)
        self.conv3 = Conv(inner, width, 1, padding=0, use_bias=False, rngs=rngs)
        self.bn3 = BatchNorm(width)
        plan = (width_in, width, stride)
        self.shortcut = Projection(*plan, rngs=rngs) if projects(*plan) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [n h w width_in] to [n ceil(h/stride) ceil(w/stride) width]."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """torchvision's ResNet of a depth in `BLOCKS`; `widening` is of the inside of bottlenecks.

    `small_stem` is for images of about 32x32: the first convolution is 3x3 at stride 1 in place of
    7x7 at stride 2, and no max-pooling follows, so that the first stage sees every pixel. This is
    the usual change to torchvision's ResNet18 for CIFAR. Some keep the max-pooling: their weights
    have the same names and shapes but give other logits here.
    """

    def __init__(
        self,
        depth: int,
        *,
        widening: int = 1,
        small_stem: bool = False,
        num_classes: int,
        channels: int,
        rngs: nnx.Rngs,
    ):
        kernel, stride, padding = (3, 1, 1) if small_stem else (7, 2, 3)
        self.conv = Conv(
            channels, STEM_WIDTH, kernel, stride=stride, padding=padding, use_bias=False, rngs=rngs
        )
        self.bn = BatchNorm(STEM_WIDTH)
        self.small_stem = small_stem
        bottleneck = partial(Bottleneck, widening=widening)
        block = bottleneck if has_bottlenecks(depth) else BasicBlock
        plan = block_plan(depth)
        self.blocks = nnx.List(block(*step, rngs=rngs) for step in plan)
        self.head = nnx.Linear(plan[-1][1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K]."""
        x = nnx.relu(self.bn(self.conv(x)))
        if not self.small_stem:
            x = max_pool(x, (3, 3), (2, 2), 1)
        for index, block in enumerate(self.blocks):
            x = checkpoint_name(block(x), f"block{index}")
        return self.head(x.mean((1, 2)))
