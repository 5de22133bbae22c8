import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.errors import InputError
from moth_jax.hardening.trigger_bank import TriggerBank
from moth_jax.hardening.trigger_store import TriggerStore
from moth_jax.triggers import Trigger

SHAPE = (2, 2, 3)
BYTES = 4 * (2 * 2 * 1 + 2 * 2 * 3)  # of one trigger
DIRECTIONS = [(a, b) for a in range(3) for b in range(3) if a != b]


def trigger(value):
    """A trigger that can be told from others by its `value`, and whose parts can."""
    pattern = np.arange(12, dtype=np.float32).reshape(SHAPE) / 12
    return Trigger(np.full((2, 2, 1), value, np.float32), pattern * np.float32(value))


def value_of(stored):
    np.testing.assert_array_equal(stored.pattern, trigger(stored.mask[0, 0, 0]).pattern)
    return float(stored.mask[0, 0, 0])


def assert_same_arrays(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [([3.0, 5.0], 1), ([5.0, 3.0], 0), ([3.0, 5.0, 4.0], 1), ([4.0, 4.0], 0)],
    ids=["grows", "shrinks", "grows then shrinks", "equal"],
)
@pytest.mark.parametrize("room", [1, 9], ids=["on disk", "in memory"])
def test_the_largest_trigger_of_a_direction_is_kept(tmp_path, sizes, kept, room):
    bank = TriggerBank(room * BYTES, tmp_path)
    for i, size in enumerate(sizes):
        bank.keep(0, 1, trigger(i / 8), size)
        bank.keep(0, 2, trigger(0.9), 1.0)
    assert value_of(bank.start(0, 1)) == kept / 8


def test_the_two_directions_of_a_pair_are_stored_apart():
    bank = TriggerBank()
    bank.keep(2, 0, trigger(0.25), 9.0)
    bank.keep(0, 2, trigger(0.5), 1.0)
    assert value_of(bank.start(2, 0)) == 0.25
    assert value_of(bank.start(0, 2)) == 0.5
    assert bank.start(0, 1) is None
    assert (0, 2) in bank
    assert (0, 1) not in bank


def test_a_direction_without_its_own_trigger_starts_from_its_targets_universal_one():
    bank = TriggerBank()
    bank.keep_universal(1, trigger(0.75))
    assert value_of(bank.start(0, 1)) == value_of(bank.start(2, 1)) == 0.75
    assert bank.start(1, 0) is None
    bank.keep(0, 1, trigger(0.5), 0.1)
    assert value_of(bank.start(0, 1)) == 0.5
    assert value_of(bank.start(2, 1)) == 0.75


@pytest.mark.parametrize("room", [1, 9], ids=["on disk", "in memory"])
def test_a_direction_whose_own_trigger_is_forgotten_starts_from_the_universal_one(tmp_path, room):
    bank = TriggerBank(room * BYTES, tmp_path)
    bank.keep(0, 1, trigger(0.5), 3.0)
    bank.keep(2, 1, trigger(0.25), 3.0)
    bank.keep_universal(1, trigger(0.75))
    bank.forget(0, 1)
    bank.forget(1, 0)  # there is none
    assert value_of(bank.start(0, 1)) == 0.75
    assert value_of(bank.start(2, 1)) == 0.25
    bank.keep(0, 1, trigger(0.125), 1.0)  # smaller than the one that is forgotten
    assert value_of(bank.start(0, 1)) == 0.125


@pytest.mark.parametrize("room", [np.inf, 1.0], ids=["in memory", "on disk"])
def test_the_size_is_of_a_directions_own_trigger(tmp_path, room):
    bank = TriggerBank(room, tmp_path)
    bank.keep(0, 1, trigger(0.5), 3.0)
    bank.keep(2, 1, trigger(0.25), 4.0)
    bank.keep_universal(1, trigger(0.75))
    assert (bank.size(0, 1), bank.size(2, 1)) == (3.0, 4.0)
    assert bank.size(1, 0) == bank.size(3, 1) == np.inf


def test_a_kept_trigger_does_not_change_with_the_array_it_came_from_nor_in_the_hands_of_a_user():
    bank, given_trigger = TriggerBank(), trigger(0.5)
    bank.keep(0, 1, given_trigger, 2.0)
    given_trigger.mask[:] = 0.0
    assert value_of(bank.start(0, 1)) == 0.5
    with pytest.raises(ValueError, match="read-only"):
        bank.start(0, 1).mask[0] = 1.0


# Past the bound


def test_past_its_bound_the_trigger_used_longest_ago_goes_to_disk_and_comes_back(tmp_path):
    bank = TriggerBank(2 * BYTES, tmp_path)
    bank.keep(0, 1, trigger(0.1), 1.0)
    bank.keep(0, 2, trigger(0.2), 1.0)
    bank.start(0, 1)
    assert not any(tmp_path.iterdir())
    bank.keep(0, 3, trigger(0.3), 1.0)
    assert bank.num_held == 2
    assert bank.arrays["stored_direction"].tolist() == [[0, 2]]
    assert value_of(bank.start(0, 2)) == pytest.approx(0.2)
    assert bank.arrays["stored_direction"].tolist() == [[0, 1]]
    assert [value_of(bank.start(0, k)) for k in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["keep", "universal", "start", "resume"]),
            st.sampled_from(DIRECTIONS),
            st.integers(1, 40),
        ),
        max_size=40,
    ),
    st.integers(1, 5),
)
def test_no_number_depends_on_the_bound_or_on_being_saved_and_loaded(
    tmp_path_factory, actions, room
):
    folder = tmp_path_factory.mktemp("bank")
    free, bounded = TriggerBank(), TriggerBank(room * BYTES, folder)
    for action, (victim, target), value in actions:
        if action == "resume":
            bounded = TriggerBank.from_arrays(bounded.arrays).copy(room * BYTES, folder)
            continue
        results = []
        for bank in (free, bounded):
            if action == "keep":
                bank.keep(victim, target, trigger(value / 64), float(value % 7))
            elif action == "universal":
                bank.keep_universal(target, trigger(value / 64))
            found = bank.start(victim, target)
            results.append(None if found is None else value_of(found))
        assert results[0] == results[1]
        assert bounded.num_held <= room


def test_what_an_older_state_refers_to_stays_there_whatever_is_done_later(tmp_path):
    bank = TriggerBank(BYTES, tmp_path)
    for k in (1, 2, 3):
        bank.keep(0, k, trigger(k / 8), 1.0)
    older, saved = bank.copy(), bank.arrays
    for branch in (bank, older.copy()):
        for k in (1, 2, 3):
            branch.keep(0, k, trigger(0.9), 50.0)
    resumed = TriggerBank.from_arrays(saved).copy(BYTES, tmp_path)
    for twin in (older, resumed):
        assert [value_of(twin.start(0, k)) for k in (1, 2, 3)] == [1 / 8, 2 / 8, 3 / 8]


def test_without_a_folder_a_checkpoint_holds_every_trigger_itself():
    bank = TriggerBank(BYTES)
    for k in (1, 2, 3):
        bank.keep(0, k, trigger(k / 8), 1.0)
    assert bank.num_held == 1
    resumed = TriggerBank.from_arrays(bank.arrays)
    assert resumed.num_held == 3
    assert [value_of(resumed.start(0, k)) for k in (1, 2, 3)] == [1 / 8, 2 / 8, 3 / 8]


def test_a_trigger_on_disk_that_is_missing_or_damaged_is_a_clear_error(tmp_path):
    digest = TriggerStore(tmp_path).write(trigger(0.5))
    (path,) = tmp_path.iterdir()
    assert value_of(TriggerStore(tmp_path).read(digest)) == 0.5
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="missing or damaged; --overwrite starts afresh"):
        TriggerStore(tmp_path).read(digest)
    path.unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        TriggerStore(tmp_path).read(digest)


def test_a_folder_that_cannot_be_written_to_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write a trigger"):
        TriggerStore(tmp_path / "file").write(trigger(0.5))


# Copies


@pytest.mark.parametrize("room", [1, 9], ids=["on disk", "in memory"])
def test_a_copy_and_a_bank_rebuilt_from_arrays_are_equal_and_do_not_change_with_the_original(
    tmp_path, room
):
    bank = TriggerBank(room * BYTES, tmp_path)
    bank.keep(0, 1, trigger(0.5), 2.0)
    bank.keep_universal(2, trigger(0.25))
    twins = [bank.copy(), TriggerBank.from_arrays(bank.arrays).copy(room * BYTES, tmp_path)]
    for twin in twins:
        assert_same_arrays(twin.arrays, bank.arrays)
    bank.keep(0, 1, trigger(0.75), 3.0)
    bank.keep_universal(2, trigger(0.75))
    for twin in twins:
        assert value_of(twin.start(0, 1)) == 0.5
        assert value_of(twin.start(0, 2)) == 0.25


def test_a_copy_shares_the_triggers_and_so_costs_no_memory():
    bank = TriggerBank()
    large = Trigger(np.zeros((64, 64, 1), np.float32), np.zeros((64, 64, 3), np.float32))
    for k in range(200):
        bank.keep(0, k + 1, large, 1.0)
    copy = bank.copy()
    assert copy.start(0, 7).mask is bank.start(0, 7).mask
    started = time.perf_counter()
    for _ in range(100):
        bank.copy()
    assert time.perf_counter() - started < 0.5  # of the arrays it would be 13 MB each


def test_an_empty_bank_is_rebuilt_from_its_arrays():
    assert TriggerBank.from_arrays(TriggerBank().arrays).start(0, 1) is None
    assert all(array.size for array in TriggerBank().arrays.values())
