import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.hardening.step import StepBatch, StepConfig, _choose_stamped, make_harden_step
from moth_jax.inversion import (
    Budget,
    InversionResult,
    NeuralCleanse,
    Samples,
    invert,
    start_triggers,
)
from moth_jax.training import Adversary, TrainState, make_update, perturb, sgd
from moth_jax.triggers import Trigger
from tests.helpers.toys import SHAPE, linear_classifier, row_images, row_variables

K = 4
CLASSIFIER = linear_classifier(K)
INVERSION = NeuralCleanse(patience=3, verify_every=5)
TX = sgd(0.1, momentum=0.9, weight_decay=0.01)
ADVERSARY = Adversary(epsilon=0.1, step_size=0.05, num_steps=3)
# Room for 4 victims of a class; half of them are stamped; triggers of any size are.
OPTIONS = {"stamp_share": 0.5, "max_trigger_share": 1.0}
KEY = jax.random.key(7)
BUDGET = Budget(20, 1e-3, 2)


@functools.cache
def compiled(**options):
    return make_harden_step(CLASSIFIER, INVERSION, TX, StepConfig(**{**OPTIONS, **options}))


@functools.cache
def compiled_update(batch_norm="update"):
    return jax.jit(make_update(CLASSIFIER, TX, batch_norm=batch_norm))


single = jax.jit(functools.partial(invert, CLASSIFIER.predict, inversion=INVERSION))


def fresh_state(never=None):
    """A model that takes rows for what they are, and nothing for class `never`."""
    variables = row_variables(K)
    variables["batch_stats"]["mean"] = jnp.array([0.1, 0.2, -0.1, 0.0])
    if never is not None:
        variables["params"]["bias"] = variables["params"]["bias"].at[never].set(-1000.0)
    return TrainState(variables, TX.init(variables["params"]))


def batch_of(classes, missing=0, size=20):
    """A batch of 4 slots for each of `classes`, then others.

    The last `missing` slots of the last class hold samples of another class.
    """
    labels = np.repeat(classes, 4)
    weights = np.ones((len(classes), 4), np.float32)
    if missing:
        labels[-missing:] = 3
        weights[-1, -missing:] = 0
    labels = np.concatenate([labels, np.resize([2, 3], size - len(labels))]).astype(np.int32)
    return StepBatch(row_images(labels, seed=4), labels, weights)


def start_for(count):
    return start_triggers(jax.random.key(1), count, SHAPE, INVERSION)


def harden(pair=(0, 1), missing=0, never=None, key=KEY, budget=BUDGET, **options):
    """One step on a pair (or two), and what went in."""
    batch = batch_of(pair, missing)
    symmetric = options.get("symmetric", True)
    targets = np.asarray(pair).reshape(-1, 2)[:, ::-1]
    targets = targets.reshape(-1) if symmetric else targets[:, 0]
    state = fresh_state(never)
    start = start_for(len(targets))
    step = compiled(**options)
    after, info = step(state, batch, targets, start, key, budget=budget)
    return state, batch, after, info


def step_keys(key=KEY):
    """The keys of augmentation, inversions and attack within a step."""
    return jax.random.split(key, 3)


def stamped_by_hand(images, info, slots, others=None):
    """`others` with the `slots` {direction: positions} replaced by stamped `images`."""
    batch = np.array(images if others is None else others)
    for direction, positions in slots.items():
        mask = np.asarray(info.trigger.mask[direction])
        pattern = np.asarray(info.trigger.pattern[direction])
        batch[positions] = (1 - mask) * images[positions] + mask * pattern
    return batch


def assert_close(one, other, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), one, other)


def assert_updated_on(state, batch, labels, after, batch_norm="update"):
    """`after` is `state` after one update on `batch` and `labels`."""
    expected, _ = compiled_update(batch_norm)(state, batch, labels)
    assert_close(after.variables, expected.variables, rtol=1e-4, atol=1e-6)
    assert_close(after.opt_state, expected.opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pair", [(0, 1), (0, 1, 2, 3)], ids=["one pair", "two pairs"])
def test_the_directions_of_a_step_are_inverted_as_each_would_be_alone(pair):
    state, batch, _, info = harden(pair)
    targets, start = [1, 0, 3, 2][: len(pair)], start_for(len(pair))
    keys = jax.random.split(step_keys()[1], len(pair))
    for i, target in enumerate(targets):
        alone = single(
            state.variables,
            Samples(batch.images[4 * i : 4 * i + 4], np.ones(4, np.float32), target),
            jax.tree.map(lambda v, i=i: v[i], start),
            keys[i],
            budget=BUDGET,
        )
        assert alone.found
        np.testing.assert_allclose(info.sizes[i], alone.size, rtol=2e-3)
        np.testing.assert_allclose(info.success_rates[i], alone.success_rate, rtol=1e-5)
        np.testing.assert_allclose(info.trigger.mask[i], alone.trigger.mask, atol=3e-3)
        np.testing.assert_allclose(info.trigger.pattern[i], alone.trigger.pattern, atol=3e-3)


def test_the_model_takes_one_step_on_the_partly_stamped_batch_with_true_labels():
    state, batch, after, info = harden()
    assert np.isfinite(info.sizes).all()
    assert info.num_stamped.tolist() == [2, 2]
    stamped = stamped_by_hand(batch.images, info, {0: [0, 1], 1: [4, 5]})
    assert_updated_on(state, stamped, batch.labels, after)
    before = state.variables["batch_stats"]["mean"]
    assert not np.array_equal(after.variables["batch_stats"]["mean"], before)
    _, loss = compiled_update()(state, stamped, batch.labels)
    assert float(info.loss) == pytest.approx(float(loss), rel=1e-4)


def test_a_failed_direction_is_not_stamped_and_does_not_hold_back_its_partner():
    state, batch, after, info = harden(never=0)
    assert np.isfinite(info.sizes[0])
    assert np.isposinf(info.sizes[1])
    assert info.num_stamped.tolist() == [2, 0]
    assert info.success_rates[1] == 0
    stamped = stamped_by_hand(batch.images, info, {0: [0, 1]})
    assert_updated_on(state, stamped, batch.labels, after)


def test_slots_of_other_classes_neither_enter_the_inversion_nor_are_stamped():
    state, batch, after, info = harden(missing=3)
    assert batch.weights.sum(1).tolist() == info.num_victims.tolist() == [4, 1]
    # Half of the smaller side would be none; at least one is stamped on each side.
    assert info.num_stamped.tolist() == [1, 1]
    stamped = stamped_by_hand(batch.images, info, {0: [0], 1: [4]})
    assert_updated_on(state, stamped, batch.labels, after)
    assert info.success_rates[1] == 1


def test_without_any_sample_of_a_class_its_direction_fails_and_the_other_is_stamped():
    *_, info = harden(missing=4)
    assert np.isfinite(info.sizes[0])
    assert np.isposinf(info.sizes[1])
    assert info.num_stamped.tolist() == [1, 0]


def test_one_direction_at_a_time_inverts_and_stamps_the_first_class_only():
    state, batch, after, info = harden(symmetric=False)
    assert info.sizes.shape == (1,)
    assert info.num_stamped.tolist() == [2]
    stamped = stamped_by_hand(batch.images, info, {0: [0, 1]})
    assert_updated_on(state, stamped, batch.labels, after)
    *_, both = harden()
    keys = [jax.random.split(step_keys()[1], n)[0] for n in (1, 2)]
    assert (keys[0] == keys[1]).all()
    np.testing.assert_allclose(info.sizes[0], both.sizes[0], rtol=2e-3)


@pytest.mark.parametrize(("never", "slots"), [(None, {0: [0, 1], 1: [4, 5]}), (0, {0: [0, 1]})])
def test_the_rest_of_an_adversarially_trained_models_batch_is_perturbed(never, slots):
    options = {"adversary": ADVERSARY, "batch_norm": "frozen"}
    state, batch, after, info = harden(never=never, **options)
    attacked = jax.jit(perturb, static_argnames=("classifier", "adversary"))(
        CLASSIFIER, state.variables, batch.images, batch.labels, step_keys()[2], ADVERSARY
    )
    assert np.abs(attacked - batch.images).max() > 0.09
    assert info.num_stamped.tolist() == [2, 2 if never is None else 0]
    stamped = stamped_by_hand(batch.images, info, slots, attacked)
    assert_updated_on(state, stamped, batch.labels, after, "frozen")
    jax.tree.map(
        np.testing.assert_array_equal,
        after.variables["batch_stats"],
        state.variables["batch_stats"],
    )


# How many are stamped.

choose = jax.jit(_choose_stamped, static_argnames="config")


def result_with(sizes):
    sizes = np.asarray(sizes, np.float32)
    count = len(sizes)
    return InversionResult(
        trigger=Trigger(
            np.zeros((count, 2, 2, 1), np.float32), np.zeros((count, 2, 2, 3), np.float32)
        ),
        size=sizes,
        success_rate=np.ones(count, np.float32),
        losses_before=np.ones((count, 20), np.float32),
        losses_after=np.ones((count, 20), np.float32),
    )


SHARES = {
    "a tenth": ([1, 1], [20, 20], 0.1, [2, 2]),
    "rounded down": ([1, 1], [19, 19], 0.1, [1, 1]),
    "of the smaller class": ([1, 1], [20, 10], 0.1, [1, 1]),
    "at least one": ([1, 1], [20, 5], 0.1, [1, 1]),
    "all": ([1, 1], [20, 20], 1.0, [20, 20]),
    "failed": ([1, np.inf], [20, 20], 0.1, [2, 0]),
    "larger than a quarter of 2*2*3": ([3.0, 3.01], [20, 20], 0.1, [2, 0]),
    "no victim": ([1, 1], [20, 0], 0.1, [1, 0]),
    "both failed": ([np.inf, np.inf], [20, 20], 0.1, [0, 0]),
    "of each pair by itself": ([1, 1, 1, 1], [20, 10, 20, 20], 0.2, [2, 2, 4, 4]),
}


@pytest.mark.parametrize(("sizes", "victims", "share", "stamped"), SHARES.values(), ids=SHARES)
def test_a_share_of_the_smaller_class_is_stamped_on_each_side(sizes, victims, share, stamped):
    weights = (np.arange(20) < np.asarray(victims)[:, None]).astype(np.float32)
    chosen = choose(result_with(sizes), weights, config=StepConfig(stamp_share=share))
    assert chosen.sum(1).tolist() == stamped
    assert not np.any(np.asarray(chosen) & (weights == 0))


def test_one_direction_at_a_time_stamps_a_share_of_its_own_victims():
    weights = (np.arange(20) < np.array([20, 10])[:, None]).astype(np.float32)
    config = StepConfig(stamp_share=0.2, symmetric=False)
    assert choose(result_with([1, 1]), weights, config=config).sum(1).tolist() == [4, 2]


def test_padding_between_the_victims_is_never_stamped():
    weights = np.array([[0, 1, 0, 1, 1, 1]] * 2, np.float32)
    chosen = choose(result_with([1, 1]), weights, config=StepConfig(stamp_share=0.5))
    assert np.flatnonzero(chosen[0]).tolist() == [1, 3]


@pytest.mark.parametrize(("augment_stamped", "places"), [(False, 1), (True, 25)])
def test_what_is_stamped_moves_with_the_image_if_asked_for(augment_stamped, places):
    trigger = Trigger(jnp.zeros((7, 7, 1)).at[3, 3].set(1.0), jnp.ones((7, 7, 1)))
    config = StepConfig(shift=2, augment_stamped=augment_stamped)
    stamped = np.asarray(config.stamped(jnp.zeros((400, 7, 7, 1)), trigger, jax.random.key(0)))
    assert (stamped.sum((1, 2, 3)) == 1).all()
    seen = np.argwhere(stamped.any(0)[..., 0])
    assert len(seen) == places
    assert np.abs(seen - 3).max() == (2 if augment_stamped else 0)
