"""Class distances: the size of the smallest trigger of every direction (Definition III.2).

    from moth_jax import distance
    matrix = distance.distance_matrix(logits_fn, images, labels)

`logits_fn` is any JAX function from images in [0, 1] to logits. A distance is an upper bound found
by trigger inversion, and it belongs to a trigger that was measured to reach the success bound. A
direction where none was found is infinite: counted, shown, and never averaged in.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.data.dataset import check_images, check_labels
from moth_jax.errors import InputError
from moth_jax.inversion import (
    Inversion,
    InversionResult,
    LogitsFn,
    Variables,
    invert,
    neural_cleanse,
)
from moth_jax.matrix import (
    DistanceMatrix,
    increase_per_direction,
    load_npz,
    relative_increase,
    save_npz,
)
from moth_jax.progress import Progress, as_progress
from moth_jax.sharding import num_devices, over_samples, replicate, spread
from moth_jax.triggers import Trigger, random_trigger

__all__ = [
    "DistanceMatrix",
    "class_distance",
    "distance_matrix",
    "increase_per_direction",
    "relative_increase",
]


def distance_matrix(
    logits_fn: LogitsFn | Callable[[Array], Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    variables: Variables | None = None,
    class_names: Sequence[str] | None = None,
    directions: Sequence[tuple[int, int]] | None = None,
    num_images: int = 100,
    num_steps: int = 1000,
    minibatch_size: int = 32,
    mask_weight: float = 1e-3,
    seeds: Sequence[int] = (0,),
    inversion: Inversion | None = None,
    directions_per_chunk: int | None = None,
    resume_dir: str | Path | None = None,
    label: str = "class distances",
    progress: bool | Progress = True,
) -> DistanceMatrix:
    """Measure the class distances of a classifier.

    Args:
      logits_fn: images [n, h, w, c] in [0, 1] -> logits [n, K]; with `variables` given,
        (variables, images) -> logits. Inference mode, normalisation inside, not softmax.
      images: [n, h, w, c] in [0, 1], or uint8 from 0 to 255.
      labels: [n] integers in [0, K).
      variables: the model's variables, if `logits_fn` takes them.
      class_names: K names; "0", "1", ... if not given.
      directions: (victim, target) pairs to measure; all K(K-1) if not given.
      num_images: the first so many images of each victim class are used.
      num_steps, minibatch_size, mask_weight: budget of an inversion (`inversion.invert`).
      seeds: one inversion per seed and direction; the smallest trigger counts. The published
        matrices are the smallest of three.
      inversion: the method; the published one if not given.
      directions_per_chunk: how many directions run in one compiled call.
      resume_dir: a folder for finished chunks; a measurement that was interrupted and is called
        again with the same arguments goes on from there.
      label: what the progress bar says.
      progress: a progress bar (True), nothing (False), or a `Progress`.

    Returns:
      The matrix. The same seeds give the same numbers for any `directions`; chunks of other sizes
      change them only by floating-point rounding.

    Raises:
      InputError: what is wrong with the images, labels, directions or the model's output.

    >>> import jax.numpy as jnp, numpy as np
    >>> def brightness(images):                    # two classes: dark and bright
    ...     level = images.mean((1, 2, 3))
    ...     return 20 * jnp.stack([0.5 - level, level - 0.5], axis=1)
    >>> images = np.concatenate([np.full((4, 4, 4, 1), 0.1), np.full((4, 4, 4, 1), 0.9)])
    >>> images, labels = images.astype("float32"), np.repeat([0, 1], 4)
    >>> matrix = distance_matrix(brightness, images, labels, num_steps=200, progress=False)
    >>> matrix.num_failures(), bool(7.1 < matrix.values[0, 1] < 7.5)   # (0.5-0.1) * 16 / (1-0.1)
    (0, True)
    """
    inversion = neural_cleanse() if inversion is None else inversion
    call = logits_fn if variables is not None else _ignore_variables(logits_fn)
    seen = check_classifier(call, variables, images, labels)
    num_classes = seen.shape[1]
    _check_options(
        num_images=num_images,
        num_steps=num_steps,
        minibatch_size=minibatch_size,
        directions_per_chunk=1 if directions_per_chunk is None else directions_per_chunk,
    )
    if not 0 <= mask_weight < np.inf:
        raise InputError(f"mask_weight must be finite and not negative, got {mask_weight}")
    if not len(seeds):
        raise InputError("seeds must name at least one seed, such as (0,)")
    names = _class_names(class_names, num_classes)
    directions = _check_directions(directions, labels, num_classes, names)
    chunk_size = _chunk_size(directions_per_chunk, len(directions), len(seeds))
    if chunk_size < num_devices():
        call = over_samples(call)
    chunks = _chunks(directions, chunk_size)
    settings = {
        "num_images": num_images,
        "num_steps": num_steps,
        "minibatch_size": minibatch_size,
        "mask_weight": mask_weight,
        "seeds": [int(seed) for seed in seeds],
    }
    details = {**settings, "inversion": inversion.name}
    measure = functools.partial(
        _measure_chunk,
        call,
        replicate(variables),
        images,
        labels,
        chunk_size=chunk_size,
        inversion=inversion,
        **settings,
    )
    # Logits tell functions apart that hold their weights themselves.
    model = seen if variables is None else variables
    store = _ChunkStore(resume_dir, details, (images, labels, model))
    reporter = as_progress(progress)
    results: list[_Chunk] = []
    with reporter.task(label, total=len(directions), unit="directions") as task:
        for chunk in chunks:
            result, advance = store.load(chunk), task.skip
            if result is None:
                result, advance = measure(chunk), task.advance
                store.save(result)
            results.append(result)
            sizes = np.concatenate([r.sizes.min(1) for r in results])
            failures = int(np.isinf(sizes).sum())
            advance(len(chunk), average=_mean_of_finite(sizes), failures=failures)
    return _assemble(results, names, details)


def class_distance(
    logits_fn: LogitsFn | Callable[[Array], Array],
    images: np.ndarray,
    target: int,
    *,
    variables: Variables | None = None,
    num_steps: int = 1000,
    minibatch_size: int = 32,
    mask_weight: float = 1e-3,
    seed: int = 0,
    inversion: Inversion | None = None,
) -> InversionResult:
    """Return the smallest verified trigger that sends `images` to `target`.

    Args are those of `distance_matrix`; `images` [n, h, w, c] are the victims' (of one class for a
    class distance, of all others for a universal trigger).
    """
    check_images(images)
    call = logits_fn if variables is not None else _ignore_variables(logits_fn)
    num_classes = _first_logits(call, variables, images).shape[1]
    _check_options(num_steps=num_steps, minibatch_size=minibatch_size)
    if not 0 <= target < num_classes:
        raise InputError(f"target must be in 0..{num_classes - 1}, got {target}")
    start_key, key = jax.random.split(jax.random.key(seed))
    return _invert_one(
        over_samples(call),
        variables,
        _unit(images),
        jnp.ones(len(images)),
        jnp.asarray(target, jnp.int32),
        random_trigger(start_key, images.shape[1:]),
        key,
        num_steps=num_steps,
        mask_weight=mask_weight,
        minibatch_size=minibatch_size,
        inversion=neural_cleanse() if inversion is None else inversion,
    )


_invert_one = jax.jit(invert, static_argnames=("logits_fn", "minibatch_size", "inversion"))


def check_classifier(
    logits_fn: LogitsFn, variables: Variables, images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Check images, labels and the model's output; return the logits [m, K] of the first images.

    Raises:
      InputError: at the first fault.
    """
    check_images(images)
    logits = _first_logits(logits_fn, variables, images)
    num_classes = logits.shape[1]
    if num_classes < 2:
        raise InputError(f"a distance needs at least 2 classes, the model has {num_classes}")
    check_labels(labels, num_classes)
    if len(labels) != len(images):
        raise InputError(f"there are {len(images)} images but {len(labels)} labels")
    return logits


def _check_options(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _unit(images: np.ndarray) -> np.ndarray:
    """Return float32 images in [0, 1]; bytes are 0 to 255."""
    scale = 255 if images.dtype == np.uint8 else 1
    return np.asarray(images, np.float32) / np.float32(scale)


def _first_logits(logits_fn: LogitsFn, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Return the logits of the first images, if they are logits."""
    logits = np.asarray(jax.jit(logits_fn)(variables, _unit(images[:8])))
    if logits.ndim != 2 or logits.shape[0] != min(8, len(images)):
        raise InputError(
            f"logits_fn must return logits [n, K] for images [n, h, w, c]; for "
            f"{images[:8].shape} it returned {logits.shape}"
        )
    if not np.isfinite(logits).all():
        raise InputError(
            "the model returns NaN or infinite logits: check its weights and its normalisation"
        )
    if logits.min() >= 0 and np.allclose(logits.sum(1), 1.0, atol=1e-3):
        raise InputError(
            "the model returns probabilities: leave out its softmax, distances need logits"
        )
    return logits


def _ignore_variables(logits_fn: Callable[[Array], Array]) -> LogitsFn:
    # A new function each time: what `logits_fn` closes over may have changed since it was compiled.
    return lambda variables, images: logits_fn(images)


def _class_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    names = tuple(map(str, range(num_classes) if class_names is None else class_names))
    if len(names) != num_classes:
        raise InputError(f"the model has {num_classes} classes, but {len(names)} names were given")
    return names


def _check_directions(
    directions: Sequence[tuple[int, int]] | None,
    labels: np.ndarray,
    num_classes: int,
    names: tuple[str, ...],
) -> list[tuple[int, int]]:
    """Return the directions to measure; every victim class must have a sample."""
    if directions is None:
        directions = [(a, b) for a in range(num_classes) for b in range(num_classes) if a != b]
    if not len(directions):
        raise InputError("directions must name at least one (victim, target)")
    for a, b in directions:
        if a == b or not (0 <= a < num_classes and 0 <= b < num_classes):
            raise InputError(
                f"direction ({a}, {b}) needs two different classes in 0..{num_classes - 1}"
            )
    empty = sorted({a for a, _ in directions} - set(np.unique(labels).tolist()))
    if empty:
        raise InputError(
            f"no images of {len(empty)} victim classes: "
            f"{', '.join(names[a] for a in empty)}; add images or leave these directions out"
        )
    return [(int(a), int(b)) for a, b in directions]


def _chunk_size(wanted: int | None, num_directions: int, num_seeds: int) -> int:
    """Return how many directions to run together: fewer than devices, or a multiple of them.

    On a CPU a few fill a core, and short chunks lose little when interrupted.
    """
    devices = num_devices()
    per_device = 2 if jax.default_backend() == "cpu" else 96
    size = min(wanted or devices * max(1, per_device // num_seeds), num_directions)
    return size if size < devices else -(-size // devices) * devices


def _chunks(directions: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Return `directions` cut into chunks of `size`; the last may be shorter."""
    return [directions[i : i + size] for i in range(0, len(directions), size)]


class _Chunk(NamedTuple):
    """Results of some directions.

    Attributes:
      directions: [D, 2] victim, target.
      sizes, rates: [D, S] per seed.
      trigger: [D, ...], the smallest over the seeds.
      seconds: wall time.
    """

    directions: np.ndarray
    sizes: np.ndarray
    rates: np.ndarray
    trigger: Trigger
    seconds: float


def _measure_chunk(
    logits_fn: LogitsFn,
    variables: Variables,
    images: np.ndarray,
    labels: np.ndarray,
    directions: list[tuple[int, int]],
    *,
    chunk_size: int,
    num_images: int,
    num_steps: int,
    minibatch_size: int,
    mask_weight: float,
    seeds: list[int],
    inversion: Inversion,
) -> _Chunk:
    """Measure `directions` in one compiled call, filled up to `chunk_size` with repeats."""
    started = time.perf_counter()
    victims, targets = np.resize(np.asarray(directions, np.int32), (chunk_size, 2)).T
    samples = [images[np.flatnonzero(labels == a)[:num_images]] for a in victims]
    capacity = min(num_images, int(np.bincount(labels).max()))
    padded = np.zeros((len(samples), capacity, *images.shape[1:]), np.float32)
    weights = np.zeros((len(samples), capacity), np.float32)
    for i, sample in enumerate(samples):
        padded[i, : len(sample)] = _unit(sample)
        weights[i, : len(sample)] = 1
    result = _invert_directions(
        logits_fn,
        variables,
        *spread((padded, weights, victims, targets)),
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
    return _Chunk(
        directions=np.asarray(directions),
        sizes=sizes,
        rates=rates,
        trigger=jax.tree.map(lambda v: v[rows], trigger),
        seconds=time.perf_counter() - started,
    )


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
        # Named by seed and classes, not by position: a direction's number does not depend on which
        # others are measured with it.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), victim), target)
        start_key, key = jax.random.split(key)
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


def _assemble(results: list[_Chunk], names: tuple[str, ...], details: dict) -> DistanceMatrix:
    """Return the matrix of all chunks."""
    shape = (len(names), len(names))
    num_seeds = len(details["seeds"])
    per_seed = np.full((num_seeds, *shape), np.nan, np.float32)
    rate = np.full(shape, np.nan, np.float32)
    kept = jax.tree.map(lambda v: np.zeros((*shape, *v.shape[1:]), np.float32), results[0].trigger)
    for chunk in results:
        rows, columns = chunk.directions.T
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
        details={**details, "seconds": sum(chunk.seconds for chunk in results)},
    )


def _mean_of_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


class _ChunkStore:
    """Finished chunks in a folder, each a file that is there whole or not at all."""

    def __init__(self, folder: str | Path | None, settings: dict, inputs):
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            for leaf in jax.tree.leaves(inputs):
                digest.update(np.ascontiguousarray(leaf).data)
            self._digest = digest.hexdigest()

    def _path(self, directions) -> Path:
        named = hashlib.sha256(f"{self._digest} {np.asarray(directions).tolist()}".encode())
        return self._folder / f"{named.hexdigest()[:24]}.npz"

    def load(self, directions) -> _Chunk | None:
        """Return the chunk of these directions, measured with the same inputs; None if absent."""
        if self._folder is None or not self._path(directions).exists():
            return None
        arrays = load_npz(self._path(directions))
        return _Chunk(
            directions=arrays["directions"],
            sizes=arrays["sizes"],
            rates=arrays["rates"],
            trigger=Trigger(arrays["mask"], arrays["pattern"]),
            seconds=float(arrays["seconds"]),
        )

    def save(self, chunk: _Chunk) -> None:
        """Keep a finished chunk."""
        if self._folder is not None:
            fields = chunk._asdict()
            trigger = fields.pop("trigger")
            save_npz(
                self._path(chunk.directions),
                {**fields, "mask": trigger.mask, "pattern": trigger.pattern},
            )
