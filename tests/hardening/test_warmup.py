import functools

import jax
import numpy as np
import pytest

from moth_jax.data.sampling import class_indices
from moth_jax.hardening.warmup import draw_samples, invert_towards, loss_fall, unusual_universals
from moth_jax.inversion import Budget, InversionResult, NeuralCleanse
from moth_jax.triggers import Trigger
from tests.helpers.toys import (
    SHAPE,
    linear_classifier,
    numpy_success_rate,
    row_split,
    row_variables,
)

K = 4
CLASSIFIER = linear_classifier(K)
SPLIT = row_split([9, 2, 9, 9])
MEMBERS = class_indices(SPLIT.labels, K)


def draw(target=0, per_class=5, seed=0, members=MEMBERS):
    return draw_samples(SPLIT, members, target, per_class, np.random.default_rng(seed))


# Samples.


@pytest.mark.parametrize("target", range(K))
def test_samples_are_of_every_class_but_the_target(target):
    samples = draw(target)
    assert samples.victims.tolist() == [k for k in range(K) if k != target]
    assert samples.images.shape == (3, 5, *SHAPE)
    for images, weights, victim in zip(*samples, strict=True):
        assert weights.sum() == min(5, len(MEMBERS[victim]))
        # The brightest row tells the class.
        assert (images[weights > 0].mean((2, 3)).argmax(1) == victim).all()


def test_no_image_is_drawn_twice_unless_as_padding():
    samples = draw(per_class=9)
    for images, weights in zip(samples.images, samples.weights, strict=True):
        real = images[weights > 0]
        assert len(np.unique(real.reshape(len(real), -1), axis=0)) == len(real)
    assert samples.weights.sum(1).tolist() == [2, 9, 9]


def test_other_images_are_drawn_with_another_generator():
    assert not np.array_equal(draw(seed=0).images, draw(seed=1).images)
    np.testing.assert_array_equal(draw(seed=1).images, draw(seed=1).images)


def test_a_class_without_any_image_is_all_padding():
    members = [*MEMBERS[:3], np.zeros(0, np.int64)]
    samples = draw(members=members)
    assert samples.weights.sum(1).tolist() == [2, 5, 0]
    assert np.isfinite(samples.images).all()


# The prior.


def result_with(before, after):
    before, after = (np.asarray(losses, np.float32) for losses in (before, after))
    return InversionResult(
        trigger=Trigger(np.zeros((1, 2, 2, 1)), np.zeros((1, 2, 2, 1))),
        size=np.ones(1),
        success_rate=np.ones(1),
        losses_before=before,
        losses_after=after,
    )


PRIORS = {
    "mean of ratios": ([4, 2], [1, 1], [1, 1], (0.75 + 0.5) / 2),
    "failed": ([4, 4], [4, 4], [1, 1], 0.0),
    "padding": ([4, 100], [1, 0], [1, 0], 0.75),
    "rises": ([4, 2], [6, 2], [1, 1], -0.25),
    "at the target from the beginning": ([4, 1e-9], [1, 5], [1, 1], (0.75 - 1) / 2),
    "nothing to lose": ([1e-9, 1e-9], [1e-9, 1e-9], [1, 1], 0.0),
    "all": ([4, 4], [0, 0], [1, 1], 1.0),
    "no sample": ([4, 4], [1, 1], [0, 0], 0.0),
}


@pytest.mark.parametrize(("before", "after", "weights", "prior"), PRIORS.values(), ids=PRIORS)
def test_the_prior_is_the_mean_relative_fall_of_a_classs_losses(before, after, weights, prior):
    # The class stands second; the first one's loss falls to a tenth.
    result = result_with([[10, 10, *before]], [[1, 1, *after]])
    got = loss_fall(result, np.array([[1, 1], weights], np.float32))
    assert got[0] == pytest.approx(0.9)
    assert float(got[1]) == pytest.approx(prior, abs=1e-6)


# Inversions.


@functools.cache
def compiled(universal):
    return jax.jit(
        functools.partial(
            invert_towards,
            CLASSIFIER.predict,
            inversion=NeuralCleanse(success_bound=0.99, patience=3, verify_every=5),
            universal=universal,
        )
    )


def towards(target=0, seed=0, universal=True, never=None, num_steps=25):
    variables = row_variables(K)
    if never is not None:
        variables["params"]["bias"] = variables["params"]["bias"].at[never].set(-1000.0)
    samples = draw(target)
    key = jax.random.key(seed)
    budget = Budget(num_steps, 1e-3, 5)
    result = compiled(universal)(variables, samples, target, key, budget=budget)
    return samples, jax.device_get(result)


def rate(samples, rows, trigger, target):
    real = samples.images[rows][samples.weights[rows] > 0]
    return numpy_success_rate(
        lambda x: CLASSIFIER.predict(row_variables(K), x), real, trigger, target
    )


def test_a_universal_trigger_sends_samples_of_all_other_classes_to_the_target():
    samples, result = towards(target=2)
    trigger = jax.tree.map(lambda v: v[0], result.trigger)
    assert result.trigger.mask.shape == (1, 4, 4, 1)
    assert rate(samples, [0, 1, 2], trigger, 2) >= 0.99
    assert result.sizes.shape == (3,)
    np.testing.assert_allclose(result.sizes, trigger.mask.sum(), rtol=1e-5)
    assert result.prior.shape == (3,)
    assert ((result.prior > 0) & (result.prior <= 1)).all()
    assert len(set(result.prior.tolist())) == 3


def test_without_approximation_every_class_has_a_trigger_of_its_own():
    samples, result = towards(target=2, universal=False)
    assert result.trigger.mask.shape == (3, 4, 4, 1)
    for row in range(3):
        trigger = jax.tree.map(lambda v, row=row: v[row], result.trigger)
        assert rate(samples, row, trigger, 2) >= 0.99
        np.testing.assert_allclose(result.sizes[row], trigger.mask.sum(), rtol=1e-5)
    assert len(set(result.sizes.tolist())) == 3


@pytest.mark.parametrize("universal", [True, False])
def test_a_failed_inversion_gives_infinite_sizes_and_no_prior(universal):
    _, result = towards(target=1, never=1, universal=universal)
    assert np.isposinf(result.sizes).all()
    assert result.prior.tolist() == [0, 0, 0]
    assert not result.trigger.mask.any()


# Universal triggers beside the directions' own.


UNIVERSALS = {
    "small": ([10, 11, 12, 13, 1], [4]),
    "failed": ([10, 11, 12, 13, np.inf], []),
    "usual": ([10, 11, 12, 13, 9], []),
    "not so small": ([10, 11, 12, 13, 7], []),  # an index of 2.7
    "large": ([10, 11, 12, 13, 50], []),
    "beside a failed one": ([10, 11, np.inf, 13, 1], [4]),
    "no spread": ([10, 10, 10, 10, 1], []),
    "too few": ([np.inf, np.inf, np.inf, 2, 1], []),
}


@pytest.mark.parametrize(("universal", "unusual"), UNIVERSALS.values(), ids=UNIVERSALS)
def test_universal_triggers_stand_for_directions_if_unusually_small_among_the_targets(
    universal, unusual
):
    own = np.full((5, 5), 20.0)
    shared = unusual_universals(own, np.array(universal, np.float32))
    expected = np.isin(np.arange(5), unusual)[None, :] & ~np.eye(5, dtype=bool)
    np.testing.assert_array_equal(shared, expected)


def test_a_smaller_trigger_of_the_directions_own_is_left_and_a_missing_one_replaced():
    own = np.full((5, 5), 20.0)
    own[0, 4], own[1, 4] = 0.5, np.inf
    shared = unusual_universals(own, np.array([10, 11, 12, 13, 1], np.float32))
    assert np.argwhere(shared).tolist() == [[1, 4], [2, 4], [3, 4]]
