"""How large a trigger must at least be to send images, one victim class and its targets at once.

A bound proven for triggers up to a size s says that no smaller trigger than min(s, s*) sends the
image. The larger s, the looser the relaxation and the smaller s*: the best s is where both meet. It
is searched image by image; what an evaluation at s costs does not depend on the number of targets.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from moth_jax.distance.bounds.relaxation import by_rows, reached_sizes
from moth_jax.distance.bounds.tape import Tape

# A search ends where the interval of each direction's bound is this much of it, or after so many
# evaluations.
_TOLERANCE = 0.02
_MOST_ROUNDS = 60
_BYTES = 2**29  # that the forms of a batch of images may take
_NUM_RIVALS = 10
_SORTED = 32  # few pixels are sorted where triggers are small


def reached_by_images(
    tape: Tape, constants: Sequence, images: np.ndarray, targets: Sequence[int], place: int
) -> np.ndarray:
    """Return [n, T]: no trigger of a smaller Σm sends the image to the target.

    Args:
      tape, constants: the network.
      images: [n, h, w, c].
      targets: [T].
      place: the search ends when the `place`-th smallest of each target, from 1, is known.
    """
    pixels = math.prod(images.shape[1:3])
    low = np.zeros((len(images), len(targets)))
    high = np.full_like(low, np.inf)  # where no more is to be expected
    for _ in range(_MOST_ROUNDS):
        low_end, high_end = (np.sort(ends, 0)[place - 1] for ends in (low, high))
        # What lies wholly on one side of the place that counts does not move it.
        is_open = (high > low_end) & (low < high_end) & (_gap(low, high) > _TOLERANCE)
        is_open &= _gap(low_end, high_end) > _TOLERANCE
        active = np.flatnonzero(is_open.any(1))
        if not len(active):
            break
        widest = np.where(is_open, _gap(low, high), -1)[active].argmax(1)
        sizes = _between(low[active, widest], high[active, widest], pixels)
        for rows in _batches(tape, len(active), len(images)):
            some, at = active[rows], sizes[rows]
            found = _evaluate(tape, constants, images[some], at, targets, pixels)
            low[some] = np.maximum(low[some], found)
            met = found < at[:, None]
            high[some] = np.where(met, np.minimum(high[some], at[:, None]), high[some])
            high[some] = np.maximum(high[some], low[some])
    return low


def _gap(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the share of an interval that is open: 1 where nothing is known, 0 of no interval."""
    gap = np.isfinite(low).astype(float)
    known = np.isfinite(high)
    gap[known] = (high[known] - low[known]) / np.maximum(high[known], 1e-9)
    return gap


def _between(low: np.ndarray, high: np.ndarray, pixels: int) -> np.ndarray:
    """Return the sizes to try next, within (low, high)."""
    further = np.minimum(pixels, np.maximum(2 * low, pixels / 32))
    with np.errstate(invalid="ignore"):
        middle = np.where(
            low > high / 4, (low + high) / 2, np.sqrt(np.maximum(low, high / 16) * high)
        )
    return np.where(np.isinf(high), further, middle).astype(np.float32)


def _batches(tape: Tape, count: int, total: int) -> Iterator[np.ndarray]:
    """Yield places 0 .. count - 1 in batches of one size; the last is filled up with repeats."""
    largest = max(math.prod(shape) for shape in tape.shapes)
    rows = tape.largest_kink() if by_rows(tape) else math.prod(tape.shapes[0])
    size = max(1, min(total, _BYTES // (16 * largest * max(rows, 1))))
    for first in range(0, count, size):
        yield np.resize(np.arange(first, min(first + size, count)), size)


def _evaluate(tape, constants, images, sizes, targets, pixels: int) -> np.ndarray:
    steps = range(int(math.log(pixels, _SORTED)) + 1)
    counts = [_SORTED**i for i in steps if _SORTED**i >= sizes.max()] if pixels > 256 else []
    found = reached_sizes(
        tape,
        constants,
        images,
        sizes,
        np.asarray(targets, np.int32),
        count=min([*counts, pixels]),
        num_rivals=min(_NUM_RIVALS, tape.num_classes),
    )
    return np.asarray(jax.device_get(found), np.float64)
