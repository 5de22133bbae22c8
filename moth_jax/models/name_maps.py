"""How other frameworks name and lay out the arrays of our architectures, one table per layout.

Each table is a list of `Entry`, readable in both directions: `to_ours` when importing weights,
`to_theirs` when exporting them.
"""

from typing import NamedTuple

import numpy as np

from moth_jax.models.resnet import stage_plan


class Entry(NamedTuple):
    """One array: its place in our variables, its name elsewhere, the order of its axes there."""

    kind: str  # "params" or "batch_stats"
    ours: str
    theirs: str
    axes: tuple[int, ...] | None = None  # ours = theirs.transpose(axes); None: the same order

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Their array in our order of axes."""
        return array if self.axes is None else array.transpose(self.axes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array in their order of axes."""
        if self.axes is None:
            return array
        # Contiguous, because safetensors silently writes a transposed view wrongly.
        return np.ascontiguousarray(array.transpose(np.argsort(self.axes)))

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape over there of an array that has `shape` here."""
        return shape if self.axes is None else tuple(shape[i] for i in np.argsort(self.axes))


_OIHW, _DENSE_OI = (2, 3, 1, 0), (1, 0)


def _torch_conv(ours, theirs):
    return [Entry("params", f"{ours}.kernel", f"{theirs}.weight", _OIHW)]


def _torch_norm(ours, theirs):
    return [
        Entry("params", f"{ours}.scale", f"{theirs}.weight"),
        Entry("params", f"{ours}.bias", f"{theirs}.bias"),
        Entry("batch_stats", f"{ours}.mean", f"{theirs}.running_mean"),
        Entry("batch_stats", f"{ours}.var", f"{theirs}.running_var"),
    ]


def _torch_dense(ours, theirs):
    return [
        Entry("params", f"{ours}.kernel", f"{theirs}.weight", _DENSE_OI),
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
