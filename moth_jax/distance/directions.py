"""Which of K(K-1) directions are measured, and what that says of the others.

A model of many classes has more directions than can be measured. A random sample estimates the
mean of all, with a confidence interval. All directions out of some classes, or into some, are
complete in themselves. The nearest directions (`nearest.py`) show where a model is weakest, and say
nothing of the mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moth_jax.errors import InputError, listed

_CONFIDENCE = 0.95


class DirectionChoice(NamedTuple):
    """Directions to measure, and how they were chosen.

    Attributes:
      directions: (victim, target) label numbers.
      details: as JSON can carry it: `kind` ("all", "sample" or "nearest"), `of` (the number of
        directions to choose from), and `victims`, `targets` (the labels that were allowed).
    """

    directions: list[tuple[int, int]]
    details: dict


def choose_directions(
    classes: Sequence[int],
    *,
    victims: Sequence[int] = (),
    targets: Sequence[int] = (),
    num_directions: int = 0,
    seed: int = 0,
) -> DirectionChoice:
    """Choose among the directions between `classes`, row after row.

    Args:
      classes: label numbers.
      victims, targets: only directions out of these and into those; () for all.
      num_directions: how many to draw at random, without replacement; 0 for all.
      seed: of the draw.

    Raises:
      InputError: victims or targets that are not among the classes, or more directions than there
        are.

    >>> choose_directions((0, 1, 2), victims=(1,)).directions
    [(1, 0), (1, 2)]
    >>> choice = choose_directions(range(1000), num_directions=200)
    >>> len(choice.directions), choice.details
    (200, {'kind': 'sample', 'of': 999000})
    """
    classes = [int(k) for k in classes]
    given = {"victims": [int(k) for k in victims], "targets": [int(k) for k in targets]}
    for name, labels in given.items():
        outside = sorted(set(labels) - set(classes))
        if outside:
            raise InputError(f"{name} must be among the chosen classes, got {listed(outside)}")
    from_, to = (np.isin(classes, labels or classes) for labels in given.values())
    allowed = from_[:, None] & to[None, :] & ~np.eye(len(classes), dtype=bool)
    rows, columns = np.nonzero(allowed)
    if not 0 <= num_directions <= len(rows):
        raise InputError(f"num_directions must be in 0..{len(rows)}, got {num_directions}")
    if not len(rows):
        raise InputError("there is no direction between these victims and targets")
    details = {"kind": "sample" if num_directions else "all", "of": len(rows)}
    if num_directions:
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(len(rows), num_directions, replace=False))
        rows, columns = rows[chosen], columns[chosen]
    labels = np.asarray(classes)
    return DirectionChoice(
        list(zip(labels[rows].tolist(), labels[columns].tolist(), strict=True)),
        {**details, **{name: values for name, values in given.items() if values}},
    )


def mean_interval(values: np.ndarray, sampled: int, population: int) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean of `population` values.

    `sampled` of them were drawn without replacement, and `values` are those of the drawn ones that
    are known. The interval is that of Student's t, with the correction for finite populations:
    nothing is left to chance when all are drawn. It is None with fewer than two values.

    >>> [round(end, 2) for end in mean_interval(np.array([9.0, 10.0, 11.0, 10.0]), 4, 1000)]
    [8.7, 11.3]
    >>> mean_interval(np.array([9.0, 11.0]), 2, 2)
    (10.0, 10.0)
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    values = np.asarray(values, np.float64)
    left_out = 1 - sampled / population
    error = values.std(ddof=1) / np.sqrt(len(values)) * np.sqrt(left_out)
    reach = t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * error
    return float(values.mean() - reach), float(values.mean() + reach)


def describe_choice(details: dict, count: int) -> str:
    """Return how `count` measured directions were chosen, in words.

    >>> describe_choice({"kind": "sample", "of": 999000}, 200)
    '200 sampled of 999,000 directions'
    >>> describe_choice({"kind": "all", "of": 9, "victims": [3]}, 9)
    'all 9 directions out of 1 class'
    """
    kind, total = details.get("kind"), details.get("of", count)
    parts = [
        f" {way} {_count(details[name])}"
        for name, way in (("victims", "out of"), ("targets", "into"))
        if details.get(name)
    ]
    directions = f"direction{'' if total == 1 else 's'}{''.join(parts)}"
    if kind == "sample":
        return f"{count:,} sampled of {total:,} {directions}"
    if kind == "nearest":
        return f"{count:,} nearest of {total:,} {directions}, as universal triggers find them"
    return f"all {count:,} {directions}" if kind == "all" else f"{count:,} {directions}"


def _count(labels: Sequence[int]) -> str:
    return f"{len(labels)} class{'' if len(labels) == 1 else 'es'}"
