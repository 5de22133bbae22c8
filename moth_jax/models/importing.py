"""Weights of other frameworks: which architecture they are of, and how they become variables."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moth_jax import models
from moth_jax.errors import InputError, require_choice
from moth_jax.models.functional import Classifier, ModelSpec, Variables
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
    names: Callable[[], list[Entry]]
    mean: tuple[float, ...]  # of the images it was trained on, pixels in [0,1]
    std: tuple[float, ...]


def _akamaster(depth):
    description = f"PyTorch ResNet{depth} of akamaster/pytorch_resnet_cifar10"
    return Layout(description, lambda: akamaster_resnet((depth - 2) // 6), *_IMAGENET)


LAYOUTS: dict[str, Layout] = {
    "resnet20": _akamaster(20),
    "resnet32": _akamaster(32),
    "resnet44": _akamaster(44),
    "resnet56": _akamaster(56),
    "preact_resnet20": Layout(
        "Keras ResNet20 of Gwinhen/MOTH", lambda: keras_preact_resnet(3), *_MOTH
    ),
}


def identify(weights: Weights) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """The architecture some weights are of, and the (mean, std) its source normalises images with.

    Decided by names alone, and a few may be missing or extra, so that a file with a fault still
    gets the precise message of `import_weights`. Raises `InputError` when no layout is near.
    """
    names = {name for name in weights if not _is_counter(name)}
    overlap = {}
    for arch, layout in LAYOUTS.items():
        expected = {entry.theirs for entry in layout.names()}
        overlap[arch] = len(names & expected) / len(names | expected)
    arch = max(overlap, key=overlap.get)
    if overlap[arch] < 0.8:
        known = "; ".join(f"{arch}: {layout.description}" for arch, layout in LAYOUTS.items())
        raise InputError(
            f"weights not recognised (they begin {_some(sorted(names))}); known layouts are {known}"
        )
    return arch, LAYOUTS[arch].mean, LAYOUTS[arch].std


def import_weights(spec: ModelSpec, variables: Variables, weights: Weights) -> Variables:
    """`variables` with every array replaced by its counterpart in `weights`, as float32.

    Raises one `InputError` that names all missing, unused and mis-shaped arrays.
    """
    require_choice("architecture with a weight import", spec.arch, LAYOUTS)
    entries = LAYOUTS[spec.arch].names()
    found = {(e.kind, e.ours): e.to_ours(weights[e.theirs]) for e in entries if e.theirs in weights}
    unused = set(weights) - {e.theirs for e in entries}
    missing = [e.theirs for e in entries if e.theirs not in weights]
    wrong = [
        f"{e.theirs} {weights[e.theirs].shape}, expected {_their_shape(e, variables)}"
        for e in entries
        if e.theirs in weights and found[e.kind, e.ours].shape != variables[e.kind][e.ours].shape
    ]
    faults = {
        "missing": missing,
        "unused": sorted(name for name in unused if not _is_counter(name)),
        "of another shape": wrong,
    }
    if any(faults.values()):
        details = "; ".join(f"{len(n)} {what}: {_some(n, 8)}" for what, n in faults.items() if n)
        raise InputError(f"weights do not fit {spec.arch}: {details}{_head_hint(spec, weights)}")
    return {
        kind: {name: jnp.asarray(found[kind, name], jnp.float32) for name in variables[kind]}
        for kind in ("params", "batch_stats")
    }


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
    classifier, variables = models.build(spec)
    return classifier, import_weights(spec, variables, weights)


def _is_counter(name):
    """PyTorch's batch-norm counters, which nothing here uses and old files lack."""
    return name.endswith("num_batches_tracked")


def _head_size(arch, weights):
    for entry in LAYOUTS[arch].names():
        if entry.ours == "head.bias" and entry.theirs in weights:
            return weights[entry.theirs].size
    return None


def _head_hint(spec, weights):
    size = _head_size(spec.arch, weights)
    if size in (None, spec.num_classes):
        return ""
    return f". The head of these weights has {size} classes, the model {spec.num_classes}"


def _their_shape(entry, variables):
    return entry.to_theirs(np.empty(variables[entry.kind][entry.ours].shape, np.bool_)).shape


def _some(names, limit=3):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
