"""No trigger leaves the bounds: brute force over random networks, images and triggers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.distance.bounds import relaxation
from moth_jax.distance.bounds.knapsack import least_size, moves, num_corners
from moth_jax.distance.bounds.relaxation import affine_form, bounds_of, reached_sizes
from moth_jax.distance.bounds.tape import record
from tests.helpers.networks import NETWORKS, SHAPE, network, random_images, small_triggers


@pytest.fixture(params=["rows", "forms"])
def both_ways(request, monkeypatch):
    monkeypatch.setattr(relaxation, "MOST_ROWS", 10**6 if request.param == "rows" else 0)
    jax.clear_caches()


def stamped(image, size, seed, count=400, shape=SHAPE):
    masks, patterns = small_triggers(count, size, seed, shape)
    return (1 - masks) * image + masks * patterns, masks.sum((1, 2, 3))


jitted_bounds = jax.jit(bounds_of, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=0)
def every_value(tape, constants, images):
    return jax.vmap(lambda x: tape.values(x[None], constants))(jnp.float32(images))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_inputs_of_all_kinks_stay_within_their_bounds(kind):
    for seed, size in enumerate((0.4, 1.7, 5.0)):
        logits_fn, image = network(kind, seed), random_images(1, seed)[0]
        tape, constants = record(lambda _, x, f=logits_fn: f(x), None, SHAPE)
        _, bounded = jitted_bounds(tape, constants, jnp.asarray(image), jnp.float32(size), 16)
        images, _ = stamped(image, size, seed)
        values = every_value(tape, constants, images)
        for step in tape.kinks:
            found, bounds = np.asarray(values[step.inputs[0]]), bounded[step.output]
            assert (found >= np.asarray(bounds.low)).all()
            assert (found <= np.asarray(bounds.high)).all()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("kind", NETWORKS)
def test_no_smaller_trigger_sends_an_image(kind):
    sent = 0
    for seed in range(3):
        logits_fn, images = network(kind, seed), random_images(3, seed)
        tape, constants = record(lambda _, x, f=logits_fn: f(x), None, SHAPE)
        targets = np.arange(3)
        for size in (0.5, 1.5, 4.0):
            reached = reached_sizes(
                tape,
                constants,
                images,
                np.full(3, size, np.float32),
                targets,
                count=16,
                num_rivals=3,
            )
            for image, bounds in zip(images, np.asarray(reached), strict=True):
                moved, sizes = stamped(image, size, seed)
                there = np.asarray(jax.jit(logits_fn)(jnp.float32(moved))).argmax(1)
                sent += len(set(there)) - 1
                assert (sizes >= bounds[there] * (1 - 1e-6)).all()
    assert sent  # triggers among these do send images


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 8.0), st.sampled_from(sorted(NETWORKS)))
def test_bounds_of_random_networks_hold(seed, size, kind):
    logits_fn, image = network(kind, seed), random_images(1, seed)[0]
    tape, constants = record(lambda _, x: logits_fn(x), None, SHAPE)
    reached = reached_sizes(
        tape,
        constants,
        image[None],
        np.full(1, size, np.float32),
        np.arange(3),
        count=16,
        num_rivals=3,
    )[0]
    moved, sizes = stamped(image, size, seed)
    there = np.asarray(jax.jit(logits_fn)(jnp.float32(moved))).argmax(1)
    assert (sizes >= np.asarray(reached)[there] * (1 - 1e-6)).all()


def test_bounds_hold_for_images_of_several_channels(monkeypatch):
    shape = (3, 3, 3)
    for corners in (2048, 1):
        monkeypatch.setattr("moth_jax.distance.bounds.knapsack._MOST_CORNERS", corners)
        jax.clear_caches()
        assert num_corners(shape) == (8 if corners > 1 else 1)
        logits_fn, image = network("mlp", 5), random_images(1, 5, shape)[0]
        tape, constants = record(lambda _, x, f=logits_fn: f(x), None, shape)
        reached = reached_sizes(
            tape,
            constants,
            image[None],
            np.full(1, 2.0, np.float32),
            np.arange(3),
            count=9,
            num_rivals=3,
        )[0]
        moved, sizes = stamped(image, 2.0, 5, 2000, shape)
        there = np.asarray(jax.jit(logits_fn)(jnp.float32(moved))).argmax(1)
        assert (sizes >= np.asarray(reached)[there] * (1 - 1e-6)).all()
    jax.clear_caches()


def test_corners_of_channels_are_the_moves_of_a_linear_form():
    image, form = random_images(1, 0, (2, 2, 3))[0], np.random.default_rng(0).normal(size=(2, 2, 3))
    up, down = moves(jnp.float32(form), jnp.float32(image))
    low, high = -image * form, (1 - image) * form
    np.testing.assert_allclose(up.max(0), np.maximum(low, high).sum(-1).ravel(), rtol=1e-5)
    np.testing.assert_allclose(down.max(0), np.maximum(-low, -high).sum(-1).ravel(), rtol=1e-5)


def test_a_sum_that_is_never_reached_takes_infinitely_many_pixels():
    assert np.isinf(least_size(jnp.array([1.0, 0.0]), jnp.array(1.5)))


def test_an_image_that_no_trigger_sends_is_proven_to_be_so():
    tape, constants = record(
        lambda _, x: x.reshape(1, -1)[:, :2] * 0.1 + jnp.array([[1.0, 0]]), None, SHAPE
    )
    reached = reached_sizes(
        tape, constants, random_images(1), np.full(1, 16, np.float32), np.array([0, 1]),
        count=16, num_rivals=2,
    )  # fmt: skip
    assert reached.tolist() == [[0.0, np.inf]]


def test_the_form_of_a_linear_network_gives_its_logits():
    logits_fn, images = network("linear"), random_images(5)
    weights, offsets = map(np.asarray, affine_form(*record(lambda _, x: logits_fn(x), None, SHAPE)))
    expected = np.tensordot(images, weights, ((1, 2, 3), (1, 2, 3))) + offsets
    np.testing.assert_allclose(logits_fn(images), expected, rtol=1e-4, atol=1e-4)
