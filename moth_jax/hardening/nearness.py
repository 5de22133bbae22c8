"""How near a pair of classes is for its kind: the order of the scheduler `nearest`.

A planted trigger is small: of few classes it may be the smallest of all. Of many classes some are
near by nature, and it stands out only by what is usual: what its victim is sent elsewhere with (a
universal backdoor, which sends every victim to one target), or what its victim and its target
usually have (a label-specific one). Beside that it works one way only, where classes that are alike
are near both ways; by that ratio the K-arm scanner tells them apart, too (`scanning/k_arm.py`).
"""

import warnings

import numpy as np

SWEEPS = 3  # of the median polish: more than two hardly change an order


def pair_ranks(sizes: np.ndarray, num_idle: np.ndarray) -> np.ndarray:
    """Return the rank of every pair: how many are at least as near, but for itself.

    Of every direction three measures are taken: its log size; that less the median of its victim;
    and what a median polish leaves of it, which takes the medians of victims and of targets off in
    turn until neither has any. A pair's score is the smaller over its directions of the measure,
    less by how much the opposite direction's is larger. The rank is the smallest of those by the
    three scores, which so take turns.

    Args:
      sizes: [K, K], row victim, column target; inf where no trigger is known. Such a way back is as
        far as the farthest known.
      num_idle: [K, K], symmetric: a pair counts as so many times farther, and once.

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
    """Return `values` less their median along an axis; NaN is no value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a class that has none
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
