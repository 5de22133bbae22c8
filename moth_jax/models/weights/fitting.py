"""Weights of a file fitted to a model: without the prefix of a wrapper, and with another head.

Names and arrays are those of the file. `head` says which arrays have a row or column for each
class: {name: axis of the classes}.
"""

import dataclasses
import re
import string
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from moth_jax.errors import InputError, listed
from moth_jax.models.classifier import ModelSpec, describe_mismatch

Weights = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]] | None
# Follows "--num-classes" in messages.
_RENEW = "(num_classes in Python, model.fine_tune in a run) draws a new one, to be trained"


def fit(
    weights: Weights,
    shapes: Shapes,
    *,
    what: str,
    head: Mapping[str, int],
    fresh: Callable[[], Weights] | None = None,
    normalisation: Normalisation = None,
) -> Weights:
    """The weights under the names that a model gives them, checked to have its `shapes`.

    Counters of PyTorch are ignored: nothing computes with them, and old files lack them. Weights of
    a loss are left out with a warning: logits do not depend on them.

    Args:
      weights: from a file.
      shapes: of all arrays of the model.
      what: the model, for messages.
      head: its arrays with an axis of classes.
      fresh: draws arrays anew; if given, those of the head that are missing or of another number of
        classes come from there, with a warning. Everything else must fit all the same.
      normalisation: the mean and std that were given for the model. A layer of the file with the
        same ones is left out; any other is named, with its numbers.

    Raises:
      InputError: naming every array that is missing, unused or of another shape, the number of
        classes of the head if that is another, and what prefix the names have.
    """
    prefix = foreign_prefix(weights, shapes)
    found = _without_prefix(weights, prefix)
    extra = {name: array for name, array in found.items() if name not in shapes}
    layers = _normalisations(extra)
    known = {name for layer in layers if _is_given(layer, normalisation) for name in layer.names}
    losses = [name for name in extra if _is_of_loss(name)]
    found = {name: array for name, array in found.items() if name not in {*known, *losses}}
    given = {name: array.shape for name, array in found.items() if not _is_counter(name)}
    expected = {name: tuple(shape) for name, shape in shapes.items() if not _is_counter(name)}
    renewed = [] if fresh is None else _renewed(given, expected, head)
    mismatch = describe_mismatch(_without(expected, renewed), _without(given, renewed))
    if mismatch:
        hints = _about_head(given, expected, head) + _about_prefix(prefix, given, expected)
        hints += _about_normalisation([la for la in layers if not known.issuperset(la.names)])
        raise InputError(f"the weights do not fit {what}: {mismatch}{hints}")
    if losses:
        warnings.warn(
            f"left out, as weights of a loss, on which logits do not depend: {listed(losses, str)}",
            stacklevel=2,
        )
    if fresh is None or not renewed:
        return found
    size = head_size(found, {name: head[name] for name in renewed})
    theirs = "no head" if size is None else f"a head of {size} classes"
    wanted = expected[renewed[0]][head[renewed[0]]]
    warnings.warn(
        f"the weights have {theirs}, {what} is to have {wanted}; drawn anew: {', '.join(renewed)}; "
        "train the model before its numbers mean anything",
        stacklevel=2,
    )
    drawn = fresh()
    return {**found, **{name: drawn[name] for name in renewed}}


def own_names(weights: Weights) -> set[str]:
    """The names of what computes logits: without counters, losses and a normalisation of images."""
    layers = _normalisations(weights)
    beside = {name for layer in layers for name in layer.names}
    return {n for n in weights if n not in beside and not _is_counter(n) and not _is_of_loss(n)}


def check_floats(weights: Weights, names: Iterable[str], what: str) -> None:
    """Raise `InputError` if any of these weights are no floating-point numbers.

    Integers in their place are quantised weights, which mean something else.
    """
    odd = [f"{name} ({weights[name].dtype})" for name in names if weights[name].dtype.kind != "f"]
    if odd:
        raise InputError(
            f"{what} has floating-point weights, but these are none: {listed(odd, str)}; save the "
            "state_dict of the model before it was quantised"
        )


def head_size(weights: Weights, head: Mapping[str, int]) -> int | None:
    """The number of classes, read off the last array of the head; None without one.

    >>> head_size({"fc.bias": np.zeros(7)}, {"fc.weight": 0, "fc.bias": 0})
    7
    """
    sizes = [
        weights[name].shape[axis]
        for name, axis in head.items()
        if name in weights and weights[name].ndim > axis
    ]
    return sizes[-1] if sizes else None


def named(
    spec: ModelSpec, class_names: tuple[str, ...], *, head_is_fixed: bool = False
) -> ModelSpec:
    """The spec with these names of its classes, if any; `InputError` if there are more or fewer."""
    size, wanted = spec.num_classes, len(class_names)
    if wanted not in (0, size):
        way_out = "name them all" if head_is_fixed else f"--num-classes={wanted} {_RENEW}"
        raise InputError(f"the head has {size} classes, but {wanted} are named: {way_out}")
    return dataclasses.replace(spec, class_names=class_names)


def without_prefix(weights: Weights, names: Collection[str]) -> Weights:
    """The weights without their `foreign_prefix`; names that do not begin with it stay."""
    return _without_prefix(weights, foreign_prefix(weights, names))


def foreign_prefix(weights: Collection[str], names: Collection[str]) -> str:
    """The prefix whose removal turns most of the weights' names into `names`; "" if none helps.

    A wrapper puts its own before all names: `module.` (DataParallel), `_orig_mod.` (torch.compile),
    `model.` (Lightning), and so on, one in another.

    >>> foreign_prefix(["module.net.fc.weight", "module.net.fc.bias"], ["fc.weight", "fc.bias"])
    'module.net.'
    """
    best, most = "", len(set(weights) & set(names))
    for prefix in _prefixes(weights):
        bare = {name.removeprefix(prefix) for name in weights}
        if len(bare) == len(weights) and len(bare & set(names)) > most:
            best, most = prefix, len(bare & set(names))
    return best


def shared_prefix(names: Iterable[str]) -> str:
    """What all names begin with, to the last dot.

    >>> shared_prefix(["net.fc.weight", "net.fc.bias"]), shared_prefix(["a.b", "c.b"])
    ('net.fc.', '')
    """
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def _prefixes(names: Collection[str]) -> list[str]:
    """All prefixes of at least half of the names, the shortest first."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    return sorted((p for p, count in counts.items() if 2 * count >= len(names)), key=len)


def _without_prefix(weights, prefix):
    return {name.removeprefix(prefix): array for name, array in weights.items()}


def _is_counter(name):
    """Whether an array counts batches, or models that were averaged (`torch.optim.swa_utils`)."""
    return name.rpartition(".")[2] in ("num_batches_tracked", "n_averaged")


_LOSS = re.compile(r"(criterion|loss|loss_?(fn|func|function|module)|(ce|bce|train)_?loss)(_?\d+)?")


def _is_of_loss(name: str) -> bool:
    return any(_LOSS.fullmatch(part) for part in name.lower().split(".")[:-1])


class _Layer(NamedTuple):
    """Two arrays that look like a normalisation of images, and their numbers for [0, 1]."""

    names: tuple[str, str]
    mean: np.ndarray
    std: np.ndarray


_MEANS = {"mean": "std", "mu": "sigma", "means": "stds"}
_MAX_CHANNELS = 4


def _normalisations(arrays: Weights) -> list[_Layer]:
    """The normalisations of images among some arrays, such as `mu` and `sigma`, or `0.mean`."""
    layers = []
    for name, mean in arrays.items():
        stem = name.rstrip(string.ascii_lowercase)
        other = stem + _MEANS.get(name.removeprefix(stem), "")
        std = arrays.get(other)
        if std is None or other == stem or not 1 <= mean.size == std.size <= _MAX_CHANNELS:
            continue
        unit = 255 if max(mean.max(), std.max()) > 1 else 1
        layers.append(_Layer((name, other), mean.ravel() / unit, std.ravel() / unit))
    return layers


def _is_given(layer: _Layer, normalisation: Normalisation) -> bool:
    return normalisation is not None and all(
        own.size in (1, len(given)) and np.allclose(given, own, rtol=1e-3, atol=1e-4)
        for given, own in zip(normalisation, layer[1:], strict=True)
    )


def _about_normalisation(layers: list[_Layer]) -> str:
    """What a message adds about layers that normalise images."""
    if not layers:
        return ""
    layer = layers[0]
    mean, std = (",".join(f"{x:.6g}" for x in values) for values in layer[1:])
    return (
        f"; {' and '.join(layer.names)} seem to normalise images in the model: give --mean={mean} "
        f"--std={std} (mean and std in Python, model.mean and model.std in a run), or a builder of "
        "the whole module"
    )


def _without(shapes, names):
    return {name: shape for name, shape in shapes.items() if name not in names}


def _renewed(given: Shapes, expected: Shapes, head: Mapping[str, int]) -> list[str]:
    """The arrays of the head that are missing, or differ in the number of classes alone."""
    return [name for name in head if name not in given] + _resized(given, expected, head)


def _resized(given: Shapes, expected: Shapes, head: Mapping[str, int]) -> list[str]:
    """The arrays that differ along the axis of the classes alone."""

    def body(shape, axis):
        return len(shape), shape[:axis], shape[axis + 1 :]

    return [
        name
        for name, axis in head.items()
        if name in given
        and given[name] != expected[name]
        and body(given[name], axis) == body(expected[name], axis)
    ]


def _about_head(given: Shapes, expected: Shapes, head: Mapping[str, int]) -> str:
    """What a message adds if the head is at fault, or seems to be where no head is known."""
    missing = {name for name in expected if name not in given}
    misshaped = {name for name in expected if name in given and given[name] != expected[name]}
    # PyTorch has the classes in front. Another width of a hidden layer shows behind, too.
    axes = head or {name: 0 for name, shape in expected.items() if shape}
    resized = _resized(given, expected, axes)
    pairs = {(given[name][axes[name]], expected[name][axes[name]]) for name in resized}
    if len(pairs) == 1 and (head or misshaped == set(resized)):
        found, wanted = pairs.pop()
        return (
            f"; the head has {found} classes, the model {wanted}: --num-classes={wanted} {_RENEW}"
        )
    sizes = {expected[name][axes[name]] for name in missing if name in axes}
    if missing and missing <= axes.keys() and len(sizes) == 1 and not misshaped:
        return f"; where a file has no head, --num-classes {_RENEW}"
    return ""


def _about_prefix(prefix: str, given: Shapes, expected: Shapes) -> str:
    """What a message adds if a prefix was cut off, or if no name is common to both."""
    if prefix:
        return f" (names without their prefix {prefix!r})"
    if given.keys() & expected.keys():
        return ""
    return "".join(
        f"; all names of {whose} begin with {shared_prefix(names)!r}"
        for whose, names in (("the file", given), ("the model", expected))
        if shared_prefix(names)
    )
