"""Programs of torch.export, read from their files as data. Needs no PyTorch, and runs nothing.

A `.pt2` file is a zip archive: a JSON file of operators and names, and the bytes of the weights.
Only these parts are read, whatever else is there. What the program computes is checked when it is a
`Graph`, as that of a checkpoint is.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy the names of bfloat16 and the 8-bit floats)
import numpy as np

from moth_jax.errors import InputError, first_line
from moth_jax.models.classifier import Classifier, ModelSpec
from moth_jax.models.program import Graph, Node, Ref, Stored, references
from moth_jax.models.pytorch import saved
from moth_jax.models.pytorch.classifier import from_graph
from moth_jax.models.pytorch.interpreter import check
from moth_jax.models.pytorch.mutation import without_mutation
from moth_jax.storage.files import unique_fields
from moth_jax.types import Variables

_SCHEMA = 8  # the major version that PyTorch writes from 2.6 on
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
# PyTorch's numbers for the types of numbers.
_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32",
    8: "float64", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn",
    30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 34: "uint32", 35: "uint64",
}  # fmt: skip
_STRIDED = 7
_POSITIONAL, _KEYWORD = 1, 2
# Arguments that say where a tensor lies and how: nothing that JAX would have to be told.
_PLACEMENTS = ("as_scalar_type", "as_memory_format", "as_layout", "as_device")
_DROPPED = ("device", "layout", "pin_memory", "memory_format", "dtype", "non_blocking", "copy")


class Program(NamedTuple):
    """A program's operators, its parameters, buffers and constants by name, and K."""

    graph: Graph
    arrays: Mapping[str, np.ndarray]
    num_classes: int


def read_program(path: str | Path) -> Program:
    """The program of a `.pt2` file.

    Raises:
      InputError: it is damaged, of another kind or version, or does what a classifier does not.
    """
    path = Path(path)
    return read(path, path, path.stat().st_size)


def read(file: Path | BinaryIO, name: Path | str, size: int) -> Program:
    """As `read_program`, of a file of `size` bytes that errors call `name`."""
    try:
        with zipfile.ZipFile(file) as archive:
            saved.check_parts(name, archive, size)
            return _program(archive, name, size)
    except InputError:
        raise
    except Exception as error:  # of any kind: what is in the file is not known yet
        raise InputError(
            f"{name} is no program of torch.export, or is damaged ({first_line(error)}); "
            "write it again with torch.export.save"
        ) from error


def from_program(
    program: Program,
    *,
    image_shape: tuple[int, int, int],
    mean: Iterable[float],
    std: Iterable[float],
    class_names: Iterable[str] = (),
    name: str = "",
) -> tuple[Classifier, Variables]:
    """The classifier of a program and its variables; the options are those of `from_torch`.

    Raises:
      InputError: an operator has no rule (with the layer it is in), or the batch size is fixed.
    """
    spec = ModelSpec(
        arch=name or "torch program",
        num_classes=program.num_classes,
        image_shape=image_shape,
        mean=tuple(mean),
        std=tuple(std),
        class_names=tuple(class_names),
        graph=program.graph,
    )
    classifier, _ = from_graph(program.graph, spec)
    check(program.graph, spec.image_shape, spec.num_classes, count=5)
    return classifier, {
        kind: {name: jnp.asarray(program.arrays[name]) for name in shapes}
        for kind, shapes in program.graph.shapes.items()
    }


# The archive


def _program(archive: zipfile.ZipFile, name: Path | str, size: int) -> Program:
    parts = archive.namelist()
    if "serialized_exported_program.json" in parts:  # of PyTorch 2.6 and 2.7
        model = "serialized_exported_program.json"
        blobs = ["serialized_constants.pt", "serialized_state_dict.pt"]
    else:
        root = parts[0].partition("/")[0]
        model = f"{root}/models/model.json"
        blobs = [f"{root}/data/constants/model.pt", f"{root}/data/weights/model.pt"]
    if model not in parts:
        raise InputError(f"{name} is no program of torch.export, which holds {model}")
    described = _json(archive, model)
    version = described["schema_version"]["major"]
    if version != _SCHEMA:
        raise InputError(
            f"{name} is a program of version {version!r}, and version {_SCHEMA} is known, which "
            "PyTorch writes from 2.6 on; export the model again there"
        )
    constants, state_dict = (
        saved.read_part(Path(name), archive.read(blob))
        if blob in parts
        else _raw(archive, blob, size)
        for blob in blobs
    )
    module = described["graph_module"]
    return _converted(module, {**constants, **state_dict}, tuple(state_dict))


def _json(archive: zipfile.ZipFile, part: str) -> Any:
    return json.loads(archive.read(part).decode(), object_pairs_hook=unique_fields)


def _raw(archive: zipfile.ZipFile, blob: str, size: int) -> dict[str, np.ndarray]:
    """The arrays whose bytes lie in parts of their own, by name."""
    folder = blob.rpartition("/")[0]
    kind = folder.rpartition("/")[2]
    config = _json(archive, f"{folder}/model_{kind}_config.json")["config"]
    arrays, numbers = {}, 0
    for name, meta in config.items():
        if meta["use_pickle"] or not _PAYLOAD.fullmatch(meta["path_name"]):
            raise InputError(
                f"{name!r} of the program is no plain tensor, or lies in a part of another name "
                f"({meta['path_name']!r}); export the model with plain tensors"
            )
        array = _strided(name, meta["tensor_meta"], archive, f"{folder}/{meta['path_name']}")
        numbers += array.size
        saved.check_numbers("the program", numbers, size)
        arrays[name] = array.astype(np.float32) if _is_float(array) else np.array(array)
    return arrays


def _strided(name: str, meta: dict, archive: zipfile.ZipFile, part: str) -> np.ndarray:
    """The view of the bytes of a part that `meta` describes."""
    if meta["layout"] != _STRIDED or meta["dtype"] not in _TYPES:
        raise InputError(
            f"{name!r} of the program is no plain array of numbers (layout {meta['layout']}, type "
            f"{meta['dtype']} of PyTorch's list); export the model with plain tensors"
        )
    kind = np.dtype(_TYPES[meta["dtype"]])
    shape, strides = ([_size(n) for n in meta[field]] for field in ("sizes", "strides"))
    offset = _size(meta["storage_offset"])
    data = np.frombuffer(archive.read(part), kind)
    if 0 in shape:
        return np.zeros(shape, kind)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= data.size:
        raise InputError(
            f"{name!r} of the program is said to have shape {shape}, and its part of the file has "
            f"{data.size} numbers; get the file again"
        )
    steps = [s * kind.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, steps, writeable=False)


def _is_float(array: np.ndarray) -> bool:
    """Whether an array holds floating numbers, also of the kinds that NumPy does not know."""
    return array.dtype.kind in "fV"


def _size(value: dict) -> int:
    size = value["as_int"]
    if type(size) is not int or size < 0:
        raise InputError(f"{size!r} is no size of a tensor; the program is damaged")
    return size


# Operators


def _converted(module: dict, arrays: dict[str, np.ndarray], persistent: tuple) -> Program:
    """The program that the JSON of a graph module describes."""
    graph = module["graph"]
    image, stored, parameters = _inputs(module["signature"]["input_specs"])
    logits = _output(module["signature"]["output_specs"])
    nodes = list(_nodes(graph["nodes"], stored))
    nodes, logits = without_mutation(nodes, logits)
    wanted = {logits, *references(tuple(nodes), Ref)}
    nodes = [n for n in nodes if n.op != "operator.getitem" or n.name in wanted]
    used = set(references(tuple(nodes), Stored))

    def kind(name):
        if name not in used:
            return "unused"
        return "params" if name in parameters else "batch_stats"

    shapes = {"params": {}, "batch_stats": {}, "unused": {}}
    for name, array in arrays.items():
        shapes[kind(name)][name] = tuple(array.shape)
    num_classes = _num_classes(graph["tensor_values"].get(logits))
    return Program(Graph(image, logits, tuple(nodes), shapes, persistent), arrays, num_classes)


def _inputs(specs: list) -> tuple[str, dict[str, str], set[str]]:
    """The name of the images; the names of stored tensors by those in the graph; the parameters."""
    images, stored, parameters = [], {}, set()
    for spec in specs:
        ((kind, fields),) = spec.items()
        if kind in ("parameter", "buffer", "tensor_constant"):
            stored[fields["arg"]["name"]] = name = fields[f"{kind}_name"]
            if kind == "parameter":
                parameters.add(name)
        else:  # an input of the user, a constant among them, an object
            images.append(fields.get("arg", {}).get("as_tensor", {}).get("name"))
    return _one("input", images), stored, parameters


def _output(specs: list) -> str:
    """The name of the logits; buffers that the program changes do not count."""
    outputs = [spec["user_output"]["arg"] for spec in specs if "user_output" in spec]
    return _one("output", [output.get("as_tensor", {}).get("name") for output in outputs])


def _one(what: str, names: list) -> str:
    if len(names) != 1 or not isinstance(names[0], str):
        raise InputError(
            f"the model must have one {what}, images or logits, but has {len(names)}; wrap it in a "
            "module whose forward takes images and returns logits"
        )
    return names[0]


def _num_classes(meta: dict | None) -> int:
    shape = [size.get("as_int", "n") for size in meta["sizes"]] if meta else []
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise InputError(f"the model must return logits [n, K], but returns shape {shape}")
    return shape[1]


def _nodes(nodes: list, stored: dict[str, str]) -> Iterator[Node]:
    """The operators; one of several results is followed by one that takes each of them out."""
    for index, node in enumerate(nodes):
        outputs = node["outputs"]
        if not outputs:
            continue  # a check of sizes
        op = node["target"].removeprefix("torch.ops.").removeprefix("_")
        args, kwargs = _arguments(op, node["inputs"], stored)
        layer = _layer(node["metadata"].get("nn_module_stack", ""))
        names = _results(outputs)
        if isinstance(names, str):
            yield Node(names, op, args, kwargs, layer)
            continue
        whole = node.get("name") or f"results_{index}"
        yield Node(whole, op, args, kwargs, layer)
        for position, name in enumerate(names):
            if name is not None:
                yield Node(name, "operator.getitem", (Ref(whole), position), (), layer)


def _results(outputs: list) -> str | list[str | None]:
    """The name of an operator's result, or the names of several."""
    if len(outputs) > 1:
        return [_name(output.get("as_tensor")) for output in outputs]
    ((kind, value),) = outputs[0].items()
    if kind == "as_tensors":
        return [_name(tensor) for tensor in value]
    return value["name"] if kind == "as_tensor" else value["as_name"]


def _name(tensor: dict | None) -> str | None:
    return None if tensor is None else tensor["name"]


def _arguments(op: str, inputs: list, stored: dict) -> tuple[tuple, tuple[tuple[str, Any], ...]]:
    """Those that are given by their places, and those that are given by their names."""
    args, kwargs = [], {}
    places = None
    for index, argument in enumerate(inputs):
        kind, name = argument.get("kind"), argument["name"]
        if kind is None:  # before PyTorch 2.8
            places = _places(op) if places is None else places
            is_next = len(args) == index and places[index : index + 1] == [name]
            kind = _POSITIONAL if is_next else _KEYWORD
        value = _value(argument["arg"], stored)
        if kind == _POSITIONAL:
            args.append(value)
        elif name not in _DROPPED:
            kwargs[name] = value
    return tuple(args), tuple(kwargs.items())


def _places(op: str) -> list[str]:
    """The arguments of an operator that may be given by place, in their order. Needs PyTorch."""
    package, name, overload = op.split(".") if op.count(".") == 2 else ("", op, "")
    if package != "aten":
        return ["a", "b"]  # those of Python's operators
    import torch  # pyright: ignore[reportMissingImports]

    schema = getattr(getattr(torch.ops.aten, name), overload)._schema
    return [argument.name for argument in schema.arguments if not argument.kwarg_only]


def _value(argument: dict, stored: dict[str, str]) -> Any:
    ((kind, value),) = argument.items()
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return _tensor(value, stored)
        case "as_int" | "as_bool" | "as_string":
            return value
        case "as_float":
            return float(value)
        case "as_ints" | "as_bools" | "as_strings":
            return tuple(value)
        case "as_floats":
            return tuple(map(float, value))
        case "as_tensors":
            return tuple(_tensor(item, stored) for item in value)
        case "as_sym_int" | "as_sym_float":
            return _number(value)
        case "as_sym_ints" | "as_sym_floats":
            return tuple(map(_number, value))
        case "as_optional_tensor":
            return _value(value, stored)
        case "as_optional_tensors":
            return tuple(_value(item, stored) for item in value)
    return None if kind in _PLACEMENTS else f"an argument {kind}"


def _tensor(value: dict, stored: dict[str, str]) -> Ref | Stored:
    name = value["name"]
    return Stored(stored[name]) if name in stored else Ref(name)


def _number(value: dict) -> Any:
    ((kind, content),) = value.items()
    return Ref(content) if kind == "as_name" else content


def _layer(stack: str) -> str:
    """The innermost of "key,path,class;key,path,class", as in "features.3 (Conv2d)"."""
    before, _, kind = stack.rpartition(";")[2].rpartition(",")
    path = before.partition(",")[2]
    return f"{path} ({kind.rpartition('.')[2]})" if path else ""
