"""Whole modules: what is read, and that nothing in them is run."""

import io
import os
import pickle

import pytest

from moth_jax.errors import InputError
from tests.helpers.pickles import Calls
from tests.helpers.torchvision_shim import torch, torchvision

nn = torch.nn

from moth_jax.models.pytorch.files import SAFE_CLASSES, read_module  # noqa: E402  (needs torch)


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


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
