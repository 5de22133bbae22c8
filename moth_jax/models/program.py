"""A program of PyTorch operators as plain data, which goes into checkpoints as JSON."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moth_jax.errors import InputError

_MOST_NODES = 50_000
_MOST_NUMBERS = 2**31  # of one array
_LARGEST = 2**63  # of the integers, as PyTorch's are; it ends a slice at the largest
_LONGEST = 1000  # of names
_DEEPEST = 5  # of tuples in arguments
_KINDS = ("params", "batch_stats", "unused")


class Ref(NamedTuple):
    """An argument that is the result of another node."""

    name: str


class Stored(NamedTuple):
    """An argument that is a parameter or buffer."""

    name: str


class Node(NamedTuple):
    """One operator: `args` are numbers, strings, None, `Ref`, `Stored` and tuples of these."""

    name: str
    op: str
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]
    layer: str  # of the module it comes from, such as "features.3"


@dataclass(frozen=True)
class Graph:
    """A program from images to logits.

    Attributes:
      image: the name of the images [n c h w].
      logits: the name of the result [n K].
      nodes: in the order of computation.
      shapes: of the parameters ("params"), of the batch-norm statistics and other buffers that are
        used ("batch_stats"), and of what the module has but the program does not use ("unused"):
        that is kept for an export back to PyTorch.
      persistent: names that belong to the module's state_dict.

    Raises:
      InputError: names, arguments or shapes are of another type than these, or a node uses what
        is computed after it. What an operator makes of its arguments is checked by
        `pytorch.interpreter.check`.
    """

    image: str
    logits: str
    nodes: tuple[Node, ...]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    persistent: tuple[str, ...]

    def __post_init__(self):
        _check_shapes(self.shapes)
        _check_names("state_dict", self.persistent)
        _check_nodes(self)

    def to_json(self) -> dict:
        """A dict of plain lists, numbers and strings."""
        return {
            "image": self.image,
            "logits": self.logits,
            "nodes": [
                [n.name, n.op, _encode(n.args), _encode(n.kwargs), n.layer] for n in self.nodes
            ],
            "shapes": {
                kind: {name: list(shape) for name, shape in shapes.items()}
                for kind, shapes in self.shapes.items()
            },
            "persistent": list(self.persistent),
        }

    @classmethod
    def from_json(cls, fields: dict) -> "Graph":
        """The inverse of `to_json`.

        Raises:
          InputError: the fields are not what it writes.
        """
        try:
            return cls._from_json(fields)
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _damaged(f"it is not in the form that this package writes ({error!r})") from error

    @classmethod
    def _from_json(cls, fields: dict) -> "Graph":
        return cls(
            image=fields["image"],
            logits=fields["logits"],
            nodes=tuple(
                Node(name, op, _decode(args), _decode(kwargs), layer)
                for name, op, args, kwargs, layer in fields["nodes"]
            ),
            shapes={
                kind: {name: tuple(shape) for name, shape in shapes.items()}
                for kind, shapes in fields["shapes"].items()
            },
            persistent=tuple(fields["persistent"]),
        )

    def __hash__(self):
        return hash((self.image, self.logits, self.nodes))


def _encode(value):
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Stored):
        return {"stored": value.name}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decode(value) -> Any:
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return {"ref": Ref, "stored": Stored, "float": float}[kind](content)
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    return value


def references(value, kind: type[Ref] | type[Stored]) -> Iterator[str]:
    """The names of one kind in an argument, a tuple of arguments, a node, or several nodes."""
    if isinstance(value, kind):
        yield value.name
    elif isinstance(value, tuple) and not isinstance(value, Ref | Stored):
        for item in value:
            yield from references(item, kind)


def _damaged(what: str) -> InputError:
    return InputError(f"the model's program is damaged: {what}; convert the model again")


def _check_shapes(shapes: Mapping) -> None:
    if set(shapes) != set(_KINDS):
        raise _damaged(f"it has shapes of {sorted(map(str, shapes))}, not of {', '.join(_KINDS)}")
    names = [name for kind in shapes.values() for name in kind]
    _check_names("weights", names)
    for kind in shapes.values():
        for name, shape in kind.items():
            if not all(type(size) is int and size >= 0 for size in shape):
                raise _damaged(f"{name!r} cannot have the shape {_short(shape)}")
            if math.prod(shape) > _MOST_NUMBERS:
                raise _damaged(f"{name!r} has {_short(shape)} numbers, more than {_MOST_NUMBERS}")


def _check_names(what: str, names) -> None:
    for name in names:
        if not isinstance(name, str) or len(name) > _LONGEST:
            raise _damaged(f"{_short(name)} is no name in the {what}")
    if len(set(names)) < len(names):
        raise _damaged(f"a name comes twice in the {what}")


def _check_nodes(graph: Graph) -> None:
    """Raise `InputError` unless each node has a name of its own and uses what is there before."""
    if len(graph.nodes) > _MOST_NODES:
        raise _damaged(f"it has {len(graph.nodes)} operators, more than {_MOST_NODES}")
    _check_names("operators", [graph.image, *(node.name for node in graph.nodes)])
    weights = {*graph.shapes["params"], *graph.shapes["batch_stats"]}
    known = {graph.image}
    for node in graph.nodes:
        if not isinstance(node.op, str) or not isinstance(node.layer, str):
            raise _damaged(f"{node.name!r} is {_short(node.op)} of {_short(node.layer)}")
        if not (isinstance(node.args, tuple) and _is_named(node.kwargs)):
            raise _damaged(f"{node.name!r} has no arguments")
        for value in (node.args, tuple(value for _, value in node.kwargs)):
            _check_argument(node.name, value, 0)
        for name in {*references(node, Ref)} - known | {*references(node, Stored)} - weights:
            raise _damaged(f"{node.name!r} uses {_short(name)}, which is not there before")
        known.add(node.name)
    if not isinstance(graph.logits, str) or graph.logits not in known - {graph.image}:
        raise _damaged(f"no operator computes its logits, {_short(graph.logits)}")


def _is_named(kwargs) -> bool:
    """Whether these are pairs of a name and a value."""
    return isinstance(kwargs, tuple) and all(
        type(pair) is tuple and len(pair) == 2 and isinstance(pair[0], str) for pair in kwargs
    )


def _check_argument(node: str, value, depth: int) -> None:
    if isinstance(value, Ref | Stored):
        if not isinstance(value.name, str):
            raise _damaged(f"{node!r} uses {_short(value.name)}, which is no name")
    elif isinstance(value, tuple):
        if depth > _DEEPEST:
            raise _damaged(f"{node!r} has arguments within arguments within arguments")
        for item in value:
            _check_argument(node, item, depth + 1)
    elif isinstance(value, str):
        if len(value) > _LONGEST:
            raise _damaged(f"{node!r} has an argument of {len(value)} letters")
    elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise _damaged(f"{node!r} has an argument beyond {_LARGEST}")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise _damaged(f"{node!r} has an argument {_short(value)}")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
