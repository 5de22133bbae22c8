"""A threshold from models that are known to be clean."""

import math
from collections.abc import Sequence

import numpy as np

from moth_jax.errors import InputError
from moth_jax.scanning.result import Scan


def calibrate(scans: Sequence[Scan], false_positive_rate: float = 0.05) -> float:
    """Return the threshold that a further clean model passes with at most `false_positive_rate`.

    It is the ⌈(n + 1)(1 - rate)⌉-th smallest statistic of n clean models, one more than the plain
    quantile would take, so that the rate holds for any n and any distribution of the statistics
    (split conformal prediction; Vovk et al., 2005), provided that the models are alike: one
    structure, data and way of training, scanned with the same method and options.

    Args:
      scans: of clean models.
      false_positive_rate: share of clean models that may be flagged, in (0, 1).

    Raises:
      InputError: too few scans for this rate, scans of different methods or options, or one
        without a statistic.

    >>> clean = [Scan("k_arm", False, s, "suspicion", 1.0, ()) for s in (0.3, 0.1, 0.2)]
    >>> calibrate(clean, 0.25), calibrate(clean, 0.5)
    (0.3, 0.2)
    """
    if not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate must be in (0, 1), got {false_positive_rate}")
    # Rounded, as (1 - 0.05) * 20 is 19.000000000000004 in some order of operations.
    needed = math.ceil(round(1 / false_positive_rate, 9)) - 1
    if len(scans) < needed:
        raise InputError(
            f"a false positive rate of {false_positive_rate:g} needs scans of at least {needed} "
            f"clean models, got {len(scans)}"
        )
    methods = sorted({scan.method for scan in scans})
    if len(methods) > 1:
        raise InputError(f"the scans must be of one method, got {', '.join(methods)}")
    if any(_asked(scan) != _asked(scans[0]) for scan in scans):
        raise InputError("the scans were made with different options; scan again with the same")
    statistics = np.sort([scan.statistic for scan in scans])
    if np.isnan(statistics).any():
        raise InputError(
            f"{int(np.isnan(statistics).sum())} of the scans have no statistic: "
            f"{next(scan.reason for scan in scans if np.isnan(scan.statistic))}"
        )
    position = math.ceil(round((len(scans) + 1) * (1 - false_positive_rate), 9))
    return float(statistics[position - 1])


def _asked(scan: Scan) -> dict:
    """What a scan was asked for, without what differs from one scan to the next."""
    return {k: v for k, v in scan.details.items() if k not in ("seed", "seeds", "seconds")}
