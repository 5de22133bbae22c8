import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moth_jax.errors import InputError
from moth_jax.hardening import scheduler

K = 4
OFF_DIAGONAL = ~np.eye(K, dtype=bool)
UNIT = st.floats(-1, 1)


def state_with(**fields):
    """A state in which nothing speaks for any pair, but for the `fields` given."""
    zeros = np.zeros((K, K))
    counts = zeros.astype(np.int64)
    state = scheduler.KArmState(zeros, zeros, zeros + 10.0, OFF_DIAGONAL, counts, counts)
    return state._replace(**fields)


def matrix(entries, rest=0.0):
    values = np.full((K, K), rest)
    for direction, value in entries.items():
        values[direction] = value
    return values


def nearest(state, seed=0, **options):
    """The pairs that are selected by their distances alone."""
    rng = np.random.default_rng(seed)
    return scheduler.select_pairs(state, 500, rng, random_share=0, nearest=True, **options)


@pytest.mark.parametrize(
    ("num_steps", "alpha"), [(0, 0.0), (100, 0.1), (500, 0.5), (1000, 1.0), (5000, 1.0)]
)
def test_the_reward_moves_from_the_prior_to_the_post_matrix_within_1000_steps(num_steps, alpha):
    rng = np.random.default_rng(0)
    prior, post = rng.random((2, K, K))
    got = scheduler.rewards(state_with(prior=prior, post=post), num_steps)
    for a in range(K):
        for b in range(K):
            both = (1 - alpha) * (prior[a, b] + prior[b, a]) + alpha * (post[a, b] + post[b, a])
            assert got[a, b] == (-np.inf if a == b else pytest.approx(both))


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float64, (6, 6), elements=UNIT),
    arrays(np.float64, (6, 6), elements=UNIT),
    st.integers(0, 2000),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 100),
    st.booleans(),
    arrays(np.float64, (6, 6), elements=st.sampled_from([0.0, 5.0, 50.0, np.inf])),
)
def test_selected_pairs_are_ordered_disjoint_and_never_on_the_diagonal(
    prior, post, num_steps, num_pairs, random_share, seed, nearest, sizes
):
    state = scheduler.init_state(prior, sizes)._replace(post=post)
    pairs = scheduler.select_pairs(
        state,
        num_steps,
        np.random.default_rng(seed),
        num_pairs=num_pairs,
        random_share=random_share,
        nearest=nearest,
    )
    assert len(pairs) == num_pairs
    assert all(0 <= a < b < 6 for a, b in pairs)
    assert len({k for pair in pairs for k in pair}) == 2 * num_pairs


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, (6, 6), elements=st.floats(-1, 1, width=32)),
    st.integers(1, 3),
    st.integers(0, 1200),
    st.integers(0, 100),
)
def test_sums_that_follow_the_rounds_change_no_selection(prior, num_pairs, num_steps, seed):
    sums, state = scheduler.PairSums(), scheduler.init_state(prior, np.abs(prior) + 1)
    options = {"num_pairs": num_pairs, "random_share": 0.3}
    for turn in range(8):
        rngs = [np.random.default_rng([seed, turn]) for _ in range(3)]
        pairs = scheduler.select_pairs(state, num_steps, rngs[0], sums=sums, **options)
        assert pairs == scheduler.select_pairs(state, num_steps, rngs[1], **options)
        reward = scheduler.rewards(state, num_steps)
        if rngs[2].random() >= 0.3:
            assert pairs[0] == divmod(int(reward.argmax()), 6)
        sizes = {(a, b): [1.0 + turn + a] for pair in pairs for a, b in (pair, pair[::-1])}
        older, state = state, scheduler.record(state, sizes, pairs, sums=sums)
        if turn == 5:  # goes on from an older state
            state = older


@pytest.mark.parametrize(
    ("prior", "num_pairs", "expected"),
    [
        ({(1, 2): 0.9}, 1, [(1, 2)]),
        ({(2, 1): 0.9}, 1, [(1, 2)]),
        ({(3, 0): 0.5, (0, 3): 0.5, (1, 2): 0.9}, 1, [(0, 3)]),
        ({(0, 0): 9.0, (3, 1): 0.1}, 1, [(1, 3)]),
        ({(0, 1): 0.9, (1, 2): 0.8, (2, 3): 0.1}, 2, [(0, 1), (2, 3)]),
        ({(0, 1): -0.1}, 1, [(0, 2)]),
    ],
    ids=["a to b", "b to a", "the sum decides", "diagonal", "disjoint", "worse than nothing"],
)
def test_without_chance_the_pairs_of_the_largest_reward_are_selected(prior, num_pairs, expected):
    state = state_with(prior=matrix(prior))
    rng = np.random.default_rng(0)
    assert scheduler.select_pairs(state, 0, rng, num_pairs=num_pairs, random_share=0) == expected


def test_three_rounds_in_ten_take_a_random_pair_and_every_pair_alike():
    state = state_with(prior=matrix({(2, 3): 1.0}))
    rng = np.random.default_rng(0)
    rounds = 4000
    drawn = [scheduler.select_pairs(state, 0, rng)[0] for _ in range(rounds)]
    counts = {pair: drawn.count(pair) / rounds for pair in set(drawn)}
    assert len(counts) == K * (K - 1) // 2
    # A random pair is the best one, too, in one case of six.
    assert counts.pop((2, 3)) == pytest.approx(0.7 + 0.3 / 6, abs=0.03)
    assert all(share == pytest.approx(0.3 / 6, abs=0.015) for share in counts.values())


@pytest.mark.parametrize("num_pairs", [0, 3])
def test_more_disjoint_pairs_than_there_are_is_an_error(num_pairs):
    with pytest.raises(InputError, match=r"must be in 1\.\.2 for 4 classes, got"):
        scheduler.select_pairs(state_with(), 0, np.random.default_rng(0), num_pairs=num_pairs)


def test_the_post_matrix_starts_as_the_warm_up_sizes_over_their_maximum():
    rng = np.random.default_rng(1)
    prior, sizes = rng.random((2, K, K))
    sizes[1, 1] = 1e6  # the diagonal is no direction and sets no scale
    state = scheduler.init_state(prior, sizes)
    np.testing.assert_allclose(
        state.post[OFF_DIAGONAL], sizes[OFF_DIAGONAL] / sizes[OFF_DIAGONAL].max()
    )
    np.testing.assert_array_equal(state.prior[OFF_DIAGONAL], prior[OFF_DIAGONAL])
    np.testing.assert_array_equal(state.size[OFF_DIAGONAL], sizes[OFF_DIAGONAL])
    assert not state.pairwise.any()
    assert not state.num_selected.any()


def test_a_failed_warm_up_gives_neither_prior_nor_post_and_leaves_the_others_scale_alone():
    sizes = matrix({(0, 1): np.inf, (2, 3): 8.0}, rest=4.0)
    state = scheduler.init_state(np.full((K, K), 0.7), sizes)
    assert state.prior[0, 1] == state.post[0, 1] == 0
    assert state.post[2, 3] == 1
    assert state.post[3, 2] == 0.5
    assert np.isfinite(scheduler.rewards(state, 0)[OFF_DIAGONAL]).all()


def test_a_warm_up_in_which_everything_failed_still_gives_an_arm():
    state = scheduler.init_state(np.zeros((K, K)), np.full((K, K), np.inf))
    assert scheduler.select_pairs(state, 500, np.random.default_rng(0), random_share=0) == [(0, 1)]


ROUNDS = {
    "grows": (True, 10.0, [15.0], (0.2 + 0.5) / 2, 15.0),
    "mean of the round": (True, 10.0, [12.0, 13.0, 20.0], (0.2 + 0.5) / 2, 15.0),
    "shrinks": (True, 10.0, [5.0], (0.2 - 0.5) / 2, 5.0),
    "a step failed": (True, 10.0, [12.0, np.inf, 18.0], (0.2 + 0.5) / 2, 15.0),
    "all steps failed": (True, 10.0, [np.inf, np.inf], 0.2, 10.0),
    "first pairwise size after a universal one": (False, 10.0, [15.0], 0.2, 15.0),
    "first size after a failed warm-up": (False, np.inf, [15.0], 0.2, 15.0),
    "still no pairwise size": (False, 10.0, [np.inf], 0.2, 10.0),
}


@pytest.mark.parametrize(
    ("pairwise", "before", "round_sizes", "post", "size"), ROUNDS.values(), ids=ROUNDS
)
def test_a_round_moves_the_post_entry_halfway_to_the_relative_growth(
    pairwise, before, round_sizes, post, size
):
    state = state_with(
        post=matrix({(0, 2): 0.2}),
        size=matrix({(0, 2): before}, rest=10.0),
        pairwise=matrix({(0, 2): pairwise}).astype(bool),
    )
    after = scheduler.record(state, {(0, 2): round_sizes, (2, 0): []}, [(0, 2)])
    assert after.post[0, 2] == pytest.approx(post)
    assert after.size[0, 2] == pytest.approx(size)
    assert after.pairwise[0, 2] == (pairwise or np.isfinite(round_sizes).any())
    changed = after.post != state.post
    assert not changed[np.arange(K) != 0].any()


def test_the_nearest_pair_is_the_one_with_the_smallest_trigger_of_either_direction():
    state = state_with(size=matrix({(0, 1): 6.0, (3, 2): 2.0, (1, 2): 4.0}, rest=9.0))
    assert nearest(state) == [(2, 3)]
    assert nearest(state, num_pairs=2) == [(2, 3), (0, 1)]
    grown = scheduler.record(state, {(3, 2): [8.0], (2, 3): [9.0]}, [(2, 3)], forget_failed=True)
    assert nearest(grown) == [(1, 2)]


def test_a_pair_that_is_near_one_way_only_comes_before_one_that_is_near_both_ways():
    planted, natural = {(0, 1): 16.0, (1, 0): 80.0}, {(2, 3): 12.0, (3, 2): 15.0}
    state = state_with(size=matrix(planted | natural, rest=90.0))
    assert nearest(state) == [(0, 1)]
    # An opposite direction that was not found is far.
    state = state_with(size=matrix({(0, 1): 16.0, (1, 0): np.inf} | natural, rest=90.0))
    assert nearest(state) == [(0, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_where_no_free_pair_has_a_size_any_free_one_is_selected(seed):
    state = state_with(size=matrix({(0, 1): 5.0, (1, 0): 5.0}, rest=np.inf))
    assert nearest(state, seed, num_pairs=2) == [(0, 1), (2, 3)]


def test_universal_sizes_are_ranked_by_what_own_ones_turned_out_to_be():
    universal = np.tile([90.0, 40.0, 60.0, 50.0], (K, 1))
    state = scheduler.init_state(np.zeros((K, K)), universal)

    def as_if(sizes):
        return nearest(scheduler.init_state(np.zeros((K, K)), sizes, pairwise=True))

    # A trigger of its own is half as large: the others can be expected at half of theirs.
    state = scheduler.record(state, {(0, 1): [20.0], (1, 0): [45.0]}, [(0, 1)])
    assert np.exp(state.own_share[0] / state.own_share[1]) == pytest.approx(0.5)
    own = np.where(state.pairwise, state.size, np.inf)
    assert nearest(state) == as_if(np.minimum(own, universal / 2))
    assert nearest(state) != as_if(np.minimum(own, universal))
    # What hardening adds is no part of the ratio.
    grown = scheduler.record(state, {(0, 1): [80.0], (2, 3): [25.0]}, [(0, 1), (2, 3)])
    assert np.exp(grown.own_share[0] / grown.own_share[1]) == pytest.approx(0.5)


def test_a_near_pair_that_is_idle_makes_way_for_others():
    near = {(0, 1): 10.0, (1, 0): 10.0, (2, 3): 25.0, (3, 2): 25.0}
    state = scheduler.init_state(np.zeros((K, K)), matrix(near, rest=90.0), pairwise=True)
    chosen = []
    for _ in range(5):
        (pair,) = nearest(state)
        chosen.append(pair)
        state = scheduler.record(state, {pair: [10.0 if pair == (0, 1) else 25.0]}, [pair])
    # It counts as 10, 20, 30 and 40 pixels, and the other as 25 and 50.
    assert chosen == [(0, 1), (0, 1), (2, 3), (0, 1), (0, 1)]
    assert state.num_idle[0, 1] == state.num_idle[1, 0] == 4
    grown = scheduler.record(state, {(0, 1): [12.0], (1, 0): [12.0]}, [(0, 1)])
    assert grown.num_idle[0, 1] == grown.num_idle[1, 0] == 0


def test_of_pairs_that_are_equally_near_a_random_one_is_selected():
    state = scheduler.init_state(np.zeros((K, K)), matrix({}, rest=9.0))
    assert len({nearest(state, seed)[0] for seed in range(40)}) > 3


def test_a_pair_whose_inversions_all_failed_is_the_nearest_no_more():
    state = state_with(size=matrix({(3, 2): 2.0, (1, 2): 4.0}, rest=9.0))
    failed = {(3, 2): [np.inf, np.inf], (2, 3): [np.inf]}
    after = scheduler.record(state, failed, [(2, 3)], forget_failed=True)
    assert np.isinf(after.size[3, 2])
    assert nearest(after) == [(1, 2)]
    found = scheduler.record(after, {(3, 2): [3.0]}, [(2, 3)], forget_failed=True)
    assert found.size[3, 2] == 3
    assert found.post[3, 2] == after.post[3, 2]  # set against nothing


@pytest.mark.parametrize(
    ("pairwise", "rounds", "post"),
    [
        (False, [[20.0]], 1.0),
        (False, [[20.0], [30.0]], (1.0 + 0.5) / 2),
        (True, [[15.0]], (1.0 + 0.5) / 2),
    ],
)
def test_a_size_is_compared_with_the_first_of_its_own_be_it_of_the_warm_up(pairwise, rounds, post):
    state = scheduler.init_state(np.zeros((K, K)), matrix({}, rest=10.0), pairwise=pairwise)
    for sizes in rounds:
        state = scheduler.record(state, {(0, 1): sizes}, [(0, 1)])
    assert state.post[0, 1] == pytest.approx(post)


@pytest.mark.parametrize("pair", [(1, 3), (3, 1)])
def test_the_order_of_a_pair_does_not_swap_its_directions(pair):
    sizes = {(1, 3): [20.0], (3, 1): [5.0]}
    after = scheduler.record(state_with(), sizes, [pair])
    assert after.size[1, 3] == 20
    assert after.size[3, 1] == 5
    assert after.post[1, 3] == pytest.approx(0.5)
    assert after.post[3, 1] == pytest.approx(-0.25)
    assert after.num_selected[1, 3] == after.num_selected[3, 1] == 1
    assert after.num_selected.sum() == 2


def test_recording_does_not_change_the_state_it_is_given():
    state = state_with()
    copies = [field.copy() for field in state]
    scheduler.record(state, {(0, 1): [3.0], (1, 0): [4.0]}, [(0, 1)])
    scheduler.select_pairs(state, 10, np.random.default_rng(0), num_pairs=2)
    for field, copied in zip(state, copies, strict=True):
        np.testing.assert_array_equal(field, copied)


# The ranks of pairs by how planted they look.

N = 12
NOT_DIAGONAL = ~np.eye(N, dtype=bool)
FIRST = np.triu_indices(N, 1)
NEVER = np.zeros((N, N), int)


def natural(seed=0, spread=0.1):
    """Sizes of a model: some classes are left easily, some are reached easily, pairs differ."""
    rng = np.random.default_rng(seed)
    alike = rng.normal(0, spread, (N, N))
    leave, reach = rng.normal(0, 0.6, (2, N))
    return 60 * np.exp(leave[:, None] + reach + (alike + alike.T) / 2)


def rank_of(sizes, a, b, num_idle=NEVER):
    ranks = scheduler.pair_ranks(np.where(NOT_DIAGONAL, sizes, np.inf), num_idle)
    return ranks[(FIRST[0] == min(a, b)) & (FIRST[1] == max(a, b))][0]


@pytest.mark.parametrize("seed", range(5))
def test_a_label_specific_trigger_is_first_though_others_are_smaller(seed):
    sizes = natural(seed)
    # Between a class that is left with difficulty and one that is reached with difficulty.
    victim, target = np.unravel_index(np.where(NOT_DIAGONAL, sizes, 0).argmax(), sizes.shape)
    sizes[victim, target] /= 2.5
    assert np.sum(sizes[NOT_DIAGONAL] < sizes[victim, target]) > 20
    assert rank_of(sizes, victim, target) <= 1


def test_the_pairs_of_a_universal_trigger_are_the_nearest_though_others_are_smaller():
    """It is a third of whatever each victim is sent elsewhere with."""
    sizes = np.tile(20 * 1.25 ** np.arange(N)[:, None], (1, N))
    sizes[:, 7] /= 3
    assert np.sum(sizes[NOT_DIAGONAL] < sizes[11, 7]) > 50
    ranks = scheduler.pair_ranks(np.where(NOT_DIAGONAL, sizes, np.inf), NEVER)
    assert ranks[(FIRST[0] == 7) | (FIRST[1] == 7)].max() < N - 1


def test_the_smallest_of_all_is_first_though_its_classes_have_small_ones():
    sizes = np.full((N, N), 60.0)
    sizes[1, :] = sizes[:, 2] = 20.0
    sizes[1, 2] = 10.0
    for k in range(3, N - 1):  # all smaller for what their classes have
        sizes[k, k + 1] = 25.0
    assert rank_of(sizes, 1, 2) == 0


def test_an_opposite_direction_that_was_not_found_is_as_far_as_the_farthest():
    sizes = np.full((N, N), 60.0)
    sizes[1, 2] = sizes[3, 4] = 20.0
    sizes[5, 6], sizes[4, 3] = 90.0, np.inf
    assert rank_of(sizes, 3, 4) == 0
    assert rank_of(sizes, 1, 2) == 1


def test_a_pair_without_a_known_size_is_last_and_one_size_is_enough():
    sizes = np.full((N, N), np.inf)
    sizes[7, 2] = 1000.0
    ranks = scheduler.pair_ranks(sizes, NEVER)
    assert rank_of(sizes, 2, 7) == 0
    assert (np.delete(ranks, ranks.argmin()) == len(ranks) - 1).all()
    assert (scheduler.pair_ranks(np.full((N, N), np.inf), NEVER) == len(ranks) - 1).all()


def test_universal_triggers_alone_are_ordered_by_their_targets():
    """No direction differs from what its target usually has, so that measure says nothing."""
    universal = np.linspace(90, 20, N)
    ranks = scheduler.pair_ranks(np.where(NOT_DIAGONAL, universal[None, :], np.inf), NEVER)
    assert (N - 1 in (FIRST[0][ranks == ranks.min()])) or (FIRST[1][ranks.argmin()] == N - 1)
    assert ranks.max() == len(ranks) - 1
    assert len(np.unique(ranks)) > N


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

    ranks = scheduler.pair_ranks(sizes, idle)
    assert ranks.shape == (10,)
    assert ((ranks >= 0) & (ranks < 10)).all()
    moved = np.ix_(order, order)
    assert (square(scheduler.pair_ranks(sizes[moved], idle[moved])) == square(ranks)[moved]).all()
