"""Which samples make a batch: on the host, in NumPy, without state.

Every function takes a `numpy.random.Generator`. Callers make one per step from `[seed, step]`, so a
run that was stopped and resumed draws what it would have drawn.
"""

from typing import NamedTuple

import numpy as np

from moth_jax.errors import InputError


class PairBatch(NamedTuple):
    """A batch with samples of chosen classes in known places.

    Attributes:
      indices: int64 [batch_size]; slots i*per_class … (i+1)*per_class - 1 are for `classes[i]`.
      weights: float32 [len(classes), per_class]; 1 where the slot holds a sample of its class, 0
        where the class had too few and a sample of another class fills the slot.
    """

    indices: np.ndarray
    weights: np.ndarray


def class_indices(labels, num_classes: int) -> list[np.ndarray]:
    """The indices int64 of each class's samples, ascending.

    Example:
      >>> class_indices(np.array([1, 0, 1]), 3)
      [array([1]), array([0, 2]), array([], dtype=int64)]
    """
    labels = np.asarray(labels)
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    return np.split(order, ends[:-1])


def pair_batch(class_indices, classes, *, per_class: int, batch_size: int, rng) -> PairBatch:
    """Draw a batch that holds `per_class` samples of each of `classes`, and random others.

    No sample is drawn twice. The rest of the batch comes from the classes not in `classes`, so that
    the pair is not seen more often than needed; from all classes where the others are too few.

    Args:
      class_indices: the samples of each class, as `class_indices` returns them.
      classes: the distinct classes drawn deliberately, a pair usually; empty for a random batch.
      per_class: samples of each, at least 1.
      batch_size: at least len(classes) * per_class, at most the number of all samples.
      rng: a `numpy.random.Generator`.

    Example:
      >>> indices = class_indices(np.array([0, 0, 1, 2, 2, 2]), 3)
      >>> batch = pair_batch(
      ...     indices, [0, 1], per_class=2, batch_size=5, rng=np.random.default_rng(0))
      >>> batch.indices.shape, batch.weights.tolist()
      ((5,), [[1.0, 1.0], [1.0, 0.0]])
    """
    classes = [int(k) for k in classes]
    _check_request(class_indices, classes, per_class, batch_size)
    indices = np.full(batch_size, -1, np.int64)
    weights = np.zeros([len(classes), per_class], np.float32)
    for i, k in enumerate(classes):
        count = min(per_class, len(class_indices[k]))
        start = i * per_class
        indices[start : start + count] = rng.choice(class_indices[k], count, replace=False)
        weights[i, :count] = 1
    empty, chosen = np.flatnonzero(indices < 0), set(classes)
    others = [members for k, members in enumerate(class_indices) if k not in chosen]
    indices[empty] = _fill(others, class_indices, indices[indices >= 0], len(empty), rng)
    return PairBatch(indices, weights)


def batch_for_classes(class_indices, classes, *, batch_size: int, rng) -> np.ndarray:
    """Draw a batch of all samples, half of it from `classes` if there are samples of others.

    No sample is drawn twice. The other half is drawn from all samples that remain.

    Args:
      class_indices: the samples of each class, as `class_indices` returns them.
      classes: at least one that has samples.
      batch_size: at most the number of all samples.
      rng: a `numpy.random.Generator`.

    Example:
      >>> indices = class_indices(np.array([0, 0, 0] + [1] * 97), 2)
      >>> batch = batch_for_classes(indices, [0], batch_size=6, rng=np.random.default_rng(0))
      >>> len(set(batch)), int((batch < 3).sum())
      (6, 3)
    """
    chosen = [class_indices[k] for k in classes]
    others = [members for k, members in enumerate(class_indices) if k not in set(classes)]
    num_chosen, num_others = (sum(map(len, members)) for members in (chosen, others))
    if num_others == 0:
        return pair_batch(class_indices, (), per_class=0, batch_size=batch_size, rng=rng).indices
    half = min(max(1, batch_size // 2), num_chosen)
    # The other half has as many of `classes` as a draw from all that remain would give.
    count = half + rng.hypergeometric(num_chosen - half, num_others, batch_size - half)
    pools = [np.concatenate(chosen), np.concatenate(others)]
    return pair_batch(pools, [0], per_class=count, batch_size=batch_size, rng=rng).indices


def epoch_batches(num_samples: int, batch_size: int, rng, drop_last: bool) -> list[np.ndarray]:
    """The indices of each batch of one pass over all samples, in random order.

    With `drop_last` the last, smaller batch is left out, so that every batch has one shape.

    Example:
      >>> [len(batch) for batch in epoch_batches(10, 4, np.random.default_rng(0), False)]
      [4, 4, 2]
    """
    if batch_size < 1 or num_samples < 1 or (drop_last and batch_size > num_samples):
        raise InputError(
            f"batch_size must be in [1, {num_samples}], the number of samples, got {batch_size}"
        )
    order = rng.permutation(num_samples)
    end = num_samples - num_samples % batch_size if drop_last else num_samples
    return [order[start : start + batch_size] for start in range(0, end, batch_size)]


def _check_request(class_indices, classes, per_class, batch_size):
    num_samples = sum(len(members) for members in class_indices)
    if len(set(classes)) < len(classes) or not all(0 <= k < len(class_indices) for k in classes):
        raise InputError(
            f"classes must be distinct and in [0, {len(class_indices)}), got {classes}"
        )
    if classes and per_class < 1:
        raise InputError(f"per_class must be at least 1, got {per_class}")
    if not max(1, len(classes) * per_class) <= batch_size <= num_samples:
        raise InputError(
            f"batch_size must be in [{max(1, len(classes) * per_class)}, {num_samples}] for "
            f"{len(classes)} classes of {per_class} samples out of {num_samples}, got {batch_size}"
        )


def _fill(others, class_indices, drawn, count, rng):
    """`count` further samples: of `others`, and of all classes only where those run out."""
    available = sum(len(members) for members in others)
    if count <= available:
        return _draw(others, count, rng)
    rest = np.setdiff1d(np.concatenate(class_indices), np.concatenate([*others, drawn]))
    both = np.concatenate([*others, rng.choice(rest, count - available, replace=False)])
    return rng.permutation(both)


def _draw(pools, count, rng):
    """`count` of the pools' members, without joining the pools: they may hold a million indices."""
    if count == 0:
        return np.zeros(0, np.int64)
    sizes = np.fromiter(map(len, pools), np.int64, len(pools))
    ends = np.cumsum(sizes)
    positions = rng.choice(ends[-1], count, replace=False)
    which = np.searchsorted(ends, positions, side="right")
    starts = ends - sizes
    return np.array([pools[p][i - starts[p]] for p, i in zip(which, positions, strict=True)])
