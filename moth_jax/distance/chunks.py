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
from moth_jax.triggers import AnyTrigger, changed_pixels
from moth_jax.types import AnyArray, LogitsFn, Variables

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
    """

    logits_fn: LogitsFn
    variables: Variables
    draw: Draw
    seeds: list[int]
    budget: Budget | None
    inversion: Search

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
        names = () if self.budget is None else ("num_steps", "minibatch_size", "mask_weight")
        budget = {name: getattr(self.budget, name) for name in names}
        return {**budget, "seeds": self.seeds, "inversion": self.inversion.name}

    def num_runs(self) -> int:
        """Return how many inversions of a direction are done at once."""
        is_ensemble = isinstance(self.inversion, Standard)
        return len(self.seeds) * (standard.NUM_RUNS if is_ensemble else 1)


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
    images, weights = from_my_rows(measurement.draw(filled[my_rows(size)]), size)
    victims, targets = spread(tuple(filled.T))
    samples = Samples(images, weights, targets)
    function, inputs, options = _program(measurement, samples, victims)
    result = function(*inputs, **options)
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
    drawn = (*measurement.draw(first), *first.T)
    images, weights, victims, targets = spread_shapes(drawn, size)
    function, inputs, options = _program(measurement, Samples(images, weights, targets), victims)
    return program_bytes(function.lower(*inputs, **options).compile())


def _program(measurement: Measurement, samples: Samples, victims: AnyArray) -> tuple:
    """Return the compiled function of a chunk, its arguments, and its options by name."""
    model = measurement.logits_fn, measurement.variables
    inputs = *model, samples, victims, replicate(np.asarray(measurement.seeds, np.uint32))
    options = {"inversion": measurement.inversion}
    if isinstance(measurement.inversion, Standard):
        return standard.search, inputs, options
    return invert_with_seeds, inputs, {**options, "budget": measurement.budget}


def assemble(
    measured: Chunk, subject: Subject, details: dict, *, by_search: bool = False
) -> DistanceMatrix:
    """Return the matrix over the subject's classes of what was measured.

    With `by_search` the columns of the sizes are the searches of an ensemble, not seeds.
    """
    classes = subject.classes
    shape = (len(classes), len(classes))
    position = {label: i for i, label in enumerate(classes)}
    places = np.array([[position[k] for k in d] for d in measured.directions.tolist()])
    rows, columns = places.T
    best = np.arange(len(places)), measured.sizes.argmin(1)
    each = np.full((measured.sizes.shape[1], *shape), np.nan, np.float32)
    each[:, rows, columns] = measured.sizes.T
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
        **{"values_per_search" if by_search else "values_per_seed": each},
        triggers=FoundTriggers(
            places[found], jax.tree.map(lambda leaf: np.asarray(leaf)[found], measured.trigger)
        ),
        changed_pixels=changed,
        details={**details, "seconds": measured.seconds},
    )
