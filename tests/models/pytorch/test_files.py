"""Programs and whole modules: what is read, and that nothing in them is run."""

import io
import os
import pickle
import zipfile

import pytest

from moth_jax.errors import InputError
from tests.helpers.pickles import Calls
from tests.helpers.torchvision_shim import torch, torchvision

nn = torch.nn

from moth_jax.models.pytorch.files import (  # noqa: E402  (needs torch)
    SAFE_CLASSES,
    read_module,
    read_program,
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A .pt2 file of a small classifier."""
    path = tmp_path_factory.mktemp("programs") / "model.pt2"
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(module.eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    torch.export.save(exported, path)
    return path


def changed(program, path, change):
    """A copy of an archive, each part of it passed through `change(name, content)`."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("part", ["data/sample_inputs/model.pt", "data/constants/extra.pt"])
def test_a_program_with_code_in_a_pickle_is_refused_and_the_code_does_not_run(
    program, tmp_path, part
):
    trap = tmp_path / "trap"
    path = tmp_path / "evil.pt2"
    changed(program, path, lambda name, content: None if name.endswith(part) else content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"model/{part}", pickled({"x": Calls(os.mkdir, str(trap))}))
    with pytest.raises(InputError, match="is refused: it contains more than numbers in"):
        read_program(path)
    assert not trap.exists()


def json_part(change):
    def apply(name, content):
        return change(content.decode()).encode() if name.endswith(".json") else content

    return apply


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.replace('"use_pickle": false', '"use_pickle": true'), "pickled objects"),
        (lambda s: s.replace("Symbol(", "__import__("), "the expression"),
        (lambda s: s.replace("positive=True", "positive=exit()"), "the expression"),
        (lambda s: s.replace("torch.ops.aten.conv2d.default", "torch.hub.load"), "the operator"),
    ],
)
def test_a_program_that_would_evaluate_its_own_text_is_refused(program, tmp_path, change, says):
    path = changed(program, tmp_path / "evil.pt2", json_part(change))
    with pytest.raises(InputError, match=f"is refused: it contains {says}"):
        read_program(path)


def test_a_damaged_program_is_refused(program, tmp_path):
    content = program.read_bytes()
    for name, damaged in {
        "short.pt2": content[: len(content) // 2],
        "other.pt2": b"not a program",
        "no_model.pt2": changed(
            program,
            tmp_path / "x",
            lambda name, content: None if name.endswith("model.json") else content,
        ).read_bytes(),
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=r"is no program of torch\.export, or is damaged"):
            read_program(tmp_path / name)


def test_a_module_of_torchvision_is_read(tmp_path):
    module = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    torch.save(module, tmp_path / "model.pt")
    read = read_module(tmp_path / "model.pt")
    assert str(read) == str(module)
    assert all(
        torch.equal(a, b) for a, b in zip(read.parameters(), module.parameters(), strict=True)
    )


def test_a_module_that_asks_for_more_is_refused_with_the_names(tmp_path):
    module = nn.Sequential(nn.Bilinear(2, 2, 2), nn.PixelShuffle(2), nn.ReLU())
    torch.save(module, tmp_path / "model.pt")
    with pytest.raises(
        InputError,
        match=r"asks for torch\.nn\.modules\.linear\.Bilinear, "
        r"torch\.nn\.modules\.pixelshuffle\.PixelShuffle; ",
    ):
        read_module(tmp_path / "model.pt")


def test_a_module_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    trap = tmp_path / "trap"
    module = nn.Sequential(nn.ReLU())
    module.extra = Calls(os.mkdir, str(trap))
    torch.save(module, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"asks for posix\.mkdir"):
        read_module(tmp_path / "model.pt")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps(3), "is no PyTorch file"),
        (b"", "is no PyTorch file"),
        (pickled({"weight": torch.zeros(3)}), "holds a dict, not a module"),
    ],
)
def test_what_holds_no_module_is_refused(tmp_path, content, says):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_module(tmp_path / "model.pt")


def test_every_safe_class_is_a_module():
    for module, names in SAFE_CLASSES.items():
        there = __import__(module, fromlist=["_"])
        for name in names.split():
            assert issubclass(getattr(there, name), nn.Module), f"{module}.{name}"
