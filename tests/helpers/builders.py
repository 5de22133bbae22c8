"""A Python file that builds a PyTorch module, as a user would give it, and weights for it."""

import pytest

torch = pytest.importorskip("torch")

SOURCE = """
import torch

def build(num_classes=5):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, num_classes),
    )

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x):
        return self.net(x)

def number():
    return 3
"""
OPTIONS = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "image_shape": (8, 8, 3)}


def module_of(name="build", **options):
    """What a function of the file returns, always with the same weights."""
    namespace = {}
    exec(SOURCE, namespace)
    torch.manual_seed(0)
    module = namespace[name](**options).eval()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.running_mean)
    return module


def write_builder(folder, name="build"):
    """Write the file; return how a builder in it is called."""
    (folder / "mine.py").write_text(SOURCE)
    return f"{folder}/mine.py:{name}"
