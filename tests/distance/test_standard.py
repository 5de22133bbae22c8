"""The standard search of distances: an ensemble."""

import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance import DistanceMatrix, chunks, class_distance, distance_matrix
from moth_jax.errors import InputError
from moth_jax.inversion import Standard, create, create_search, standard
from moth_jax.triggers import stamp
from tests.helpers.toys import linear_classifier, row_images, row_variables

LABELS = np.repeat([0, 1, 2], 12)
IMAGES = row_images(LABELS)
PREDICT, VARIABLES = linear_classifier().predict, row_variables()
ALL = [(a, b) for a in range(3) for b in range(3) if a != b]


def measured(directions=None, inversion="standard", **options):
    return distance_matrix(
        PREDICT,
        IMAGES,
        LABELS,
        variables=VARIABLES,
        directions=directions,
        inversion=inversion,
        progress=False,
        **{"directions_per_chunk": 2, **options},  # one program for most of the tests
    )


@pytest.fixture(scope="module")
def matrix():
    return measured()


def test_every_trigger_is_verified_and_none_is_larger_than_by_one_search(matrix):
    single = measured(inversion="trimmed")
    assert matrix.num_failures() == 0
    for a, b in ALL:
        logits = PREDICT(VARIABLES, stamp(IMAGES[a == LABELS], matrix.trigger(a, b)))
        assert np.mean(np.argmax(logits, -1) == b) >= 0.9
        assert matrix.values[a, b] <= 1.02 * single.values[a, b]


def test_a_matrix_knows_what_each_search_found_and_how_far_they_are_apart(matrix, tmp_path):
    searches = matrix.values_per_search
    assert searches.shape == (standard.NUM_KEPT + 1, 3, 3)
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_array_equal(searches.min(0)[off], matrix.values[off])
    assert matrix.values_per_seed is None
    first, second = np.sort(searches, axis=0)[:2]
    np.testing.assert_allclose(matrix.disagreement()[off], (second / first - 1)[off], rtol=1e-5)
    assert matrix.details["inversion"] == "standard-1(0.9)"
    assert "num_steps" not in matrix.details
    matrix.save(tmp_path / "matrix.npz")
    again = DistanceMatrix.load(tmp_path / "matrix.npz")
    np.testing.assert_array_equal(again.values_per_search, searches)
    assert again.in_changed_pixels().values_per_search is None


def test_seeds_are_whole_ensembles():
    both, first = (measured(ALL[:2], seeds=seeds) for seeds in ((3, 4), (3,)))
    assert len(both.values_per_search) == 2 * len(first.values_per_search)
    np.testing.assert_allclose(both.values_per_search[:3], first.values_per_search, rtol=1e-4)


def test_one_search_does_not_know_how_far_others_are():
    assert np.isnan(measured([(0, 1)], inversion="trimmed").disagreement()).all()


def test_an_interrupted_measurement_gives_the_same_numbers(matrix, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    calls.left = 1
    with pytest.raises(KeyboardInterrupt):
        measured(resume_dir=tmp_path)
    calls.left = 2
    resumed = measured(resume_dir=tmp_path)
    np.testing.assert_array_equal(resumed.values, matrix.values)


class Calls:
    """How many chunks may still be measured; None: all."""

    left = None


def counted(monkeypatch):
    """Count what is measured."""
    calls, original = Calls(), chunks.measure_chunk

    def measure_chunk(*args):
        if calls.left is not None:
            if not calls.left:
                raise KeyboardInterrupt
            calls.left -= 1
        return original(*args)

    monkeypatch.setattr(chunks, "measure_chunk", measure_chunk)
    return calls


def test_a_class_distance_is_the_smallest_of_all_its_searches(matrix):
    images = IMAGES[LABELS == 0]
    found = class_distance(PREDICT, images, 1, variables=VARIABLES, inversion="standard")
    assert found.size.shape == ()
    logits = PREDICT(VARIABLES, stamp(images, found.trigger))
    assert np.mean(np.argmax(logits, -1) == 1) >= 0.9
    assert float(found.size) <= 1.05 * matrix.values[0, 1]


@pytest.mark.parametrize("options", [{"num_steps": 5}, {"minibatch_size": 5}, {"mask_weight": 1.0}])
def test_it_has_a_budget_of_its_own(options):
    with pytest.raises(
        InputError, match=f"'standard' has a budget of its own .* {next(iter(options))};"
    ):
        measured(**options)


def test_it_has_no_options_but_what_a_distance_is_and_hardens_nothing():
    assert create_search("standard", success_bound=0.8) == Standard(success_bound=0.8)
    with pytest.raises(InputError, match="'standard' has no option 'patience'"):
        create_search("standard", patience=3)
    with pytest.raises(InputError, match="'standard' is an ensemble that measures distances; choo"):
        create("standard")
    with pytest.raises(InputError, match=r"success_bound must be in \(0, 1\], got 2"):
        Standard(success_bound=2)


def test_a_search_that_finds_nothing_is_not_found():
    def constant(variables, images):
        return jnp.zeros((len(images), 3)).at[:, 0].set(1.0 + 0 * images.sum())

    matrix = distance_matrix(
        constant,
        IMAGES,
        LABELS,
        variables={},
        directions=[(0, 1)],
        inversion="standard",
        check_order=False,
        progress=False,
    )
    assert matrix.num_failures() == 1
