"""Weights of other frameworks: which architecture they are of, and how they become variables."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moth_jax import models
from moth_jax.errors import InputError, require_choice
from moth_jax.models.functional import Classifier, ModelSpec, Variables, describe_mismatch
from moth_jax.models.name_maps import Entry, akamaster_resnet, keras_preact_resnet
from moth_jax.models.weight_files import read_weights

__all__ = ["LAYOUTS", "identify", "import_weights", "load", "read_weights"]

Weights = dict[str, np.ndarray]
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MOTH = (
    tuple(value / 255 for value in (125.307, 122.950, 113.865)),
    tuple(value / 255 for value in (62.9932, 62.0887, 66.7048)),
)


class Layout(NamedTuple):
    """A known source of weights of one of our architectures."""

    description: str
    entries: tuple[Entry, ...]
    mean: tuple[float, ...]  # of the images it was trained on, pixels in [0,1]
    std: tuple[float, ...]


def _akamaster(depth):
    description = f"PyTorch ResNet{depth} of akamaster/pytorch_resnet_cifar10"
    return Layout(description, tuple(akamaster_resnet((depth - 2) // 6)), *_IMAGENET)


LAYOUTS: dict[str, Layout] = {
    **{f"resnet{depth}": _akamaster(depth) for depth in (20, 32, 44, 56, 110)},
    "preact_resnet20": Layout(
        "Keras ResNet20 of Gwinhen/MOTH", tuple(keras_preact_resnet(3)), *_MOTH
    ),
}


def identify(weights: Weights) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """The architecture some weights are of, and the (mean, std) its source normalises images with.

    Decided by names alone, and a few may be missing or extra, so that a file with a fault still
    gets the precise message of `import_weights`. Raises `InputError` when no layout is near.
    """
    names = set(_relevant(weights))
    overlap = {}
    for arch, layout in LAYOUTS.items():
        expected = {entry.theirs for entry in layout.entries}
        overlap[arch] = len(names & expected) / len(names | expected)
    arch = max(overlap, key=overlap.get)
    if overlap[arch] < 0.8:
        known = "; ".join(f"{arch} ({layout.description})" for arch, layout in LAYOUTS.items())
        raise InputError(
            f"weights not recognised: {len(names)} arrays, {', '.join(sorted(names)[:4])} ...; "
            f"known layouts are {known}"
        )
    return arch, LAYOUTS[arch].mean, LAYOUTS[arch].std


def import_weights(spec: ModelSpec, variables: Variables, weights: Weights) -> Variables:
    """The variables of a model, float32, from `weights` as `read_weights` gives them.

    `variables` are the model's own of any value, or their outline, and say only the shapes.
    Raises one `InputError` that names all missing, unused and mis-shaped arrays, as the file calls
    them, and the number of classes of its head if that is another.
    """
    require_choice("architecture with a weight import", spec.arch, LAYOUTS)
    entries = LAYOUTS[spec.arch].entries
    expected = {e.theirs: e.their_shape(variables[e.kind][e.ours].shape) for e in entries}
    given = {name: array.shape for name, array in _relevant(weights).items()}
    mismatch = describe_mismatch(expected, given)
    if mismatch:
        size = _head_size(spec.arch, weights)
        if size not in (None, spec.num_classes):
            mismatch += f"; the head has {size} classes, the model {spec.num_classes}"
        raise InputError(f"weights do not fit {spec.arch}: {mismatch}")
    imported = {"params": {}, "batch_stats": {}}
    for entry in entries:
        array = entry.to_ours(weights[entry.theirs])
        imported[entry.kind][entry.ours] = jnp.asarray(array, jnp.float32)
    return imported


def load(
    path: str | Path,
    *,
    arch: str = "auto",
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_shape: tuple[int, int, int] = (32, 32, 3),
) -> tuple[Classifier, Variables]:
    """The classifier whose weights are in a file of PyTorch, safetensors or Keras.

    `arch` "auto" recognises the layouts in `LAYOUTS`; `num_classes` is read off the head, and
    `mean` and `std` are those of the layout, unless given. Raises `InputError` (see `read_weights`,
    `identify`, `import_weights`).
    """
    weights = read_weights(path)
    if arch == "auto":
        arch = identify(weights)[0]
    require_choice("architecture with a weight import", arch, LAYOUTS)
    spec = ModelSpec(
        arch,
        num_classes or _head_size(arch, weights) or 2,
        image_shape,
        LAYOUTS[arch].mean if mean is None else mean,
        LAYOUTS[arch].std if std is None else std,
        class_names,
    )
    classifier, shapes = models.outline(spec)
    return classifier, import_weights(spec, shapes, weights)


def _relevant(weights):
    """Without PyTorch's batch-norm counters, which nothing here uses and old files lack."""
    return {k: array for k, array in weights.items() if not k.endswith("num_batches_tracked")}


def _head_size(arch, weights):
    theirs = {entry.ours: entry.theirs for entry in LAYOUTS[arch].entries}
    bias = weights.get(theirs["head.bias"])
    return None if bias is None else bias.size
