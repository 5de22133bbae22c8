"""A tape gives the logits of its function, and names the layers that it does not know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moth_jax.distance.bounds.tape import record
from moth_jax.errors import InputError
from moth_jax.models import ModelSpec, build
from tests.helpers.networks import NETWORKS, SHAPE, network, random_images


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_tape_gives_the_logits_of_its_function(kind):
    logits_fn, images = network(kind), random_images(4)
    tape, constants = record(lambda _, x: logits_fn(x), None, SHAPE)
    found = [tape.values(image[None], constants)[tape.output][0] for image in images]
    np.testing.assert_allclose(np.stack(found), logits_fn(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["small_cnn", "preact_resnet20", "lisa_cnn"])
def test_native_architectures_are_known(arch):
    spec = ModelSpec(arch, 4, (32, 32, 3), mean=(0.5,) * 3, std=(0.25,) * 3)
    classifier, variables = build(spec, seed=0)
    tape, constants = record(classifier.predict, variables, spec.image_shape)
    image = random_images(1, 0, spec.image_shape)
    found = jax.jit(lambda x: tape.values(x, constants)[tape.output])(image)
    np.testing.assert_allclose(found, classifier.predict(variables, image), rtol=1e-3, atol=1e-4)


def test_equal_networks_share_their_compiled_programs():
    first, second = (record(lambda _, x, s=s: network("mlp", s)(x), None, SHAPE)[0] for s in (0, 1))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (jnp.tanh, "tanh"),
        (nnx.gelu, "'integer_pow'|'mul'|'erf"),
        (lambda x: x * x, "'mul'"),
        (lambda x: x / (1 + jnp.abs(x)), "'div'"),
        (lambda x: jnp.where(x > 0.5, x, 0.0), "'gt'"),
        (lambda x: jnp.where(x > 0, x, 1.0), "'select_n'"),
        (nnx.softmax, "'exp'"),
        (jnp.sort, "'sort'"),
        (lambda x: x.astype(jnp.bfloat16), "'convert_element_type'"),
        (lambda x: jnp.zeros_like(x), "does not depend on the image"),
    ],
)
def test_a_layer_that_is_not_known_is_named(layer, name):
    def logits_fn(_, images):
        return layer(images.reshape(len(images), -1)).astype(jnp.float32)

    with pytest.raises(InputError, match=name) as error:
        record(logits_fn, None, SHAPE)
    assert "\n" not in str(error.value)


def test_a_gradient_of_ones_own_does_not_fool_the_tape():
    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (0 * g,))
    tape, constants = record(lambda _, x: doubled(x).reshape(1, -1), None, SHAPE)
    form = jax.jacrev(lambda x: tape.values(x, constants)[tape.output].sum())(jnp.ones((1, *SHAPE)))
    assert (form == 2).all()
