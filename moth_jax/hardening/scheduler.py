"""The K-arm scheduler: which class pair to harden next (Section IV-C).

K(K-1)/2 arms, one for each pair of classes. The reward of an arm joins the prior (how far the
warm-up's universal triggers lowered each class's loss) and the post matrix (how much the pair's
distances grew when it was last hardened). Pure functions on NumPy arrays, on the host: the state is
O(K^2) small numbers and is saved with the model.
"""

import functools
import warnings
from typing import NamedTuple

import numpy as np

from moth_jax.errors import InputError

GROWTH = 1.1  # of a pair's smaller size in a round; a pair that grows by less is idle
SWEEPS = 3  # of the median polish: more than two hardly change an order


class KArmState(NamedTuple):
    """State of the scheduler; each field [K, K], row victim, column target.

    Attributes:
      prior: mean relative fall of the loss under the warm-up's trigger, at most 1.
      post: how much hardening has enlarged the distance; before the first round, the relative size.
      size: mean trigger size of the last round, or of the warm-up before the first; inf where none
        was found.
      pairwise: whether `size` comes from the direction's own trigger, not a universal one.
      num_selected: rounds in which the pair was selected (symmetric).
      num_idle: how many of the last of those rounds left the pair idle (`GROWTH`; symmetric).
      own_share: [2], of the directions that were measured after a universal trigger was known: the
        sum of log(own size / universal size), and how many.
    """

    prior: np.ndarray
    post: np.ndarray
    size: np.ndarray
    pairwise: np.ndarray
    num_selected: np.ndarray
    num_idle: np.ndarray
    own_share: np.ndarray = np.zeros(2)


def init_state(
    prior: np.ndarray, sizes: np.ndarray, *, pairwise: bool | np.ndarray = False
) -> KArmState:
    """Return the state after the warm-up.

    Args:
      prior: [K, K] relative fall of the loss; 0 where the inversion failed.
      sizes: [K, K] size of the trigger of each direction; inf where the inversion failed.
      pairwise: whether `sizes` are of the directions' own triggers (warm-up without approximation);
        one bool for all directions, or [K, K].

    Note: A failed inversion does not show how far a pair can be pushed. Its prior and post are 0,
      so that the rewards of other arms decide. In the published code one failure makes raw sizes
      the rewards.
    """
    found = np.isfinite(sizes) & ~np.eye(len(sizes), dtype=bool)
    largest = sizes[found].max(initial=0.0)
    scale = largest if largest > 0 else 1.0
    return KArmState(
        prior=np.where(found, prior, 0.0),
        post=np.where(found, np.where(found, sizes, 0.0) / scale, 0.0),
        size=np.where(found, sizes, np.inf),
        pairwise=found & pairwise,
        num_selected=np.zeros(sizes.shape, np.int64),
        num_idle=np.zeros(sizes.shape, np.int64),
    )


def rewards(state: KArmState, num_steps: int) -> np.ndarray:
    """Return [K, K], symmetric: (1 - α)(prior + priorᵀ) + α(post + postᵀ), α = min(t / 1000, 1).

    The diagonal is -inf, for it has no arms. `num_steps` is t, the main training steps so far.
    """
    reward = _mix(state.prior + state.prior.T, state.post + state.post.T, num_steps)
    return np.where(np.eye(len(reward), dtype=bool), -np.inf, reward)


def _mix(prior: np.ndarray, post: np.ndarray, num_steps: int) -> np.ndarray:
    alpha = min(0.1 * num_steps / 100, 1.0)
    return (1 - alpha) * prior + alpha * post


def _nearness(state: KArmState) -> np.ndarray:
    """Return how much each pair looks planted, in the order of rows: minus its rank.

    A universal size is scaled to a direction's own size by the mean ratio of the two so far. A pair
    that one round left idle counts as twice as far, after two such rounds as three times.
    """
    log_share, count = state.own_share
    share = np.exp(log_share / count) if count else 1.0
    sizes = np.where(state.pairwise, state.size, share * state.size)
    return -pair_ranks(sizes, state.num_idle).astype(float)


class PairSums:
    """Each pair's two entries of prior and post added up, kept from one round to the next.

    A thousand classes have half a million pairs, and a round changes the sums of a few. The results
    of `select_pairs` and `record` are the same without it.
    """

    def __init__(self):
        # The arrays whose sums are known, and the sums.
        self._prior = self._post = self._prior_sums = self._post_sums = np.zeros(0)

    def of(self, state: KArmState) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of prior and post, each [K(K-1)/2], the pairs (a, b), a < b, in order."""
        if self._prior is not state.prior or self._post is not state.post:
            upper = np.triu_indices(len(state.prior), 1)
            self._prior_sums = (state.prior + state.prior.T)[upper]
            self._post_sums = (state.post + state.post.T)[upper]
            self._prior, self._post = state.prior, state.post
        return self._prior_sums, self._post_sums

    def follow(self, before: KArmState, after: KArmState, changed: list[tuple[int, int]]) -> None:
        """Go on from `before` to `after`, whose post differs at the `changed` directions."""
        if self._prior is before.prior and self._post is before.post:
            for a, b in changed:
                place = _place(len(after.post), min(a, b), max(a, b))
                self._post_sums[place] = after.post[a, b] + after.post[b, a]
            self._post = after.post


def _place(num_classes: int, a, b):
    """Return the place of a pair (a, b), a < b, in the order of rows."""
    return a * num_classes - a * (a + 1) // 2 + b - a - 1


def _pair(num_classes: int, place: int) -> tuple[int, int]:
    """Return the pair at that place."""
    rows = np.arange(num_classes)
    a = int(np.searchsorted(_place(num_classes, rows, rows + 1), place, side="right")) - 1
    return a, place - _place(num_classes, a, a + 1) + a + 1


def _places_of(num_classes: int, k: int) -> np.ndarray:
    """Return the places of all pairs of class `k`."""
    below, above = np.arange(k), np.arange(k + 1, num_classes)
    return np.concatenate([_place(num_classes, below, k), _place(num_classes, k, above)])


def select_pairs(
    state: KArmState,
    num_steps: int,
    rng: np.random.Generator,
    *,
    num_pairs: int = 1,
    random_share: float = 0.3,
    nearest: bool = False,
    sums: PairSums | None = None,
) -> list[tuple[int, int]]:
    """Return `num_pairs` disjoint pairs (a, b), a < b, for the next round.

    Each is a random arm with probability `random_share`, else the arm with the largest reward among
    those that share no class with the pairs chosen before it. With `nearest` it is instead the arm
    that looks most planted (`pair_ranks`), a random one among equals. `sums` are kept from the
    round before.

    Note: The paper takes one pair a round. More are an extension for many classes.
    Note: `nearest` is an extension too. The paper's rewards begin with the largest sizes, so that a
      planted backdoor, whose trigger is small, waits for a random turn. This takes it early. Among
      many classes some pairs are near by nature and stay near: as idle pairs they make way.
    """
    num_classes = len(state.prior)
    if not 1 <= num_pairs <= num_classes // 2:
        raise InputError(
            f"pairs per step must be in 1..{num_classes // 2} for {num_classes} classes, "
            f"got {num_pairs}"
        )
    pairs, taken, reward = [], [], None
    for _ in range(num_pairs):
        if rng.random() < random_share:
            free = np.delete(np.arange(num_classes), taken)
            a, b = sorted(rng.choice(free, size=2, replace=False).tolist())
        else:
            if reward is None:
                reward = (
                    _nearness(state)
                    if nearest
                    else _mix(*(sums or PairSums()).of(state), num_steps)
                )
            for k in taken:
                reward[_places_of(num_classes, k)] = -np.inf
            best = int(reward.argmax())
            if nearest:  # many pairs have the size of one universal trigger
                best = int(rng.choice(np.flatnonzero(reward == reward[best])))
            a, b = _pair(num_classes, best)
        pairs.append((a, b))
        taken += [a, b]
    return pairs


def sweep_pair(num_classes: int, turn: int, seed: int) -> tuple[int, int]:
    """Return the pair (a, b), a < b, of a turn: turns pass over all pairs again and again.

    The order is random, and another one in each pass.
    """
    num_pairs = num_classes * (num_classes - 1) // 2
    pass_number, place = divmod(turn, num_pairs)
    return _pair(num_classes, int(_order(num_pairs, seed, pass_number)[place]))


@functools.lru_cache(maxsize=2)
def _order(num_pairs: int, seed: int, pass_number: int) -> np.ndarray:
    return np.random.default_rng([seed, pass_number]).permutation(num_pairs)


def record(
    state: KArmState,
    sizes: dict[tuple[int, int], list[float]],
    pairs: list[tuple[int, int]],
    *,
    forget_failed: bool = False,
    sums: PairSums | None = None,
) -> KArmState:
    """Return the state after a round.

    Args:
      state: before the round.
      sizes: per direction (victim, target), the trigger sizes of the round's steps; inf for a step
        whose inversion failed, which is left out.
      pairs: the pairs that were selected.
      forget_failed: forget the size of a direction whose inversions all failed, so that it is not
        the nearest any more; else its last size stays.
      sums: of `state`; they follow the change.

    Note: The first size of a direction's own trigger gives no growth: a trigger for one victim
      class is smaller than a universal one, and hardening is not the reason.
    """
    post, size = state.post.copy(), state.size.copy()
    pairwise, num_selected = state.pairwise.copy(), state.num_selected.copy()
    num_idle, own_share = state.num_idle.copy(), state.own_share.copy()
    for direction, values in sizes.items():
        found = [value for value in values if np.isfinite(value)]
        if not found:
            if forget_failed and values:
                size[direction] = np.inf
            continue
        mean = float(np.mean(found))
        known = mean > 0 and 0 < size[direction] < np.inf
        if pairwise[direction] and known:
            growth = (mean - size[direction]) / size[direction]
            post[direction] = (post[direction] + growth) / 2
        elif known:
            own_share += (np.log(mean / size[direction]), 1)
        size[direction] = mean
        pairwise[direction] = True
    for a, b in pairs:
        both = [a, b], [b, a]
        num_selected[both] += 1
        if state.pairwise[both].all():
            idle = size[both].min() <= GROWTH * state.size[both].min()
            num_idle[both] = num_idle[both] + 1 if idle else 0
    after = KArmState(state.prior, post, size, pairwise, num_selected, num_idle, own_share)
    if sums is not None:
        sums.follow(state, after, list(sizes))
    return after


def pair_ranks(sizes: np.ndarray, num_idle: np.ndarray) -> np.ndarray:
    """Return the rank of every pair: the number of other pairs that look at least as planted.

    A planted trigger is small. Among few classes it may be the smallest of all. Among many classes
    some are near by nature, and three measures of a direction tell a planted trigger from them:

    - its log size;
    - that less the median of its victim, which shows a universal backdoor: every victim reaches one
      target more easily than it reaches the others;
    - what a median polish leaves of the log sizes, which shows a label-specific backdoor: it is
      small for both its victim and its target. The polish takes the medians of victims and of
      targets off in turn until neither has any.

    A planted trigger also works one way only, where classes that are alike are near both ways. So
    the score of a direction is its measure minus how much larger the opposite direction's is, and
    the score of a pair the smaller of its two. The rank of a pair is the smallest of its ranks by
    the three scores.

    Args:
      sizes: [K, K], row victim, column target; inf where no trigger is known. The opposite of a
        direction counts as the farthest known where it is not known itself.
      num_idle: [K, K], symmetric: a pair counts as 1 + num_idle times as far.

    Returns:
      [K(K-1)/2] whole numbers, the pairs (a, b), a < b, in the order of rows. Pairs that are
      equally near share the largest of their ranks: a measure that does not tell pairs apart (the
      third, of universal triggers alone) leaves the order to the others.

    It takes half a second for 1,000 classes.
    """
    known = np.isfinite(sizes) & ~np.eye(len(sizes), dtype=bool)
    logs = np.log(np.maximum(sizes, 1.0), where=known, out=np.full(sizes.shape, np.nan))
    of_both = of_victim = _less_median(logs, axis=1)
    for _ in range(SWEEPS):
        of_both = _less_median(_less_median(of_both, axis=0), axis=1)
    upper = np.triu_indices(len(sizes), 1)
    idle = np.log1p(num_idle[upper])
    measures = (logs, of_victim, of_both)
    return np.min([_ranks(_pair_scores(m)[upper] + idle) for m in measures], axis=0)


def _less_median(values: np.ndarray, axis: int) -> np.ndarray:
    """Return `values` less their median along an axis; NaN is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a class whose sizes are all NaN
        return values - np.nanmedian(values, axis=axis, keepdims=True)


def _pair_scores(measure: np.ndarray) -> np.ndarray:
    """Return [K, K], symmetric: what is low looks planted; inf where neither direction is known."""
    known = ~np.isnan(measure)
    farthest = measure.max(initial=-np.inf, where=known)
    there = np.where(known, measure, np.inf)
    back = np.where(known, measure, farthest).T
    one_way = there + (there - back)
    return np.minimum(one_way, one_way.T)


def _ranks(scores: np.ndarray) -> np.ndarray:
    scores = np.round(scores, 6)  # what is equal but for rounding is equal
    return np.searchsorted(np.sort(scores), scores, side="right") - 1
