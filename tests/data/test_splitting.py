import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.data.splitting import split_validation
from moth_jax.errors import InputError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)
FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32)


def assert_parts_every_index_once(train, validation, n):
    assert train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(n))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


@given(LABELS, FRACTIONS, SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_parts_are_disjoint_cover_all_and_hold_every_class_that_has_two(labels, fraction, seed):
    train, validation = split_validation(labels, fraction, seed)
    assert_parts_every_index_once(train, validation, len(labels))
    for k, count in zip(*np.unique(labels, return_counts=True), strict=True):
        taken = (labels[validation] == k).sum()
        if count == 1:
            assert taken == 0
        else:
            assert 1 <= taken <= count - 1
            assert abs(taken - count * fraction) <= 1


@given(LABELS, FRACTIONS, SEEDS, st.data())
@settings(max_examples=60, deadline=None)
def test_groups_are_never_parted(labels, fraction, seed, data):
    size = len(labels)
    groups = np.array(data.draw(st.lists(st.integers(0, 12), min_size=size, max_size=size)))
    train, validation = split_validation(labels, fraction, seed, groups)
    assert_parts_every_index_once(train, validation, size)
    assert not set(groups[train]) & set(groups[validation])
    assert set(labels[train]) == set(labels)


@given(LABELS, FRACTIONS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_groups_within_classes_give_each_class_with_two_of_them_to_both_parts(
    labels, fraction, seed
):
    groups = labels * 100 + np.arange(len(labels)) % 3
    train, validation = split_validation(labels, fraction, seed, groups)
    for k in np.unique(labels):
        assert k in labels[train]
        assert (k in labels[validation]) == (len(np.unique(groups[labels == k])) > 1)


def test_the_seed_alone_decides_the_split():
    labels = np.arange(200) % 5
    same = [split_validation(labels, 0.2, seed=7)[1] for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert (same[0] != split_validation(labels, 0.2, seed=8)[1]).any()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(
        InputError, match=rf"validation_fraction must be in \(0, 1\), got {fraction}"
    ):
        split_validation(np.array([0, 1]), fraction, seed=0)


def test_groups_of_another_length_are_refused():
    with pytest.raises(InputError, match=r"one per label \(3,\), got \(2,\)"):
        split_validation(np.array([0, 1, 1]), 0.5, 0, groups=[1, 2])
