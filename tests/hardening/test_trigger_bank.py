import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.hardening.trigger_bank import TriggerBank
from moth_jax.triggers import Trigger
from tests.helpers.toys import assert_same_arrays

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


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [([3.0, 5.0], 1), ([5.0, 3.0], 0), ([3.0, 5.0, 4.0], 1), ([4.0, 4.0], 0)],
    ids=["grows", "shrinks", "grows then shrinks", "equal"],
)
def test_the_largest_trigger_of_a_direction_is_kept(sizes, kept):
    bank = TriggerBank()
    for i, size in enumerate(sizes):
        bank.keep(0, 1, trigger(i / 8), size)
        bank.keep(0, 2, trigger(0.9), 1.0)
    assert value_of(bank.start(0, 1)) == kept / 8


def test_a_direction_without_its_own_trigger_starts_from_its_targets_universal_one():
    bank = TriggerBank()
    bank.keep_universal(1, trigger(0.75))
    assert value_of(bank.start(0, 1)) == value_of(bank.start(2, 1)) == 0.75
    assert bank.start(1, 0) is None
    bank.keep(0, 1, trigger(0.5), 0.1)
    assert value_of(bank.start(0, 1)) == 0.5
    assert value_of(bank.start(2, 1)) == 0.75


def test_a_direction_whose_own_trigger_is_forgotten_starts_from_the_universal_one():
    bank = TriggerBank()
    bank.keep(0, 1, trigger(0.5), 3.0)
    bank.keep(2, 1, trigger(0.25), 3.0)
    bank.keep_universal(1, trigger(0.75))
    bank.forget(0, 1)
    bank.forget(1, 0)  # there is none
    assert value_of(bank.start(0, 1)) == 0.75
    assert value_of(bank.start(2, 1)) == 0.25
    bank.keep(0, 1, trigger(0.125), 1.0)  # smaller than the one that is forgotten
    assert value_of(bank.start(0, 1)) == 0.125


def test_a_kept_trigger_does_not_change_with_the_array_it_came_from_nor_in_the_hands_of_a_user():
    bank, given_trigger = TriggerBank(), trigger(0.5)
    bank.keep(0, 1, given_trigger, 2.0)
    given_trigger.mask[:] = 0.0
    assert value_of(bank.start(0, 1)) == 0.5
    with pytest.raises(ValueError, match="read-only"):
        bank.start(0, 1).mask[0] = 1.0


# Past the bound


def test_past_its_bound_the_trigger_used_longest_ago_is_forgotten():
    bank = TriggerBank(2 * BYTES)
    bank.keep(0, 1, trigger(0.25), 1.0)
    bank.keep(0, 2, trigger(0.5), 1.0)
    bank.start(0, 1)
    bank.keep(0, 3, trigger(0.75), 1.0)
    assert bank.arrays["direction"].tolist() == [[0, 1], [0, 3]]
    assert bank.start(0, 2) is None
    assert [value_of(bank.start(0, k)) for k in (1, 3)] == [0.25, 0.75]


def test_past_its_bound_universal_triggers_are_forgotten_too():
    bank = TriggerBank(2 * BYTES)
    bank.keep_universal(1, trigger(0.25))
    bank.keep(0, 1, trigger(0.5), 1.0)
    bank.keep(0, 2, trigger(0.75), 1.0)
    assert value_of(bank.start(0, 1)) == 0.5
    assert bank.start(2, 1) is None


def test_a_direction_whose_trigger_had_no_room_starts_from_the_universal_one_that_is_used_more():
    bank = TriggerBank(2 * BYTES)
    bank.keep(0, 1, trigger(0.5), 1.0)
    bank.keep_universal(1, trigger(0.25))
    bank.keep(2, 1, trigger(0.75), 1.0)
    assert value_of(bank.start(0, 1)) == 0.25


def test_the_last_trigger_stays_however_large():
    bank = TriggerBank(1.0)
    bank.keep(0, 1, trigger(0.25), 1.0)
    bank.keep(0, 2, trigger(0.5), 1.0)
    assert bank.arrays["direction"].tolist() == [[0, 2]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["keep", "universal", "start", "save"]),
            st.sampled_from(DIRECTIONS),
            st.integers(1, 40),
        ),
        max_size=40,
    ),
    st.integers(1, 5),
)
def test_a_bounded_bank_that_is_saved_and_loaded_goes_on_as_one_that_is_not(actions, room):
    kept, loaded = TriggerBank(room * BYTES), TriggerBank(room * BYTES)
    for action, (victim, target), value in actions:
        if action == "save":
            loaded = TriggerBank.from_arrays(loaded.arrays).copy(room * BYTES)
        for bank in (kept, loaded):
            if action == "keep":
                bank.keep(victim, target, trigger(value / 64), float(value % 7))
            elif action == "universal":
                bank.keep_universal(target, trigger(value / 64))
            elif action == "start":
                bank.start(victim, target)
        assert_same_arrays(kept.arrays, loaded.arrays)
        assert len(kept.arrays.get("direction", ())) <= room


# Copies


def test_a_copy_and_a_bank_rebuilt_from_arrays_are_equal_and_do_not_change_with_the_original():
    bank = TriggerBank()
    bank.keep(0, 1, trigger(0.5), 2.0)
    bank.keep_universal(2, trigger(0.25))
    twins = [bank.copy(), TriggerBank.from_arrays(bank.arrays)]
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
    for k in range(200):
        one, other = copy.start(0, k + 1), bank.start(0, k + 1)
        assert one.mask is other.mask
        assert one.pattern is other.pattern
