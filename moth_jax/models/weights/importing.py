"""Weights of other frameworks: which architecture they belong to, and how they are converted."""

import dataclasses
import warnings
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moth_jax import models
from moth_jax.errors import InputError, require_choice
from moth_jax.models.classifier import Classifier, ModelSpec, Reading, describe_mismatch
from moth_jax.models.weights.files import read_file, read_weights
from moth_jax.models.weights.fitting import (
    Normalisation,
    Weights,
    check_floats,
    fit,
    head_size,
    named,
    own_names,
    shared_prefix,
    without_prefix,
)
from moth_jax.models.weights.name_maps import (
    Entry,
    akamaster_resnet,
    cifar_vgg,
    keras_preact_resnet,
    torch_lisa_cnn,
    torch_nin,
    torchvision_resnet,
    torchvision_vgg,
    wide_resnet,
)
from moth_jax.types import Variables

__all__ = ["LAYOUTS", "export_weights", "identify", "import_weights", "load", "read_weights"]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10 = (
    tuple(value / 255 for value in (125.307, 122.950, 113.865)),
    tuple(value / 255 for value in (62.9932, 62.0887, 66.7048)),
)
_KUANGLIU = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_UNCHANGED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_LARGE = (224, 224, 3)


class Layout(NamedTuple):
    """A known source of weights of one of our architectures."""

    description: str
    entries: tuple[Entry, ...]
    mean: tuple[float, ...]  # of the images it was trained on, pixels in [0,1]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int] = (32, 32, 3)
    framework: str = "PyTorch"
    unseen: str = ""  # what names and shapes do not show
    twin: str = ""  # another network that is as common, with the same names and shapes


def _akamaster(depth):
    description = f"PyTorch ResNet{depth} of akamaster/pytorch_resnet_cifar10"
    entries = tuple(akamaster_resnet((depth - 2) // 6))
    unseen = (
        "stride 2 at the second and third stage, shortcuts that take every second pixel and pad"
    )
    return Layout(description, entries, *_IMAGENET, unseen=unseen)


def _torchvision(name, entries, unseen):
    return Layout(f"{name} of torchvision", tuple(entries), *_IMAGENET, _LARGE, unseen=unseen)


def _torchvision_resnet(name, depth):
    unseen = "stride 2 and max-pooling at the first convolution, stride 2 at each later stage"
    return _torchvision(name, torchvision_resnet(depth), unseen)


LAYOUTS: dict[str, Layout] = {
    **{f"resnet{depth}": _akamaster(depth) for depth in (20, 32, 44, 56, 110)},
    "preact_resnet20": Layout(
        "Keras ResNet20 of Gwinhen/MOTH",
        tuple(keras_preact_resnet(3)),
        *_CIFAR10,
        framework="Keras",
        unseen="stride 2 at the second and third stage, projections of the activated input",
    ),
    **{
        f"wrn{depth}_{widening}": Layout(
            f"PyTorch wide ResNet {depth}-{widening}",
            tuple(wide_resnet((depth - 4) // 6, widening)),
            *_UNCHANGED,
            unseen="images in [0, 1] as they are, stride 2 at the second and third stage",
        )
        for depth, widening in ((16, 1), (28, 10))
    },
    **{
        f"resnet{depth}": _torchvision_resnet(f"ResNet{depth}", depth)
        for depth in (18, 34, 50, 101)
    },
    "wide_resnet50_2": _torchvision_resnet("Wide ResNet50-2", 50),
    "resnet18_cifar": Layout(
        "ResNet18 of torchvision, first convolution 3x3",
        tuple(torchvision_resnet(18)),
        *_CIFAR10,
        unseen="stride 1 and no max-pooling at the first convolution, stride 2 at each later stage",
        twin="one that keeps the max-pooling or the stride after the first convolution",
    ),
    **{
        f"vgg{depth}_bn": _torchvision(
            f"VGG{depth} with batch norm",
            torchvision_vgg(depth),
            "2x2 max-pooling after each stage",
        )
        for depth in (11, 13)
    },
    "vgg19": Layout(
        "PyTorch VGG19 of kuangliu/pytorch-cifar",
        tuple(cifar_vgg(19)),
        *_KUANGLIU,
        unseen="2x2 max-pooling after each stage",
    ),
    "nin": Layout(
        "PyTorch NiN, blocks named block1 to block3",
        tuple(torch_nin()),
        *_CIFAR10,
        unseen="3x3 max-pooling at stride 2 after the first two blocks",
    ),
    "lisa_cnn": Layout(
        "PyTorch LisaCNN",
        tuple(torch_lisa_cnn()),
        *_UNCHANGED,
        unseen="strides 2, 2 and 1, no pooling",
    ),
}


def identify(weights: Weights) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """The architecture of some weights, and the (mean, std) that normalise images for them.

    Decided by names, and by shapes between layouts that share them; the head, and a few others, may
    be missing, extra or mis-shaped, so that a file with a fault still gets the precise message of
    `import_weights`. Raises `InputError` when no layout is near.
    """
    known_names = {entry.theirs for layout in LAYOUTS.values() for entry in layout.entries}
    weights = without_prefix(weights, known_names)
    names = own_names(weights)
    overlap = {}
    for arch, layout in LAYOUTS.items():
        body = {entry.theirs for entry in layout.entries if not _of_head(entry)}
        head = {entry.theirs for entry in layout.entries if _of_head(entry)}
        overlap[arch] = len(names & body) / len((names - head) | body)
    closest = max(overlap.values())
    if closest < 0.8:
        known = "; ".join(f"{arch} ({layout.description})" for arch, layout in LAYOUTS.items())
        prefix = shared_prefix(names)
        raise InputError(
            f"weights not recognised: {len(names)} arrays, {', '.join(sorted(names)[:4])} ..."
            + (f", all of the prefix {prefix!r}" if prefix else "")
            + "; name the classifier of torchvision they are of as the architecture (such as "
            f"mobilenet_v2), or give a builder of the module; known layouts are {known}"
        )
    nearest = [arch for arch, value in overlap.items() if value == closest]
    if len(nearest) > 1:
        nearest.sort(key=lambda arch: _num_fitting(arch, weights), reverse=True)
    layout = LAYOUTS[nearest[0]]
    return nearest[0], layout.mean, layout.std


def _of_head(entry: Entry) -> bool:
    return entry.ours.startswith("head.")


def _num_fitting(arch, weights):
    """How many arrays have the shape that `arch` gives them."""
    layout = LAYOUTS[arch]
    _, variables = models.outline(ModelSpec(arch, 2, layout.image_shape, layout.mean, layout.std))
    shapes = _their_shapes(layout.entries, variables)
    return sum(name in weights and weights[name].shape == shape for name, shape in shapes.items())


def _their_shapes(entries, variables):
    return {e.theirs: e.their_shape(variables[e.kind][e.ours].shape) for e in entries}


def _head(arch: str, variables: Variables) -> dict[str, int]:
    """The arrays of the last layer by their names, and the axis of the classes there."""
    axes = {}
    for entry in LAYOUTS[arch].entries:
        if _of_head(entry):
            marked = [0] * len(variables[entry.kind][entry.ours].shape)
            marked[-1] = 1  # the classes are our last axis
            axes[entry.theirs] = entry.their_shape(tuple(marked)).index(1)
    return axes


def import_weights(
    spec: ModelSpec,
    variables: Variables,
    weights: Weights,
    *,
    new_head: bool = False,
    normalisation: Normalisation = None,
) -> Variables:
    """The variables of a model, float32, from `weights` as `read_weights` gives them.

    `variables` give the shapes: the model's own, or their outline. A prefix of all names is removed
    (`fitting.foreign_prefix`). With `new_head` a head that is missing or
    of another number of classes is drawn as the architecture initialises it, with a warning.
    `normalisation` is as in `fit`. Raises one `InputError` that names all missing, unused and
    mis-shaped arrays, as the file calls them, and the number of classes of its head if that is
    another; or names arrays that are no floating-point numbers.
    """
    require_choice("architecture with a weight import", spec.arch, LAYOUTS)
    entries = LAYOUTS[spec.arch].entries
    weights = fit(
        weights,
        _their_shapes(entries, variables),
        what=spec.arch,
        head=_head(spec.arch, variables),
        fresh=(lambda: export_weights(spec, models.build(spec)[1])) if new_head else None,
        normalisation=normalisation,
    )
    check_floats(weights, (entry.theirs for entry in entries), spec.arch)
    imported = {"params": {}, "batch_stats": {}}
    for entry in entries:
        array = entry.to_ours(weights[entry.theirs])
        # A copy: on the CPU JAX may share memory with theirs, which their owner goes on training.
        imported[entry.kind][entry.ours] = jnp.array(array, jnp.float32)
    return imported


def export_weights(spec: ModelSpec, variables: Variables) -> Weights:
    """The inverse of `import_weights`: arrays with the names and layout of the source.

    Float32 and contiguous; with the `num_batches_tracked` (0) of PyTorch's batch norm, so that
    `load_state_dict(strict=True)` of the original module takes them as tensors. Raises `InputError`
    for an architecture that has no known source, or variables that are not of it.

    >>> spec = ModelSpec("lisa_cnn", 4, (32, 32, 3), mean=(0, 0, 0), std=(1, 1, 1))
    >>> weights = export_weights(spec, models.build(spec)[1])
    >>> weights["conv1.weight"].shape, weights["fc.weight"].shape
    ((64, 3, 8, 8), (4, 512))
    """
    if spec.arch not in LAYOUTS:
        raise InputError(
            f"{spec.arch} is an architecture of this package alone, without an original in PyTorch "
            "that could take its weights; write .stablehlo, or a checkpoint folder"
        )
    entries = LAYOUTS[spec.arch].entries
    mismatch = describe_mismatch(
        {f"{entry.kind} {entry.ours}": () for entry in entries},
        {f"{kind} {name}": () for kind in variables for name in variables[kind]},
    )
    if mismatch:
        raise InputError(f"variables are not of {spec.arch}: {mismatch}")
    weights = {}
    for entry in entries:
        array = np.asarray(variables[entry.kind][entry.ours], np.float32)
        weights[entry.theirs] = entry.to_theirs(array)
        layer, _, name = entry.theirs.rpartition(".")
        if name == "running_var":
            weights[f"{layer}.num_batches_tracked"] = np.zeros((), np.int64)
    return weights


def load(
    path: str | Path,
    *,
    arch: str = "auto",
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    chosen: str = "",
) -> tuple[Classifier, Variables]:
    """The classifier whose weights are in a file of PyTorch, safetensors or Keras.

    `arch` "auto" recognises the layouts in `LAYOUTS`. `num_classes`, if given, is the number of
    classes that the head is to have: weights of another number, or without a head, get a new one
    (`import_weights`). Otherwise the number is read off the weights. `mean`, `std` and
    `image_shape` are those of the layout, unless given. `chosen` is the name of one of several sets
    of weights in the file. `Classifier.reading` says what was assumed. A network that is as common
    and looks alike is warned of. Raises `InputError` (see `files.read_file`, `identify`,
    `import_weights`).
    """
    weights, claim = read_file(path, chosen=chosen)
    recognised = arch == "auto"
    if recognised:
        arch = identify(weights)[0]
    require_choice("architecture with a weight import", arch, LAYOUTS)
    layout = LAYOUTS[arch]
    spec = ModelSpec(
        arch,
        num_classes or _num_classes(arch, weights, len(class_names)),
        layout.image_shape if image_shape is None else image_shape,
        layout.mean if mean is None else mean,
        layout.std if std is None else std,
    )
    spec = named(spec, class_names)
    classifier, shapes = models.outline(spec)
    given = None if mean is None or std is None else (spec.mean, spec.std)
    variables = import_weights(
        spec, shapes, weights, new_head=num_classes is not None, normalisation=given
    )
    if recognised and layout.twin:
        warnings.warn(
            f"{path} was taken for {arch} by its names and shapes, which {layout.twin} has too; "
            "compare the accuracy, and give a builder if it is that one",
            stacklevel=2,
        )
    assumed = _assumed(spec, given is None, "recognised as" if recognised else "taken as")
    return dataclasses.replace(classifier, reading=Reading(assumed, claim)), variables


def _assumed(spec: ModelSpec, normalisation: bool, how: str) -> str:
    """What weights of a known layout do not show, and was taken to be as in its source."""
    layout = LAYOUTS[spec.arch]
    has_norm = any(entry.kind == "batch_stats" for entry in layout.entries)
    parts = [layout.unseen, "ReLU", *(["batch-norm epsilon 1e-5"] if has_norm else [])]
    if normalisation:
        mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (spec.mean, spec.std))
        parts.append(f"images normalised with mean ({mean}) and std ({std})")
    return (
        f"{how} {spec.arch}, {layout.description}; assumed, because weights do not show it: "
        f"{', '.join(parts)}"
    )


def _num_classes(arch: str, weights: Weights, num_names: int) -> int:
    """The number of classes of the head; without one that of the names, or else any."""
    names = [entry.theirs for entry in LAYOUTS[arch].entries]
    biases = [entry.theirs for entry in LAYOUTS[arch].entries if entry.ours == "head.bias"]
    size = head_size(without_prefix(weights, names), dict.fromkeys(biases, 0))
    return size or num_names or 2
