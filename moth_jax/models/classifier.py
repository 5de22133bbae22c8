"""Classifiers as pure functions of a flat dict of arrays. Nothing outside `models/` names NNX."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moth_jax.errors import InputError, listed
from moth_jax.models.program import Graph
from moth_jax.types import LogitsFn, TrainFn, Variables


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to rebuild a classifier except its weights; goes into checkpoints as JSON.

    `image_shape` is (height, width, channels); `mean` and `std`, one per channel and of pixels in
    [0,1], are what the classifier normalises images with. `graph` is the program of a model that
    came from PyTorch (`pytorch.export`). Raises `InputError` if they do not fit.

    >>> spec = ModelSpec("small_cnn", 10, (8, 8, 1), mean=(0.3,), std=(0.4,))
    >>> ModelSpec.from_json(spec.to_json()) == spec
    True
    """

    arch: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    graph: Graph | None = None

    def __post_init__(self):
        # Lists come from JSON, NumPy numbers from data sets; these are hashable and go into JSON.
        kinds = {"image_shape": int, "mean": float, "std": float, "class_names": str}
        for name, kind in kinds.items():
            object.__setattr__(self, name, _plain(name, getattr(self, name), kind))
        check_num_classes(self.num_classes)
        check_image_shape(self.image_shape)
        check_normalisation(self.mean, self.std, self.image_shape[-1])
        check_class_names(self.class_names, self.num_classes)

    def to_json(self) -> dict:
        """A dict of plain lists, numbers and strings."""
        values = {each.name: getattr(self, each.name) for each in fields_of(self)}
        graph = values.pop("graph")
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return plain if graph is None else {**plain, "graph": graph.to_json()}

    @classmethod
    def from_json(cls, fields: Any) -> "ModelSpec":
        """The inverse of `to_json`; `InputError` for what it never returns."""
        names = {each.name for each in fields_of(cls)}
        required = names - {"class_names", "graph"}
        if not isinstance(fields, dict) or not required <= fields.keys() <= names:
            raise InputError(
                f"a model is described by {', '.join(sorted(names))}, got "
                f"{textwrap.shorten(str(fields), 200)}"
            )
        if not isinstance(fields["arch"], str):
            raise InputError(f"the architecture of a model is a name, got {fields['arch']!r}")
        graph = fields.get("graph")
        return cls(**{**fields, "graph": None if graph is None else Graph.from_json(graph)})


_MAX_CLASSES = 100_000  # a matrix of distances has an entry for each pair
_MAX_PIXELS, _MAX_CHANNELS = 2**26, 1024
_WHAT = {
    "image_shape": "whole numbers (height, width, channels)",
    "mean": "numbers, one per channel",
    "std": "numbers, one per channel",
    "class_names": "names, one per class",
}


def _plain(field: str, values: Any, kind: type) -> tuple:
    """Return the values of a field as a tuple of Python's own numbers or strings."""
    try:
        if isinstance(values, str) or (kind is not str and any(isinstance(v, str) for v in values)):
            raise TypeError
        plain = tuple(map(kind, values))
        if kind is int and any(a != b for a, b in zip(plain, values, strict=True)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{field} must be {_WHAT[field]}, got {values!r}") from None
    return plain


def check_num_classes(count: int) -> None:
    """Raise `InputError` unless a classifier can have this number of classes."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise InputError(f"the number of classes must be a whole number, got {count!r}")
    if count < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {count}")
    if count > _MAX_CLASSES:
        raise InputError(f"a classifier may have up to {_MAX_CLASSES:,} classes, got {count:,}")


def check_image_shape(shape: tuple[int, ...]) -> None:
    """Raise `InputError` unless images can have the shape (height, width, channels)."""
    shape = _plain("image_shape", shape, int)
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"image_shape must be (height, width, channels), got {shape}")
    if shape[0] * shape[1] > _MAX_PIXELS or shape[2] > _MAX_CHANNELS:
        raise InputError(
            f"image_shape may have up to {_MAX_PIXELS:,} pixels of {_MAX_CHANNELS:,} channels, "
            f"got {shape}"
        )


def check_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int | None = None
) -> None:
    """Raise `InputError` unless (x - mean) / std normalises pixels of this number of channels.

    What is None is not given, and not checked.
    """
    plain = {"mean": mean, "std": std}
    plain = {name: _plain(name, v, float) for name, v in plain.items() if v is not None}
    for name, values in plain.items():
        if channels is not None and len(values) != channels:
            raise InputError(
                f"{name} must have one value per channel ({channels}), got {len(values)}: {values}"
            )
        if not all(map(math.isfinite, values)):
            raise InputError(f"{name} must be finite numbers, one per channel, got {values}")
    mean, std = plain.get("mean", ()), plain.get("std", ())
    if any(abs(m) > 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise InputError(
            f"mean must be in [-1, 1] and std in (0, 1], for pixels in [0, 1], got mean {mean}, "
            f"std {std}; divide by 255 if they are for pixels 0-255"
        )


def check_class_names(names: tuple[str, ...], num_classes: int) -> None:
    """Raise `InputError` unless there are no names, or one for each class, distinct and visible."""
    if names and len(names) != num_classes:
        raise InputError(f"{num_classes} classes but {len(names)} class_names")
    unseen = [name for name in names if not name.strip() or not name.isprintable()]
    if unseen:
        raise InputError(
            f"class_names must be printable and not empty, got {listed(unseen)} at index "
            f"{names.index(unseen[0])}"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"class_names must be distinct, given more than once: {listed(twice)}")


class Claim(NamedTuple):
    """An accuracy, in [0, 1], that a file says its model has, and the name it has there."""

    name: str
    share: float


class Reading(NamedTuple):
    """What came with a model from a file beside the model itself.

    Attributes:
      assumed: what the file does not show of the model and was assumed; "" where it shows all.
      claim: the accuracy that the file says the model has; None if it says none.
    """

    assumed: str = ""
    claim: Claim | None = None


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier as functions of (variables, images [n h w c] in [0,1]); both can be jitted.

    `predict` gives logits [n K] in inference mode. `forward_train` normalises by the statistics of
    the batch and also returns the variables with the running statistics moved towards them.
    `frozen` says why that is impossible; it is empty where it is possible. `reading` is about the
    file that the model was read from.
    """

    spec: ModelSpec
    predict: LogitsFn
    forward_train: TrainFn
    frozen: str = ""
    reading: Reading = field(default_factory=Reading)


def normalise(spec: ModelSpec, images: jax.Array) -> jax.Array:
    """Images [n h w c] in [0,1] as the model expects them; `InputError` if they do not fit it."""
    if images.ndim != 4 or images.shape[1:] != spec.image_shape:
        height, width, channels = spec.image_shape
        raise InputError(
            f"{spec.arch} takes images [n, {height}, {width}, {channels}], "
            f"got shape {tuple(images.shape)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be floats in [0,1], got {images.dtype}; divide by 255")
    mean, std = (
        jnp.asarray(values, images.dtype).reshape(1, 1, 1, -1) for values in (spec.mean, spec.std)
    )
    return (images - mean) / std


def from_module(module: nnx.Module, spec: ModelSpec) -> tuple[Classifier, Variables]:
    """The pure functions of a module that maps normalised images to logits, and its variables.

    The module is left in evaluation mode. State other than parameters and batch statistics
    (dropout's random keys) is not supported: NNX refuses to split such a module.
    """
    module.train()
    graph_train, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    module.eval()
    graph_eval = nnx.graphdef(module)
    params, stats = nnx.as_pure(params), nnx.as_pure(stats)
    structure = {"params": jax.tree.structure(params), "batch_stats": jax.tree.structure(stats)}
    variables = {"params": flat(params), "batch_stats": flat(stats)}
    names = {kind: tuple(flat) for kind, flat in variables.items()}

    def build(graph, variables):
        # Merged from bare arrays: a model merged from nnx.Variables shares them, and updating its
        # batch-norm statistics would change those of the caller.
        states = [
            jax.tree.unflatten(structure[kind], [variables[kind][name] for name in names[kind]])
            for kind in ("params", "batch_stats")
        ]
        return nnx.merge(graph, *states)

    def predict(variables, images):
        return build(graph_eval, variables)(normalise(spec, images))

    def forward_train(variables, images):
        model = build(graph_train, variables)
        logits = model(normalise(spec, images))
        stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        return logits, {**variables, "batch_stats": flat(stats)}

    return Classifier(spec, predict, forward_train), variables


def describe_mismatch(expected: Mapping[str, tuple], given: Mapping[str, tuple]) -> str:
    """All differences between two sets of named shapes in one clause; empty if there are none.

    >>> describe_mismatch({"a": (2,), "b": (3,)}, {"a": (4,), "c": (1,)})
    '1 missing: b; 1 unused: c; 1 of another shape: a (4,), expected (2,)'
    """
    faults = {
        "missing": [name for name in expected if name not in given],
        "unused": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {given[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }
    return "; ".join(f"{len(n)} {what}: {', '.join(n)}" for what, n in faults.items() if n)


def flat(state) -> dict[str, Any]:
    """The leaves of a pytree under their paths, joined by dots.

    >>> flat({"a": [1, 2]})
    {'a.0': 1, 'a.1': 2}
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {".".join(_key(part) for part in path): leaf for path, leaf in leaves}


def _key(part) -> str:
    return str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))


def complete(variables: Variables) -> Variables:
    """Put back the empty collections, which Orbax does not keep."""
    return {"params": {}, "batch_stats": {}, **variables}
