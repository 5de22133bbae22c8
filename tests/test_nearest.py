import functools

import jax.numpy as jnp
import numpy as np
import pytest
from toys import RecordedProgress, linear_classifier, row_images, row_variables

from moth_jax import distance, nearest
from moth_jax.errors import InputError

CLASSIFIER = linear_classifier(num_classes=4)
LABELS = np.repeat([0, 1, 2, 3], 8).astype(np.int32)
IMAGES = row_images(LABELS)


@functools.cache
def variables():
    """Rows decide; class 3 is easily reached."""
    tree = row_variables(num_classes=4)
    bias = jnp.array([0.0, 0.0, 0.0, 4.0])
    return {**tree, "params": {**tree["params"], "bias": bias}}


def choose(num_directions, **options):
    defaults = {"variables": variables(), "num_steps": 30, "num_images": 12, "progress": False}
    return nearest.nearest_directions(
        CLASSIFIER.predict, IMAGES, LABELS, num_directions, **{**defaults, **options}
    )


def test_the_nearest_directions_are_those_of_the_smallest_distances():
    choice = choose(12)
    assert choice.details == {"kind": "nearest", "of": 12}
    matrix = distance.distance_matrix(
        CLASSIFIER.predict,
        IMAGES,
        LABELS,
        variables=variables(),
        directions=choice,
        num_steps=60,
        progress=False,
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
    assert sum(progress.skipped) == 4


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
