"""The imported networks against PyTorch modules written here, on the published weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.models.weights import importing
from tests.helpers.torch_models import CifarResNet, F, in_float64, to_torch, torch

AKAMASTER = "akamaster_resnet20-12fca82f.th"
KERAS = "moth_cifar10_resnet20_nat.h5"


def keras_logits(weights, x):
    """The authors' network, written out layer by layer as their Keras file lists them."""
    numbers = {"conv2d": 0, "batch_normalization": 0}

    def get(kind, *names):
        numbers[kind] += 1
        return [torch.tensor(weights[f"{kind}_{numbers[kind]}/{name}"]).double() for name in names]

    def conv(x, stride=1):
        kernel, bias = get("conv2d", "kernel", "bias")
        if kernel.shape[0] == 3:  # TensorFlow's "same": at stride 2 only below and to the right
            x = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride)

    def activated(x):
        gamma, beta, mean, var = get(
            "batch_normalization", "gamma", "beta", "moving_mean", "moving_variance"
        )
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, eps=1e-5))

    x = conv(x)
    for stage in range(3):
        for block in range(3):
            stride = 2 if stage > 0 and block == 0 else 1
            before = activated(x)
            y = conv(activated(conv(before, stride)))
            x = y + (x if stride == 1 else conv(before, 2))
    pooled = activated(x).mean((2, 3))
    kernel, bias = (
        torch.tensor(weights[f"dense_1/{name}"]).double() for name in ("kernel", "bias")
    )
    return pooled @ kernel + bias


@pytest.fixture(scope="module")
def images(cifar10_test):
    return cifar10_test[0][:8]


@pytest.fixture(scope="module")
def akamaster(shared):
    path = shared / "checkpoints" / AKAMASTER
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    module = CifarResNet().double()
    state = {name.removeprefix("module."): value.double() for name, value in saved.items()}
    result = module.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in result.missing_keys)
    return importing.load(path), module


def test_logits_and_input_gradients_of_akamasters_resnet_equal_pytorchs(akamaster, images):
    (classifier, variables), module = akamaster
    x = to_torch(images, torch.float64, classifier.spec).requires_grad_()
    logits = module.eval()(x)
    logits[:, 3].sum().backward()
    with jax.enable_x64(True):

        def score(images):
            ours = classifier.predict(in_float64(variables), images)
            return ours[:, 3].sum(), ours

        gradient, ours = jax.jit(jax.grad(score, has_aux=True))(jnp.asarray(images, jnp.float64))
    np.testing.assert_allclose(ours, logits.detach(), atol=1e-9)
    theirs = x.grad.numpy().transpose(0, 2, 3, 1) / np.array(classifier.spec.std)
    np.testing.assert_allclose(gradient, theirs, atol=1e-9)


def test_a_training_pass_equals_pytorchs_in_logits_gradients_and_statistics(akamaster, images):
    (classifier, variables), module = akamaster
    module.train()
    module.zero_grad()
    logits = module(to_torch(images, torch.float64, classifier.spec))
    logits[:, 3].sum().backward()
    with jax.enable_x64(True):
        variables = in_float64(variables)

        def score(params):
            ours, updated = classifier.forward_train(
                {**variables, "params": params}, jnp.asarray(images, jnp.float64)
            )
            return ours[:, 3].sum(), (ours, updated)

        gradients, (ours, updated) = jax.jit(jax.grad(score, has_aux=True))(variables["params"])
    np.testing.assert_allclose(ours, logits.detach(), atol=1e-8)
    state = dict(module.state_dict())
    slopes = {name: parameter.grad for name, parameter in module.named_parameters()}
    for entry in importing.LAYOUTS["resnet20"].entries:
        if entry.kind == "params":
            theirs = entry.to_ours(slopes[entry.theirs].numpy())
            np.testing.assert_allclose(gradients[entry.ours], theirs, atol=1e-7)
        else:
            theirs = entry.to_ours(state[entry.theirs].numpy())
            np.testing.assert_allclose(updated["batch_stats"][entry.ours], theirs, atol=1e-10)


def test_logits_of_the_authors_keras_resnet_equal_pytorchs(shared, images):
    path = shared / "checkpoints" / KERAS
    classifier, variables = importing.load(path)
    x = to_torch(images, torch.float64, classifier.spec)
    theirs = keras_logits(importing.read_weights(path), x)
    with jax.enable_x64(True):
        ours = jax.jit(classifier.predict)(in_float64(variables), jnp.asarray(images, jnp.float64))
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
