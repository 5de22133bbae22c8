"""PyTorch's public ResNet32 goes in, is measured and hardened, and goes home again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax import MothConfig, data, harden
from moth_jax.convert import convert
from moth_jax.distance import measure
from moth_jax.evaluation import accuracy
from moth_jax.models import checkpoint
from tests.helpers.torch_models import CifarResNet, torch

PAIRS = [(2, 7), (0, 1), (3, 5)]
SHORT = MothConfig(
    max_steps=12,
    max_accuracy_drop=1.0,
    batch_size=64,
    warmup_steps=10,
    first_steps=20,
    next_steps=8,
    stamp_share=0.25,
)


@pytest.mark.slow
def test_the_public_resnet32_is_measured_hardened_and_taken_home(shared, tmp_path):
    source = shared / "checkpoints" / "akamaster_resnet32-d509ac18.th"
    convert(source, tmp_path / "original")
    classifier, variables = checkpoint.load_model(tmp_path / "original")
    dataset = data.load("cifar10", dir=str(shared / "data" / "tfds"))
    test = dataset.test
    images = test.batch(np.arange(len(test)))
    assert accuracy(classifier.predict, variables, test) > 0.9

    matrix = measure.distance_matrix(
        classifier.predict,
        images,
        test.labels,
        variables=variables,
        class_names=dataset.class_names,
        directions=[*PAIRS, *((b, a) for a, b in PAIRS)],
        num_images=32,
        num_steps=80,
        progress=False,
    )
    assert matrix.num_measured() == 6
    assert matrix.num_failures() == 0
    assert 10 < matrix.average() < 200

    hardened = harden(classifier, variables, dataset, SHORT, progress=False).kept
    checkpoint.save_model(tmp_path / "hardened", classifier, hardened)
    convert(tmp_path / "hardened", tmp_path / "home.pt")
    module = CifarResNet(5, num_classes=10).eval()
    state = torch.load(tmp_path / "home.pt", weights_only=True)
    module.load_state_dict(state, strict=True)
    original = torch.load(source, "cpu", weights_only=True)["state_dict"]
    assert not torch.equal(state["conv1.weight"], original["module.conv1.weight"])

    spec = classifier.spec
    x = (images[:64] - np.float32(spec.mean)) / np.float32(spec.std)
    with torch.no_grad():
        theirs = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    ours = jax.jit(classifier.predict)(hardened, jnp.asarray(images[:64]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
