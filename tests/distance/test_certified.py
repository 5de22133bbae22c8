"""Certified distances: below every verified trigger, over the same images, kept and resumed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.distance import DistanceMatrix, certified_distances, distance_matrix
from moth_jax.distance.bounds.linear import least_optimum
from moth_jax.distance.certified import least_hits
from moth_jax.errors import InputError
from tests.helpers.networks import NETWORKS, network, random_images
from tests.helpers.toys import (
    RecordedProgress,
    StoppedError,
    linear_classifier,
    row_distances,
    row_images,
    row_variables,
)

LABELS = np.repeat(np.arange(3), 4)


def labelled_by(logits_fn, count=24, seed=0):
    images = random_images(count, seed)
    return images, np.asarray(logits_fn(images)).argmax(1)


def rows(**options):
    return certified_distances(
        linear_classifier().predict,
        row_images(LABELS),
        LABELS,
        variables=row_variables(),
        **{"progress": False, **options},
    )


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(NETWORKS)), st.sampled_from([0.7, 1.0]))
def test_no_verified_trigger_is_smaller_than_the_bound(seed, kind, success_bound):
    from moth_jax.inversion import create

    logits_fn = network(kind, seed)
    images, labels = labelled_by(logits_fn, 24, seed)
    directions = [(a, b) for a in np.unique(labels).tolist() for b in range(3) if a != b]
    options = {"directions": directions, "num_images": 5, "progress": False}
    inversion = create("trimmed", success_bound=success_bound)
    matrix = distance_matrix(
        logits_fn, images, labels, inversion=inversion, num_steps=100, **options
    )
    lower = certified_distances(logits_fn, images, labels, success_bound=success_bound, **options)
    measured = ~np.isnan(matrix.values)
    assert (np.isnan(lower) == ~measured).all()
    assert (lower[measured] <= matrix.values[measured]).all()


def test_the_optimum_of_a_linear_classifier_is_close_below_what_is_found():
    lower, found = rows(), row_distances(LABELS, seeds=(0, 1)).values
    off = ~np.eye(3, dtype=bool)
    assert (lower[off] <= found[off]).all()
    assert (lower[off] > 0.8 * found[off]).all()


def test_for_one_image_of_a_linear_classifier_the_bound_is_the_optimum():
    # One pixel after the other, the most useful first, until the margin is gone.
    image = row_images(np.array([0]))[0]
    lower = certified_distances(
        linear_classifier().predict,
        np.stack([image, *row_images(np.array([1, 2]))]),
        np.array([0, 1, 2]),
        variables=row_variables(),
        directions=[(0, 1)],
        num_images=1,
        progress=False,
    )[0, 1]
    # Row 1 up, row 0 down; row 2 stays below row 0 and needs no change of its own.
    gains = np.sort(np.concatenate([4 * (1 - image[1]).ravel(), 4 * image[0].ravel()]))[::-1]
    margin = 4 * float(image[0].sum() - image[1].sum())
    taken = int((np.cumsum(gains) < margin).sum())
    optimum = taken + (margin - gains[:taken].sum()) / gains[taken]
    assert lower == pytest.approx(optimum, rel=1e-3)
    assert lower <= optimum


def test_the_bound_of_more_images_that_all_must_be_sent_is_not_smaller():
    logits_fn = network("mlp", 3)
    images, labels = labelled_by(logits_fn, 40)
    present = np.unique(labels).tolist()
    directions = [(a, b) for a in present for b in range(3) if a != b]
    options = {"success_bound": 1.0, "directions": directions, "progress": False}
    few, many = (
        certified_distances(logits_fn, images, labels, num_images=n, **options) for n in (2, 8)
    )
    known = ~np.isnan(few)
    assert (many[known] >= few[known] * (1 - 0.05)).all()  # up to the search's tolerance


def test_images_that_are_predicted_as_the_target_need_no_trigger():
    images, labels = row_images(np.array([1, 1, 0])), np.array([0, 0, 0])
    images = np.concatenate([images, row_images(np.array([1]))])
    lower = certified_distances(
        linear_classifier().predict,
        images,
        np.append(labels, 1),
        variables=row_variables(),
        directions=[(0, 1)],
        success_bound=0.6,
        check_order=False,
        progress=False,
    )
    assert lower[0, 1] == 0


def test_the_least_hits_are_those_that_the_inversion_counts():
    for n in range(1, 60):
        for bound in (0.5, 0.9, 0.99, 1.0):
            hits = least_hits(n, bound)
            rates = np.float32(np.arange(n + 1)) / np.float32(n)
            assert hits == np.flatnonzero(rates >= bound - 1e-6)[0]


def test_a_linear_program_that_no_trigger_solves_is_infinite():
    weights, offsets = np.zeros((2, 2, 2, 1)), np.array([1.0, 0.0])
    assert np.isinf(least_optimum(weights, offsets, np.zeros((3, 2, 2, 1)), 1, 3))
    assert np.isinf(least_optimum(weights, offsets, np.zeros((3, 2, 2, 1)), 1, 2))
    assert least_optimum(weights, offsets, np.zeros((3, 2, 2, 1)), 0, 3) == 0


def test_a_layer_that_is_not_known_is_named_in_a_line():
    def logits_fn(images):
        return jnp.tanh(images.reshape(len(images), -1)[:, :3])

    with pytest.raises(InputError, match="'tanh'") as error:
        certified_distances(
            logits_fn, random_images(6), np.arange(6) % 3, check_order=False, progress=False
        )
    assert "\n" not in str(error.value)


def test_a_function_that_mixes_the_images_of_a_batch_is_refused():
    def logits_fn(images):
        flat = images.reshape(len(images), -1)
        return (flat - flat.mean(0, keepdims=True))[:, :3]

    with pytest.raises(InputError, match="other images of its batch"):
        certified_distances(
            logits_fn, random_images(6), np.arange(6) % 3, check_order=False, progress=False
        )


@pytest.mark.parametrize("bound", [0, 1.5])
def test_a_success_bound_outside_its_range_is_refused(bound):
    with pytest.raises(InputError, match="success_bound"):
        rows(success_bound=bound)


def test_finished_victims_are_not_certified_again(tmp_path):
    with pytest.raises(StoppedError):
        rows(resume_dir=tmp_path, progress=RecordedProgress(interrupt_after=2))
    again = RecordedProgress()
    resumed = rows(resume_dir=tmp_path, progress=again)
    assert (sum(again.skipped), sum(again.advanced)) == (2, 4)
    np.testing.assert_array_equal(resumed, rows())


def test_lower_ends_are_saved_shown_and_compared(tmp_path):
    matrix = dataclasses.replace(row_distances(LABELS), lower=rows())
    matrix.save(tmp_path / "matrix.npz")
    loaded = DistanceMatrix.load(tmp_path / "matrix.npz")
    np.testing.assert_array_equal(loaded.lower, matrix.lower)
    assert f"[{np.floor(10 * matrix.lower[0, 1]) / 10:.1f}, {matrix.values[0, 1]:.1f}]" in str(
        matrix
    )
    assert "proven lower" in matrix.compare(loaded)
    texts = [text.get_text() for text in matrix.plot().texts]
    assert sum(text.startswith("≥") for text in texts) == 6
    assert row_distances(LABELS).average_lower() is None
