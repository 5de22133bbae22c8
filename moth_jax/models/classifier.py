"""Classifiers as pure functions of a flat dict of arrays. Nothing outside `models/` names NNX."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moth_jax.errors import InputError
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
        for field, kind in kinds.items():
            object.__setattr__(self, field, tuple(map(kind, getattr(self, field))))
        _check_spec(self)

    def to_json(self) -> dict:
        """A dict of plain lists, numbers and strings."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        graph = values.pop("graph")
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return plain if graph is None else {**plain, "graph": graph.to_json()}

    @classmethod
    def from_json(cls, fields: dict) -> "ModelSpec":
        """The inverse of `to_json`."""
        graph = fields.get("graph")
        return cls(**{**fields, "graph": None if graph is None else Graph.from_json(graph)})


def _check_spec(spec: ModelSpec) -> None:
    if spec.num_classes < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {spec.num_classes}")
    if len(spec.image_shape) != 3 or min(spec.image_shape) < 1:
        raise InputError(f"image_shape must be (height, width, channels), got {spec.image_shape}")
    channels = spec.image_shape[-1]
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) != channels:
            raise InputError(
                f"{name} must have one value per channel ({channels}), got {len(values)}: {values}"
            )
    if max(map(abs, spec.mean)) > 1 or not all(0 < s <= 1 for s in spec.std):
        raise InputError(
            f"mean and std refer to pixels in [0,1], got mean {spec.mean}, std {spec.std}; "
            "divide by 255 if they are for pixels 0-255"
        )
    if spec.class_names and len(spec.class_names) != spec.num_classes:
        raise InputError(f"{spec.num_classes} classes but {len(spec.class_names)} class_names")


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier as functions of (variables, images [n h w c] in [0,1]); both can be jitted.

    `predict` gives logits [n K] in inference mode. `forward_train` normalises by the statistics of
    the batch and also returns the variables with the running statistics moved towards them.
    `frozen` says why that is impossible; it is empty where it is possible.
    """

    spec: ModelSpec
    predict: LogitsFn
    forward_train: TrainFn
    frozen: str = ""


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
