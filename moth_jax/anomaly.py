"""The anomaly index: is one trigger unusually small?"""

import numpy as np

MIN_CLASSES = 3
_MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is σ / 1.4826


def anomaly_indices(sizes: np.ndarray) -> np.ndarray:
    """Return how far each size lies below the median of all: (median - size) / (1.4826 MAD).

    The index of Neural Cleanse (Wang et al., S&P 2019, Section V-B), positive on the low side: only
    an unusually small trigger is a sign of a backdoor. Sizes of failed inversions (inf) are left
    out, and have none (NaN). All are NaN if it is undefined: fewer than three sizes, or a MAD of 0.

    >>> anomaly_indices(np.array([10.0, 11.0, 12.0, 13.0, 1.0])).round(2).tolist()
    [0.67, 0.0, -0.67, -1.35, 6.74]
    >>> anomaly_indices(np.array([10.0, np.inf, 1.0])).tolist()
    [nan, nan, nan]
    """
    sizes = np.asarray(sizes, np.float64)
    found = sizes[np.isfinite(sizes)]
    undefined = np.full(sizes.shape, np.nan)
    if len(found) < MIN_CLASSES:
        return undefined
    median = np.median(found)
    deviation = _MAD_TO_SIGMA * np.median(np.abs(found - median))
    if deviation == 0:
        return undefined
    return (median - np.where(np.isfinite(sizes), sizes, np.nan)) / deviation
