"""Network in Network (Lin et al. 2013) for 32x32 images, as the MOTH authors built it."""

from itertools import islice

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moth_jax.models.layers import Conv
from moth_jax.models.layers.pooling import max_pool

# Kernel size and width of each convolution of a block; the head is the last one of the last block.
BLOCKS = (
    ((5, 192), (1, 160), (1, 96)),
    ((5, 192), (1, 192), (1, 192)),
    ((3, 192), (1, 192)),
)


class NiN(nnx.Module):
    """Three blocks of a convolution and two 1x1 convolutions, each followed by relu, even the last.

    3x3 max-pooling at stride 2 separates the blocks; the logits are the means over all positions.

    Note: both poolings take the maximum, as in the authors' code; the second one of the original
    network takes the mean. Dropout after the poolings is left out: hardening, as published, runs
    with the model in evaluation mode, where dropout is the identity.
    """

    def __init__(self, *, num_classes: int, channels: int, rngs: nnx.Rngs):
        convs, before = [], channels
        for kernel, width in (layer for block in BLOCKS for layer in block):
            convs.append(Conv(before, width, kernel, padding=kernel // 2, rngs=rngs))
            before = width
        self.convs = nnx.List(convs)
        self.head = Conv(before, num_classes, 1, padding=0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K], none negative."""
        convs = iter(self.convs)
        for index, block in enumerate(BLOCKS):
            if index > 0:
                # Only below and to the right: TensorFlow's "same" and PyTorch's ceil_mode, which
                # agree where the size is even.
                x = max_pool(x, (3, 3), (2, 2), ((0, 1), (0, 1)))
            for conv in islice(convs, len(block)):
                x = nnx.relu(conv(x))
            x = checkpoint_name(x, f"block{index}")
        return nnx.relu(self.head(x)).mean((1, 2))
