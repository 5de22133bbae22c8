"""How other frameworks name and lay out the arrays of our architectures, one table per layout.

Each table is a list of `Entry`, readable in both directions: `to_ours` when importing weights,
`to_theirs` when exporting them.
"""

from typing import NamedTuple

import numpy as np

from moth_jax.models.architectures import lisa_cnn, vgg
from moth_jax.models.architectures.resnet import stage_plan
from moth_jax.models.architectures.torchvision_resnet import (
    BLOCKS,
    block_plan,
    has_bottlenecks,
    projects,
)


class Entry(NamedTuple):
    """One array: its place in our variables, its name elsewhere, the order of its axes there."""

    kind: str  # "params" or "batch_stats"
    ours: str
    theirs: str
    axes: tuple[int, ...] | None = None  # ours = theirs.transpose(axes); None: the same order
    # Of a dense layer that reads an image: it lists its inputs channel by channel there, position
    # by position here. So theirs is [out, channels * positions], ours [positions * channels, out].
    channels: int | None = None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Their array in our order of axes and inputs."""
        if self.channels is not None:
            out, inputs = array.shape
            image = array.reshape(out, self.channels, inputs // self.channels)
            return image.transpose(2, 1, 0).reshape(inputs, out)
        return array if self.axes is None else array.transpose(self.axes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array in their order of axes and inputs."""
        if self.channels is not None:
            inputs, out = array.shape
            image = array.reshape(inputs // self.channels, self.channels, out)
            array = image.transpose(2, 1, 0).reshape(out, inputs)
        elif self.axes is not None:
            array = array.transpose(np.argsort(self.axes))
        # Contiguous, because safetensors silently writes a transposed view wrongly.
        return np.ascontiguousarray(array)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape over there of an array that has `shape` here."""
        if self.channels is not None:
            return shape[::-1]
        return shape if self.axes is None else tuple(shape[i] for i in np.argsort(self.axes))


_OIHW, _DENSE_OI = (2, 3, 1, 0), (1, 0)


def _torch_conv(ours, theirs, *, bias=False):
    entries = [Entry("params", f"{ours}.kernel", f"{theirs}.weight", _OIHW)]
    return [*entries, Entry("params", f"{ours}.bias", f"{theirs}.bias")] if bias else entries


def _torch_norm(ours, theirs):
    return [
        Entry("params", f"{ours}.scale", f"{theirs}.weight"),
        Entry("params", f"{ours}.bias", f"{theirs}.bias"),
        Entry("batch_stats", f"{ours}.mean", f"{theirs}.running_mean"),
        Entry("batch_stats", f"{ours}.var", f"{theirs}.running_var"),
    ]


def _torch_dense(ours, theirs, *, channels=None):
    axes = _DENSE_OI if channels is None else None
    return [
        Entry("params", f"{ours}.kernel", f"{theirs}.weight", axes, channels),
        Entry("params", f"{ours}.bias", f"{theirs}.bias"),
    ]


def akamaster_resnet(blocks_per_stage: int) -> list[Entry]:
    """`CifarResNet` as in akamaster/pytorch_resnet_cifar10."""
    entries = _torch_conv("conv", "conv1") + _torch_norm("bn", "bn1")
    for index in range(3 * blocks_per_stage):
        stage, block = divmod(index, blocks_per_stage)
        ours, theirs = f"blocks.{index}", f"layer{stage + 1}.{block}"
        for part in ("1", "2"):
            entries += _torch_conv(f"{ours}.conv{part}", f"{theirs}.conv{part}")
            entries += _torch_norm(f"{ours}.bn{part}", f"{theirs}.bn{part}")
    return entries + _torch_dense("head", "linear")


def wide_resnet(blocks_per_stage: int, widening: int) -> list[Entry]:
    """`PreactResNet` as in xternalz/WideResNet-pytorch: stages `block1` to `block3`."""
    entries = _torch_conv("conv", "conv1")
    for index, (before, width, _) in enumerate(stage_plan(blocks_per_stage, widening)):
        stage, block = divmod(index, blocks_per_stage)
        ours, theirs = f"blocks.{index}", f"block{stage + 1}.layer.{block}"
        for part in ("1", "2"):
            entries += _torch_norm(f"{ours}.bn{part}", f"{theirs}.bn{part}")
            entries += _torch_conv(f"{ours}.conv{part}", f"{theirs}.conv{part}")
        if width != before:
            entries += _torch_conv(f"{ours}.projection", f"{theirs}.convShortcut")
    return entries + _torch_norm("bn", "bn1") + _torch_dense("head", "fc")


def torchvision_resnet(depth: int) -> list[Entry]:
    """`ResNet` as in torchvision; wide ones and other first convolutions have the same names."""
    entries = _torch_conv("conv", "conv1") + _torch_norm("bn", "bn1")
    places = [(stage, block) for stage, n in enumerate(BLOCKS[depth]) for block in range(n)]
    for index, (plan, (stage, block)) in enumerate(zip(block_plan(depth), places, strict=True)):
        ours, theirs = f"blocks.{index}", f"layer{stage + 1}.{block}"
        for part in range(1, 4 if has_bottlenecks(depth) else 3):
            entries += _torch_conv(f"{ours}.conv{part}", f"{theirs}.conv{part}")
            entries += _torch_norm(f"{ours}.bn{part}", f"{theirs}.bn{part}")
        if projects(*plan):
            entries += _torch_conv(f"{ours}.shortcut.conv", f"{theirs}.downsample.0")
            entries += _torch_norm(f"{ours}.shortcut.bn", f"{theirs}.downsample.1")
    return entries + _torch_dense("head", "fc")


def _torch_vgg_features(depth):
    """Numbered as in `nn.Sequential`: convolution, batch norm, relu; pooling ends a stage."""
    entries, index, number = [], 0, 0
    for count in vgg.CONVS[depth]:
        for _ in range(count):
            entries += _torch_conv(f"convs.{index}", f"features.{number}", bias=True)
            entries += _torch_norm(f"norms.{index}", f"features.{number + 1}")
            index, number = index + 1, number + 3
        number += 1
    return entries


def torchvision_vgg(depth: int) -> list[Entry]:
    """`VGG` with two hidden layers as torchvision's `vgg*_bn`."""
    return [
        *_torch_vgg_features(depth),
        *_torch_dense("dense.0", "classifier.0", channels=vgg.WIDTHS[-1]),
        *_torch_dense("dense.1", "classifier.3"),
        *_torch_dense("head", "classifier.6"),
    ]


def cifar_vgg(depth: int) -> list[Entry]:
    """`VGG` with one dense layer as in kuangliu/pytorch-cifar."""
    return _torch_vgg_features(depth) + _torch_dense("head", "classifier")


def torch_nin() -> list[Entry]:
    """`NiN` as a PyTorch module of `block1`, `block2`, `block3`, each a `Sequential`.

    Number 0, 2 and 4 of each are its convolutions; between them are relus. Public PyTorch files
    number all layers of the network in one `Sequential`, and average in the second pooling: they
    must not be taken for this one.
    """
    entries = []
    for index in range(9):
        block, layer = divmod(index, 3)
        ours = "head" if index == 8 else f"convs.{index}"
        entries += _torch_conv(ours, f"block{block + 1}.{2 * layer}", bias=True)
    return entries


def torch_lisa_cnn() -> list[Entry]:
    """`LisaCNN` as the PyTorch class of that name: `conv1`, `conv2`, `conv3` and `fc`."""
    entries = []
    for index in range(len(lisa_cnn.CONVS)):
        entries += _torch_conv(f"convs.{index}", f"conv{index + 1}", bias=True)
    return entries + _torch_dense("head", "fc", channels=lisa_cnn.CONVS[-1][0])


def _keras_conv(ours, number):
    theirs = f"conv2d_{number}/"
    return [
        Entry("params", f"{ours}.kernel", theirs + "kernel"),
        Entry("params", f"{ours}.bias", theirs + "bias"),
    ]


def _keras_norm(ours, number):
    theirs = f"batch_normalization_{number}/"
    return [
        Entry("params", f"{ours}.scale", theirs + "gamma"),
        Entry("params", f"{ours}.bias", theirs + "beta"),
        Entry("batch_stats", f"{ours}.mean", theirs + "moving_mean"),
        Entry("batch_stats", f"{ours}.var", theirs + "moving_variance"),
    ]


def keras_preact_resnet(blocks_per_stage: int) -> list[Entry]:
    """`PreactResNet` as the MOTH authors' Keras code creates it, layers numbered in that order."""
    entries, conv, norm = _keras_conv("conv", 1), 1, 0
    for index, (width_in, width, _) in enumerate(stage_plan(blocks_per_stage)):
        ours = f"blocks.{index}"
        entries += _keras_norm(f"{ours}.bn1", norm + 1) + _keras_conv(f"{ours}.conv1", conv + 1)
        entries += _keras_norm(f"{ours}.bn2", norm + 2) + _keras_conv(f"{ours}.conv2", conv + 2)
        conv, norm = conv + 2, norm + 2
        if width != width_in:
            conv += 1
            entries += _keras_conv(f"{ours}.projection", conv)
    entries += _keras_norm("bn", norm + 1)
    return [
        *entries,
        Entry("params", "head.kernel", "dense_1/kernel"),
        Entry("params", "head.bias", "dense_1/bias"),
    ]
