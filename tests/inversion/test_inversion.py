import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moth_jax.errors import InputError
from moth_jax.inversion import (
    INVERSIONS,
    Budget,
    Inversion,
    NeuralCleanse,
    Samples,
    Trimmed,
    invert,
)
from moth_jax.inversion.base import Score
from moth_jax.inversion.loop import _deal
from moth_jax.inversion.neural_cleanse import to_theta, to_trigger
from moth_jax.triggers import Trigger, random_trigger, trigger_size
from tests.helpers.toys import (
    SHAPE,
    linear_classifier,
    row_images,
    row_variables,
)

CLASSIFIER = linear_classifier()
VARIABLES = row_variables()


def inverting(predict, minibatch_size, inversion):
    """`invert` as a function of arrays."""

    def call(variables, images, weights, target, start, key, *, num_steps, mask_weight):
        samples = Samples(images, weights, target)
        budget = Budget(num_steps, mask_weight, minibatch_size)
        return invert(predict, variables, samples, start, key, budget=budget, inversion=inversion)

    return call


# One compiled inversion serves most tests; a step has two minibatches of four.
INVERSION = NeuralCleanse(patience=3, verify_every=5)
run = jax.jit(inverting(CLASSIFIER.predict, 4, INVERSION))
deal = jax.jit(_deal, static_argnums=2)
ROW_0 = row_images([0] * 8)


def invert_rows(
    images=ROW_0, weights=None, target=1, seed=0, num_steps=60, mask_weight=1e-3, variables=None
):
    start_key, key = jax.random.split(jax.random.key(seed))
    return run(
        VARIABLES if variables is None else variables,
        jnp.asarray(images),
        jnp.ones(len(images)) if weights is None else jnp.asarray(weights, jnp.float32),
        jnp.asarray(target, jnp.int32),
        random_trigger(start_key, SHAPE),
        key,
        num_steps=num_steps,
        mask_weight=mask_weight,
    )


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# What an inversion returns.


def test_the_losses_are_those_under_the_start_and_under_the_returned_trigger():
    start_key, _ = jax.random.split(jax.random.key(0))
    start = random_trigger(start_key, SHAPE)
    result = invert_rows()
    for trigger, losses in ((start, result.losses_before), (result.trigger, result.losses_after)):
        mask, pattern = np.asarray(trigger.mask), np.asarray(trigger.pattern)
        logits = np.asarray(CLASSIFIER.predict(VARIABLES, (1 - mask) * ROW_0 + mask * pattern))
        expected = np.log(np.exp(logits).sum(1)) - logits[:, 1]
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)


def test_a_longer_search_never_ends_with_a_larger_trigger():
    sizes = [float(invert_rows(num_steps=steps).size) for steps in (20, 60, 120)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < sizes[0]


@pytest.mark.parametrize("num_steps", [0, 12])
def test_where_no_trigger_reaches_the_bound_the_size_is_infinite_and_nothing_is_kept(num_steps):
    always_class_0 = jax.tree.map(jnp.zeros_like, VARIABLES)
    always_class_0["params"]["bias"] = jnp.array([3.0, 0.0, 0.0])
    result = invert_rows(num_steps=num_steps, variables=always_class_0)
    assert np.isposinf(result.size)
    assert not result.found
    assert result.success_rate == 0
    assert not np.any(result.trigger.mask)
    np.testing.assert_array_equal(result.losses_before, result.losses_after)


def test_a_candidate_of_the_last_steps_is_verified_even_if_no_verification_was_due():
    assert INVERSION.verify_every == 5
    assert invert_rows(num_steps=4, target=0).found


def test_without_samples_nothing_is_found():
    assert not invert_rows(weights=np.zeros(8)).found


# Vectorising, padding and compilation.


def test_inversions_vectorised_over_directions_equal_one_after_another():
    victims = np.stack([row_images([0] * 8), row_images([1] * 8), row_images([2] * 8)])
    targets = [1, 2, 0]
    one_by_one = [invert_rows(victims[i], target=targets[i], seed=i) for i in range(3)]
    keys = jnp.stack([jax.random.split(jax.random.key(i)) for i in range(3)])

    def one(images, target, pair_of_keys):
        return run(
            VARIABLES,
            images,
            jnp.ones(8),
            target,
            random_trigger(pair_of_keys[0], SHAPE),
            pair_of_keys[1],
            num_steps=60,
            mask_weight=1e-3,
        )

    together = jax.vmap(one)(jnp.asarray(victims), jnp.asarray(targets), keys)
    for i, alone in enumerate(one_by_one):
        np.testing.assert_allclose(together.size[i], alone.size, rtol=1e-3)
        np.testing.assert_allclose(together.success_rate[i], alone.success_rate, rtol=1e-6)
        np.testing.assert_allclose(together.trigger.mask[i], alone.trigger.mask, atol=2e-3)


def test_padding_has_no_influence_whatever_image_stands_there():
    weights = [1, 1, 1, 1, 1, 0, 0, 0]
    rng = np.random.default_rng(0)
    fillings = [np.zeros((3, *SHAPE)), rng.random((3, *SHAPE)), row_images([1] * 3)]
    results = [
        invert_rows(np.concatenate([ROW_0[:5], filling]).astype(np.float32), weights)
        for filling in fillings
    ]
    for result in results[1:]:
        for name in ("trigger", "size", "success_rate"):
            assert_same(getattr(result, name), getattr(results[0], name))
        np.testing.assert_array_equal(result.losses_after[:5], results[0].losses_after[:5])
    other_samples = np.concatenate([row_images([0] * 5, seed=9), ROW_0[5:]])
    assert float(invert_rows(other_samples, weights).size) != float(results[0].size)


class Counts(NamedTuple):
    """How often the parts of a method were called, and the samples its updates saw."""

    updates: int = 0
    samples: float = 0.0
    progress: float = 0.0
    observations: int = 0
    verifications: int = 0


@dataclasses.dataclass(frozen=True)
class Counting(Inversion):
    method: ClassVar[str] = "counting"
    budget: ClassVar[Budget] = Budget(num_steps=10, minibatch_size=4, mask_weight=1e-3)
    verify_every: int = 3

    def init(self, start, mask_weight, score, key):
        return jax.tree.map(jnp.asarray, Counts())

    def update(self, state, objective, progress):
        weights = objective(random_trigger(jax.random.key(0), SHAPE)).weights
        return state._replace(
            updates=state.updates + 1, samples=state.samples + weights.sum(), progress=progress
        )

    def observe(self, state, key):
        return state._replace(observations=state.observations + 1)

    def verify(self, state, objective):
        return state._replace(verifications=state.verifications + 1)

    def result(self, state):
        return state


count = jax.jit(inverting(CLASSIFIER.predict, 4, Counting()))
COUNTS = {  # num_steps, num_samples: updates, samples, progress, observations, verifications
    "last verified": (7, 10, Counts(21, 70, 6 / 7, 7, 3)),
    "due at the end": (6, 10, Counts(18, 60, 5 / 6, 6, 2)),
    "one each": (1, 3, Counts(3, 3, 0, 1, 1)),
    "fewer than minibatches": (4, 2, Counts(8, 8, 0.75, 4, 2)),
    "none": (4, 0, Counts(0, 0, 0, 4, 2)),
    "no step": (0, 10, Counts()),
}


@pytest.mark.parametrize(("num_steps", "num_samples", "expected"), COUNTS.values(), ids=COUNTS)
def test_a_step_passes_once_over_the_samples_and_is_observed_once(num_steps, num_samples, expected):
    # Ten slots, for which a minibatch of at most four means three of them (4, 3 and 3).
    counts = count(
        VARIABLES,
        row_images([0] * 10),
        (np.arange(10) < num_samples).astype(np.float32),
        1,
        random_trigger(jax.random.key(0), SHAPE),
        jax.random.key(1),
        num_steps=num_steps,
        mask_weight=1e-3,
    )
    assert Counts(*map(float, counts)) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, 12), st.sampled_from([1, 3, 4]), st.integers(0, 9))
def test_dealing_covers_every_sample_once_and_spreads_the_padding(real, num_minibatches, seed):
    order = np.asarray(deal(jax.random.key(seed), real.astype(np.float32), num_minibatches))
    assert order.shape == (num_minibatches, len(real) // num_minibatches)
    assert sorted(order.ravel().tolist()) == list(range(len(real)))
    samples = real[order].sum(1)
    assert samples.max() - samples.min() <= 1


def test_dealing_is_a_new_shuffle_for_every_key():
    orders = {
        tuple(np.asarray(deal(jax.random.key(i), np.ones(12, np.float32), 3)).ravel())
        for i in range(10)
    }
    assert len(orders) == 10


def test_samples_of_one_minibatch_are_not_dealt():
    def primitives(minibatch_size):
        traced = jax.make_jaxpr(inverting(CLASSIFIER.predict, minibatch_size, INVERSION))
        start = random_trigger(jax.random.key(0), SHAPE)
        arguments = VARIABLES, jnp.asarray(ROW_0), jnp.ones(8), 1, start, jax.random.key(1)
        return str(traced(*arguments, num_steps=5, mask_weight=1e-3))

    assert " sort[" in primitives(4)
    assert " sort[" not in primitives(8)


def test_the_order_of_one_minibatch_does_not_matter():
    whole = jax.jit(inverting(CLASSIFIER.predict, 8, INVERSION))
    order = np.random.default_rng(0).permutation(8)
    start = random_trigger(jax.random.key(0), SHAPE)

    def size(images):
        options = {"num_steps": 40, "mask_weight": 1e-3}
        samples = VARIABLES, jnp.asarray(images), jnp.ones(8)
        return float(whole(*samples, 1, start, jax.random.key(1), **options).size)

    assert np.isfinite(size(ROW_0))
    assert size(ROW_0[order]) == pytest.approx(size(ROW_0), rel=1e-4)


# The method: variables, schedule, candidates.


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (2, 2, 1), elements=st.floats(0, 1, width=32, allow_subnormal=False)))
def test_every_trigger_in_the_unit_interval_has_finite_variables_that_give_it_back(values):
    theta = to_theta(Trigger(values, values))
    assert np.isfinite(theta.mask).all()
    np.testing.assert_allclose(to_trigger(theta).mask, values, atol=1e-6)


@pytest.mark.parametrize("theta", [-1e9, -20.0, -9.0, 0.0, 9.0, 20.0, 1e9])
def test_no_variable_leads_out_of_the_unit_interval(theta):
    value = float(to_trigger(Trigger(jnp.float32(theta), jnp.float32(theta))).mask)
    assert 0 <= value <= 1


def score(rate, num_samples=10):
    """A score of `num_samples` samples, the first share `rate` of which hits, padded to 100."""
    position = np.arange(100)
    hits = (position < round(rate * num_samples)) | (position >= num_samples)
    weights = position < num_samples
    return Score(
        losses=np.ones(100, np.float32),
        hits=hits.astype(np.float32),
        weights=weights.astype(np.float32),
        margins=np.where(hits, 1, -1).astype(np.float32),
        indices=position,
        images=None,
    )


def state_of(inversion, mask_weight=1.0, size=8.0):
    """A state whose trigger has `size`, jitter apart."""
    start = Trigger(np.full((4, 4, 1), size / 16, np.float32), np.full(SHAPE, 0.5, np.float32))
    return jax.jit(inversion.init)(start, np.float32(mask_weight), score(0), jax.random.key(0))


@functools.cache
def compiled_verify(inversion):
    return jax.jit(lambda state, measured: inversion.verify(state, lambda trigger: measured))


def after_steps(inversion, state, rates):
    """`state` after steps with these success rates, in which the variables did not move."""
    for i, rate in enumerate(rates):
        state = state.replace(hits=np.float32(round(10 * rate)), count=np.float32(10))
        state = jax.jit(inversion.observe)(state, jax.random.key(i))
    return state


UP, DOWN = 1.5, 1.5**-1.5


@pytest.mark.parametrize(
    ("rates", "factor"),
    [
        ([1.0] * 9, 1),
        ([1.0] * 10, UP),
        ([0.9] * 10, UP),
        ([1.0] * 19, UP),
        ([1.0] * 20, UP**2),
        ([0.8] * 9, 1),
        ([0.8] * 10, DOWN),
        ([0.0] * 20, DOWN**2),
        ([1.0] * 9 + [0.0] + [1.0] * 9, 1),
        ([1.0, 0.0] * 20, 1),
        ([1.0] * 10 + [0.0] * 10, UP * DOWN),
        ([1.0] * 9 + [0.0] * 10, DOWN),
    ],
)
def test_the_mask_weight_follows_ten_successes_or_failures_in_a_row(rates, factor):
    state = after_steps(NeuralCleanse(), state_of(NeuralCleanse(), mask_weight=1e-3), rates)
    assert float(state.mask_weight) == pytest.approx(1e-3 * factor, rel=1e-5)


def test_patience_and_factors_can_be_chosen():
    inversion = NeuralCleanse(patience=2, increase=3.0, decrease=5.0)
    state = after_steps(inversion, state_of(inversion), [1.0, 1.0, 0.0, 0.0, 1.0])
    assert float(state.mask_weight) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("rate", "known", "better"),
    [(1.0, 9.0, True), (0.9, 9.0, True), (0.8, 9.0, False), (1.0, 5.0, False)],
    ids=["smaller", "just at the bound", "below the bound", "larger"],
)
def test_only_a_step_that_reaches_the_bound_with_a_smaller_trigger_restarts_from_it(
    rate, known, better
):
    inversion = NeuralCleanse(jitter_scale=0.01)
    before = state_of(inversion, size=8.0).replace(candidate_size=np.float32(known))
    trigger = to_trigger(before.theta)
    after = after_steps(inversion, before, [rate])
    if better:
        assert_same(after.candidate, trigger)
        assert float(after.candidate_size) == pytest.approx(float(trigger_size(trigger)), rel=1e-6)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), to_trigger(after.theta), trigger)
        assert 0 < moved.mask <= 0.0101
        assert 0 < moved.pattern <= 0.0101
    else:
        assert_same(after.candidate, before.candidate)
        assert float(after.candidate_size) == known
        assert_same(after.theta, before.theta)


def test_a_candidate_that_holds_becomes_the_result_and_one_that_does_not_is_forgotten():
    inversion = NeuralCleanse()
    found = after_steps(inversion, state_of(inversion, size=8.0), [1.0])
    state = compiled_verify(inversion)(found, score(0.9))
    kept = inversion.result(state)
    assert float(kept.success_rate) == pytest.approx(0.9)
    assert float(kept.size) == float(found.candidate_size)
    assert_same(kept.trigger, found.candidate)
    smaller = state_of(inversion, size=4.0)
    state = after_steps(inversion, state.replace(theta=smaller.theta), [1.0])
    assert float(state.candidate_size) < float(kept.size)
    state = compiled_verify(inversion)(state, score(0.8))
    assert_same(inversion.result(state), kept)
    assert float(state.candidate_size) == float(kept.size)


@pytest.mark.parametrize(
    ("hits", "num_samples", "bound", "reached"),
    [
        (9, 10, 0.9, True),
        (18, 20, 0.9, True),
        (45, 50, 0.9, True),
        (90, 100, 0.9, True),
        (99, 100, 0.99, True),
        (10, 10, 1.0, True),
        (89, 100, 0.9, False),
        (9, 10, 0.99, False),
    ],
)
def test_a_success_rate_of_exactly_the_bound_is_enough(hits, num_samples, bound, reached):
    inversion = NeuralCleanse(success_bound=bound)
    state = state_of(inversion).replace(hits=np.float32(hits), count=np.float32(num_samples))
    state = jax.jit(inversion.observe)(state, jax.random.key(0))
    assert bool(np.isfinite(state.candidate_size)) == reached
    state = state.replace(candidate_size=np.float32(1.0))
    state = compiled_verify(inversion)(state, score(hits / num_samples, num_samples))
    assert bool(inversion.result(state).found) == reached


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (NeuralCleanse, {"success_bound": 0.0}, r"success_bound must be in \(0, 1\], got 0"),
        (NeuralCleanse, {"success_bound": 90}, r"success_bound must be in \(0, 1\], got 90"),
        (NeuralCleanse, {"patience": 0}, "patience must be at least 1, got 0"),
        (NeuralCleanse, {"verify_every": 0}, "verify_every must be at least 1, got 0"),
        (NeuralCleanse, {"increase": 1.0}, "increase must be above 1, got 1.0"),
        (NeuralCleanse, {"decrease": 0.5}, "decrease must be above 1, got 0.5"),
        (Trimmed, {"success_bound": 1.5}, r"success_bound must be in \(0, 1\], got 1.5"),
        (Trimmed, {"verify_every": 0}, "verify_every must be at least 1, got 0"),
        (Trimmed, {"increase": 1.0}, "increase must be above 1, got 1.0"),
        (Trimmed, {"start_mask": 0.0}, r"start_mask must be in \(0, 1\], got 0.0"),
        (Trimmed, {"last_learning_rate": 0.3}, r"last_learning_rate must be in \[0, 0.1\]"),
        (Trimmed, {"precision": "float16"}, "bfloat16, float32"),
    ],
)
def test_options_that_make_no_sense_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        method(**options)


def trimmed_state(margins, weights=None, mask_weight=1.0):
    """A state of the trimmed method that saw these margins, of real samples or padding."""
    margins = np.asarray(margins, np.float32)
    state = state_of(Trimmed(), mask_weight)
    weights = np.ones(len(margins), np.float32) if weights is None else np.float32(weights)
    return state.replace(margins=margins, weights=weights)


def trimmed_update(state, score_of, progress=0.0):
    return jax.jit(
        lambda state, progress: Trimmed().update(state, lambda t: score_of(t), progress)
    )(state, progress)


def leaning_on(sample, margin=0.0):
    """Scores of ten samples at `margin`, only one of which hangs on the trigger."""

    def score_of(trigger):
        margins = jnp.full(10, margin).at[sample].add(trigger.mask.sum() + trigger.pattern.sum())
        return Score(jnp.ones(10), jnp.ones(10), jnp.ones(10), margins, jnp.arange(10), None)

    return score_of


@pytest.mark.parametrize(("sample", "moves"), [(0, False), (1, True), (9, True)])
def test_the_hardest_tenth_has_no_say_in_where_the_trigger_moves(sample, moves):
    state = trimmed_state(np.arange(10) - 20.0, mask_weight=0.0)
    after = trimmed_update(state, leaning_on(sample, margin=-1000.0))
    moved = np.abs(np.asarray(after.trigger.pattern - state.trigger.pattern)).max()
    assert bool(moved > 1e-3) == moves


def test_a_sample_far_past_the_target_has_no_say_either():
    state = trimmed_state([1.0] * 10, mask_weight=0.0)
    after = trimmed_update(state, leaning_on(5, margin=1000.0))
    assert_same(after.trigger, state.trigger)


def test_padding_is_not_among_the_samples_that_the_bound_asks_for():
    # Of five real samples none may be left out at 0.9; the padding looks the hardest.
    margins = [-9.0, 1, 1, 1, 1, -50, -50, -50, -50, -50]
    state = trimmed_state(margins, [1] * 5 + [0] * 5, mask_weight=0.0)
    after = trimmed_update(state, leaning_on(0, margin=-1000.0))
    assert np.abs(np.asarray(after.trigger.pattern - state.trigger.pattern)).max() > 1e-3


@pytest.mark.parametrize(("num_hits", "factor"), [(10, 1.28), (9, 1.28), (8, 1.28**-1.5)])
def test_a_pass_moves_the_mask_weight_by_one_factor_however_it_is_cut(num_hits, factor):
    margins = np.where(np.arange(10) < num_hits, 1.0, -1.0).astype(np.float32)

    def scores_of(indices):
        def score_of(trigger):
            ones = jnp.ones(len(indices))
            return Score(
                ones, ones, ones, jnp.asarray(margins[indices]), jnp.asarray(indices), None
            )

        return score_of

    for parts in (1, 2, 5):
        state = trimmed_state(margins, mask_weight=2.0)
        for indices in np.arange(10).reshape(parts, -1):
            state = trimmed_update(state, scores_of(indices))
        assert float(state.mask_weight) == pytest.approx(2.0 * factor, rel=1e-5)


@pytest.mark.parametrize("steps_before", [0, 3, 9])
def test_an_inversion_from_a_found_trigger_begins_as_slowly_as_a_longer_one_would_end(
    steps_before,
):
    start = Trigger(jnp.full((*SHAPE[:2], 1), 0.5), jnp.full(SHAPE, 0.5))
    after = invert(
        CLASSIFIER.predict,
        VARIABLES,
        # To their own class: any trigger will do.
        Samples(jnp.asarray(ROW_0), jnp.ones(8), jnp.asarray(0)),
        start,
        jax.random.key(0),
        budget=Budget(1, 1.0, 8, steps_before=steps_before),
        inversion=Trimmed(),
    )
    assert after.found
    # The first update of Adam is its learning rate, which falls as a cosine from 0.1 to 0.001.
    rate = 0.001 + 0.099 * (1 + np.cos(np.pi * steps_before / (steps_before + 1))) / 2
    moved = np.abs(np.asarray(after.trigger.mask - start.mask)).max()
    assert moved == pytest.approx(rate, rel=1e-3)


def test_the_mask_weight_moves_by_a_tenth_of_a_pass_at_most_at_the_end():
    def moved(progress, num_samples):
        def score_of(trigger):
            ones = jnp.ones(num_samples)
            return Score(ones, ones, ones, ones, jnp.arange(num_samples), None)

        state = trimmed_state([1.0] * 20, mask_weight=1.0)
        return float(trimmed_update(state, score_of, progress).mask_weight)

    assert moved(0.0, 20) == pytest.approx(1.28, rel=1e-5)
    assert moved(1.0, 20) == pytest.approx(1.28**0.1, rel=1e-5)
    assert moved(0.0, 2) == moved(1.0, 2) == pytest.approx(1.28**0.1, rel=1e-5)


def test_the_latest_trigger_that_reached_the_bound_is_verified_if_it_is_smaller_than_the_known():
    def seen(state, size, margin=1.0):
        mask = np.full((4, 4, 1), size / 16, np.float32)
        state = state.replace(
            trigger=state.trigger.replace(mask=mask), margins=np.full(10, margin, np.float32)
        )
        return jax.jit(Trimmed().observe)(state, jax.random.key(0))

    state = seen(seen(trimmed_state([0.0] * 10), 6.0), 8.0)
    assert float(state.candidate_size) == 8.0
    assert float(seen(state, 5.0, margin=-1.0).candidate_size) == 8.0
    state = compiled_verify(Trimmed())(state, score(1.0))
    assert float(Trimmed().result(state).size) == 8.0
    assert float(seen(state, 9.0).candidate_size) == 8.0
    assert float(seen(state, 7.0).candidate_size) == 7.0


def test_padding_leaves_no_margin_behind():
    def score_of(trigger):
        weights = jnp.asarray([1.0, 1.0, 0.0])
        return Score(weights, weights, weights, jnp.full(3, 7.0), jnp.asarray([2, 9, 10]), None)

    after = trimmed_update(trimmed_state([0.0] * 10), score_of)
    assert np.flatnonzero(np.asarray(after.margins)).tolist() == [2, 9]


def test_the_trimmed_method_forgives_the_samples_that_no_trigger_sends():
    # One of ten images is of the target's opposite: its row outshines whatever is stamped.
    images = np.concatenate([row_images([0] * 18), row_images([2] * 2)])
    images[18:, 2] = 1.0
    find = {
        method: jax.jit(inverting(CLASSIFIER.predict, 10, method))(
            VARIABLES,
            jnp.asarray(images),
            jnp.ones(20),
            1,
            method.start(jax.random.key(0), SHAPE),
            jax.random.key(1),
            num_steps=100,
            mask_weight=method.budget.mask_weight,
        )
        for method in (NeuralCleanse(), Trimmed())
    }
    published, ours = find.values()
    assert ours.found
    assert float(ours.size) < float(published.size)


def test_the_names_are_those_that_files_of_finished_measurements_are_found_by():
    published = f"(0.9, 10, 1.5, {1.5**1.5}, 0.1, 0.5, 0.9, 1e-07, 0.01, 20)"
    assert NeuralCleanse().name == f"neural_cleanse{published}"
    ours = f"(0.9, 0.5, 1.28, {1.28**1.5}, 0.1, 0.001, 0.9, 0.9, 1e-07, 0.1, 5)"
    assert Trimmed().name == f"trimmed{ours}"
    assert Trimmed(precision="bfloat16").name == f"trimmed{ours} in bfloat16"


@pytest.mark.parametrize("name", INVERSIONS)
def test_no_gradient_of_a_weight_is_computed(name):
    def convolve(images, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=dimensions
        )

    def predict(kernels, images):
        return convolve(jax.nn.relu(convolve(images, kernels[0])), kernels[1]).mean((1, 2))

    def convolutions(function, *args):
        return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")

    kernels = [jnp.ones((3, 3, 1, 5)), jnp.ones((3, 3, 5, 3))]
    method = INVERSIONS[name]()
    images, key = jnp.asarray(ROW_0), jax.random.key(0)

    def search(kernels, images):
        find = inverting(predict, 8, method)
        start = method.start(key, SHAPE)
        given = kernels, images, jnp.ones(8), 1, start, key
        return find(*given, num_steps=10, mask_weight=1e-3)

    once = convolutions(predict, kernels, images)
    gradients = [
        convolutions(jax.grad(lambda k, i: predict(k, i).sum(), argnums), kernels, images)
        for argnums in (1, (0, 1))
    ]
    assert (once, *gradients) == (2, 4, 6)
    # Once under the start, once in an update and back to its images, once in a verification.
    assert convolutions(search, kernels, images) == 2 + 4 + 2
