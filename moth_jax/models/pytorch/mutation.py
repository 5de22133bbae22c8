"""Operators that change their argument, as operators that return a new value.

`relu_` writes into the memory of its argument. Here it returns its result, so whoever uses the
argument afterwards must use the result. That is right as long as no other tensor shows the same
memory; a program where one does is refused.
"""

from collections.abc import Sequence

from moth_jax.errors import InputError
from moth_jax.models.program import Node, Ref, Stored, references

# What may show the memory of its first argument, by the names of the operators.
_VIEWS = frozenset(
    ("_to_copy", "_unsafe_view", "alias", "chunk", "contiguous", "detach", "dropout", "expand",
     "feature_dropout", "flatten", "getitem", "lift_fresh_copy", "numpy_T", "permute", "reshape",
     "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose",
     "unsqueeze", "view")
)  # fmt: skip


def without_mutation(nodes: Sequence[Node], logits: str) -> tuple[list[Node], str]:
    """The same program, in which every result stays as it is; and the name of its logits.

    Raises:
      InputError: a part of a tensor is changed while others show it too, or a parameter is.
    """
    if not any(_mutates(node) for node in nodes):
        return list(nodes), logits
    last_use, last_read = {logits: len(nodes)}, {}  # of values, of parameters and buffers
    for index, node in enumerate(nodes):
        last_use.update(dict.fromkeys(references(node, Ref), index))
        last_read.update(dict.fromkeys(references(node, Stored), index))
    newest: dict[str, str] = {}  # of a value that was changed: the value after the change
    memory: dict[str, list[str]] = {}  # the values that show the same memory, of each of them
    result = []
    for index, node in enumerate(nodes):
        node = node._replace(args=_renamed(node.args, newest), kwargs=_renamed(node.kwargs, newest))
        result.append(node)
        shown = memory[node.name] = [node.name]
        target = node.args[0] if node.args else None
        if isinstance(target, Ref) and (_mutates(node) or _short(node.op) in _VIEWS):
            shown = memory[node.name] = memory.setdefault(target.name, [target.name])
            shown.append(node.name)
        if not _mutates(node):
            continue
        if isinstance(target, Ref):
            own = (target.name, node.name)
            stale = any(last_use.get(name, -1) > index for name in shown if name not in own)
            newest[target.name] = node.name
        else:
            stale = not isinstance(target, Stored) or last_read[target.name] > index
        if stale:
            raise _refused(node)
        shown[:] = [node.name]
    return result, _after(logits, newest)


def _after(name: str, newest: dict[str, str]) -> str:
    """The last value that a value was changed to."""
    last = name
    while last in newest:
        last = newest[last]
    while name in newest:  # so that no chain is followed twice
        newest[name], name = last, newest[name]
    return last


def _refused(node: Node) -> InputError:
    return InputError(
        f"{node.op} in {node.layer or 'the model'} changes memory that other tensors show as well; "
        "export the program with .run_decompositions({}), which removes that"
    )


def _mutates(node: Node) -> bool:
    return node.op.startswith("aten.") and _short(node.op).endswith("_")


def _short(op: str) -> str:
    """`relu_` of `aten.relu_.default`."""
    return [*op.split("."), "", ""][1]


def _renamed(value, newest: dict[str, str]):
    if isinstance(value, Ref):
        return Ref(_after(value.name, newest))
    if isinstance(value, tuple) and not isinstance(value, Stored):
        return tuple(_renamed(item, newest) for item in value)
    return value
