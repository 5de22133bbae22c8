import numpy as np
import pytest

from moth_jax.trigger_bank import TriggerBank
from moth_jax.triggers import Trigger

SHAPE = (2, 2, 3)


def trigger(value):
    """A trigger that can be told from others by its `value`."""
    return Trigger(np.full((2, 2, 1), value, np.float32), np.full(SHAPE, value, np.float32))


def value_of(stored):
    assert (stored.pattern == stored.mask).all()
    return float(stored.mask[0, 0, 0])


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [([3.0, 5.0], 1), ([5.0, 3.0], 0), ([3.0, 5.0, 4.0], 1), ([4.0, 4.0], 0)],
    ids=["grows", "shrinks", "grows then shrinks", "equal"],
)
def test_the_largest_trigger_of_a_direction_is_kept(sizes, kept):
    bank = TriggerBank(3, SHAPE)
    for i, size in enumerate(sizes):
        bank.keep(0, 1, trigger(i / 8), size)
    assert value_of(bank.start(0, 1)) == kept / 8


def test_the_two_directions_of_a_pair_are_stored_apart():
    bank = TriggerBank(3, SHAPE)
    bank.keep(2, 0, trigger(0.25), 9.0)
    bank.keep(0, 2, trigger(0.5), 1.0)
    assert value_of(bank.start(2, 0)) == 0.25
    assert value_of(bank.start(0, 2)) == 0.5
    assert bank.start(0, 1) is None


def test_a_direction_without_its_own_trigger_starts_from_its_targets_universal_one():
    bank = TriggerBank(3, SHAPE)
    bank.keep_universal(1, trigger(0.75))
    assert value_of(bank.start(0, 1)) == value_of(bank.start(2, 1)) == 0.75
    assert bank.start(1, 0) is None
    bank.keep(0, 1, trigger(0.5), 0.1)
    assert value_of(bank.start(0, 1)) == 0.5
    assert value_of(bank.start(2, 1)) == 0.75


def test_past_its_capacity_the_bank_forgets_the_direction_used_longest_ago():
    bank = TriggerBank(4, SHAPE, capacity=2)
    bank.keep(0, 1, trigger(0.1), 1.0)
    bank.keep(0, 2, trigger(0.2), 1.0)
    bank.start(0, 1)
    bank.keep(0, 3, trigger(0.3), 1.0)
    assert bank.start(0, 2) is None
    assert value_of(bank.start(0, 1)) == pytest.approx(0.1)
    assert value_of(bank.start(0, 3)) == pytest.approx(0.3)


def test_a_direction_that_comes_back_after_being_forgotten_is_not_compared_with_its_past():
    bank = TriggerBank(3, SHAPE, capacity=1)
    bank.keep(0, 1, trigger(0.1), 100.0)
    bank.keep(0, 2, trigger(0.2), 1.0)
    bank.keep(0, 1, trigger(0.3), 1.0)
    assert value_of(bank.start(0, 1)) == pytest.approx(0.3)
    assert bank.start(0, 2) is None


def test_the_bank_holds_no_more_slots_than_directions():
    assert len(TriggerBank(3, SHAPE, capacity=100).arrays["mask"]) == 6


def test_a_copy_and_a_bank_rebuilt_from_arrays_are_equal_and_do_not_change_with_the_original():
    bank = TriggerBank(3, SHAPE)
    bank.keep(0, 1, trigger(0.5), 2.0)
    bank.keep_universal(2, trigger(0.25))
    twins = [bank.copy(), TriggerBank.from_arrays(bank.arrays)]
    for twin in twins:
        assert all((twin.arrays[name] == bank.arrays[name]).all() for name in bank.arrays)
    bank.keep(0, 1, trigger(0.75), 3.0)
    bank.keep_universal(2, trigger(0.75))
    for twin in twins:
        assert value_of(twin.start(0, 1)) == 0.5
        assert value_of(twin.start(0, 2)) == 0.25
