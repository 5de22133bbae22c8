"""How a distance matrix is measured: directions in chunks, each one compiled call."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moth_jax.distance.matrix import DistanceMatrix, FoundTriggers
from moth_jax.distance.store import Chunk, ChunkStore, Directions
from moth_jax.distance.subject import Subject
from moth_jax.inversion import Budget, Samples, Search, Standard, standard
from moth_jax.inversion.directions import invert_with_seeds
from moth_jax.parallel.devices import (
    fetch,
    from_my_rows,
    my_rows,
    num_devices,
    over_directions,
    replicate,
    spread,
    spread_shapes,
)
from moth_jax.parallel.memory import equal, fitting_size, free_bytes, halving, program_bytes
from moth_jax.parallel.processes import smallest
from moth_jax.progress import Task
from moth_jax.triggers import AnyTrigger, Trigger, changed_pixels
from moth_jax.types import LogitsFn, Variables

# Directions [D, 2] to their images [D, n, h, w, c] and weights [D, n].
Draw = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_LOWER = "lower num_images, minibatch_size or the number of seeds"


class Measurement(NamedTuple):
    """Everything that all chunks of a measurement share.

    Attributes:
      logits_fn, variables: the model, the variables on the devices.
      draw: directions [D, 2] -> images [D, n, h, w, c] and weights [D, n].
      seeds: one inversion for each; the smallest trigger counts.
      budget: of each inversion; None where the search has its own.
      inversion: the search.
      starts: directions [D, 2] -> triggers [D, R, ...] that a later pass goes on from
        (`distance.passes`), None in the first one.
    """

    logits_fn: LogitsFn
    variables: Variables
    draw: Draw
    seeds: list[int]
    budget: Budget | None
    inversion: Search
    starts: Callable[[np.ndarray], Trigger] | None = None

    @classmethod
    def of(
        cls,
        subject: Subject,
        draw: Draw,
        seeds: list[int],
        budget: Budget | None,
        inversion: Search,
    ) -> "Measurement":
        """Return the measurement of a subject."""
        model = subject.logits_fn, replicate(subject.variables)
        return cls(*model, draw, seeds, budget, inversion)

    def settings(self) -> dict:
        """Return what it was asked for, as JSON can carry it."""
        budget = {} if self.budget is None else budget_fields(self.budget)
        return {**budget, "seeds": self.seeds, "inversion": self.inversion.name}

    def num_runs(self) -> int:
        """Return how many inversions of a direction are done at once."""
        is_ensemble = isinstance(self.inversion, Standard)
        return len(self.seeds) * (len(standard.BEGINNINGS) if is_ensemble else 1)


def budget_fields(budget: Budget) -> dict:
    """Return a budget as JSON can carry it."""
    names = ("num_steps", "minibatch_size", "mask_weight")
    return {name: getattr(budget, name) for name in names}


def chunk_size(wanted: int | None, num_directions: int, num_seeds: int) -> int:
    """Return how many directions to run together: fewer than devices, or a multiple of them.

    On a CPU a few directions fill a core, and short chunks lose little when they are interrupted.
    If no size is wanted, all chunks are equally large, because the last one is filled up with
    repeats.
    """
    devices = num_devices()
    per_device = 2 if jax.default_backend() == "cpu" else 96
    size = min(wanted or devices * max(1, per_device // num_seeds), num_directions)
    if not wanted:
        return equal(size, num_directions)
    return size if size < devices else -(-size // devices) * devices


def measure_all(
    measurement: Measurement,
    directions: list[tuple[int, int]],
    size: int,
    store: ChunkStore,
    task: Task,
    *,
    fit: bool,
) -> Chunk:
    """Return the results of all `directions`, those in the store and those measured here.

    `size` directions run together. With `fit` the size is lowered until the free memory has room
    for it. If memory runs out all the same, the size is halved. The remaining chunks are then made
    equal, and never larger than that.
    """
    chunks: list[Chunk] = []
    left = dict.fromkeys(directions)  # an ordered set
    total = count = failures = 0

    def add(some: list[Chunk], advance: Callable[..., None]) -> None:
        nonlocal total, count, failures
        chunks.extend(some)
        for direction in (tuple(d) for chunk in some for d in chunk.directions.tolist()):
            left.pop(direction, None)
        sizes = np.concatenate([chunk.sizes.min(1) for chunk in some])
        found = sizes[np.isfinite(sizes)]
        total, count = total + float(found.sum()), count + found.size
        failures += sizes.size - found.size
        average = total / count if count else "none found"
        advance(len(sizes), average=average, failures=failures)

    known = store.load(directions)
    if known:
        add(known, task.resume)

    def of_what_is_left(size: int) -> int:
        return equal(size, len(left))

    def needed(size: int) -> float:
        return chunk_bytes(measurement, tuple(left)[:1], size)

    if left and fit:
        size = smallest(fitting_size(size, needed, free_bytes(), of_what_is_left))
    elif len(left) < size:
        size = of_what_is_left(size)

    def measure_left(size: int) -> None:
        rest = tuple(left)
        for first in range(0, len(rest), size):
            chunk = measure_chunk(measurement, rest[first : first + size], size)
            store.save(chunk)  # before the progress, which may end the process
            add([chunk], task.advance)

    halving(measure_left, size, advice=_LOWER, rounded=of_what_is_left)
    return _in_order(chunks, directions)


def _in_order(chunks: list[Chunk], directions: Directions) -> Chunk:
    """Return the results of all chunks as one, in the order of `directions`."""
    rows = [tuple(direction) for chunk in chunks for direction in chunk.directions.tolist()]
    place = {direction: i for i, direction in enumerate(rows)}
    order = np.array([place[tuple(direction)] for direction in directions])
    parts = [tuple(chunk)[:-1] for chunk in chunks]  # all but the seconds
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *parts)
    return Chunk(*whole, seconds=sum(chunk.seconds for chunk in chunks))


def measure_chunk(measurement: Measurement, directions: Directions, size: int) -> Chunk:
    """Measure `directions` in one compiled call, filled up to `size` of them with repeats."""
    started = time.perf_counter()
    filled = np.resize(np.asarray(directions, np.int32), (size, 2))
    mine = filled[my_rows(size)]
    drawn = from_my_rows((*measurement.draw(mine), _starts(measurement, mine)), size)
    victims, targets = spread(tuple(filled.T))
    images, weights, starts = drawn
    samples = Samples(images, weights, targets)
    function, *inputs, options = _program(measurement, samples, victims, starts)
    result = function(measurement.logits_fn, measurement.variables, *inputs, **options)
    smallest_found = _smallest(samples, result.size, result.trigger)
    sizes, rates, (trigger, changed) = jax.tree.map(
        lambda v: v[: len(directions)],
        fetch((result.size, result.success_rate, smallest_found)),
    )
    return Chunk(
        directions=np.asarray(directions),
        sizes=sizes,
        rates=rates,
        trigger=trigger,
        changed_pixels=changed,
        seconds=time.perf_counter() - started,
    )


@jax.jit
def _smallest(samples: Samples, sizes: jax.Array, triggers: AnyTrigger):
    """Return the smallest trigger [D, ...] over the seeds [D, S], and how many pixels it changes.

    It is a program of its own, so that the one that searches knows nothing of it.
    """

    def one(samples: Samples, sizes: jax.Array, triggers: AnyTrigger):
        best = jnp.argmin(sizes)
        trigger = jax.tree.map(lambda leaf: leaf[best], triggers)
        changed = changed_pixels(trigger, samples.images, samples.weights).astype(sizes.dtype)
        return trigger, jnp.where(jnp.isfinite(sizes[best]), changed, jnp.inf)

    return over_directions(one)(samples, sizes, triggers)


def chunk_bytes(measurement: Measurement, directions: Directions, size: int) -> float:
    """Return the bytes that `measure_chunk` with the same arguments needs on each device.

    The compilation is the one that it then uses. Images are drawn of one direction only, for their
    shape.
    """
    first = np.asarray(directions[:1], np.int32)
    drawn = (*measurement.draw(first), *first.T, _starts(measurement, first))
    images, weights, victims, targets, starts = spread_shapes(drawn, size)
    samples = Samples(images, weights, targets)
    function, *inputs, options = _program(measurement, samples, victims, starts)
    lowered = function.lower(measurement.logits_fn, measurement.variables, *inputs, **options)
    return program_bytes(lowered.compile())


def _starts(measurement: Measurement, directions: np.ndarray) -> Trigger | None:
    return None if measurement.starts is None else measurement.starts(directions)


def _program(measurement: Measurement, samples: Samples, victims, starts) -> tuple:
    """Return the compiled function of a chunk, what it takes after the model, and its options."""
    options = {"inversion": measurement.inversion}
    if starts is not None:
        return standard.go_on, samples, victims, starts, options
    seeds = replicate(np.asarray(measurement.seeds, np.uint32))
    if isinstance(measurement.inversion, Standard):
        return standard.search, samples, victims, seeds, options
    return invert_with_seeds, samples, victims, seeds, {**options, "budget": measurement.budget}


def assemble(
    measured: Chunk, subject: Subject, details: dict, settled: np.ndarray | None = None
) -> DistanceMatrix:
    """Return the matrix over the subject's classes of what was measured.

    `settled` [D] is given where the columns of the sizes are searches, not seeds.
    """
    classes = subject.classes
    shape = (len(classes), len(classes))
    position = {label: i for i, label in enumerate(classes)}
    places = np.array([[position[k] for k in d] for d in measured.directions.tolist()])
    rows, columns = places.T
    best = np.arange(len(places)), measured.sizes.argmin(1)
    each = np.full((measured.sizes.shape[1], *shape), np.nan, np.float32)
    each[:, rows, columns] = measured.sizes.T
    of_searches = {}
    if settled is not None:
        whether = np.full(shape, np.nan, np.float32)
        whether[rows, columns] = settled
        of_searches = {"values_per_search": each, "settled": whether}
    changed = np.full(shape, np.nan, np.float32)
    changed[rows, columns] = measured.changed_pixels
    rate = np.full(shape, np.nan, np.float32)
    rate[rows, columns] = measured.rates[best]
    share = np.full(shape, np.nan, np.float32)
    for row in np.unique(rows).tolist():
        taken_for = subject.predictions_of(classes[row])
        share[row] = [np.mean(taken_for == target) for target in classes]
    share[np.isnan(rate)] = np.nan
    found = np.flatnonzero(np.isfinite(measured.sizes[best]))
    found = found[np.lexsort(places[found].T[::-1])]
    return DistanceMatrix(
        values=each.min(0),
        success_rate=rate,
        class_names=subject.names,
        share_there=share,
        values_per_seed=each if settled is None else None,
        **of_searches,
        triggers=FoundTriggers(
            places[found], jax.tree.map(lambda leaf: np.asarray(leaf)[found], measured.trigger)
        ),
        changed_pixels=changed,
        details={**details, "seconds": measured.seconds},
    )
