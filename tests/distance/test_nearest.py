import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance import measure, nearest
from moth_jax.errors import InputError
from moth_jax.progress import silent_progress
from tests.helpers.toys import (
    RecordedProgress,
    StoppedError,
    linear_classifier,
    row_images,
    row_variables,
)

CLASSIFIER = linear_classifier(num_classes=4)
LABELS = np.repeat([0, 1, 2, 3], 8).astype(np.int32)
IMAGES = row_images(LABELS)


@functools.cache
def variables():
    """Rows decide; class 3 is easily reached."""
    tree = row_variables(num_classes=4)
    bias = jnp.array([0.0, 0.0, 0.0, 4.0])
    return {**tree, "params": {**tree["params"], "bias": bias}}


def choose(num_directions, images=IMAGES, labels=LABELS, **options):
    defaults = {"variables": variables(), "num_steps": 30, "num_images": 12, "progress": False}
    return nearest.nearest_directions(
        CLASSIFIER.predict, images, labels, num_directions, **{**defaults, **options}
    )


def test_the_nearest_directions_are_those_of_the_smallest_distances():
    choice = choose(12)
    assert choice.details == {"kind": "nearest", "of": 12}
    options = {"variables": variables(), "num_steps": 60, "progress": False}
    matrix = measure.distance_matrix(
        CLASSIFIER.predict, IMAGES, LABELS, directions=choice, **options
    )
    assert matrix.details["selection"] == choice.details
    measured = np.array([matrix.values[direction] for direction in choice.directions])
    assert set(choice.directions[:3]) == {(0, 3), (1, 3), (2, 3)}
    assert measured[:3].mean() < 0.7 * measured.mean()
    assert "12 nearest of 12 directions, as universal triggers" in matrix.summary()
    assert matrix.interval() is None


def test_the_bounds_belong_to_triggers_that_send_the_victims_to_the_target():
    rates = np.zeros((16, 3))
    rates[7:, 0] = 1.0  # from half of the mask on
    rates[[3, 12], 1] = 1.0  # by accident
    rates[15, 2] = 0.5
    bounds = nearest._bound(rates, 8.0, 0.9)
    np.testing.assert_allclose(bounds, [4.0, np.inf, 16.0])


def test_victims_targets_and_classes_restrict_what_is_chosen_from():
    assert {b for _, b in choose(3, targets=(2,)).directions} == {2}
    assert {a for a, _ in choose(3, victims=(1,)).directions} == {1}
    choice = choose(4, classes=(3, 0, 2))
    assert {k for direction in choice.directions for k in direction} == {0, 2, 3}
    assert choice.details["of"] == 6


def test_universal_triggers_that_are_done_are_not_inverted_again(tmp_path):
    whole = choose(5, resume_dir=tmp_path)
    progress = RecordedProgress()
    assert choose(5, resume_dir=tmp_path, progress=progress) == whole
    assert sum(progress.skipped) == 4 + 4  # the triggers, and the success of their parts
    assert not progress.advanced


def test_targets_that_are_done_are_not_tried_again_after_an_interruption(tmp_path, monkeypatch):
    whole, computed, rates = choose(12), [], nearest._rates

    def counted(*arguments):
        computed.append(int(arguments[4]))
        return rates(*arguments)

    monkeypatch.setattr(nearest, "_rates", counted)

    def end():
        if len(computed) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        choose(12, resume_dir=tmp_path, progress=silent_progress(after_advance=end))
    assert computed == [0, 1]
    assert choose(12, resume_dir=tmp_path) == whole
    assert computed == [0, 1, 2, 3]
    # On other images they did otherwise.
    choose(12, resume_dir=tmp_path, images_per_class=5)
    assert len(computed) == 8


@pytest.mark.parametrize("images_together", [1, 15, 256])
def test_bounds_are_sizes_of_parts_that_succeed_stamped_in_numpy(monkeypatch, images_together):
    monkeypatch.setattr(nearest, "_IMAGES_TOGETHER", images_together)
    jax.clear_caches()
    seen = []

    def watch(module, name, whole):
        def watched(*arguments, **options):
            seen.append(whole(*arguments, **options))
            return seen[-1]

        monkeypatch.setattr(module, name, watched)

    watch(nearest, "universal_triggers", nearest.universal_triggers)
    watch(nearest, "distance_bounds", nearest.distance_bounds)
    kept = np.r_[:19, 24:32]  # fewer images of class 2
    choose(12, IMAGES[kept], LABELS[kept], num_steps=60, images_per_class=8)
    found, bounds = seen
    checked = 0
    for target in range(4):
        mask, pattern = found.trigger.mask[target], found.trigger.pattern[target]
        for victim in set(range(4)) - {target}:
            own = IMAGES[kept][victim == LABELS[kept]]
            rates = []
            for share in np.arange(1, 17) / 16:
                stamped = (1 - share * mask) * own + share * mask * pattern
                logits = np.asarray(CLASSIFIER.predict(variables(), jnp.asarray(stamped)))
                rates.append((logits.argmax(-1) == target).mean())
            if rates[-1] >= 0.9:
                last_failure = max((i for i in range(16) if rates[i] < 0.9), default=-1)
                size = mask.sum() * (last_failure + 2) / 16
                np.testing.assert_allclose(bounds[victim, target], size, rtol=1e-5)
                checked += 1
    assert checked >= 8


def test_bounds_count_where_margins_say_otherwise():
    kernel = np.zeros((16, 3), np.float32)
    kernel[:, 1] = 0.3  # near by its margin of 1, but it takes all pixels together
    kernel[0, 2] = 8  # a margin of 2, which a single pixel overcomes
    tree = {
        "params": {"kernel": jnp.asarray(kernel), "bias": jnp.array([0.0, -3.4, -6.0])},
        "batch_stats": {"mean": jnp.zeros(3)},
    }
    images, labels = np.full((24, 4, 4, 1), 0.5, np.float32), np.repeat([0, 1, 2], 8)
    images[8:16], images[8:16, 0, 0], images[16:, 0, 0] = 1.0, 0.5, 1.0
    options = {"variables": tree, "victims": (0,), "num_steps": 200, "progress": False}
    predict = linear_classifier(num_classes=3).predict
    choice = nearest.nearest_directions(predict, images, labels, 2, **options)
    assert choice.directions == [(0, 2), (0, 1)]


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "num_directions must be at least 1, got 0"),
        (13, {}, r"num_directions must be in 1\.\.12, got 13"),
        (4, {"targets": (1,)}, r"num_directions must be in 1\.\.3, got 4"),
        (1, {"images_per_class": 0}, "images_per_class must be at least 1"),
        (1, {"success_bound": 0.0}, r"success_bound must be in \(0, 1\], got 0"),
        (1, {"victims": (1,), "targets": (1,)}, "no direction between"),
    ],
)
def test_a_choice_that_cannot_be_is_a_clear_error(count, options, message):
    with pytest.raises(InputError, match=message):
        choose(count, **options)
