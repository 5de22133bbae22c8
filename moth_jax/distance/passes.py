"""A measurement in passes: in each, directions go on from what was found before.

What sends one class to a target often nearly sends another. So every direction goes on from its own
trigger and from those of other directions to its target that send the most of its images, until
that finds no smaller trigger (`inversion.standard`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from moth_jax.distance.chunks import Measurement
from moth_jax.distance.store import Chunk
from moth_jax.inversion.standard import NUM_NEIGHBOURS, NUM_PASSES, SETTLED
from moth_jax.parallel.devices import fetch, replicate
from moth_jax.triggers import AnyTrigger, Trigger, stamp, success_rate
from moth_jax.types import LogitsFn, Variables

MOST_TRIED = 32  # triggers to one target: the smallest; each costs a forward pass of the images

# A measurement, its directions [(victim, target)] and the number of the pass -> their results.
MeasurePass = Callable[[Measurement, list[tuple[int, int]], int], Chunk]


class InPasses(NamedTuple):
    """The results of all passes.

    Attributes:
      chunk: the smallest trigger of every direction; `sizes` [D, R] are those of all searches, inf
        where one found nothing or was not made.
      settled: [D], whether the last pass found no trigger that is smaller by 2 % or more.
    """

    chunk: Chunk
    settled: np.ndarray


def measure_in_passes(
    measurement: Measurement, directions: list[tuple[int, int]], measure: MeasurePass
) -> InPasses:
    """Return what all passes over `directions` find."""
    found = measure(measurement, directions, 0)
    falling = np.ones(len(directions), bool)
    for number in range(1, NUM_PASSES + 1):
        places = np.flatnonzero(falling)
        if not len(places):
            break
        chosen = [directions[i] for i in places]
        starts = starts_of(measurement, found, places)
        later = measure(measurement._replace(starts=_by_direction(chosen, starts)), chosen, number)
        before = found.sizes.min(1)
        found = merged(found, later, places)
        falling = found.sizes.min(1) < SETTLED * before
    return InPasses(found, ~falling)


def starts_of(measurement: Measurement, found: Chunk, places: np.ndarray) -> Trigger:
    """Return what directions go on from [D, R, ...]: their own triggers, and their neighbours'.

    `places` [D] are the directions among those of `found`.
    """
    sizes, targets = found.sizes.min(1), found.directions[:, 1]
    most = max(np.sum((targets == target) & np.isfinite(sizes)) for target in targets[places])
    num_neighbours = int(np.clip(most - 1, 0, NUM_NEIGHBOURS))
    rows = []
    for place in places:
        others = np.flatnonzero((targets == targets[place]) & np.isfinite(sizes))
        others = others[others != place]
        others = others[np.argsort(sizes[others], kind="stable")][:MOST_TRIED]
        if num_neighbours and len(others):
            rates = _rates(measurement, found, place, others)
            others = others[np.argsort(-rates, kind="stable")]
        row = [place, *others[:num_neighbours]]
        rows.append(row + [place] * (1 + num_neighbours - len(row)))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[np.array(rows)], found.trigger)


def _rates(measurement: Measurement, found: Chunk, place: int, others: np.ndarray) -> np.ndarray:
    """Return the success rates [R] of other directions' triggers on the images of one."""
    images, weights = measurement.draw(found.directions[place][None])
    # Equally many for all directions, or every count would be compiled.
    filled = np.resize(others, -(-len(others) // 8) * 8)
    triggers = jax.tree.map(lambda leaf: np.asarray(leaf)[filled], found.trigger)
    target = np.int32(found.directions[place, 1])
    inputs = replicate((images[0], weights[0], triggers, target))
    rates = _rates_of_triggers(measurement.logits_fn, measurement.variables, *inputs)
    return np.asarray(fetch(rates))[: len(others)]


@functools.partial(jax.jit, static_argnums=0)
def _rates_of_triggers(
    logits_fn: LogitsFn, variables: Variables, images, weights, triggers: AnyTrigger, target
) -> jax.Array:
    def rate(trigger: AnyTrigger) -> jax.Array:
        return success_rate(logits_fn(variables, stamp(images, trigger)), target, weights)

    return jax.lax.map(rate, triggers)


def _by_direction(
    directions: list[tuple[int, int]], starts: Trigger
) -> Callable[[np.ndarray], Trigger]:
    """Return the function that gives directions [D, 2] their `starts`."""
    place = {direction: i for i, direction in enumerate(directions)}

    def of(chosen: np.ndarray) -> Trigger:
        rows = np.array([place[tuple(direction)] for direction in chosen.tolist()])
        return jax.tree.map(lambda leaf: leaf[rows], starts)

    return of


def merged(found: Chunk, later: Chunk, places: np.ndarray) -> Chunk:
    """Return `found` with the searches of a later pass, which was made at `places`."""

    def widened(values: np.ndarray, nothing: float) -> np.ndarray:
        columns = np.full((len(found.directions), values.shape[1]), nothing, values.dtype)
        columns[places] = values
        return columns

    smaller = np.zeros(len(found.directions), bool)
    smaller[places] = later.sizes.min(1) < found.sizes[places].min(1)
    chosen = smaller[places]

    def replaced(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        values = np.array(old)
        values[smaller] = np.asarray(new)[chosen]
        return values

    return Chunk(
        directions=found.directions,
        sizes=np.concatenate([found.sizes, widened(later.sizes, np.inf)], axis=1),
        rates=np.concatenate([found.rates, widened(later.rates, 0.0)], axis=1),
        trigger=jax.tree.map(replaced, found.trigger, later.trigger),
        changed_pixels=replaced(found.changed_pixels, later.changed_pixels),
        seconds=found.seconds + later.seconds,
    )
