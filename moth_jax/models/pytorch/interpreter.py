"""Classifiers given as a graph of PyTorch operators, run in JAX without PyTorch.

A `Graph` is plain data: `export` makes it, checkpoints hold it as JSON, and nothing but this module
is needed to run it. Names of parameters are the PyTorch module's own.
"""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moth_jax.errors import InputError, first_line
from moth_jax.models.program import Graph, Node, Ref, Stored, references
from moth_jax.models.pytorch import tensors
from moth_jax.models.pytorch.rules import RULES
from moth_jax.models.pytorch.tensors import Tensor, plain
from moth_jax.types import ImageShape, Variables

# What an operator raises for arguments that do not fit; a lack of memory is no such fault.
_MISFITS = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    RecursionError,
)
_LARGEST_RESULT = 2**30  # numbers of one operator, of one image
_LONGEST_CHECK = 120  # seconds; the longest programs of torchvision take two


def _batch_norm_arguments(node: Node) -> tuple:
    """(x, scale, bias, mean, var, momentum, epsilon) of any of the operators."""
    args = node.args + tuple(value for _, value in node.kwargs)
    x, scale, bias, mean, var, *rest = [*args, *[None] * (7 - len(args))]
    numbers = [value for value in rest if not isinstance(value, bool)]  # the mode is ours to choose
    if not (isinstance(mean, Stored) and isinstance(var, Stored)):
        raise InputError(
            f"{_place(node)} has no running statistics; build the model with track_running_stats"
        )
    if not all(isinstance(n, int | float | None) for n in numbers) or len(numbers) < 2:
        raise InputError(f"{_place(node)} has the momentum and epsilon {numbers!r}")
    return x, scale, bias, mean, var, *numbers[:2]


# Whether the result is a tuple whose first element counts.
BATCH_NORMS = {
    "aten._native_batch_norm_legit_no_training.default": True,
    "aten._native_batch_norm_legit.default": True,
    "aten._native_batch_norm_legit_functional.default": True,
    "aten.native_batch_norm.default": True,
    "aten.batch_norm.default": False,
}


def check_operators(graph: Graph) -> None:
    """Raise `InputError` naming every operator without a rule, with the layers it is in."""
    layers: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op not in RULES and node.op not in BATCH_NORMS:
            layers.setdefault(node.op, []).append(node.layer or "the model itself")
    if not layers:
        return
    named = "; ".join(
        f"{op} (in {', '.join(sorted(set(where))[:4])})" for op, where in sorted(layers.items())
    )
    raise InputError(
        f"no JAX rule for {len(layers)} of the model's operators: {named}; write that part with "
        "other layers, or add a rule to moth_jax/models/pytorch/rules.py"
    )


@lru_cache(maxsize=16)
def check(graph: Graph, image_shape: ImageShape, num_classes: int, count: int = 3) -> None:
    """Raise `InputError` unless a program gives logits [count, K] for images of a shape.

    Nothing is computed: the shapes of all results are found, and none may be beyond bounds. A
    program is checked once in a process.
    """
    check_operators(graph)
    started = time.monotonic()

    def watch(node: Node, result) -> None:
        if time.monotonic() - started > _LONGEST_CHECK:
            raise InputError(f"the program is too long: at {_place(node)} its check is given up")
        for x in result if isinstance(result, list) else [result]:
            if isinstance(x, Tensor) and x.array.size > count * _LARGEST_RESULT:
                raise InputError(
                    f"{_place(node)} makes {x.array.size} numbers of {count} images, and at most "
                    f"{_LARGEST_RESULT} of each are allowed; convert the model again"
                )

    def logits(variables, images):
        return run(graph, variables, images, train=False, watch=watch)[0]

    images = jax.ShapeDtypeStruct((count, *image_shape), jnp.float32)
    shape = jax.eval_shape(logits, outline(graph), images).shape
    if shape != (count, num_classes):
        raise _not_for_any_number(f"{count} images give logits {list(shape)}")


def _not_for_any_number(reason: str) -> InputError:
    return InputError(
        f"the program does not run with any number of images ({reason}); export it with "
        "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), for images of the size given"
    )


def outline(graph: Graph) -> Variables:
    """The shapes of a program's variables."""
    return {
        kind: {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        for kind, shapes in graph.shapes.items()
    }


def why_frozen(graph: Graph) -> str:
    """Why batch normalisation cannot be updated in training; empty if it can.

    Statistics that other operators read (a program whose batch normalisation is taken apart into
    arithmetic) or that average over all batches seen (momentum None) cannot be followed.
    """
    own, momenta = set(), []
    for node in graph.nodes:
        if node.op in BATCH_NORMS:
            _, _, _, mean, var, momentum, _ = _batch_norm_arguments(node)
            own |= {mean.name, var.name}
            momenta.append((momentum, node.layer))
    for momentum, layer in momenta:
        if not momentum:
            return f"{layer} averages its statistics over all batches (momentum None)"
    statistics = {name for name in graph.shapes["batch_stats"] if "running_" in name}
    lost = sorted(statistics - own)
    if lost:
        return f"{', '.join(lost[:3])} are used outside of batch normalisation"
    return ""


def run(
    graph: Graph,
    variables: Mapping,
    images: jax.Array,
    *,
    train: bool,
    watch: Callable[[Node, Any], None] = lambda node, result: None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits [n K] of normalised images [n h w c], and the batch statistics afterwards.

    With `train`, batch normalisation takes the statistics of the batch and moves the running ones
    towards them (the unbiased variance, as PyTorch does); everything else is in evaluation mode.
    `watch` sees each operator with its result.

    Raises:
      InputError: an operator does not take what it is given, as with another number of images than
        the program was made for.
    """
    try:
        return _run(graph, variables, images, train, watch)
    except InputError:
        raise
    except _MISFITS as error:
        notes = getattr(error, "__notes__", [])  # that of `_apply`, and what JAX adds at length
        place = [note for note in notes if "\n" not in note][:1]
        raise _not_for_any_number(" in ".join([first_line(error), *place])) from error


def _run(graph, variables, images, train, watch):
    stats = dict(variables["batch_stats"])
    stored = {
        name: tensors.tensor(_in_precision(array, images.dtype))
        for kind in ("params", "batch_stats")
        for name, array in variables[kind].items()
    }
    values: dict[str, Any] = {graph.image: tensors.from_images(images)}
    last_uses = _last_uses(graph)
    for index, node in enumerate(graph.nodes):
        if node.op in BATCH_NORMS:
            arguments = _resolve(_batch_norm_arguments(node), values, stored)
            values[node.name] = _batch_norm(node, arguments, stats, train)
        else:
            values[node.name] = _apply(node, values, stored)
        watch(node, values[node.name])
        values[node.name] = _marked(node.name, values[node.name])
        for name in last_uses.get(index, ()):
            del values[name]
    return plain(values[graph.logits]), stats


def _marked(name: str, value):
    """A result, images [n c h w] being marked as a feature map [n h w c] (`models.features`)."""
    is_map = isinstance(value, Tensor) and value.order == tensors.CHANNELS_LAST
    return Tensor(checkpoint_name(value.array, name), value.order) if is_map else value


def _in_precision(array, dtype):
    """An array in the images' precision (float64 to compare, bfloat16 for speed); indices stay."""
    array = jnp.asarray(array)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _apply(node: Node, values: dict, stored: dict):
    arguments = _resolve(node.args, values, stored)
    options = {name: _resolve(value, values, stored) for name, value in node.kwargs}
    try:
        return RULES[node.op](*arguments, **options)
    except InputError as error:
        raise InputError(f"{_place(node)}: {error}") from error
    except Exception as error:
        error.add_note(_place(node))
        raise


def _place(node: Node) -> str:
    return f"{node.op} in {node.layer or 'the model'}"


def _last_uses(graph: Graph) -> dict[int, list[str]]:
    """Which results no node needs after each node: they are dropped, for there are thousands."""
    last = {}
    for index, node in enumerate(graph.nodes):
        for name in references(node, Ref):
            last[name] = index
    last.pop(graph.logits, None)
    uses: dict[int, list[str]] = {}
    for name, index in last.items():
        uses.setdefault(index, []).append(name)
    return uses


def _resolve(value, values: dict, stored: dict):
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, Stored):
        return stored[value.name]
    if isinstance(value, tuple):
        return [_resolve(item, values, stored) for item in value]
    return value


def _batch_norm(node: Node, arguments: list, stats: dict, train: bool):
    x, scale, bias, mean, var, momentum, epsilon = arguments
    channel = x.axis(1)
    mean, var = plain(mean), plain(var)
    if train:
        names = [ref.name for ref in _batch_norm_arguments(node)[3:5]]
        mean, var = _update(x.array, channel, stats, names, momentum)
    factor = lax.rsqrt(var + epsilon)
    factor = factor if scale is None else factor * plain(scale)
    offset = -mean * factor if bias is None else plain(bias) - mean * factor
    shape = [1] * x.ndim
    shape[channel] = -1
    result = Tensor(x.array * factor.reshape(shape) + offset.reshape(shape), x.order)
    return [result] if BATCH_NORMS[node.op] else result


def _update(x, channel, stats, names, momentum):
    axes = tuple(axis for axis in range(x.ndim) if axis != channel)
    count = x.size // x.shape[channel]
    mean = x.mean(axes)
    var = jnp.square(x - jnp.expand_dims(mean, axes)).mean(axes)
    unbiased = var * (count / max(count - 1, 1))
    for name, new in zip(names, (mean, unbiased), strict=True):
        old = stats[name]
        stats[name] = (1 - momentum) * old + momentum * lax.stop_gradient(new).astype(old.dtype)
    return mean, var
