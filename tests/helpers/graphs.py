"""The description of a converted model, as a checkpoint has it, and damaged copies of it."""

import json
import random
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moth_jax.models import ModelSpec, outline
from moth_jax.models.program import Graph, Node, Ref, Stored
from tests.helpers.mutations import mutated_json


def write_graph(path):
    """What a checkpoint says of a converted model."""
    nodes = [
        ("c", "aten.conv2d.default", (Ref("x"), Stored("w"), Stored("b"), (1, 1), (1, 1))),
        ("n", "aten.batch_norm.default", (Ref("c"), *[Stored("b")] * 4, False, 0.1, 1e-5, True)),
        ("r", "aten.hardtanh.default", (Ref("n"), 0.0, float("inf"))),
        ("p", "aten.max_pool2d.default", (Ref("r"), (2, 2), (2, 2), (1, 1), (1, 1), True)),
        ("d", "aten.constant_pad_nd.default", (Ref("p"), (1, -1, 0, 0))),
        ("o", "aten.pow.Tensor_Scalar", (Ref("d"), 2)),
        ("k", "aten.chunk.default", (Ref("o"), 2, 1)),
        ("g", "operator.getitem", (Ref("k"), 1)),
        ("a", "aten.adaptive_avg_pool2d.default", (Ref("g"), (2, 2))),
        ("s", "aten.sym_size.int", (Ref("a"), 0)),
        ("m", "operator.mul", (Ref("s"), 1)),
        ("v", "aten.view.default", (Ref("a"), (Ref("m"), -1))),
        ("l", "aten.slice.Tensor", (Ref("v"), 1, 0, 2**63 - 1, 1)),
        ("y", "aten.linear.default", (Ref("l"), Stored("f"))),
    ]
    shapes = {"params": {"w": (2, 1, 3, 3), "f": (3, 4)}, "batch_stats": {"b": (2,)}, "unused": {}}
    nodes = tuple(Node(name, op, args, (), "a layer") for name, op, args in nodes)
    graph = Graph("x", "y", nodes, shapes, ("w", "f", "b"))
    spec = ModelSpec("mine", 3, (6, 6, 1), (0.0,), (1.0,), (), graph)
    path.write_text(json.dumps(spec.to_json()))


def read_graph(path):
    """Rebuild the model; then it must run, give gradients and train."""
    spec = ModelSpec.from_json(json.loads(path.read_text()))
    classifier, variables = outline(spec)
    images = jax.ShapeDtypeStruct((4, *spec.image_shape), jnp.float32)

    def loss(images, variables):
        return classifier.predict(variables, images).sum()

    jax.eval_shape(jax.grad(loss), images, variables)
    if not classifier.frozen:
        jax.eval_shape(classifier.forward_train, variables, images)
    return classifier


def mutated_graphs(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies with one value changed; in most of them an argument of an operator."""
    rng = random.Random(seed)
    for _ in range(count):
        spec = json.loads(content)
        node = rng.choice(spec["graph"]["nodes"])
        if rng.random() < 0.7:
            node[2] = mutated_json(node[2], rng)
        else:
            spec["graph"] = mutated_json(spec["graph"], rng)
        yield json.dumps(spec).encode()
