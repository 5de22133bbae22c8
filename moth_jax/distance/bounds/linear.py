"""The smallest trigger of a classifier whose logits are affine in the pixels, by SciPy's HiGHS.

With q = m·p the stamped image x − m·x + q is linear in (m, q), where 0 <= q <= m <= 1, and so is
every logit difference. The smallest trigger that sends all images is a linear program; the smallest
that sends some of them a mixed-integer one, with a binary for each image.

Note: that a bound is proven is HiGHS' word here. Its presolve is switched off, because with it the
word was wrong.
"""

import numpy as np

# Seconds that HiGHS may take for a direction. Where they do not suffice, its bound is what counts.
TIME_LIMIT = 20.0
_GAP = 0.005  # of the mixed-integer program
_NUM_RIVALS = 10  # the likeliest of each image; a trigger that overtakes fewer is smaller
_ROUNDING = 1e-4


def least_optimum(
    weights: np.ndarray,
    offsets: np.ndarray,
    images: np.ndarray,
    target: int,
    needed: int,
    time_limit: float = TIME_LIMIT,
) -> float:
    """Return a lower bound of Σm of the triggers that send `needed` of the images to the target.

    It is the optimum, up to a gap of half a percent, where HiGHS needs no longer than `time_limit`
    seconds; inf where no trigger sends them.

    Args:
      weights: [K, h, w, c], of the logits in the pixels.
      offsets: [K].
      images: [n, h, w, c].
      target: a class.
      needed: 1 to n.
      time_limit: in seconds.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, height, width, channels = images.shape
    flat = images.reshape(n, height * width, channels).astype(np.float64)
    form = weights.reshape(len(weights), height * width, channels).astype(np.float64)
    pixels, values = height * width, height * width * channels
    all_needed = needed == n
    rows, least = [], []
    for index, image in enumerate(flat):
        logits = offsets + np.tensordot(form, image, 2)
        rivals = [k for k in np.argsort(-logits, kind="stable") if k != target][:_NUM_RIVALS]
        for rival in rivals:
            difference = form[target] - form[rival]
            start = logits[target] - logits[rival]
            worst = offsets[target] - offsets[rival] + np.minimum(difference, 0).sum()
            if worst >= 0:  # whatever the image
                continue
            chosen = np.zeros(0 if all_needed else n)
            if not all_needed:
                chosen[index] = worst
            rows.append(np.concatenate([-(difference * image).sum(1), difference.ravel(), chosen]))
            least.append(-start if all_needed else worst - start)
    count = pixels + values + (0 if all_needed else n)
    if not rows:
        return 0.0
    within = sparse.hstack(  # q <= m
        [
            sparse.kron(sparse.eye(pixels), np.ones((channels, 1))),
            -sparse.eye(values),
            sparse.csr_matrix((values, count - pixels - values)),
        ]
    )
    constraints = [
        LinearConstraint(sparse.csr_matrix(np.array(rows)), least, np.inf),  # pyright: ignore[reportArgumentType]
        LinearConstraint(within.tocsr(), 0, np.inf),
    ]
    whole = np.zeros(count)
    if not all_needed:
        whole[pixels + values :] = 1
        constraints.append(LinearConstraint(whole[None], needed, np.inf))
    found = milp(
        np.concatenate([np.ones(pixels), np.zeros(count - pixels)]),
        integrality=whole,
        bounds=Bounds(0, 1),
        constraints=constraints,
        # With its presolve HiGHS calls worse solutions optimal (tests/distance/bounds).
        options={"time_limit": time_limit, "mip_rel_gap": _GAP, "presolve": False},
    )
    if found.status == 2:
        return float("inf")
    proven = found.fun if all_needed and found.status == 0 else found.mip_dual_bound
    if proven is None or not np.isfinite(proven):
        return 0.0
    return max(0.0, float(proven) * (1 - _ROUNDING) - 1e-5)
