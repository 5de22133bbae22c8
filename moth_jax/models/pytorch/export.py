"""PyTorch modules and exported programs to graphs. Needs torch, and only to convert."""

import copy
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from moth_jax.errors import InputError, first_line
from moth_jax.models.classifier import Classifier, ModelSpec
from moth_jax.models.program import Graph, Node, Ref, Stored
from moth_jax.models.pytorch.classifier import from_graph
from moth_jax.models.pytorch.interpreter import check_operators
from moth_jax.types import Variables

_PYTHON_OPERATORS = {
    getattr(operator, name): f"operator.{name}"
    for name in ("getitem", "add", "sub", "mul", "floordiv", "neg")
}
# What torch.export raises, and what a module's own code may: its own kinds derive from these.
_EXPORT_FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
)
# Where a tensor lies and how: nothing that JAX would have to be told.
_DROPPED = ("device", "layout", "pin_memory", "memory_format", "dtype", "non_blocking", "copy")


def from_torch(
    model: "torch.nn.Module | torch.export.ExportedProgram",
    *,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
    name: str = "",
) -> tuple[Classifier, Variables]:
    """Turn a PyTorch classifier into a pure JAX function and its parameters.

    Args:
      model: a module from images [n c h w] to logits [n K], which stays as it is, or a program
        that `torch.export` made of one with a free batch size.
      image_shape: (h, w, c) of the images.
      mean, std: one per channel, of pixels in [0, 1]: what images are normalised with before they
        reach the module. (0, 0, 0) and (1, 1, 1) if it normalises itself.
      class_names: K names, if known.
      name: of the architecture; the module's class if not given.

    Returns:
      The classifier, and its variables under the module's own names. `forward_train` updates batch
      normalisation; everything else, dropout included, is as in evaluation mode.

    Raises:
      InputError: an operator has no rule (with the layer it is in), the batch size is fixed, or the
        result is not one array of logits.

    Note: Dropout is left out in training. The published hardening leaves it out as well, since its
    model stays in evaluation mode, and a trigger's stamp is to be unlearned by the whole network.
    """
    if isinstance(model, torch.nn.Module):
        name = name or type(model).__name__
    program = _program(model, image_shape)
    graph, arrays = _graph(program, _names(model, program))
    check_operators(graph)
    spec = ModelSpec(
        arch=name or "torch program",
        num_classes=_num_classes(program),
        image_shape=image_shape,
        mean=tuple(mean),
        std=tuple(std),
        class_names=tuple(class_names),
        graph=graph,
    )
    classifier, outline = from_graph(graph, spec)
    _check_batch_size(classifier, outline)
    return classifier, _variables(graph, arrays)


def _program(model, image_shape) -> "torch.export.ExportedProgram":
    """The program without operators that change their arguments, composite ones kept."""
    height, width, channels = image_shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of its own deprecations
        if isinstance(model, torch.nn.Module):
            model = _exported(model, torch.zeros(2, channels, height, width))
        try:
            return model.run_decompositions({})
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"torch.export cannot simplify the program: {first_line(error)}"
            ) from error


def _exported(module, images):
    own = copy.deepcopy(module).cpu().float().eval()
    free_batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad():
            return torch.export.export(own, (images,), dynamic_shapes=free_batch)
    except _EXPORT_FAULTS as error:
        raise InputError(
            f"torch.export cannot turn {type(module).__name__} into a program for images "
            f"{tuple(images.shape[1:])} with a free batch size: {first_line(error)}"
        ) from error


def _names(model, program) -> tuple[str, ...]:
    """The names of the state_dict; a program has all parameters before all buffers."""
    is_module = isinstance(model, torch.nn.Module)
    return tuple(model.state_dict()) if is_module else tuple(program.state_dict)


def _graph(program, names: tuple[str, ...]) -> tuple[Graph, dict[str, np.ndarray]]:
    signature = program.graph_signature
    stored = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    image, logits = _one("input", signature.user_inputs), _one("output", signature.user_outputs)
    arrays = _arrays(program)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    used = {stored[n.name] for n in program.graph.nodes if n.name in stored and n.users}
    parameters = set(signature.parameters)

    def kind(name):
        if name not in used:
            return "unused"
        return "params" if name in parameters else "batch_stats"

    shapes = {"params": {}, "batch_stats": {}, "unused": {}}
    for name, array in arrays.items():
        shapes[kind(name)][name] = tuple(array.shape)
    converted = tuple(_node(n, stored) for n in nodes)
    return Graph(image, logits, converted, shapes, names), arrays


def _one(what, names):
    if len(names) != 1 or not isinstance(names[0], str):
        raise InputError(
            f"the model must have one {what}, images or logits, but has {len(names)}; wrap it in a "
            "module whose forward takes images and returns logits"
        )
    return names[0]


def _arrays(program) -> dict[str, np.ndarray]:
    """All parameters, buffers and constants; floating ones as float32."""
    tensors = {**program.constants, **program.state_dict}
    arrays = {}
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            arrays[name] = (value.float() if value.is_floating_point() else value).numpy()
    return arrays


def _node(node, stored) -> Node:
    target = _PYTHON_OPERATORS.get(node.target, str(node.target))

    def convert(value) -> Any:
        if isinstance(value, torch.fx.Node):
            return Stored(stored[value.name]) if value.name in stored else Ref(value.name)
        if isinstance(value, list | tuple):
            return tuple(convert(item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return str(value)

    kwargs = {k: convert(v) for k, v in node.kwargs.items() if k not in _DROPPED}
    return Node(node.name, target, convert(node.args), tuple(kwargs.items()), _layer(node))


def _layer(node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{path} ({kind.rpartition('.')[2]})" if path else ""


def _num_classes(program) -> int:
    output = next(iter(program.graph.output_node().args[0]))
    shape = tuple(output.meta["val"].shape)
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise InputError(f"the model must return logits [n, K], but returns shape {list(shape)}")
    return shape[1]


def _check_batch_size(classifier: Classifier, variables: Variables) -> None:
    """Raise `InputError` if the program was exported for one batch size."""
    for count in (3, 5):
        images = jax.ShapeDtypeStruct((count, *classifier.spec.image_shape), jnp.float32)
        try:
            shape = jax.eval_shape(classifier.predict, variables, images).shape
        except InputError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            raise _fixed_batch(first_line(error)) from error
        if shape != (count, classifier.spec.num_classes):
            raise _fixed_batch(f"{count} images give logits {list(shape)}")


def _fixed_batch(reason: str) -> InputError:
    return InputError(
        "the program does not run with any number of images "
        f"({reason}); export it with "
        "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), for images of the size given"
    )


def _variables(graph: Graph, arrays: dict[str, np.ndarray]) -> Variables:
    return {
        kind: {name: jnp.asarray(arrays[name]) for name in shapes}
        for kind, shapes in graph.shapes.items()
    }
