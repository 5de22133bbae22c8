import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moth_jax import models
from moth_jax.errors import InputError
from moth_jax.models import ModelSpec
from moth_jax.models.classifier import from_module

SPEC = {"num_classes": 5, "image_shape": (8, 8, 3), "mean": (0.4,) * 3, "std": (0.2,) * 3}
FAST = ["resnet20", "preact_resnet20", "small_cnn"]
SLOW_TO_TRACE = {"resnet101", "resnet110"}


@pytest.fixture(scope="module", params=FAST)
def model(request):
    """A classifier and variables whose batch-norm statistics are not the trivial ones."""
    classifier, variables = models.create(request.param, **SPEC)
    stats = {
        name: value + 0.3 * np.abs(np.random.default_rng(0).normal(size=value.shape))
        for name, value in variables["batch_stats"].items()
    }
    return classifier, {
        **variables,
        "batch_stats": {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()},
    }


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (6, *SPEC["image_shape"]))


@pytest.mark.parametrize("arch", sorted(set(models.MODELS) - SLOW_TO_TRACE))
def test_every_architecture_gives_one_logit_per_class(arch):
    classifier, variables = models.outline(ModelSpec(arch, **{**SPEC, "image_shape": (32, 36, 3)}))
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(variables))
    images = jax.ShapeDtypeStruct((2, 32, 36, 3), jnp.float32)
    logits = jax.eval_shape(classifier.predict, variables, images)
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32
    logits, updated = jax.eval_shape(classifier.forward_train, variables, images)
    assert logits.shape == (2, 5)
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, variables)


def test_the_outline_of_a_model_has_its_names_shapes_and_types(model):
    classifier, variables = model
    _, shapes = models.outline(classifier.spec)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )


@pytest.mark.parametrize("depth", [18, 20, 32, 34, 44, 50, 56, 101, 110])
def test_the_depth_of_a_resnet_is_the_number_of_its_layers(depth):
    _, variables = models.outline(ModelSpec(f"resnet{depth}", **SPEC))
    kernels = [name for name in variables["params"] if name.endswith("kernel")]
    assert sum("shortcut" not in name for name in kernels) == depth


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    first, same, other = (models.create("small_cnn", **SPEC, seed=seed)[1] for seed in (3, 3, 4))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, same))
    assert not np.array_equal(first["params"]["head.kernel"], other["params"]["head.kernel"])


def test_predictions_treat_each_image_alone(model, images):
    classifier, variables = model
    predict = jax.jit(classifier.predict)
    together = predict(variables, images)
    alone = jnp.concatenate([predict(variables, image[None]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_gradients_under_vmap_equal_a_loop(images):
    classifier, variables = models.create("small_cnn", **SPEC)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)
        groups = images.astype(jnp.float64).reshape(3, 2, *images.shape[1:])

        def gradient(images):
            return jax.grad(lambda x: (classifier.predict(variables, x) ** 2).sum())(images)

        batched = jax.jit(jax.vmap(gradient))(groups)
        compiled = jax.jit(gradient)
        np.testing.assert_allclose(batched, np.stack([compiled(g) for g in groups]), atol=1e-10)


@pytest.mark.parametrize("compiled", [True, False])
def test_training_moves_the_statistics_and_leaves_the_callers_alone(model, images, compiled):
    classifier, variables = model
    before = jax.tree.map(np.array, variables)
    train = jax.jit(classifier.forward_train) if compiled else classifier.forward_train
    _, updated = train(variables, images)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))
    for name, value in before["batch_stats"].items():
        assert not np.array_equal(updated["batch_stats"][name], value)
    assert jax.tree.all(jax.tree.map(np.array_equal, before["params"], updated["params"]))


def test_normalisation_is_inside(images):
    plain, variables = models.create("small_cnn", **SPEC)
    identity, _ = models.create("small_cnn", **{**SPEC, "mean": (0,) * 3, "std": (1,) * 3})
    np.testing.assert_allclose(
        plain.predict(variables, images),
        identity.predict(variables, (images - 0.4) / 0.2),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (jnp.zeros((2, 8, 8, 1)), r"takes images \[n, 8, 8, 3\], got shape \(2, 8, 8, 1\)"),
        (jnp.zeros((2, 3, 8, 8)), r"got shape \(2, 3, 8, 8\)"),
        (jnp.zeros((8, 8, 3)), r"got shape \(8, 8, 3\)"),
        (jnp.zeros((2, 8, 8, 3), jnp.uint8), "must be floats .* got uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message):
    classifier, variables = models.create("small_cnn", **SPEC)
    with pytest.raises(InputError, match=message):
        jax.jit(classifier.predict)(variables, images)
    with pytest.raises(InputError, match=message):
        classifier.forward_train(variables, images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "at least 2 classes, got 1"),
        ({"image_shape": (8, 8)}, r"image_shape must be \(height, width, channels\)"),
        ({"mean": (0.5,)}, "mean must have one value per channel"),
        ({"mean": (125.3, 123.0, 113.9)}, "divide by 255"),
        ({"std": (0.2, 0.2, 0.0)}, "std"),
        ({"class_names": ("cat", "dog")}, "5 classes but 2 class_names"),
        ({"num_classes": 10**12}, r"up to 100,000 classes, got 1,000,000,000,000"),
        ({"num_classes": 10_000_000}, r"up to 100,000 classes, got 10,000,000"),
        ({"num_classes": 5.0}, "must be a whole number, got 5.0"),
        ({"mean": (float("nan"),) * 3}, r"mean must be finite numbers, .* got \(nan, nan, nan\)"),
        ({"std": (0.2, 0.2, float("inf"))}, "std must be finite numbers"),
        ({"std": (0.2, 0.2, -0.2)}, r"std in \(0, 1\]"),
        ({"mean": ("x",)}, r"mean must be numbers, one per channel, got \('x',\)"),
        ({"mean": "0.5"}, "mean must be numbers, one per channel, got '0.5'"),
        ({"mean": None}, "mean must be numbers, one per channel, got None"),
        ({"std": 0.5}, "std must be numbers, one per channel, got 0.5"),
        ({"image_shape": (999999999, 1, 3)}, "up to 67,108,864 pixels"),
        ({"image_shape": (8, 8.5, 3)}, "image_shape must be whole numbers"),
        ({"image_shape": (8, 0, 3)}, r"image_shape must be \(height, width, channels\), got"),
        ({"class_names": ("a", "b", "c", "a", "e")}, "distinct, given more than once: 'a'"),
        ({"class_names": ("a", " ", "c", "d", "e")}, "printable and not empty, got ' ' at index 1"),
        ({"class_names": ("a", "b\n", "c", "d", "e")}, r"got 'b\\n' at index 1"),
    ],
)
def test_a_description_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        models.create("small_cnn", **{**SPEC, **change})


@pytest.mark.parametrize(("arch", "size"), [("vgg11_bn", 31), ("vgg19", 31), ("lisa_cnn", 27)])
def test_images_of_which_nothing_would_be_left_are_refused(arch, size):
    message = rf"needs .*at least {size + 1}x{size + 1} pixels, got image_shape \({size}, 40, 3\)"
    with pytest.raises(InputError, match=message):
        models.outline(ModelSpec(arch, **{**SPEC, "image_shape": (size, 40, 3)}))
    models.outline(ModelSpec(arch, **{**SPEC, "image_shape": (size + 1, 40, 3)}))


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(InputError, match=r"unknown model 'resnet21'; .*preact_resnet20.*small_cnn"):
        models.create("resnet21", **SPEC)


def test_a_spec_survives_json():
    names = ("a", "b", "c", "d", "e")
    spec = ModelSpec("small_cnn", **SPEC, class_names=names)
    numpy_spec = ModelSpec(
        "small_cnn", **{**SPEC, "mean": np.float32([0.5] * 3)}, class_names=list(names)
    )
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert json.dumps(numpy_spec.to_json())
    assert hash(spec) == hash(ModelSpec.from_json(spec.to_json()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "a model is described by arch, .*, got None"),
        ([], r"got \[\]"),
        ({}, r"got \{\}"),
        ({"arch": "small_cnn", "surplus": 1}, "a model is described by"),
        ({"arch": ["small_cnn"]}, "the architecture of a model is a name"),
        ({"num_classes": "5"}, "must be a whole number, got '5'"),
        ({"num_classes": True}, "must be a whole number, got True"),
        ({"image_shape": None}, "image_shape must be whole numbers"),
        ({"mean": {"r": 1}}, "mean must be numbers"),
    ],
)
def test_a_description_that_this_package_never_writes_is_refused(fields, message):
    whole = isinstance(fields, dict) and fields and "surplus" not in fields
    spec = ModelSpec("small_cnn", **SPEC).to_json()
    with pytest.raises(InputError, match=message):
        ModelSpec.from_json({**spec, **fields} if whole else fields)


def test_the_head_of_a_small_cnn_fits_odd_image_sizes():
    classifier, variables = models.create("small_cnn", **{**SPEC, "image_shape": (9, 7, 3)})
    assert classifier.predict(variables, jnp.zeros((2, 9, 7, 3))).shape == (2, 5)


def test_a_module_of_ones_own_becomes_a_classifier(images):
    class Linear(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(192, 5, rngs=rngs)])

        def __call__(self, x):
            return self.layers[0](x.reshape(len(x), -1))

    classifier, variables = from_module(Linear(nnx.Rngs(0)), ModelSpec("mine", **SPEC))
    assert set(variables["params"]) == {"layers.0.kernel", "layers.0.bias"}
    assert variables["batch_stats"] == {}
    assert classifier.predict(variables, images).shape == (6, 5)
    assert classifier.forward_train(variables, images)[1] == variables
