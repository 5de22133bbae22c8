"""The standard search: an ensemble in passes."""

import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance import DistanceMatrix, chunks, class_distance, distance_matrix, passes
from moth_jax.distance.store import Chunk
from moth_jax.errors import InputError
from moth_jax.inversion import Standard, create, create_search, standard
from moth_jax.triggers import Trigger, stamp
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
        **options,
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


def test_a_matrix_knows_its_searches_and_whether_they_settled(matrix, tmp_path):
    searches = matrix.values_per_search
    first = standard.NUM_KEPT
    assert searches.shape[1:] == (3, 3)
    assert len(searches) in (first + 2, first + 4)  # its own trigger and its only neighbour's
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_array_equal(searches.min(0)[off], matrix.values[off])
    assert matrix.values_per_seed is None
    assert set(matrix.settled[off]) <= {0.0, 1.0}
    assert (matrix.disagreement()[off] >= 0).all()
    assert matrix.details["inversion"] == "standard-1(0.9)"
    assert "num_steps" not in matrix.details
    matrix.save(tmp_path / "matrix.npz")
    again = DistanceMatrix.load(tmp_path / "matrix.npz")
    np.testing.assert_array_equal(again.values_per_search, searches)
    np.testing.assert_array_equal(again.settled, matrix.settled)


def test_an_interrupted_measurement_gives_the_same_numbers(matrix, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    calls.left = 4  # the first pass and part of the second
    with pytest.raises(KeyboardInterrupt):
        measured(resume_dir=tmp_path, directions_per_chunk=2)
    calls.left = None
    resumed = measured(resume_dir=tmp_path, directions_per_chunk=2)
    np.testing.assert_allclose(resumed.values, matrix.values, rtol=0.02)
    whole = measured(directions_per_chunk=2)
    np.testing.assert_array_equal(resumed.values, whole.values)


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


def test_one_direction_alone_has_no_neighbours():
    alone = measured([(0, 1)])
    assert len(alone.values_per_search) in (standard.NUM_KEPT + 1, standard.NUM_KEPT + 2)
    assert np.isfinite(alone.values[0, 1])


def test_a_class_distance_is_the_smallest_of_all_its_searches():
    images = IMAGES[LABELS == 0]
    found = class_distance(PREDICT, images, 1, variables=VARIABLES, inversion="standard")
    assert found.size.shape == ()
    logits = PREDICT(VARIABLES, stamp(images, found.trigger))
    assert np.mean(np.argmax(logits, -1) == 1) >= 0.9
    assert float(found.size) <= 1.05 * measured([(0, 1)]).values[0, 1]


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


def a_chunk(sizes, directions):
    """Chunk whose trigger's mask says of which direction it is."""
    count = len(directions)
    mask = np.broadcast_to(
        np.arange(count, dtype=np.float32)[:, None, None, None], (count, 4, 4, 1)
    )
    return Chunk(
        directions=np.array(directions),
        sizes=np.asarray(sizes, np.float32),
        rates=np.ones_like(sizes),
        trigger=Trigger(mask, mask),
        changed_pixels=np.arange(count, dtype=np.float32),
        seconds=1.0,
    )


def test_directions_go_on_from_their_own_trigger_and_those_that_send_most_of_their_images(
    monkeypatch,
):
    directions = [(0, 3), (1, 3), (2, 3), (4, 3), (0, 1), (5, 3)]
    found = a_chunk([[5.0], [4.0], [3.0], [6.0], [1.0], [np.inf]], directions)
    rates = {0: [0.1, 0.8, 0.3], 5: [0.2, 0.1, 0.4, 0.9]}
    tried = {}

    def rates_of(measurement, chunk, place, others):
        tried[place] = others.tolist()
        return np.array(rates[place])

    monkeypatch.setattr(passes, "_rates", rates_of)
    starts = passes.starts_of(None, found, np.array([0, 4, 5]))
    # The smallest first; never one that was not found, of another target, or its own.
    assert tried == {0: [2, 1, 3], 5: [2, 1, 0, 3]}
    assert starts.mask[:, :, 0, 0, 0].tolist() == [[0, 1, 3], [4, 4, 4], [5, 3, 0]]


def test_a_later_pass_replaces_what_it_made_smaller():
    directions = [(0, 1), (0, 2), (1, 2)]
    found = a_chunk([[5.0, 6.0], [4.0, 3.0], [np.inf, np.inf]], directions)
    later = a_chunk([[2.0], [7.0]], directions[::2])
    later = later._replace(sizes=np.array([[5.5], [7.0]], np.float32))
    merged = passes.merged(found, later, np.array([0, 2]))
    assert merged.sizes.tolist() == [[5, 6, 5.5], [4, 3, np.inf], [np.inf, np.inf, 7]]
    assert merged.trigger.mask[:, 0, 0, 0].tolist() == [0, 1, 1]  # the last is the second of later
    assert merged.changed_pixels.tolist() == [0, 1, 1]
    assert merged.seconds == 2.0


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
