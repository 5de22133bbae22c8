"""A program of PyTorch operators as plain data, which goes into checkpoints as JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


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
    """

    image: str
    logits: str
    nodes: tuple[Node, ...]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    persistent: tuple[str, ...]

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
        """The inverse of `to_json`."""
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
