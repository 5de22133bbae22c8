"""Taking a validation part out of the training data."""

import numpy as np

from moth_jax.errors import InputError


def generator(seed: int) -> np.random.Generator:
    """Return the generator of random numbers of a seed, a whole number.

    >>> generator(-1)
    Traceback (most recent call last):
    ...
    moth_jax.errors.InputError: seed must be a whole number, 0 or more, got -1
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed must be a whole number, 0 or more, got {seed!r}")
    return np.random.default_rng(seed)


def split_validation(labels, fraction: float, seed: int, groups=None):
    """Split training samples into a training and a validation part, class by class.

    Each class gives about `fraction` of its samples to the validation part, and each side keeps at
    least one sample of a class where that is possible (a class with a single sample stays in
    training). With `groups`, samples of a group are never parted: frames of one video are nearly
    identical, and a validation part that shares them with the training part measures memory.

    Args:
      labels: integers [n] in [0, K).
      fraction: share of the validation part, in (0, 1).
      seed: of the random choice; the same seed gives the same split.
      groups: None, or an array [n] whose equal values name one group.

    Returns:
      Indices (train, validation), int64, ascending: disjoint, and together all of 0..n-1.

    Example:
      >>> train, validation = split_validation(np.array([0, 0, 0, 1, 1, 1]), 0.3, seed=0)
      >>> len(train), len(validation)
      (4, 2)
    """
    labels = np.asarray(labels)
    if not 0 < fraction < 1:
        raise InputError(
            f"validation_fraction must be in (0, 1), got {fraction}; 0.1 keeps a tenth of the "
            "training images for validation"
        )
    rng = generator(seed)
    if groups is None:
        chosen = _choose_samples(labels, fraction, rng)
    else:
        groups = np.asarray(groups)
        if groups.shape != labels.shape:
            raise InputError(f"groups must be one per label {labels.shape}, got {groups.shape}")
        chosen = _choose_groups(labels, groups, fraction, rng)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _choose_samples(labels, fraction, rng):
    chosen = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        indices = np.flatnonzero(labels == k)
        if len(indices) > 1:
            count = np.clip(round(len(indices) * fraction), 1, len(indices) - 1)
            chosen[rng.choice(indices, count, replace=False)] = True
    return chosen


def _choose_groups(labels, groups, fraction, rng):
    classes, labels = np.unique(labels, return_inverse=True)
    names, group_of = np.unique(groups, return_inverse=True)
    counts = np.zeros([len(names), len(classes)], np.int64)
    np.add.at(counts, (group_of, labels), 1)
    totals = counts.sum(0)
    in_validation = np.zeros(len(names), bool)
    taken = np.zeros(len(classes), np.int64)
    # Rare classes first: a group may hold several classes, and they have the fewest groups to give.
    for k in np.argsort(totals, kind="stable"):
        for g in rng.permutation(np.flatnonzero(counts[:, k])):
            if taken[k] > 0 and taken[k] + counts[g, k] / 2 > totals[k] * fraction:
                break
            leaves_some = np.all((taken + counts[g] < totals) | (counts[g] == 0))
            if not in_validation[g] and leaves_some:
                in_validation[g] = True
                taken += counts[g]
    return in_validation[group_of]
