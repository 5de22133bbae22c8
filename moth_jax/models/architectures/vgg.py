"""VGG with batch normalisation (Simonyan and Zisserman 2014): torchvision's, and one for CIFAR.

Note: torchvision's dropout between the dense layers is left out. Hardening, as published, runs with
the model in evaluation mode, where dropout is the identity; training one of these from random
weights is not regularised by it.
"""

from collections.abc import Sequence
from itertools import islice

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moth_jax.errors import InputError
from moth_jax.models.layers import BatchNorm, Conv
from moth_jax.models.layers.pooling import adaptive_avg_pool, max_pool

WIDTHS = (64, 128, 256, 512, 512)
CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 19: (2, 2, 4, 4, 4)}  # per stage, by depth


class VGG(nnx.Module):
    """Five stages of 3x3 convolutions, each halving the image at its end; then dense layers.

    The features are averaged to `grid` x `grid` positions, whatever the size of the image, and read
    by dense layers of `hidden` units and the head. torchvision's has grid 7 and two hidden layers
    of 4,096; the usual one for CIFAR grid 1 and none, so its only dense layer is 512 -> K.

    Note: the MOTH authors' Keras VGG19 for CIFAR is another one: two hidden layers of 4,096 units
    with batch normalisation, which also follows the head.
    """

    def __init__(
        self,
        depth: int,
        *,
        grid: int,
        hidden: Sequence[int] = (),
        num_classes: int,
        image_shape: tuple[int, int, int],
        rngs: nnx.Rngs,
    ):
        smallest = 2 ** len(WIDTHS)
        if min(image_shape[:2]) < smallest:
            raise InputError(
                f"vgg{depth} halves images {len(WIDTHS)} times and needs at least "
                f"{smallest}x{smallest} pixels, got image_shape {tuple(image_shape)}"
            )
        convs, norms, dense, before = [], [], [], image_shape[-1]
        for width, count in zip(WIDTHS, CONVS[depth], strict=True):
            for _ in range(count):
                convs.append(Conv(before, width, padding=1, rngs=rngs))
                norms.append(BatchNorm(width))
                before = width
        before *= grid * grid
        for width in hidden:
            dense.append(nnx.Linear(before, width, rngs=rngs))
            before = width
        self.convs, self.norms, self.dense = nnx.List(convs), nnx.List(norms), nnx.List(dense)
        self.head = nnx.Linear(before, num_classes, rngs=rngs)
        self.convs_per_stage, self.grid = CONVS[depth], grid

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K]."""
        layers = zip(self.convs, self.norms, strict=True)
        for stage, count in enumerate(self.convs_per_stage):
            for conv, norm in islice(layers, count):
                x = nnx.relu(norm(conv(x)))
            x = max_pool(checkpoint_name(x, f"stage{stage}"), (2, 2))
        x = adaptive_avg_pool(x, (self.grid, self.grid))
        x = x.reshape(x.shape[0], -1)
        for layer in self.dense:
            x = nnx.relu(layer(x))
        return self.head(x)
