"""How a distance matrix is measured: directions in chunks, each one compiled call."""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from moth_jax.chunks import Chunk, ChunkStore, Directions
from moth_jax.inversion import Inversion, InversionResult, LogitsFn, Variables, invert
from moth_jax.matrix import DistanceMatrix
from moth_jax.progress import Task
from moth_jax.sharding import num_devices, replicate, spread
from moth_jax.triggers import random_trigger


def unit_images(images: np.ndarray) -> np.ndarray:
    """Return float32 images in [0, 1]; bytes are 0 to 255."""
    scale = 255 if images.dtype == np.uint8 else 1
    return np.asarray(images, np.float32) / np.float32(scale)


def chunk_size(wanted: int | None, num_directions: int, num_seeds: int) -> int:
    """Return how many directions to run together: fewer than devices, or a multiple of them.

    On a CPU a few fill a core, and short chunks lose little when interrupted.
    """
    devices = num_devices()
    per_device = 2 if jax.default_backend() == "cpu" else 96
    size = min(wanted or devices * max(1, per_device // num_seeds), num_directions)
    return size if size < devices else -(-size // devices) * devices


def measure_all(
    directions: list[tuple[int, int]],
    size: int,
    measure: Callable[[list[tuple[int, int]]], Chunk],
    store: ChunkStore,
    task: Task,
) -> list[Chunk]:
    """Return the chunks of all `directions`, `size` of them in each: stored before, or measured."""
    chunks: list[Chunk] = []
    for first in range(0, len(directions), size):
        wanted = directions[first : first + size]
        chunk, advance = store.load(wanted), task.skip
        if chunk is None:
            chunk, advance = measure(wanted), task.advance
            store.save(chunk)
        chunks.append(chunk)
        sizes = np.concatenate([c.sizes.min(1) for c in chunks])
        found = sizes[np.isfinite(sizes)]
        average = float(found.mean()) if found.size else float("nan")
        advance(len(wanted), average=average, failures=int(np.isinf(sizes).sum()))
    return chunks


def measure_chunk(
    logits_fn: LogitsFn,
    variables: Variables,
    draw: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    directions: Directions,
    *,
    size: int,
    num_steps: int,
    minibatch_size: int,
    mask_weight: float,
    seeds: list[int],
    inversion: Inversion,
) -> Chunk:
    """Measure `directions` in one compiled call, filled up to `size` of them with repeats.

    `draw` returns the images [D, n, h, w, c] and the weights [D, n] of directions [D, 2].
    """
    started = time.perf_counter()
    filled = np.resize(np.asarray(directions, np.int32), (size, 2))
    samples, weights = draw(filled)
    victims, targets = filled.T
    result = _invert_directions(
        logits_fn,
        variables,
        *spread((samples, weights, victims, targets)),
        replicate(np.asarray(seeds, np.uint32)),
        num_steps=num_steps,
        mask_weight=mask_weight,
        minibatch_size=minibatch_size,
        inversion=inversion,
    )
    sizes, rates, trigger = jax.tree.map(
        lambda v: np.asarray(v)[: len(directions)],
        (result.size, result.success_rate, result.trigger),
    )
    rows = np.arange(len(directions)), sizes.argmin(1)
    return Chunk(
        directions=np.asarray(directions),
        sizes=sizes,
        rates=rates,
        trigger=jax.tree.map(lambda v: v[rows], trigger),
        seconds=time.perf_counter() - started,
    )


def victims_images(
    images: np.ndarray, labels: np.ndarray, num_images: int, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images of each victim class [D, n, h, w, c] and their weights [D, n].

    All classes are padded to one n, so that one compilation serves every chunk.
    """
    capacity = min(num_images, int(np.bincount(labels).max()))
    chosen = [np.flatnonzero(labels == victim)[:num_images] for victim, _ in directions]
    return padded_images(images, chosen, capacity)


def padded_images(
    images: np.ndarray, chosen: list[np.ndarray], capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `chosen` images of each direction [D, capacity, ...] and weights, 0 of padding."""
    padded = np.zeros((len(chosen), capacity, *images.shape[1:]), np.float32)
    weights = np.zeros((len(chosen), capacity), np.float32)
    for i, indices in enumerate(chosen):
        padded[i, : len(indices)] = unit_images(images[indices])
        weights[i, : len(indices)] = 1
    return padded, weights


@functools.partial(jax.jit, static_argnames=("logits_fn", "minibatch_size", "inversion"))
def _invert_directions(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    victims: Array,
    targets: Array,
    seeds: Array,
    *,
    num_steps: Array,
    mask_weight: Array,
    minibatch_size: int,
    inversion: Inversion,
) -> InversionResult:
    """Invert D directions with S seeds each: images [D, n, h, w, c] -> result [D, S]."""

    def one(images, weights, victim, target, seed) -> InversionResult:
        start_key, key = jax.random.split(direction_key(seed, victim, target))
        return invert(
            logits_fn,
            variables,
            images,
            weights,
            target,
            random_trigger(start_key, images.shape[1:]),
            key,
            num_steps=num_steps,
            mask_weight=mask_weight,
            minibatch_size=minibatch_size,
            inversion=inversion,
        )

    over_seeds = jax.vmap(one, in_axes=(None, None, None, None, 0))
    return jax.vmap(over_seeds, in_axes=(0, 0, 0, 0, None))(
        images, weights, victims, targets, seeds
    )


def direction_key(seed: Array, victim: Array, target: Array) -> Array:
    """Return the key of a direction.

    Named by seed and classes, not by position: a direction's number does not depend on which others
    are measured with it.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), victim), target)


def assemble(
    chunks: list[Chunk], classes: tuple[int, ...], names: tuple[str, ...], details: dict
) -> DistanceMatrix:
    """Return the matrix over `classes` (label numbers, called `names`) of all chunks."""
    shape = (len(classes), len(classes))
    position = {label: i for i, label in enumerate(classes)}
    per_seed = np.full((chunks[0].sizes.shape[1], *shape), np.nan, np.float32)
    rate = np.full(shape, np.nan, np.float32)
    kept = jax.tree.map(lambda v: np.zeros((*shape, *v.shape[1:]), np.float32), chunks[0].trigger)
    for chunk in chunks:
        rows, columns = np.array([[position[k] for k in d] for d in chunk.directions.tolist()]).T
        per_seed[:, rows, columns] = chunk.sizes.T
        rate[rows, columns] = chunk.rates[np.arange(len(rows)), chunk.sizes.argmin(1)]
        kept.mask[rows, columns] = chunk.trigger.mask
        kept.pattern[rows, columns] = chunk.trigger.pattern
    return DistanceMatrix(
        values=per_seed.min(0),
        success_rate=rate,
        class_names=names,
        values_per_seed=per_seed,
        triggers=kept,
        details={**details, "seconds": sum(chunk.seconds for chunk in chunks)},
    )
