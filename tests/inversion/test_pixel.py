import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance.measure import class_distance, distance_matrix
from moth_jax.inversion import INVERSIONS, Budget, Pixel, Samples, invert
from moth_jax.inversion.base import Score
from moth_jax.inversion.pixel import Parts, added, penalty, without_small
from moth_jax.triggers import AddedTrigger, changed_pixels, replacing, stamp
from tests.helpers.toys import SHAPE, linear_classifier, row_images, row_variables

CLASSIFIER, VARIABLES = linear_classifier(), row_variables()
H, W, C, N, K, TARGET = 4, 3, 3, 6, 3, 1
PIXEL = Pixel()


@pytest.fixture
def problem():
    """A linear model, images of which many values are exactly 0 or 1, and parts past both ends."""
    rng = np.random.default_rng(0)
    images = np.clip(rng.uniform(-0.3, 1.3, (N, H, W, C)), 0, 1)
    kernel = rng.normal(size=(H * W * C, K))
    plus, minus = rng.uniform(-0.3, 1.3, (2, H, W, C))
    plus[0, 0], minus[0, 1] = 0.0, 1.0  # at the ends, and ties between channels
    return images, kernel, plus, minus


def numpy_gradient(images, kernel, plus, minus, weight):
    """The gradient of the published loss by both parts, by hand, in double precision."""
    delta = np.clip(plus, 0, 1) - np.clip(minus, 0, 1)
    raw = images + delta
    logits = np.clip(raw, 0, 1).reshape(N, -1) @ kernel
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    to_images = ((softmax - np.eye(K)[TARGET]) @ kernel.T).reshape(images.shape) / N
    to_delta = (to_images * ((raw >= 0) & (raw <= 1))).sum(0)
    gradients = []
    for part, sign in ((plus, 1), (minus, -1)):
        to_part = sign * to_delta * ((part >= 0) & (part <= 1))
        largest = np.eye(C)[part.argmax(-1)]
        slope = (1 - np.tanh(part / 10) ** 2) / 10 / (2 - 1e-7)
        gradients.append(to_part + weight * largest * slope)
    return gradients


def score_in_jax(images, kernel):
    def score(trigger):
        logits = stamp(images, trigger).reshape(N, -1) @ kernel
        losses = -jax.nn.log_softmax(logits)[:, TARGET]
        hits = (logits.argmax(1) == TARGET).astype(logits.dtype)
        return Score(losses, hits, jnp.ones(N), losses, jnp.arange(N), images)

    return score


def test_an_update_is_one_step_of_adam_down_the_published_loss(problem):
    with jax.enable_x64(True):
        images, kernel, plus, minus = map(jnp.asarray, problem)
        score = score_in_jax(images, kernel)
        nothing = AddedTrigger(jnp.zeros((H, W, C)))
        state = PIXEL.init(nothing, jnp.asarray(0.3), score(nothing), jax.random.key(0))
        state = dataclasses.replace(state, parts=Parts(plus, minus))
        after = PIXEL.update(state, score, jnp.zeros(()))
    for before, moved, gradient in zip(
        problem[2:], after.parts, numpy_gradient(*problem, 0.3), strict=True
    ):
        # Adam's first step: 0.1 times the gradient over its own size.
        expected = before - 0.1 * gradient / (np.abs(gradient) + 1e-8)
        np.testing.assert_allclose(moved, expected, atol=1e-6)
    total = sum((np.tanh(part.max(-1) / 10) / (2 - 1e-7) + 0.5).sum() for part in problem[2:])
    np.testing.assert_allclose(after.penalties, N * total)
    jax.tree.map(np.testing.assert_array_equal, after.used, state.parts)


def test_a_part_below_0_is_pushed_by_the_penalty_alone():
    part = jnp.full((2, 2, 1), -0.5)

    def push(function):
        return jax.grad(lambda p: function(p).sum())(part)

    assert not push(lambda p: added(Parts(p, jnp.zeros_like(p))).delta).any()
    assert (push(penalty) > 0).all()


def test_what_is_below_1_in_255_is_nothing():
    values = jnp.asarray([-3.0, 0.0, 0.9 / 255, 1.1 / 255, 0.5, 7.0])
    small = without_small(Parts(values, -values))
    np.testing.assert_allclose(small.plus, [0, 0, 0, 1.1 / 255, 0.5, 1])
    np.testing.assert_allclose(small.minus, [1, 0, 0, 0, 0, 0])


def test_the_parts_of_a_random_start_are_uniform_and_their_difference_is_the_start():
    start = PIXEL.start(jax.random.key(0), (60, 60, 3))
    score = Score(*[jnp.zeros(1)] * 5, jnp.zeros((1, 60, 60, 3)))
    parts = PIXEL.init(start, jnp.ones(()), score, jax.random.key(1)).parts
    np.testing.assert_allclose(parts.plus - parts.minus, start.delta, atol=1e-6)
    for part in parts:
        values = np.sort(np.asarray(part).ravel())
        # Kolmogorov's distance from the uniform distribution; 1.63 / sqrt(n) is its 1 % quantile.
        assert np.abs(values - np.linspace(0, 1, values.size)).max() < 1.63 / np.sqrt(values.size)
    assert abs(np.corrcoef(parts.plus.ravel(), parts.minus.ravel())[0, 1]) < 0.05


# What a step does with its trigger.


def observed(plus, *, hits=N, penalties=1.0, **fields):
    """The state after a step whose last minibatch used `plus`."""
    score = Score(*[jnp.zeros(N)] * 5, jnp.zeros((N, H, W, C)))
    start = AddedTrigger(jnp.zeros((H, W, C)))
    state = PIXEL.init(start, jnp.ones(()), score, jax.random.key(0))
    state = dataclasses.replace(
        state,
        used=Parts(jnp.asarray(plus), jnp.zeros((H, W, C))),
        hits=jnp.asarray(float(hits)),
        count=jnp.asarray(float(N)),
        penalties=jnp.asarray(penalties * N),
        opt_state=jax.tree.map(jnp.ones_like, state.opt_state),
        **fields,
    )
    return state, PIXEL.observe(state, jax.random.key(0))


def two_pixels():
    return jnp.zeros((H, W, C)).at[0, 0, 1].set(0.4).at[2, 1].set(0.001).at[3, 2].set(0.7)


def test_a_smaller_trigger_is_the_candidate_and_the_search_goes_on_from_it_with_its_momentum():
    before, after = observed(two_pixels())
    expected = two_pixels().at[2, 1].set(0.0)
    np.testing.assert_allclose(after.candidate.delta, expected)
    assert (after.candidate_size, after.candidate_penalty) == (2, 1)
    np.testing.assert_allclose(after.parts.plus, expected)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


@pytest.mark.parametrize(
    "fields",
    [
        {"hits": N - 1},
        {"candidate_size": jnp.asarray(2.0)},
        {"candidate_penalty": jnp.asarray(1.0)},
    ],
    ids=["too few are sent", "as many pixels", "as large a penalty"],
)
def test_another_trigger_is_no_candidate(fields):
    before, after = observed(two_pixels(), **fields)
    jax.tree.map(np.testing.assert_array_equal, after.parts, before.parts)
    assert not after.candidate.delta.any()


# What an inversion returns.


def invert_rows(num_steps, images, weights=None):
    weights = jnp.ones(len(images)) if weights is None else jnp.asarray(weights, jnp.float32)
    samples = Samples(jnp.asarray(images), weights, jnp.asarray(1))
    start = PIXEL.start(jax.random.key(0), SHAPE)
    budget = Budget(num_steps, 1e-2, 4)
    return search(VARIABLES, samples, start, budget)


@jax.jit
def search(variables, samples, start, budget):
    key = jax.random.key(1)
    predict = CLASSIFIER.predict
    return invert(predict, variables, samples, start, key, budget=budget, inversion=PIXEL)


def test_the_trigger_that_is_returned_sends_what_it_says_and_its_size_is_of_its_mask():
    images = row_images([0] * 10)
    result = invert_rows(200, images)
    stamped = np.clip(images + np.asarray(result.trigger.delta), 0, 1)
    sent = np.asarray(CLASSIFIER.predict(VARIABLES, stamped)).argmax(1) == 1
    assert result.found
    assert sent.mean() == pytest.approx(float(result.success_rate))
    assert sent.mean() >= 0.9
    masks = np.asarray(replacing(result.trigger, images).mask)
    own = masks.sum((1, 2, 3))
    held = sent & (own <= np.sort(own[sent])[8])  # nine of ten are enough
    assert float(result.size) == pytest.approx(masks[held].max(0).sum(), rel=1e-5)
    pixels = changed_pixels(result.trigger, images, np.ones(10))
    assert 0 < pixels <= np.any(np.asarray(result.trigger.delta) != 0, axis=-1).sum() < 16
    assert np.abs(np.asarray(result.trigger.delta))[result.trigger.delta != 0].min() > 0.9 / 255


def test_padding_does_not_change_the_trigger_or_its_mask():
    images = row_images([0] * 8)
    fillings = [np.zeros((3, *SHAPE)), np.ones((3, *SHAPE))]
    one, other = (
        invert_rows(60, np.concatenate([images[:5], filling]).astype(np.float32), [1] * 5 + [0] * 3)
        for filling in fillings
    )
    assert one.found
    for name in ("trigger", "size", "success_rate"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))


def test_where_no_trigger_is_found_there_is_no_size():
    never = jax.tree.map(jnp.zeros_like, VARIABLES)
    never["params"]["bias"] = jnp.array([3.0, 0.0, 0.0])
    result = class_distance(
        CLASSIFIER.predict,
        row_images([0] * 4),
        1,
        variables=never,
        num_steps=3,
        inversion="pixel",
    )
    assert np.isposinf(result.size)
    assert not result.found
    assert not result.trigger.delta.any()


def test_a_candidate_that_fails_is_forgotten_with_its_penalty():
    none, images = jnp.zeros(4), jnp.zeros((4, H, W, C))
    score = Score(none, none, jnp.ones(4), none, jnp.arange(4), images)
    start = AddedTrigger(jnp.zeros((H, W, C)))
    state = PIXEL.init(start, jnp.ones(()), score, jax.random.key(0))
    small = AddedTrigger(jnp.ones((H, W, C)))
    state = dataclasses.replace(
        state, candidate=small, candidate_size=jnp.ones(()), candidate_penalty=jnp.ones(())
    )
    failed = PIXEL.verify(state, lambda trigger: score)
    assert np.isinf([failed.candidate_size, failed.candidate_penalty, failed.needed]).all()
    held = PIXEL.verify(state, lambda trigger: score._replace(hits=jnp.ones(4)))
    assert (held.candidate_size, held.candidate_penalty) == (1, 1)
    assert PIXEL.result(held).size == H * W * C


def test_a_name_stands_for_it_and_its_options():
    options = f"(0.9, 10, 1.5, {1.5**1.5}, 0.1, 0.5, 0.9, 1e-08, 10)"
    assert INVERSIONS["pixel"]().name == f"pixel{options}"
    assert Pixel(precision="bfloat16").name == f"pixel{options} in bfloat16"


def test_distances_of_the_digits_are_of_triggers_that_hold():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    flat = images.reshape(len(images), -1)
    kernel = np.linalg.lstsq(flat, np.eye(10)[digits.target], rcond=None)[0].astype(np.float32)

    def logits_fn(images):
        return 10 * images.reshape(len(images), -1) @ kernel

    directions, seeds = [(0, 5), (1, 8), (4, 3)], (0, 1)
    matrix = distance_matrix(
        logits_fn,
        images,
        digits.target,
        inversion="pixel",
        directions=directions,
        num_images=30,
        num_steps=150,
        seeds=seeds,
        progress=False,
    )
    for victim, target in directions:
        trigger = matrix.trigger(victim, target)
        victims = images[digits.target == victim][:30]
        stamped = np.clip(victims + trigger.delta, 0, 1)
        sent = (np.asarray(logits_fn(stamped)).argmax(1) == target).mean()
        assert sent == pytest.approx(matrix.success_rate[victim, target])
        assert sent >= 0.9
        change = np.abs(stamped - victims).max((0, 3))
        assert matrix.changed_pixels[victim, target] == (change >= 0.99 / 255).sum()
        assert 0 < matrix.values[victim, target] <= matrix.changed_pixels[victim, target]
    np.testing.assert_array_equal(matrix.values_per_seed.min(0), matrix.values)
    assert str(matrix.in_changed_pixels()).endswith("no trigger found in 0")
