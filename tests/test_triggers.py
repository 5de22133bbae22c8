import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moth_jax.triggers import (
    TRIGGER_LAYOUT,
    AddedTrigger,
    Trigger,
    changed_pixels,
    clip_to_unit,
    jitter,
    names_of_other_kinds,
    needed_mask,
    random_trigger,
    replacing,
    stamp,
    success_rate,
    trigger_arrays,
    trigger_of,
    trigger_size,
)

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


# Triggers that are added.


DELTA = st.floats(-1, 1, width=32, allow_subnormal=False)
COARSE = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])  # many are at the ends, or alike


def added(*shape):
    return arrays(np.float32, shape, elements=DELTA).map(AddedTrigger)


@quick
@given(in_unit(4, H, W, C), added(H, W, C))
def test_an_added_trigger_is_added_and_clipped_and_keeps_pixels_where_it_is_0(images, trigger):
    stamped = np.asarray(stamp(images, trigger))
    np.testing.assert_allclose(stamped, np.clip(images + trigger.delta, 0, 1), atol=1e-7)
    kept = np.broadcast_to(trigger.delta == 0, images.shape)
    np.testing.assert_array_equal(stamped[kept], images[kept])


def test_the_gradient_of_a_clipped_value_is_whole_at_both_ends_and_nothing_past_them():
    values = jnp.asarray([-0.1, 0.0, 0.5, 1.0, 1.1])
    slopes = jax.grad(lambda v: clip_to_unit(v).sum())(values)
    assert slopes.tolist() == [0, 1, 1, 1, 0]


@quick
@given(in_unit(2, H, W, C), added(H, W, C))
def test_a_trigger_that_replaces_stamps_its_image_as_the_added_one_does(images, trigger):
    for image in images:
        same = replacing(trigger, image)
        assert ((np.asarray(same.mask) >= 0) & (np.asarray(same.mask) <= 1)).all()
        np.testing.assert_allclose(stamp(image, same), stamp(image, trigger), atol=1e-6)


def smallest_mask(x, delta):
    """The smallest m of a grid with clip(x + δ) - x in m·[-x, 1 - x], of one pixel's channels."""
    change = np.clip(x + delta, 0, 1) - x
    for m in np.linspace(0, 1, 2521):  # a multiple of all that coarse values can give
        if ((-m * x - 1e-6 <= change) & (change <= m * (1 - x) + 1e-6)).all():
            return m
    raise AssertionError("a whole mask reaches every change")


@settings(max_examples=20, deadline=None)
@given(
    arrays(np.float32, (3, 2, 1, 2), elements=COARSE),
    arrays(np.float32, (2, 1, 2), elements=COARSE),
    arrays(np.float32, (2, 1, 2), elements=COARSE),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_the_needed_mask_is_the_smallest_one_of_the_images_that_are_held(images, plus, minus, sent):
    trigger = AddedTrigger(plus - minus)
    each = np.array(
        [[[smallest_mask(x[i, 0], trigger.delta[i, 0])] for i in range(2)] for x in images]
    )
    own = each.sum((1, 2))
    for share in (1 / 3, 2 / 3, 1.0):
        wanted = round(3 * share)
        known = np.sort(own[sent])
        held = np.asarray(sent) & (own <= (known[wanted - 1] + 1e-5 if wanted <= len(known) else 9))
        expected = each[held].max(0, initial=0)
        got = needed_mask(trigger, images, np.ones(3), np.asarray(sent), share - 1e-6)
        np.testing.assert_allclose(got[..., 0], expected, atol=1 / 2520)


@quick
@given(in_unit(4, H, W, C), added(H, W, C))
def test_every_image_is_stamped_with_the_needed_mask_and_some_pattern(images, trigger):
    mask = np.asarray(needed_mask(trigger, images, np.ones(4), np.ones(4), 1.0), np.float64)
    change = np.asarray(stamp(images, trigger), np.float64) - images
    assert (-mask * images - 1e-6 <= change).all()  # a pattern of 0 or more does it
    assert (change <= mask * (1 - images) + 1e-6).all()  # and one of 1 or less
    assert mask.max() <= 1


def test_images_that_are_not_sent_and_padding_need_no_mask():
    images = np.array([0.5, 0.75, 0.0, 0.9], np.float32)[:, None, None, None]
    trigger = AddedTrigger(np.full((1, 1, 1), 0.1, np.float32))  # 0.2, 0.4, 0.1 and 1 of a mask

    def needed(sent, weights, share):
        known = np.array(weights), np.array(sent)
        return float(needed_mask(trigger, images, *known, share).item())

    assert needed([1, 1, 1, 1], [1, 1, 1, 1], 1.0) == pytest.approx(1.0)
    assert needed([1, 1, 1, 1], [1, 1, 1, 1], 0.75) == pytest.approx(0.4)
    assert needed([1, 0, 1, 1], [1, 1, 1, 0], 0.66) == pytest.approx(0.2)
    assert needed([1, 1, 1, 1], [1, 1, 1, 1], 0.25) == pytest.approx(0.1)


def test_a_pixel_is_changed_if_one_channel_of_one_image_is():
    images = np.zeros((3, 2, 2, 3), np.float32)
    images[2] = 0.5
    delta = np.zeros((2, 2, 3), np.float32)
    delta[0, 0, 1], delta[0, 1, 2], delta[1, 0, 0] = 0.2, -0.2, 0.5 / 255
    trigger = AddedTrigger(delta)
    assert int(changed_pixels(trigger, images, np.ones(3))) == 2
    assert int(changed_pixels(trigger, images, np.array([1, 1, 0]))) == 1  # black stays black
    replaced = Trigger(np.ones((2, 2, 1), np.float32), np.full((2, 2, 3), 0.5, np.float32))
    assert int(changed_pixels(replaced, images, np.ones(3))) == 4
    assert int(changed_pixels(replaced, images, np.array([0, 0, 1]))) == 0
    faint = AddedTrigger(np.full((2, 2, 3), 1 / 255, np.float32))  # which roundings do not hide
    noise = np.random.default_rng(0).random((9, 2, 2, 3), np.float32)
    assert int(changed_pixels(faint, noise, np.ones(9))) == 4


@pytest.mark.parametrize("suffix", ["", "s"])
@pytest.mark.parametrize(
    "trigger",
    [random_triggers(2), AddedTrigger(np.ones((2, H, W, C), np.float32))],
    ids=["replaces", "is added"],
)
def test_a_trigger_is_the_same_from_its_arrays(trigger, suffix):
    written = trigger_arrays(trigger, suffix)
    other = names_of_other_kinds(written, suffix)
    assert {*written, *other} == {f"{name}{suffix}" for name in TRIGGER_LAYOUT}
    again = trigger_of({**written, "seconds": np.ones(())}, suffix)
    assert type(again) is type(trigger)
    jax.tree.map(np.testing.assert_array_equal, again, trigger)
    assert trigger.image_shape == (H, W, C)
