"""The order in which pairs of classes look planted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moth_jax.hardening.nearness import pair_ranks

K = 12
OFF = ~np.eye(K, dtype=bool)
FIRST = np.triu_indices(K, 1)
NEVER = np.zeros((K, K), int)


def natural(seed=0, spread=0.1):
    """Sizes of a model: some classes are left easily, some are reached easily, pairs differ."""
    rng = np.random.default_rng(seed)
    alike = rng.normal(0, spread, (K, K))
    leave, reach = rng.normal(0, 0.6, (2, K))
    return 60 * np.exp(leave[:, None] + reach + (alike + alike.T) / 2)


def rank_of(sizes, a, b, num_idle=NEVER):
    ranks = pair_ranks(np.where(OFF, sizes, np.inf), num_idle)
    return ranks[(FIRST[0] == min(a, b)) & (FIRST[1] == max(a, b))][0]


@pytest.mark.parametrize("seed", range(5))
def test_a_label_specific_trigger_is_first_though_others_are_smaller(seed):
    sizes = natural(seed)
    # Between a class that is left with difficulty and one that is reached with difficulty.
    victim, target = np.unravel_index(np.where(OFF, sizes, 0).argmax(), sizes.shape)
    sizes[victim, target] /= 2.5
    assert np.sum(sizes[OFF] < sizes[victim, target]) > 20
    assert rank_of(sizes, victim, target) <= 1


def test_the_pairs_of_a_universal_trigger_are_the_nearest_though_others_are_smaller():
    """It is a third of whatever each victim is sent elsewhere with."""
    sizes = np.tile(20 * 1.25 ** np.arange(K)[:, None], (1, K))
    sizes[:, 7] /= 3
    assert np.sum(sizes[OFF] < sizes[11, 7]) > 50
    ranks = pair_ranks(np.where(OFF, sizes, np.inf), NEVER)
    assert ranks[(FIRST[0] == 7) | (FIRST[1] == 7)].max() < K - 1


def test_the_smallest_of_all_is_first_though_its_classes_have_small_ones():
    sizes = np.full((K, K), 60.0)
    sizes[1, :] = sizes[:, 2] = 20.0
    sizes[1, 2] = 10.0
    for k in range(3, K - 1):  # all smaller for what their classes have
        sizes[k, k + 1] = 25.0
    assert rank_of(sizes, 1, 2) == 0


def test_of_two_equally_small_ones_the_one_that_works_one_way_only_is_nearer():
    sizes = np.full((K, K), 60.0)
    sizes[1, 2] = sizes[3, 4] = sizes[4, 3] = 20.0
    assert rank_of(sizes, 1, 2) == 0
    assert rank_of(sizes, 3, 4) == 1


def test_a_way_back_that_was_not_found_is_as_far_as_the_farthest():
    sizes = np.full((K, K), 60.0)
    sizes[1, 2] = sizes[3, 4] = 20.0
    sizes[5, 6], sizes[4, 3] = 90.0, np.inf
    assert rank_of(sizes, 3, 4) == 0
    assert rank_of(sizes, 1, 2) == 1


def test_a_pair_without_a_known_size_is_last_and_one_size_is_enough():
    sizes = np.full((K, K), np.inf)
    sizes[7, 2] = 1000.0
    ranks = pair_ranks(sizes, NEVER)
    assert rank_of(sizes, 2, 7) == 0
    assert (np.delete(ranks, ranks.argmin()) == len(ranks) - 1).all()
    assert (pair_ranks(np.full((K, K), np.inf), NEVER) == len(ranks) - 1).all()


def test_a_pair_that_does_not_move_makes_way():
    sizes = np.full((K, K), 60.0)
    sizes[1, 2], sizes[3, 4] = 10.0, 16.0
    idle = NEVER.copy()
    assert rank_of(sizes, 1, 2) == 0
    idle[1, 2] = idle[2, 1] = 3  # log 4 is more than twice log 16 / 10
    assert rank_of(sizes, 1, 2, idle) == 1
    assert rank_of(sizes, 3, 4, idle) == 0


def test_universal_triggers_alone_are_ordered_by_their_targets():
    """No direction differs from what its target usually has, so that measure says nothing."""
    universal = np.linspace(90, 20, K)
    ranks = pair_ranks(np.where(OFF, universal[None, :], np.inf), NEVER)
    assert (K - 1 in (FIRST[0][ranks == ranks.min()])) or (FIRST[1][ranks.argmin()] == K - 1)
    assert ranks.max() == len(ranks) - 1
    assert len(np.unique(ranks)) > K


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float64, (5, 5), elements=st.sampled_from([0.0, 3.0, 40.0, 55.5, 3000.0, np.inf])),
    arrays(np.int64, (5, 5), elements=st.integers(0, 3)),
    st.permutations(range(5)),
)
def test_ranks_are_whole_and_do_not_depend_on_the_order_of_classes(sizes, idle, order):
    idle = idle + idle.T
    np.fill_diagonal(sizes, np.inf)
    upper = np.triu_indices(5, 1)

    def square(ranks):
        values = np.zeros((5, 5), int)
        values[upper] = ranks
        return values + values.T

    ranks = pair_ranks(sizes, idle)
    assert ranks.shape == (10,)
    assert ((ranks >= 0) & (ranks < 10)).all()
    moved = np.ix_(order, order)
    assert (square(pair_ranks(sizes[moved], idle[moved])) == square(ranks)[moved]).all()
