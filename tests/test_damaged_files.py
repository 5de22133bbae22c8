"""Every reader, given thousands of damaged files: a result or one line, nothing else, in time.

`FORMATS` has one row for each kind of file: how a valid one is written, how it is read, how often a
damaged copy is tried, and which damages. `pytest -n 0 -s` shows the counts; `-m slow` tries twenty
times as many. A row whose library is missing is skipped.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moth_jax.models.weights.files import read_weights
from tests.helpers.mutations import mutated_parts, mutations, read_all

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


FORMATS = {
    "PyTorch": Format("w.pt", write_torch, read_weights, needs="torch"),
    "parts of PyTorch": Format(
        "w.pt", write_torch, read_weights, tries=1000, damage=mutated_parts, needs="torch"
    ),
    "PyTorch before 2020": Format(
        "w.pth", write_legacy_torch, read_weights, tries=1500, needs="torch"
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
