import dataclasses
import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.distance import matrix as matrix_module
from moth_jax.distance.directions import mean_interval
from moth_jax.distance.matrix import (
    DistanceMatrix,
    increase_interval,
    increase_per_direction,
    relative_increase,
)
from moth_jax.errors import InputError
from moth_jax.storage import files
from moth_jax.storage.files import load_npz
from moth_jax.triggers import AddedTrigger, Trigger
from tests.helpers.toys import found_triggers

NAN, INF = np.nan, np.inf
NAMES = ("cat", "dog", "ship")
TOLD = {"inversion": "pixel(0.9)", "images": ["a", "b", "c"]}


def make(values, names=NAMES, **fields):
    values = np.asarray(values, np.float32)
    rate = np.where(np.isnan(values), NAN, np.where(np.isinf(values), 0.0, 0.9))
    return DistanceMatrix(values, rate.astype(np.float32), names, **fields)


def dense():
    """A trigger in every place of a matrix of three classes."""
    rng = np.random.default_rng(0)
    return Trigger(rng.random((3, 3, 2, 2, 1), np.float32), rng.random((3, 3, 2, 2, 3), np.float32))


def full():
    """A matrix with every field, one failure and one direction that was not measured."""
    values = [[NAN, 10, 20], [30, NAN, INF], [NAN, 40, NAN]]
    return make(
        values,
        values_per_seed=np.stack([np.add(values, 1), values]).astype(np.float32),
        triggers=found_triggers(dense(), values),
        details={"seeds": [0, 1], "num_steps": 5, "seconds": 1.5},
    )


def test_a_failure_is_counted_and_never_averaged_in():
    matrix = full()
    assert matrix.average() == 25
    assert matrix.num_failures() == 1
    assert matrix.num_measured() == 5
    assert matrix.num_classes == 3
    np.testing.assert_array_equal(matrix.found, [[0, 1, 1], [1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(("value", "failures"), [(NAN, 0), (INF, 6)])
def test_the_average_of_nothing_is_nan_and_not_zero(value, failures):
    matrix = make(np.where(np.eye(3, dtype=bool), NAN, value))
    assert np.isnan(matrix.average())
    assert matrix.num_failures() == failures
    assert matrix.smallest(5) == []


def test_the_smallest_distances_come_first_and_failures_not_at_all():
    assert full().smallest(2) == [(0, 1), (0, 2)]
    assert full().smallest(9) == [(0, 1), (0, 2), (1, 0), (2, 1)]


def test_triggers_are_kept_and_given_of_found_directions_only():
    matrix = full()
    np.testing.assert_array_equal(matrix.trigger(0, 2).mask, dense().mask[0, 2])
    np.testing.assert_array_equal(matrix.trigger(0, 2).pattern, dense().pattern[0, 2])
    assert matrix.trigger(1, 2) is None
    assert matrix.trigger(2, 0) is None
    assert make(matrix.values).trigger(0, 1) is None
    assert matrix.triggers.directions.tolist() == [[0, 1], [0, 2], [1, 0], [2, 1]]
    assert len(matrix.triggers.trigger.mask) == len(matrix.triggers.trigger.pattern) == 4
    some = matrix.triggers.at(np.array([[2, 1], [1, 2], [0, 1]]))
    np.testing.assert_array_equal(some.pattern[[0, 2]], dense().pattern[[2, 0], [1, 1]])
    assert not some.pattern[1].any()


def of_added():
    """A matrix whose triggers are added, with the pixels that they change."""
    delta = np.random.default_rng(0).uniform(-1, 1, (3, 3, 2, 2, 3)).astype(np.float32)
    values = np.asarray([[NAN, 10, 20], [30, NAN, INF], [NAN, 40, NAN]], np.float32)
    changed = np.asarray([[NAN, 4, 3], [2, NAN, INF], [NAN, 1, NAN]], np.float32)
    found = found_triggers(AddedTrigger(delta), values)
    return make(values, triggers=found, changed_pixels=changed, details=TOLD)


def test_triggers_that_are_added_are_kept_and_given_as_such():
    matrix = of_added()
    assert isinstance(matrix.trigger(0, 2), AddedTrigger)
    np.testing.assert_array_equal(matrix.trigger(0, 2).delta, matrix.triggers.trigger.delta[1])
    assert matrix.trigger(1, 2) is None


def test_a_matrix_shows_and_compares_the_number_of_changed_pixels():
    matrix = of_added()
    pixels = matrix.in_changed_pixels()
    np.testing.assert_array_equal(pixels.values, matrix.changed_pixels)
    assert pixels.average() == 2.5
    assert str(pixels).splitlines()[-1] == (
        "average number of changed pixels 2.50 over 4 directions, no trigger found in 1"
    )
    assert pixels.summary() == "mean of 5 directions: 2.5 changed pixels"
    assert pixels.smallest(1) == [(2, 1)]
    assert pixels.trigger(2, 1) is not None
    assert pixels.plot().get_title() == "average number of changed pixels 2.50"
    other = dataclasses.replace(matrix, changed_pixels=2 * matrix.changed_pixels)
    said = pixels.compare(other.in_changed_pixels())
    assert said.startswith("average number of changed pixels 2.50 -> 5.00\nincrease +100.00 %")
    assert matrix.compare(other).startswith("average distance 25.00 -> 25.00")
    with pytest.raises(InputError, match="one of the two matrices is in changed pixels and"):
        pixels.compare(matrix)


def test_a_matrix_that_does_not_know_the_changed_pixels_says_so():
    with pytest.raises(InputError, match="does not know how many pixels its triggers change"):
        full().in_changed_pixels()


# Which directions, and how sure the mean of all is.


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (None, "mean of 5 directions: 25.0"),
        ({"kind": "all", "of": 5}, "mean of all 5 directions: 25.0"),
        ({"kind": "all", "of": 5, "targets": [0]}, "mean of all 5 directions into 1 class: 25.0"),
        (
            {"kind": "all", "of": 5, "victims": [0, 1], "targets": [0, 2]},
            "mean of all 5 directions out of 2 classes into 2 classes: 25.0",
        ),
        (
            {"kind": "sample", "of": 2000},
            "mean of 5 sampled of 2,000 directions: 25.0 (95 % interval 4.5-45.5)",
        ),
        (
            {"kind": "nearest", "of": 6},
            "mean of 5 nearest of 6 directions, as universal triggers find them: 25.0",
        ),
    ],
)
def test_a_matrix_says_which_directions_its_mean_is_of_and_how_sure_it_is(selection, said):
    details = {} if selection is None else {"selection": selection}
    assert make(full().values, details=details).summary() == said
    every = make(np.where(np.eye(3, dtype=bool), NAN, 7.0))
    assert every.summary() == "mean of all 6 directions: 7.0"


def test_the_interval_is_students_shrinks_with_the_sample_and_is_nothing_for_the_whole():
    rng = np.random.default_rng(0)
    population = rng.gamma(2.0, 10.0, 2450)
    low, high = mean_interval(population[:30], 30, 10**9)
    reach = 2.0452 * population[:30].std(ddof=1) / np.sqrt(30)  # t of 29 degrees of freedom
    assert (high - low) / 2 == pytest.approx(reach, rel=1e-4)
    assert (high + low) / 2 == pytest.approx(population[:30].mean())
    narrow = mean_interval(population[:30], 30, 60)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) * np.sqrt(0.5))
    assert mean_interval(population, 2450, 2450) == pytest.approx((population.mean(),) * 2)
    assert mean_interval(population[:1], 1, 10) is None


def test_the_interval_of_a_distance_is_cut_at_0_and_that_of_an_increase_at_minus_1():
    details = {"selection": {"kind": "sample", "of": 90}}
    before = make([[NAN, 10], [600, NAN]], ("a", "b"), details=details)
    low, high = before.interval()
    assert (low, high > 600) == (0.0, True)
    after = make([[NAN, 20], [0.1, NAN]], ("a", "b"), details=details)
    low, high = increase_interval(before, after)
    assert (low, high > 1) == (-1.0, True)
    assert make([[NAN, 10], [11, NAN]], ("a", "b"), details=details).interval()[0] > 4


# Before and after.


INCREASES = {
    "mean": ([[NAN, 10], [20, NAN]], [[NAN, 20], [20, NAN]], 0.5),
    "of ratios, not a ratio of means": ([[NAN, 10], [100, NAN]], [[NAN, 30], [100, NAN]], 1.0),
    "falls": ([[NAN, 10], [20, NAN]], [[NAN, 5], [20, NAN]], -0.25),
    "failed before": ([[NAN, 10], [INF, NAN]], [[NAN, 20], [20, NAN]], 1.0),
    "failed after": ([[NAN, 10], [20, NAN]], [[NAN, 20], [INF, NAN]], 1.0),
    "not measured before": ([[NAN, 10], [NAN, NAN]], [[NAN, 20], [20, NAN]], 1.0),
    "none in both": ([[NAN, INF], [10, NAN]], [[NAN, 20], [INF, NAN]], NAN),
}


@pytest.mark.parametrize(("before", "after", "increase"), INCREASES.values(), ids=INCREASES)
def test_the_increase_is_the_mean_of_ratios_over_directions_found_in_both(before, after, increase):
    names = ("a", "b")
    got = relative_increase(make(before, names), make(after, names))
    assert got == pytest.approx(increase, nan_ok=True)


def test_the_increase_of_each_direction_is_nan_where_it_is_not_known():
    before = make([[NAN, 10, 20], [INF, NAN, 40], [50, 0, NAN]])
    after = make([[NAN, 15, INF], [10, NAN, 20], [NAN, 10, NAN]])
    expected = [[NAN, 0.5, NAN], [NAN, NAN, -0.5], [NAN, NAN, NAN]]
    np.testing.assert_allclose(increase_per_direction(before, after), expected)


def test_matrices_of_different_classes_are_not_compared():
    with pytest.raises(InputError, match="different classes: cat, dog, ship and a, b, c"):
        relative_increase(full(), make(full().values, ("a", "b", "c")))


def test_matrices_without_a_direction_in_common_are_not_compared():
    before = make([[NAN, 10], [NAN, NAN]], ("a", "b"))
    after = make([[NAN, NAN], [20, NAN]], ("a", "b"))
    with pytest.raises(InputError, match="no direction in common"):
        relative_increase(before, after)


def test_a_comparison_says_averages_increase_failures_and_the_least_increase():
    before = make([[NAN, 10, 20], [30, NAN, INF], [40, 50, NAN]])
    after = make([[NAN, 20, 22], [60, NAN, 70], [INF, 100, NAN]])
    text = before.compare(after)
    assert "average distance 30.00 -> 54.40" in text
    assert "increase +77.50 % over 4 directions" in text
    assert "in 1 -> 1 directions" in text
    assert "least increase +10.00 % (cat -> ship)" in text


def test_where_no_trigger_was_found_the_mean_is_none_and_the_increase_unknown():
    nothing = make(np.where(np.eye(3, dtype=bool), NAN, INF))
    assert nothing.summary() == "mean of all 6 directions: none found"
    assert "average distance none found -> 25.00" in nothing.compare(full())
    assert "increase unknown over 0 directions" in nothing.compare(full())
    assert "average distance none found over 0 directions" in str(nothing)


# Print.


def test_the_table_shows_names_distances_failures_and_what_was_not_measured():
    lines = str(full()).splitlines()
    assert lines[0].split() == ["victim", "\\", "target", *NAMES]
    assert [line.split() for line in lines[1:4]] == [
        ["cat", ".", "10.0", "20.0"],
        ["dog", "30.0", ".", "none"],
        ["ship", ".", "40.0", "."],
    ]
    assert lines[4] == "average distance 25.00 over 4 directions, no trigger found in 1"
    assert len({len(line) for line in lines[:4]}) == 1


def test_many_classes_are_shown_by_their_smallest_distances():
    values = 100 + np.arange(25.0 * 25).reshape(25, 25)
    values[7, 3] = 1.5
    text = str(make(values, tuple(f"class{k}" for k in range(25))))
    assert text.splitlines()[1] == "class7 -> class3: 1.5"
    assert len(text.splitlines()) == 12


# Files.


def test_a_saved_matrix_is_read_back_with_every_field(tmp_path):
    saved = full()
    saved.save(tmp_path / "distance.npz")
    read = DistanceMatrix.load(tmp_path / "distance.npz")
    for name in ("values", "success_rate", "values_per_seed"):
        np.testing.assert_array_equal(getattr(read, name), getattr(saved, name))
        assert getattr(read, name).dtype == getattr(saved, name).dtype
    jax.tree.map(np.testing.assert_array_equal, read.triggers, saved.triggers)
    assert read.class_names == saved.class_names
    assert read.details == saved.details


def test_a_matrix_of_added_triggers_is_read_back_with_its_changed_pixels(tmp_path):
    saved = of_added()
    saved.save(tmp_path / "distance.npz")
    read = DistanceMatrix.load(tmp_path / "distance.npz")
    assert isinstance(read.triggers.trigger, AddedTrigger)
    jax.tree.map(np.testing.assert_array_equal, read.triggers, saved.triggers)
    np.testing.assert_array_equal(read.changed_pixels, saved.changed_pixels)


def test_a_matrix_with_half_a_trigger_is_refused(tmp_path):
    full().save(tmp_path / "distance.npz")
    arrays = load_npz(tmp_path / "distance.npz")
    del arrays["patterns"]
    files.save_npz(tmp_path / "distance.npz", arrays)
    with pytest.raises(InputError, match="no array patterns"):
        DistanceMatrix.load(tmp_path / "distance.npz")


def test_a_matrix_without_triggers_and_seeds_is_read_back_without_them(tmp_path):
    make(full().values).save(tmp_path / "distance.npz")
    read = DistanceMatrix.load(tmp_path / "distance.npz")
    assert read.triggers is None
    assert read.values_per_seed is None
    assert read.details == {}


def test_the_file_has_the_documented_arrays_and_needs_no_unpickling(tmp_path):
    full().save(tmp_path / "distance.npz")
    with np.load(tmp_path / "distance.npz", allow_pickle=False) as file:
        assert {"values", "success_rate", "class_names"} <= set(file.files)
        assert np.isnan(np.diag(file["values"])).all()
        assert np.isposinf(file["values"][1, 2])
        assert file["class_names"].tolist() == list(NAMES)


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "distance.npz"
    full().save(path)
    before = path.read_bytes()

    def disk_full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matrix_module.np, "savez_compressed", disk_full)
    with pytest.raises(InputError, match="No space left"):
        full().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def write_npy(path):
    np.save(path, np.zeros(3))
    path.with_name(path.name + ".npy").rename(path)


def write_objects(path):
    with open(path, "wb") as file:
        np.savez(file, values=np.array([{}], dtype=object), success_rate=0, class_names=0)


def write_truncated(path):
    full().save(path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "cannot read"),
        (lambda path: path.write_bytes(b""), "cannot read"),
        (lambda path: path.write_bytes(b"neither zip nor npy"), "cannot read"),
        (write_npy, "cannot read"),
        (write_truncated, "cannot read.*; move it away, and the command that measured it"),
        (write_objects, "cannot read.*Object arrays"),
        (lambda path: files.save_npz(path, {"values": np.zeros(3)}), "is no distance"),
    ],
    ids=["missing", "folder", "empty", "text", "npy", "truncated", "objects", "other"],
)
def test_a_file_that_is_no_matrix_is_named_in_a_clear_error(tmp_path, write, message):
    path = tmp_path / "distance.npz"
    write(path)
    with pytest.raises(InputError, match=message) as raised:
        DistanceMatrix.load(path)
    assert str(path) in str(raised.value)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.npz"
    written = {"values": np.arange(12.0), "names": np.array(["a", "b"])}
    files.save_npz(path, written)
    return written, path, path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_file_with_a_wrong_byte_is_read_right_or_refused(small_file, position, flip):
    written, path, content = small_file
    damaged = bytearray(content)
    damaged[position % len(content)] ^= flip
    path.write_bytes(damaged)
    try:
        read = load_npz(path)
    except InputError:
        return
    for name in read.keys() & written.keys():
        np.testing.assert_array_equal(read[name], written[name])


DETAILS = {"inversion": "trimmed(0.9)", "images": ["a", "b"], "num_images": 8, "num_steps": 5}


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"inversion": "trimmed(0.8)"}, r"different methods, trimmed\(0.9\) and trimmed\(0.8\)"),
        ({"images": ["a", "c"]}, r"different images of 'dog'"),
        ({"images": ["d", "c"], "num_images": 4}, r"different images \(8 and 4 of a class\)"),
    ],
)
@pytest.mark.parametrize("compare", [relative_increase, DistanceMatrix.compare])
def test_matrices_of_other_methods_or_images_are_not_compared(compare, details, message):
    names = full().class_names[:2]
    before, after = (
        dataclasses.replace(
            full(), values=np.array([[np.nan, 2], [3, np.nan]]), class_names=names, details=given
        )
        for given in (DETAILS, {**DETAILS, **details})
    )
    with pytest.raises(InputError, match=message):
        compare(before, after)


def test_other_budgets_and_unknown_methods_are_warned_of():
    two = DistanceMatrix(
        np.array([[np.nan, 2], [3, np.nan]]), np.ones((2, 2)), ("a", "b"), details=DETAILS
    )
    longer = dataclasses.replace(two, details={**DETAILS, "num_steps": 9})
    with pytest.warns(UserWarning, match="different budgets .num_steps 5 and 9."):
        assert relative_increase(two, longer) == 0
    unknown = dataclasses.replace(two, details={})
    with pytest.warns(UserWarning, match="does not tell by which method and on which images"):
        two.compare(unknown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.compare(two)


@pytest.mark.parametrize(
    "details",
    [
        *('{"success_bound": ' + value for value in ("null}", '"0.9"}', "[]}", "true}", "NaN}")),
        *('{"images": ' + value for value in ("[]}", '["a", "b"]}', "[1, 2, 3]}", '"abc"}', "{}}")),
        '{"inversion": ["pixel"]}',
        '{"inversion": "pixel", "inversion": "trimmed"}',
        "[" * 100_000,
    ],
)
def test_details_of_another_type_are_refused_when_a_matrix_is_read(tmp_path, details):
    path = tmp_path / "distances.npz"
    full().save(path)
    np.savez(path, **{**load_npz(path, advice=""), "details": np.array(details)})
    with pytest.raises(InputError, match=r"distances\.npz is damaged: its details are not as"):
        DistanceMatrix.load(path)
