"""Every reader, given thousands of damaged files: a result or one line, nothing else, in time.

`FORMATS` has one row for each kind of file: how a valid one is written, how it is read, how often a
damaged copy is tried, and which damages. `pytest -n 0 -s` shows the counts; `-m slow` tries twenty
times as many. A row whose library is missing is skipped.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.models import ModelSpec, outline
from moth_jax.models.program import Graph, Node, Ref, Stored
from moth_jax.models.pytorch.programs import from_program, read_program
from moth_jax.models.weights.files import read_weights
from tests.helpers.mutations import mutated_json, mutated_parts, mutations, read_all

SLOW = 20


class Format(NamedTuple):
    """`write(path)` writes a valid file named `name`, and `read(path)` reads one."""

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    tries: int = 2000
    damage: Callable[[bytes, int, int], Iterator[bytes]] = mutations
    needs: str = ""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (2, 1, 3, 3), "conv.bias": (2,), "fc.weight": (3, 2), "fc.bias": (3,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_torch(path, **options):
    import torch

    tensors = {name: torch.tensor(array) for name, array in weights().items()}
    torch.save({**tensors, "steps": torch.tensor(3)}, path, **options)


def write_legacy_torch(path):
    write_torch(path, _use_new_zipfile_serialization=False)


def write_program(path):
    import torch

    nn = torch.nn
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip
    free_batch = ({0: torch.export.Dim.DYNAMIC},)
    images = (torch.zeros(2, 1, 6, 6),)
    torch.export.save(torch.export.export(module, images, dynamic_shapes=free_batch), path)


def write_module(path):
    import torch

    nn = torch.nn
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    torch.save(nn.Sequential(*layers), path)


def read_whole_module(path):
    from moth_jax.models.pytorch.files import read_module

    return read_module(path)


def convert_program(path):
    return from_program(read_program(path), image_shape=(6, 6, 1), mean=(0,), std=(1,))


def is_read(part: str) -> bool:
    """Whether a part of a program's archive is read."""
    return "/data/weights" in part or "/models/" in part


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


FORMATS = {
    "PyTorch": Format("w.pt", write_torch, read_weights, needs="torch"),
    "parts of PyTorch": Format(
        "w.pt", write_torch, read_weights, tries=1000, damage=mutated_parts, needs="torch"
    ),
    "PyTorch before 2020": Format(
        "w.pth", write_legacy_torch, read_weights, tries=1500, needs="torch"
    ),
    "whole modules": Format(
        "m.pt",
        write_module,
        read_whole_module,
        tries=500,
        damage=mutated_parts,
        needs="torch",
    ),
    "programs of torch.export": Format("m.pt2", write_program, convert_program, needs="torch"),
    "parts of programs": Format(
        "m.pt2",
        write_program,
        convert_program,
        tries=1000,
        damage=lambda *options: mutated_parts(*options, choose=is_read),
        needs="torch",
    ),
    "programs in checkpoints": Format(
        "graph.json", write_graph, read_graph, tries=300, damage=mutated_graphs
    ),
}


def try_damaged(case: Format, folder: Path, tries: int):
    if case.needs:
        pytest.importorskip(case.needs)
    path = folder / case.name
    case.write(path)
    assert case.read(path) is not None
    content = path.read_bytes()

    def read(damaged: bytes):
        path.write_bytes(damaged)
        return case.read(path)

    counts = read_all(case.damage(content, tries, 0), read)
    assert counts.tried == tries
    assert counts.refused > 0
    return counts


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    print(f"{name}: {try_damaged(FORMATS[name], tmp_path, FORMATS[name].tries)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_twenty_times_as_many_damaged_files_are_read_or_refused(name, tmp_path):
    print(f"{name}: {try_damaged(FORMATS[name], tmp_path, SLOW * FORMATS[name].tries)}")
