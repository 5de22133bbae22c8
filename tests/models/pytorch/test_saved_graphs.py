"""The program in a checkpoint: what cannot be one is refused before anything is computed."""

import json

import pytest

from moth_jax.errors import InputError
from moth_jax.models import ModelSpec, outline
from moth_jax.models.program import Graph
from tests.helpers.graphs import write_graph


@pytest.fixture
def fields(tmp_path):
    """A valid description of a model, as a checkpoint has it."""
    write_graph(tmp_path / "graph.json")
    return json.loads((tmp_path / "graph.json").read_text())


def node_of(fields, name):
    return next(node for node in fields["graph"]["nodes"] if node[0] == name)


def build(fields):
    return outline(ModelSpec.from_json(fields))


def test_the_program_is_read_as_it_was_written(fields):
    spec = ModelSpec.from_json(json.loads(json.dumps(fields)))
    assert spec.to_json() == fields
    assert outline(spec)[1]["params"]["f"].shape == (3, 4)


ARGUMENTS = {
    "a negative padding": ("p", 3, [-3, -3], "0 to 16384 are expected"),
    "a negative padding of a convolution": ("c", 4, [-1, 0], "0 to 16384 are expected"),
    "a huge padding": ("p", 3, [9, 9], "beyond a window"),
    "a padding beyond the image": ("c", 4, [99, 99], "beyond a window"),
    "no stride": ("c", 3, [0, 1], "1 to 16384 are expected"),
    "a huge stride": ("c", 3, [9999, 9999], "more than 16384 places"),
    "a huge window": ("p", 1, [10**6, 1], "1 to 16384 are expected"),
    "very many places": ("p", 1, [1000, 1000], "more than 16384 places"),
    "a window of a text": ("p", 1, ["2", 2], "whole numbers"),
    "three sizes": ("p", 1, [2, 2, 2], "two whole numbers"),
    "too much cut off": ("d", 1, [-9, 1, 0, 0], "leaves nothing"),
    "a huge edge": ("d", 1, [2**40, 0, 0, 0], "of each are allowed"),
    "a power of numbers": ("o", 0, 9, "any number of images"),
    "no parts": ("k", 1, 0, "any number of images"),
    "a part that is not there": ("g", 1, 7, "any number of images"),
    "a part of a text": ("g", 0, "abc", "one of several results is expected"),
    "very many means": ("a", 1, [2**20, 1], "1 to 16384 are expected"),
    "a product of texts": ("m", 0, "abc", "sizes are expected"),
    "a product without an end": ("m", 1, 2**60, "no tensor has the size"),
    "another number of images": ("v", 1, [4, -1], "any number of images"),
    "statistics that are none": ("n", 3, None, "no running statistics"),
    "a momentum that is none": ("n", 6, "0.1", "the momentum and epsilon"),
    "a backward slice": ("l", 4, -1, "cannot have the step -1"),
    "a list where a tensor belongs": ("y", 0, [], "any number of images"),
    "a value of the future": ("c", 0, {"ref": "y"}, "'c' uses 'y', which is not there before"),
    "a value of no node": ("c", 0, {"ref": "z"}, "'c' uses 'z', which is not there before"),
    "itself": ("c", 0, {"ref": "c"}, "'c' uses 'c', which is not there before"),
    "no such weight": ("c", 1, {"stored": "z"}, "'c' uses 'z', which is not there before"),
    "a name that is none": ("c", 0, {"ref": [1]}, "which is no name"),
    "a reference of another kind": ("c", 0, {"call": "x"}, "not in the form"),
    "an integer without an end": ("o", 1, 10**400, "has an argument beyond"),
    "a text without an end": ("o", 1, "x" * 10**6, "an argument of 1000000 letters"),
    "a deep list": ("o", 1, [[[[[[[[1]]]]]]]], "arguments within arguments"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_an_operator_cannot_take_are_refused(fields, name):
    node, place, value, says = ARGUMENTS[name]
    node_of(fields, node)[2][place] = value
    with pytest.raises(InputError, match=says) as error:
        build(fields)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


CHANGES = {
    "an unknown operator": (lambda g: g["nodes"][0].__setitem__(1, "os.system"), "no JAX rule"),
    "a number as operator": (lambda g: g["nodes"][0].__setitem__(1, 3), "'c' is 3 of"),
    "no layer": (lambda g: g["nodes"][0].__setitem__(4, None), "of None"),
    "a node too short": (lambda g: g["nodes"][0].pop(), "not in the form"),
    "a name twice": (lambda g: g["nodes"][1].__setitem__(0, "c"), "twice in the operators"),
    "the images' name": (lambda g: g["nodes"][0].__setitem__(0, "x"), "twice in the operators"),
    "an option without a name": (lambda g: g["nodes"][0].__setitem__(3, [[1, 2]]), "arguments"),
    "an unknown option": (lambda g: g["nodes"][0].__setitem__(3, [["z", 2]]), "any number of"),
    "no nodes": (lambda g: g.__setitem__("nodes", []), "no operator computes its logits"),
    "nodes that are none": (lambda g: g.__setitem__("nodes", None), "not in the form"),
    "no such logits": (lambda g: g.__setitem__("logits", "z"), "computes its logits, 'z'"),
    "the images as logits": (lambda g: g.__setitem__("logits", "x"), "computes its logits, 'x'"),
    "a list as logits": (lambda g: g.__setitem__("logits", ["y"]), "computes its logits"),
    "other logits": (lambda g: g.__setitem__("logits", "v"), r"give logits \[3, 4\]"),
    "no shapes": (lambda g: g.__setitem__("shapes", None), "not in the form"),
    "a kind of shapes missing": (lambda g: g["shapes"].pop("unused"), "it has shapes of"),
    "a negative shape": (lambda g: g["shapes"]["params"].__setitem__("w", [-1]), "the shape"),
    "a huge shape": (lambda g: g["shapes"]["unused"].__setitem__("u", [2**40]), "more than"),
    "a shape of texts": (lambda g: g["shapes"]["params"].__setitem__("w", ["2"]), "the shape"),
    "a weight of two kinds": (lambda g: g["shapes"]["unused"].__setitem__("w", []), "twice"),
    "a name that is a number": (lambda g: g["persistent"].append(3), "3 is no name"),
    "a very deep list": (lambda g: g.__setitem__("nodes", nested(3000)), "not in the form"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_program_that_is_none_is_refused(fields, name):
    change, says = CHANGES[name]
    change(fields["graph"])
    with pytest.raises(InputError, match=says):
        build(fields)


@pytest.mark.parametrize("value", [[], "graph", 3, {}])
def test_a_program_of_another_type_is_refused(value):
    with pytest.raises(InputError, match="the model's program is damaged: it is not in the form"):
        Graph.from_json(value)


def test_a_program_that_runs_on_for_hours_is_refused(fields):
    nodes = fields["graph"]["nodes"]
    nodes[:0] = [[f"z{i}", "aten.relu.default", [{"ref": "x"}], [], ""] for i in range(60_000)]
    with pytest.raises(InputError, match="60014 operators, more than 50000"):
        build(fields)
