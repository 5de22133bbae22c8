"""A small convolutional network for small images, such as the 8x8 handwritten digits."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moth_jax.models.layers import BatchNorm, Conv
from moth_jax.types import ImageShape

WIDTHS = (16, 32, 64)


class SmallCNN(nnx.Module):
    """3x3 convolutions, each normalised and activated, all but the first at stride 2; a dense head.

    The head reads every position rather than their average: with 2x2 positions left that costs
    nothing, and where a stroke is tells digits apart.
    """

    def __init__(self, *, num_classes: int, image_shape: ImageShape, rngs: nnx.Rngs):
        height, width, before = image_shape
        convs, norms = [], []
        for index, features in enumerate(WIDTHS):
            stride = 1 if index == 0 else 2
            convs.append(Conv(before, features, stride=stride, use_bias=False, rngs=rngs))
            norms.append(BatchNorm(features))
            height, width, before = -(-height // stride), -(-width // stride), features
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.head = nnx.Linear(height * width * before, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K]."""
        layers = zip(self.convs, self.norms, strict=True)
        for index, (conv, norm) in enumerate(layers):
            x = checkpoint_name(nnx.relu(norm(conv(x))), f"conv{index}")
        return self.head(x.reshape(x.shape[0], -1))
