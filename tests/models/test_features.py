"""Feature maps: which there are, what they hold, and that changing one changes what follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from moth_jax import models
from moth_jax.errors import InputError
from moth_jax.models.features import stages, with_features, with_replaced
from tests.helpers.toys import linear_classifier, row_variables

STAGES = {
    "resnet20": ((32, 32, 3), [(32, 16), (16, 32), (8, 64)]),
    "preact_resnet20": ((32, 32, 3), [(32, 16), (16, 32), (8, 64)]),
    "small_cnn": ((8, 8, 1), [(8, 16), (4, 32), (2, 64)]),
    "lisa_cnn": ((32, 32, 3), [(16, 64), (6, 128), (2, 128)]),
    "nin": ((32, 32, 3), [(32, 96), (16, 192), (8, 192)]),
    "vgg19": ((32, 32, 3), [(32, 64), (16, 128), (8, 256), (4, 512), (2, 512)]),
    "resnet18": ((64, 64, 3), [(16, 64), (8, 128), (4, 256), (2, 512)]),
    "vgg11_bn": ((64, 64, 3), [(64, 64), (32, 128), (16, 256), (8, 512), (4, 512)]),
}


def outlined(arch, image_shape, num_classes=10):
    channels = image_shape[2]
    spec = models.ModelSpec(arch, num_classes, image_shape, (0.5,) * channels, (0.5,) * channels)
    return models.outline(spec)


@pytest.mark.parametrize("arch", STAGES)
@pytest.mark.parametrize("num_classes", [10, 64])
def test_the_stages_of_every_family_end_in_their_last_maps(arch, num_classes):
    image_shape, expected = STAGES[arch]
    classifier, variables = outlined(arch, image_shape, num_classes)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    _, marked = jax.eval_shape(with_features(classifier.predict), variables, images)
    shapes = [marked[name].shape for name in stages(classifier, variables)]
    assert shapes == [(2, side, side, channels) for side, channels in expected]


IMAGES = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)


def small(seed=0):
    return models.create(
        "small_cnn", num_classes=3, image_shape=(8, 8, 1), mean=(0.5,), std=(0.5,), seed=seed
    )


@pytest.mark.parametrize("jitted", [False, True])
def test_the_maps_are_those_the_logits_come_from(jitted):
    classifier, variables = small()
    predict = jax.jit(classifier.predict) if jitted else classifier.predict
    logits, marked = with_features(predict)(variables, IMAGES)
    np.testing.assert_allclose(logits, classifier.predict(variables, IMAGES), rtol=1e-5, atol=1e-6)
    last = marked["conv2"].reshape(5, -1)
    params = variables["params"]
    by_hand = last @ params["head.kernel"] + params["head.bias"][None]
    np.testing.assert_allclose(logits, by_hand, rtol=1e-5, atol=1e-6)
    assert (last >= 0).all()


def test_training_mode_has_its_own_maps_and_gradients_flow_through_them():
    classifier, variables = small()

    def loss(params):
        (_, _), marked = with_features(classifier.forward_train)(
            {**variables, "params": params}, IMAGES
        )
        return jnp.sum(marked["conv1"] ** 2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert float(jnp.abs(gradient["convs.0.kernel"]).max()) > 0
    assert not jnp.abs(gradient["convs.2.kernel"]).any()


def test_what_replaces_a_map_decides_what_follows():
    classifier, variables = small()
    images = np.zeros((2, 8, 8, 1), np.float32)
    replaced = with_replaced(classifier.predict, "conv2", jnp.zeros_like)
    bias = variables["params"]["head.bias"] + 0.0
    np.testing.assert_allclose(replaced(variables, images), jnp.stack([bias, bias]), atol=1e-6)
    other = with_replaced(classifier.predict, "no such name", jnp.zeros_like)
    expected = classifier.predict(variables, images)
    np.testing.assert_allclose(other(variables, images), expected, rtol=1e-6)


def test_logits_that_have_yet_to_be_averaged_give_way_to_the_map_before_them():
    def predict(tree, images):
        x = checkpoint_name(jnp.tile(images, (1, 1, 1, 5)), "map")
        return checkpoint_name(x @ tree["params"]["head"], "logits").mean((1, 2))

    tree = {"params": {"head": jnp.ones((5, 3))}}
    classifier, variables = models.from_function(predict, tree, image_shape=(4, 4, 1))
    assert stages(classifier, variables) == ("map",)


def test_a_model_that_marks_nothing_is_told_how():
    with pytest.raises(InputError, match=r"marks no feature maps; .*checkpoint_name\(x, name\)"):
        stages(linear_classifier(), row_variables())


def test_a_converted_model_has_maps_in_our_order_of_axes():
    torch = pytest.importorskip("torch")
    from moth_jax.models import from_torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 7, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(7, 4),
    ).eval()
    classifier, variables = from_torch(module, image_shape=(8, 8, 3), mean=(0, 0, 0), std=(1, 1, 1))
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    _, marked = with_features(classifier.predict)(variables, images)
    names = stages(classifier, variables)
    assert [marked[name].shape[1:] for name in names] == [(8, 8, 6), (4, 4, 7)]
    with torch.no_grad():
        expected = module[:5](torch.from_numpy(images.transpose(0, 3, 1, 2)))
    found = marked[names[-1]].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_values_marked_inside_of_a_checkpoint_are_seen():
    inside = jax.checkpoint(lambda x: checkpoint_name(x * x, "square") + 1)
    result, marked = with_features(lambda x: 2 * inside(x))(3.0)
    assert (float(result), float(marked["square"])) == (20.0, 9.0)
    doubled = with_replaced(lambda x: 2 * inside(x), "square", lambda value: 2 * value)
    assert float(doubled(3.0)) == 38.0
    assert float(jax.grad(lambda x: with_features(inside)(x)[0])(3.0)) == 6.0
