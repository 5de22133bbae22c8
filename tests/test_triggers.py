import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moth_jax.triggers import Trigger, jitter, random_trigger, stamp, success_rate, trigger_size

H, W, C = 3, 2, 3
UNIT = st.floats(0, 1, width=32, allow_subnormal=False)  # XLA rounds subnormal numbers to 0
quick = settings(max_examples=50, deadline=None)


def in_unit(*shape):
    return arrays(np.float32, shape, elements=UNIT)


@quick
@given(in_unit(4, H, W, C), arrays(np.bool_, (H, W, 1)), in_unit(H, W, C))
def test_pixels_outside_the_mask_do_not_change_and_those_inside_become_the_pattern(
    images, inside, pattern
):
    stamped = stamp(images, Trigger(inside.astype(np.float32), pattern))
    np.testing.assert_array_equal(stamped, np.where(inside, pattern, images))


@quick
@given(in_unit(4, H, W, C), in_unit(H, W, 1), in_unit(H, W, C))
def test_a_stamped_image_lies_between_the_image_and_the_pattern_and_so_in_the_unit_interval(
    images, mask, pattern
):
    stamped = np.asarray(stamp(images, Trigger(mask, pattern)))
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    rounding = 1e-6
    assert (stamped >= np.minimum(images, pattern) - rounding).all()
    assert (stamped <= np.maximum(images, pattern) + rounding).all()
    np.testing.assert_allclose(stamped, (1 - mask) * images + mask * pattern, atol=rounding)


def random_triggers(count, seed=0):
    rng = np.random.default_rng(seed)
    return Trigger(
        rng.random((count, H, W, 1), np.float32), rng.random((count, H, W, C), np.float32)
    )


def test_a_trigger_of_its_own_may_be_stamped_on_each_image():
    triggers = random_triggers(5)
    images = np.random.default_rng(1).random((5, H, W, C), np.float32)
    each = [stamp(images[i], jax.tree.map(lambda v, i=i: v[i], triggers)) for i in range(5)]
    np.testing.assert_allclose(stamp(images, triggers), np.stack(each), rtol=1e-6)


@quick
@given(in_unit(H, W, 1))
def test_the_size_is_the_number_of_channels_times_the_sum_of_the_mask(mask):
    trigger = Trigger(mask, np.zeros((H, W, C), np.float32))
    assert float(trigger_size(trigger)) == pytest.approx(C * mask.sum(dtype=np.float64), rel=1e-5)


def test_the_sizes_of_a_batch_of_triggers_keep_its_axes():
    masks = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1, 1) * np.ones((H, W, 1), np.float32)
    trigger = Trigger(masks, np.zeros((2, 3, H, W, C), np.float32))
    expected = np.arange(6).reshape(2, 3) * H * W * C
    np.testing.assert_allclose(trigger_size(trigger), expected)


def test_a_random_trigger_is_uniform_and_its_mask_and_pattern_are_drawn_apart():
    trigger = random_trigger(jax.random.key(3), (40, 40, 1))
    for part in (trigger.mask, trigger.pattern):
        values = np.sort(np.asarray(part).ravel())
        assert values[0] >= 0
        assert values[-1] <= 1
        # Kolmogorov's distance from the uniform distribution; 1.63 / sqrt(n) is its 1 % quantile.
        assert np.abs(values - np.linspace(0, 1, values.size)).max() < 1.63 / np.sqrt(values.size)
    correlation = np.corrcoef(trigger.mask.ravel(), trigger.pattern.ravel())[0, 1]
    assert abs(correlation) < 0.1
    assert trigger.mask.shape == trigger.pattern.shape == (40, 40, 1)


@quick
@given(in_unit(H, W, 1), in_unit(H, W, C), st.integers(0, 5))
def test_jitter_moves_mask_and_pattern_by_at_most_its_scale_and_stays_in_the_unit_interval(
    mask, pattern, seed
):
    noisy = jitter(Trigger(mask, pattern), jax.random.key(seed), 0.01)
    for before, after in ((mask, noisy.mask), (pattern, noisy.pattern)):
        assert np.abs(after - before).max() <= 0.01 + 1e-6
        assert after.min() >= 0
        assert after.max() <= 1
        assert (after != before).any()


def test_jitter_without_scale_changes_nothing():
    trigger = random_trigger(jax.random.key(0), (H, W, C))
    unmoved = jitter(trigger, jax.random.key(1), 0.0)
    jax.tree.map(np.testing.assert_array_equal, unmoved, trigger)


@pytest.mark.parametrize(
    ("predicted", "target", "weights", "expected"),
    [
        ([1, 1, 0, 2], 1, [1, 1, 1, 1], 0.5),
        ([1, 1, 0, 2], 1, [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 1], 1, [1, 1, 0, 0], 0.0),
        ([1, 1, 1, 1], 1, [0, 0, 0, 0], 0.0),
        ([0, 1, 2, 2], [0, 1, 2, 0], [1, 1, 1, 1], 0.75),
    ],
    ids=["half", "padding missed", "padding hit", "no sample", "targets of their own"],
)
def test_the_success_rate_counts_samples_and_not_padding(predicted, target, weights, expected):
    logits = jax.nn.one_hot(np.asarray(predicted), 3)
    rate = success_rate(logits, np.asarray(target), np.asarray(weights, np.float32))
    assert float(rate) == pytest.approx(expected)
