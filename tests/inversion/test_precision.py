"""Searching in bfloat16: what is rounded, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.inversion import Budget, Samples, create, invert
from moth_jax.inversion.precision import in_bfloat16
from moth_jax.triggers import random_trigger
from tests.helpers.toys import (
    SHAPE,
    linear_classifier,
    numpy_success_rate,
    row_images,
    row_variables,
)

CLASSIFIER = linear_classifier()
VARIABLES = row_variables()
ROW_0 = row_images([0] * 8)


def found_by(predict, precision):
    inversion = create("trimmed", precision=precision)
    start_key, key = jax.random.split(jax.random.key(0))
    return jax.jit(
        lambda variables: invert(
            predict,
            variables,
            Samples(jnp.asarray(ROW_0), jnp.ones(len(ROW_0)), jnp.asarray(1)),
            random_trigger(start_key, SHAPE),
            key,
            budget=Budget(40, 0.02, 4),
            inversion=inversion,
        )
    )(VARIABLES)


def test_the_network_is_rounded_and_its_logits_are_not():
    seen = []

    def logits_fn(variables, images):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves((variables, images)))
        return images.reshape(len(images), -1) @ variables["kernel"]

    variables = {"kernel": jnp.ones((16, 3)), "count": jnp.ones((), jnp.int32)}
    logits = in_bfloat16(logits_fn)(variables, jnp.ones((2, *SHAPE)))
    assert logits.dtype == jnp.float32
    assert sorted(str(dtype) for dtype in seen) == ["bfloat16", "bfloat16", "int32"]


@pytest.fixture(scope="module")
def rounded():
    """An inversion in bfloat16, and what its model was given: types and numbers of images."""
    seen = set()

    def predict(variables, images):
        seen.add((str(images.dtype), len(images)))
        return CLASSIFIER.predict(variables, images)

    return found_by(predict, "bfloat16"), seen


def test_a_trigger_found_in_bfloat16_is_verified_in_float32(rounded):
    result, seen = rounded
    # Minibatches, in the end in float32, too; and all samples.
    assert seen == {("bfloat16", 4), ("float32", 4), ("float32", 8)}
    assert result.size.dtype == result.trigger.mask.dtype == jnp.float32
    rate = numpy_success_rate(
        lambda x: CLASSIFIER.predict(VARIABLES, x), ROW_0, result.trigger, target=1
    )
    assert rate == pytest.approx(float(result.success_rate))
    assert rate >= 0.9


def test_its_size_is_that_of_float32_within_a_few_per_cent(rounded):
    expected = found_by(CLASSIFIER.predict, "float32")
    np.testing.assert_allclose(rounded[0].size, expected.size, rtol=0.05)
