"""The small network for LISA's traffic signs, known as LISA-CNN (Eykholt et al. 2018)."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moth_jax.errors import InputError
from moth_jax.models.layers import Conv

# Width, kernel size, stride and padding of each convolution.
CONVS = ((64, 8, 2, 3), (128, 6, 2, 0), (128, 5, 1, 0))


def _positions(size):
    """How many places along an axis are left of `size` pixels."""
    for _, kernel, stride, padding in CONVS:
        size = (size + 2 * padding - kernel) // stride + 1
    return size


class LisaCNN(nnx.Module):
    """Three convolutions with relu, 64 of 8x8 at stride 2, 128 of 6x6 at stride 2, 128 of 5x5.

    A dense layer reads all positions, 2x2 of a 32x32 image. There is neither pooling nor
    normalisation nor dropout. The same in Eykholt et al. (who took it from Cleverhans' tutorial),
    in the MOTH authors' code, and in the PyTorch files that call it LisaCNN.
    """

    def __init__(self, *, num_classes: int, image_shape: tuple[int, int, int], rngs: nnx.Rngs):
        height, width = (_positions(size) for size in image_shape[:2])
        if min(height, width) < 1:
            raise InputError(
                "lisa_cnn needs images of at least 28x28 pixels, "
                f"got image_shape {tuple(image_shape)}"
            )
        convs, before = [], image_shape[-1]
        for features, kernel, stride, padding in CONVS:
            convs.append(Conv(before, features, kernel, stride=stride, padding=padding, rngs=rngs))
            before = features
        self.convs = nnx.List(convs)
        self.head = nnx.Linear(height * width * before, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised images [n h w c] to logits [n K]."""
        for index, conv in enumerate(self.convs):
            x = checkpoint_name(nnx.relu(conv(x)), f"conv{index}")
        return self.head(x.reshape(x.shape[0], -1))
