"""Converted PyTorch models are certified like native ones."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moth_jax.distance.bounds.relaxation import reached_sizes  # noqa: E402
from moth_jax.distance.bounds.tape import record  # noqa: E402
from moth_jax.models import from_torch  # noqa: E402
from tests.helpers.networks import random_images, small_triggers  # noqa: E402

SHAPE = (6, 6, 3)


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.inner = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.pool = torch.nn.MaxPool2d(2)
        self.head = torch.nn.Linear(36, 3)

    def forward(self, x):
        x = torch.nn.functional.leaky_relu(self.norm(self.conv(x)), 0.1)
        x = torch.relu(x + self.inner(x))
        return 3 * self.head(torch.flatten(self.pool(x), 1))


def test_a_converted_graph_is_bounded_and_no_smaller_trigger_sends_an_image():
    torch.manual_seed(0)
    module = Residual()
    with torch.no_grad():
        for _ in range(5):
            module(torch.rand(16, 3, 6, 6))
    classifier, variables = from_torch(
        module.eval(), image_shape=SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    tape, constants = record(classifier.predict, variables, SHAPE)
    image = random_images(1, 0, SHAPE)[0]
    found = tape.values(image[None], constants)[tape.output]
    np.testing.assert_allclose(found, classifier.predict(variables, image[None]), atol=1e-4)
    reached = np.asarray(
        reached_sizes(
            tape,
            constants,
            image[None],
            np.full(1, 1.0, np.float32),
            np.arange(3),
            count=36,
            num_rivals=3,
        )[0]
    )
    assert (reached > 0.01).sum() == 2
    masks, patterns = small_triggers(1000, 3.0, 0, SHAPE)
    stamped = np.float32((1 - masks) * image + masks * patterns)
    there = np.asarray(classifier.predict(variables, stamped)).argmax(1)
    assert len(set(there)) > 1
    assert (masks.sum((1, 2, 3)) >= reached[there] * (1 - 1e-6)).all()
