"""How a distance matrix is measured: directions in chunks, each one compiled call."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from moth_jax.distance.found_triggers import FoundTriggers
from moth_jax.distance.lanes import measure_in_lanes
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.distance.store import Chunk, ChunkStore, Directions
from moth_jax.inversion import Inversion
from moth_jax.inversion.directions import _invert_directions
from moth_jax.parallel.devices import (
    fetch,
    from_my_rows,
    my_rows,
    num_devices,
    replicate,
    spread,
    spread_shapes,
)
from moth_jax.parallel.memory import equal, fitting_size, free_bytes, halving, program_bytes
from moth_jax.parallel.processes import smallest
from moth_jax.progress.task import Task
from moth_jax.run import preemption
from moth_jax.types import LogitsFn, Variables

Draw = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_LOWER = "lower num_images, minibatch_size or the number of seeds"


def chunk_size(wanted: int | None, num_directions: int, num_seeds: int) -> int:
    """Return how many directions to run together: fewer than devices, or a multiple of them.

    On a CPU a few fill a core, and short chunks lose little when interrupted. Where nobody wants a
    size the chunks are of equal ones, for the last is filled up with repeats.
    """
    devices = num_devices()
    per_device = 2 if jax.default_backend() == "cpu" else 96
    size = min(wanted or devices * max(1, per_device // num_seeds), num_directions)
    if not wanted:
        return equal(size, num_directions)
    return size if size < devices else -(-size // devices) * devices


class Measurer(NamedTuple):
    """What measures directions, given them and how many to run together.

    Attributes:
      measure: yields their results in chunks of any size.
      needed: returns the bytes that this takes on each device.
    """

    measure: Callable[[Directions, int], Iterable[Chunk]]
    needed: Callable[[Directions, int], float]


def measurer(logits_fn: LogitsFn, variables: Variables, draw: Draw, **options) -> Measurer:
    """Return what measures directions of one model by one method (`measure_chunks`)."""
    inputs = logits_fn, replicate(variables), draw
    return Measurer(
        functools.partial(measure_chunks, *inputs, **options),
        functools.partial(chunk_bytes, *inputs, **options),
    )


def measure_all(
    directions: list[tuple[int, int]],
    size: int,
    by: Measurer,
    store: ChunkStore,
    task: Task,
    *,
    fit: bool,
) -> Chunk:
    """Return the results of all `directions`: stored before, or measured, `size` together.

    With `fit` the size is made one that the free memory has room for; where memory runs out all the
    same it is halved. The chunks of what is left are then made equal, and never larger than that.
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
        return by.needed(tuple(left)[:size], size)

    if left and fit:
        size = smallest(fitting_size(size, needed, free_bytes(), of_what_is_left))
    elif len(left) < size:
        size = of_what_is_left(size)

    def measure_left(size: int) -> None:
        for chunk in by.measure(tuple(left), size):
            store.save(chunk)
            add([chunk], task.advance)
            preemption.stop_here(store.folder)

    halving(measure_left, size, advice=_LOWER, rounded=of_what_is_left)
    return _in_order(chunks, directions)


def _in_order(chunks: list[Chunk], directions: Directions) -> Chunk:
    """Return the results of all chunks as one, in the order of `directions`."""
    rows = [tuple(direction) for chunk in chunks for direction in chunk.directions.tolist()]
    place = {direction: i for i, direction in enumerate(rows)}
    order = np.array([place[tuple(direction)] for direction in directions])
    parts = [(chunk.directions, chunk.sizes, chunk.rates, chunk.trigger) for chunk in chunks]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *parts)
    return Chunk(*whole, seconds=sum(chunk.seconds for chunk in chunks))


def measure_chunks(
    logits_fn: LogitsFn,
    variables: Variables,
    draw: Draw,
    directions: Directions,
    size: int,
    *,
    seeds: list[int],
    inversion: Inversion,
    **budget,
) -> Iterator[Chunk]:
    """Yield the results of `directions`, `size` of them together in each compiled call.

    `draw` returns the images [D, n, h, w, c] and the weights [D, n] of directions [D, 2]: of those
    that are on this process's devices. `budget` is that of `invert`. Directions of a method whose
    searches settle leave when they do (`lanes.py`).
    """
    if inversion.settled is not None:
        inputs = functools.partial(_inputs, variables, draw, seeds=seeds)
        yield from measure_in_lanes(
            logits_fn, inputs, directions, size, inversion=inversion, **budget
        )
        return
    for first in range(0, len(directions), size):
        chosen = directions[first : first + size]
        yield _measure_chunk(
            logits_fn, variables, draw, chosen, size, seeds=seeds, inversion=inversion, **budget
        )


def _measure_chunk(
    logits_fn: LogitsFn,
    variables: Variables,
    draw: Draw,
    directions: Directions,
    size: int,
    *,
    seeds: list[int],
    **options,
) -> Chunk:
    """Measure `directions` in one compiled call, filled up to `size` of them with repeats."""
    started = time.perf_counter()
    inputs = _inputs(variables, draw, directions, size, seeds)
    result = _invert_directions(logits_fn, *inputs, **options)
    sizes, rates, trigger = jax.tree.map(
        lambda v: v[: len(directions)],
        fetch((result.size, result.success_rate, result.trigger)),
    )
    rows = np.arange(len(directions)), sizes.argmin(1)
    return Chunk(
        directions=np.asarray(directions),
        sizes=sizes,
        rates=rates,
        trigger=jax.tree.map(lambda v: v[rows], trigger),
        seconds=time.perf_counter() - started,
    )


def chunk_bytes(
    logits_fn: LogitsFn,
    variables: Variables,
    draw: Draw,
    directions: Directions,
    size: int,
    *,
    seeds: list[int],
    **options,
) -> float:
    """Return the bytes that `measure_chunks` with the same arguments needs on each device.

    The compilation is the one that it then uses; of directions in lanes it is one of its own, which
    says about what they need. Images are drawn of one direction only, for their shape.
    """
    first = np.asarray(directions[:1], np.int32)
    rows = (*draw(first), *first.T)
    seeds = replicate(np.asarray(seeds, np.uint32))
    inputs = variables, *spread_shapes(rows, size), seeds
    return program_bytes(_invert_directions.lower(logits_fn, *inputs, **options).compile())


def _inputs(
    variables: Variables, draw: Draw, directions: Directions, size: int, seeds: list[int]
) -> tuple:
    """Return the variables, images, weights, victims, targets and seeds of a chunk, on devices."""
    filled = np.resize(np.asarray(directions, np.int32), (size, 2))
    samples, weights = from_my_rows(draw(filled[my_rows(size)]), size)
    victims, targets = spread(tuple(filled.T))
    return variables, samples, weights, victims, targets, replicate(np.asarray(seeds, np.uint32))


def assemble(
    measured: Chunk, classes: tuple[int, ...], names: tuple[str, ...], details: dict
) -> DistanceMatrix:
    """Return the matrix over `classes` (label numbers, called `names`) of what was measured."""
    shape = (len(classes), len(classes))
    position = {label: i for i, label in enumerate(classes)}
    places = np.array([[position[k] for k in d] for d in measured.directions.tolist()])
    rows, columns = places.T
    best = np.arange(len(places)), measured.sizes.argmin(1)
    per_seed = np.full((measured.sizes.shape[1], *shape), np.nan, np.float32)
    per_seed[:, rows, columns] = measured.sizes.T
    rate = np.full(shape, np.nan, np.float32)
    rate[rows, columns] = measured.rates[best]
    found = np.flatnonzero(np.isfinite(measured.sizes[best]))
    found = found[np.lexsort(places[found].T[::-1])]
    return DistanceMatrix(
        values=per_seed.min(0),
        success_rate=rate,
        class_names=names,
        values_per_seed=per_seed,
        triggers=FoundTriggers(
            places[found], measured.trigger.mask[found], measured.trigger.pattern[found]
        ),
        details={**details, "seconds": measured.seconds},
    )
