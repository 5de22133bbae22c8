import functools

import numpy as np
import pytest

from moth_jax import distance
from moth_jax.distance import chunks, lanes
from moth_jax.errors import InputError
from moth_jax.inversion import NeuralCleanse, create
from tests.helpers.toys import linear_classifier, row_images, row_variables

K = 3
CLASSIFIER = linear_classifier(K)
LABELS = np.repeat(range(K), 6)
IMAGES = row_images(LABELS)
NEVER = NeuralCleanse(patience=3, verify_every=5, settle_after=10_000)
SOON = NeuralCleanse(patience=3, verify_every=5, settle_after=40)


def measure(inversion, *, together=2, num_steps=150, **options):
    return distance.distance_matrix(
        CLASSIFIER.predict,
        IMAGES,
        LABELS,
        variables=row_variables(K),
        num_steps=num_steps,
        minibatch_size=4,
        inversion=inversion,
        directions_per_chunk=together,
        progress=False,
        **options,
    )


@functools.cache
def published():
    return measure(NeuralCleanse(patience=3, verify_every=5), seeds=(0, 1))


@pytest.fixture
def widths(monkeypatch):
    """How many lanes each compiled call had, and the steps that each of them had done."""
    seen, whole = [], lanes._advance_lanes

    def advance_lanes(*arguments, **options):
        seen.append(np.asarray(arguments[6]).tolist())
        return whole(*arguments, **options)

    monkeypatch.setattr(lanes, "_advance_lanes", advance_lanes)
    return seen


@pytest.mark.parametrize("together", [1, 2, 4])
def test_directions_that_never_settle_are_measured_as_in_one_call(together, widths):
    matrix = measure(NEVER, together=together, seeds=(0, 1))
    np.testing.assert_allclose(matrix.values_per_seed, published().values_per_seed, rtol=1e-4)
    np.testing.assert_array_equal(matrix.success_rate, published().success_rate)
    for direction in [(0, 1), (2, 0)]:
        one, other = (m.trigger(*direction) for m in (matrix, published()))
        np.testing.assert_allclose(one.mask, other.mask, atol=1e-3)
    assert len(widths[0]) == together


def test_precision_cannot_change_in_the_middle_of_lanes():
    with pytest.raises(InputError, match="settle_after and precision='bfloat16' do not go toget"):
        with_precision(SOON, "bfloat16")
    with pytest.raises(InputError, match="settle_after and precision='bfloat16' do not go toget"):
        create("neural_cleanse", settle_after=40, precision="bfloat16")
    assert with_precision(SOON, "float32") == SOON


def test_a_settled_direction_makes_room_for_the_next_one_and_the_last_move_together(widths):
    matrix = measure(SOON, together=4, num_steps=1500)
    assert matrix.num_measured() == K * (K - 1)
    assert matrix.num_failures() == 0
    steps = [done for lanes_done in widths for done in lanes_done]
    part = 25
    assert len(steps) * part < 0.6 * 1500 * K * (K - 1)
    assert any(0 in done and max(done) > 0 for done in widths[1:]), "none took a settled one's lane"
    assert len(widths[-1]) < 4
    unhurried = measure(NEVER, together=4, num_steps=1500)
    assert matrix.average() < 1.05 * unhurried.average()


def test_images_are_drawn_only_where_a_direction_enters_a_lane(widths, monkeypatch):
    drawn, whole = [], lanes._begin_lanes

    def begin_lanes(*arguments, **options):
        drawn.append(len(widths))
        return whole(*arguments, **options)

    calls, inputs = [], chunks._inputs

    def counted(variables, draw, directions, size, **options):
        calls.append(size)
        return inputs(variables, draw, directions, size, **options)

    monkeypatch.setattr(chunks, "_inputs", counted)
    monkeypatch.setattr(lanes, "_begin_lanes", begin_lanes)
    measure(SOON, together=4, num_steps=1500)
    assert len(calls) == len(drawn)
    # Six directions in four lanes: at the start, and as the last two find room.
    assert 2 <= len(calls) <= 3 < len(widths)
    assert set(calls) == {4}


def test_what_settled_is_kept_when_the_measurement_is_interrupted(tmp_path, monkeypatch):
    whole = lanes._advance_lanes
    left = iter(range(15))

    def interrupted(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "_advance_lanes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(SOON, num_steps=300, resume_dir=tmp_path)
    assert list(tmp_path.glob("*.npz"))
    resumed = measure(SOON, num_steps=300, resume_dir=tmp_path)
    np.testing.assert_allclose(resumed.values, measure(SOON, num_steps=300).values, rtol=1e-4)


def test_a_budget_that_is_no_whole_number_of_verifications_is_refused():
    with pytest.raises(InputError, match=r"num_steps must be a multiple of verify_every \(5\)"):
        measure(SOON, num_steps=152)
