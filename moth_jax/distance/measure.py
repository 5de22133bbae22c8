"""The measurement of class distances (Definition III.2)."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.data.conversion import as_images
from moth_jax.distance.chunks import Measurement, assemble, chunk_size, measure_all
from moth_jax.distance.directions import DirectionChoice
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.distance.store import ChunkStore
from moth_jax.distance.subject import (
    Subject,
    check_at_least_one,
    check_seeds,
    predict,
    probe_logits,
    unit_images,
    with_variables,
)
from moth_jax.errors import InputError, listed
from moth_jax.inversion import (
    DEFAULT,
    Budget,
    InversionResult,
    Samples,
    Search,
    Standard,
    create_search,
    invert,
    standard,
)
from moth_jax.inversion.candidates import least_rate
from moth_jax.options import NOT_NEGATIVE, check_option
from moth_jax.parallel.devices import over_samples
from moth_jax.progress import Progress, as_progress
from moth_jax.typed import shown
from moth_jax.types import LogitsFn, Variables


def distance_matrix(
    logits_fn: LogitsFn | Callable[[Array], Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    variables: Variables | None = None,
    class_names: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    directions: Sequence[tuple[int, int]] | DirectionChoice | None = None,
    num_images: int = 100,
    num_steps: int | None = None,
    minibatch_size: int | None = None,
    mask_weight: float | None = None,
    seeds: Sequence[int] = (0,),
    inversion: Search | str | None = None,
    check_order: bool = True,
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
      class_names: K names, or those of the chosen classes; "0", "1", ... if not given.
      classes: the label numbers of the classes to measure among, in the order of the matrix; all K
        if not given. A trigger still has to send its victims to the target among all K.
      directions: (victim, target) label numbers to measure, or a choice of them, by
        `choose_directions` or `nearest.nearest_directions`; all between `classes` if not given.
      num_images: how many images of each victim class are used, its first ones.
      num_steps, minibatch_size, mask_weight: budget of an inversion (`inversion.invert`); that
        which the method was made for (`inversion.Budget`) if not given.
      seeds: one inversion per seed and direction; the smallest trigger counts. The published
        matrices are the smallest of three.
      inversion: the search, or its name (`inversion.create_search`); `inversion.Trimmed()` if not
        given. `inversion.Standard()` is slower and tighter, and takes no budget.
        The published one is `inversion.NeuralCleanse()`.
      check_order: refuse labels that are in another order than the model's outputs, as its
        predictions show.
      directions_per_chunk: how many directions run in one compiled call; as many as are fast and
        fit in memory if not given. Where memory runs out it is halved, with a warning.
      resume_dir: a folder for finished chunks; a measurement that was interrupted and is called
        again with the same arguments goes on from there.
      label: what the progress bar says.
      progress: a progress bar (True), nothing (False), or a `Progress`.

    Returns:
      The matrix over `classes`. The same seeds give the same numbers for any `classes` and
      `directions`; chunks of other sizes change them only by floating-point rounding.

    Raises:
      InputError: what is wrong with the images, labels, directions or the model's output.

    >>> import jax.numpy as jnp, numpy as np
    >>> def brightness(images):                    # two classes: dark and bright
    ...     level = images.mean((1, 2, 3))
    ...     return 20 * jnp.stack([0.5 - level, level - 0.5], axis=1)
    >>> images = np.concatenate([np.full((4, 4, 4, 1), 0.1), np.full((4, 4, 4, 1), 0.9)])
    >>> images, labels = images.astype("float32"), np.repeat([0, 1], 4)
    >>> matrix = distance_matrix(brightness, images, labels, num_steps=400, progress=False)
    >>> matrix.num_failures(), bool(7.1 < matrix.values[0, 1] < 7.5)   # (0.5-0.1) * 16 / (1-0.1)
    (0, True)
    """
    inversion = _method(inversion)
    budget = budget_of(inversion, num_steps, minibatch_size, mask_weight)
    check_seeds(seeds)
    seeds = [int(seed) for seed in seeds]
    _check_counts(num_images, directions_per_chunk)
    subject = Subject.of(
        logits_fn,
        images,
        labels,
        variables=variables,
        class_names=class_names,
        classes=classes,
        num_images=num_images,
        check_order=check_order,
    )
    wanted, selection = checked_directions(directions, subject)
    draw = functools.partial(subject.victims_images, num_images)
    measurement = Measurement.of(subject, draw, seeds, budget, inversion)
    details = {"num_images": int(num_images), **measurement.settings()}
    store = ChunkStore(resume_dir, details, (subject.images, subject.labels, subject.model))
    size = chunk_size(directions_per_chunk, len(wanted), measurement.num_runs())
    with as_progress(progress).task(label, total=len(wanted), unit="directions") as task:
        fit = directions_per_chunk is None
        measured = measure_all(measurement, wanted, size, store, task, fit=fit)
    details["success_bound"] = _success_bound(inversion)
    victims = {victim for victim, _ in wanted}
    details["images"] = [
        subject.digest(k, num_images) if k in victims else None for k in subject.classes
    ]
    if selection:
        details["selection"] = selection
    if subject.classes != tuple(range(subject.num_classes)):
        details["classes"] = list(subject.classes)
    matrix = assemble(measured, subject, details, by_search=isinstance(inversion, Standard))
    _warn_of_those_there(matrix)
    return matrix


def _success_bound(inversion: Search) -> float:
    return getattr(inversion, "success_bound", 1.0)


def _warn_of_those_there(matrix: DistanceMatrix) -> None:
    """Warn of directions whose distance is 0 because the model takes the victims for the target."""
    names = matrix.class_names
    there = [f"{names[a]!r} as {names[b]!r}" for a, b in np.argwhere(matrix.is_there())]
    if there:
        warnings.warn(
            f"images of {listed(there, str)} are predicted without a trigger: the distance is 0 "
            "there because the model is wrong (or the labels are), which is no sign of a backdoor",
            stacklevel=3,
        )


def _method(inversion: Search | str | None) -> Search:
    if isinstance(inversion, Search):
        return inversion
    return create_search(DEFAULT if inversion is None else inversion)


def budget_of(
    inversion: Search,
    num_steps: int | None,
    minibatch_size: int | None,
    mask_weight: float | None,
) -> Budget | None:
    """Return the budget that was asked for, checked; the method's own where nothing was."""
    own = inversion.budget
    if own is None:
        given = {"num_steps": num_steps, "minibatch_size": minibatch_size}
        given = [k for k, v in {**given, "mask_weight": mask_weight}.items() if v is not None]
        if given:
            raise InputError(
                f"the inversion {inversion.method!r} has a budget of its own and takes no "
                f"{given[0]}; leave it out, or choose another inversion, such as 'trimmed'"
            )
        return None
    # Python's numbers, which a file can hold.
    steps: Any = own.num_steps if num_steps is None else num_steps
    size = own.minibatch_size if minibatch_size is None else minibatch_size
    weight = own.mask_weight if mask_weight is None else mask_weight
    check_at_least_one(num_steps=steps, minibatch_size=size)
    check_option("mask_weight", weight, float, NOT_NEGATIVE)
    return Budget(int(steps), float(weight), int(size))


def _check_counts(num_images: int, directions_per_chunk: int | None) -> None:
    counts = {"num_images": num_images}
    if directions_per_chunk is not None:
        counts["directions_per_chunk"] = directions_per_chunk
    check_at_least_one(**counts)


def checked_directions(
    directions: Sequence[tuple[int, int]] | DirectionChoice | None, subject: Subject
) -> tuple[list[tuple[int, int]], dict]:
    """Return the directions to measure, pairs of label numbers, and how they were chosen.

    Every victim must have an image.
    """
    classes, selection = subject.classes, {}
    if isinstance(directions, DirectionChoice):
        directions, selection = directions
    elif directions is None:
        directions = [(a, b) for a in classes for b in classes if a != b]
    pairs = np.asarray(directions)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise InputError(
            "directions must name at least one (victim, target), as pairs of label numbers, got "
            f"{shown(directions)}"
        )
    directions = [(int(a), int(b)) for a, b in pairs]
    for a, b in directions:
        if a == b or a not in classes or b not in classes:
            few = len(classes) < subject.num_classes
            choices = listed(classes) if few else f"0..{subject.num_classes - 1}"
            raise InputError(f"direction ({a}, {b}) needs two different classes in {choices}")
    empty = {a for a, _ in directions} - set(np.unique(subject.labels).tolist())
    if empty:
        missing = [name for k, name in zip(classes, subject.names, strict=True) if k in empty]
        raise InputError(
            f"no images of {len(empty)} victim classes: {', '.join(missing)}; add images or leave "
            "these directions out"
        )
    return directions, selection


def class_distance(
    logits_fn: LogitsFn | Callable[[Array], Array],
    images: np.ndarray,
    target: int,
    *,
    variables: Variables | None = None,
    num_steps: int | None = None,
    minibatch_size: int | None = None,
    mask_weight: float | None = None,
    seed: int = 0,
    inversion: Search | str | None = None,
) -> InversionResult:
    """Return the smallest verified trigger that sends `images` to `target`.

    Args are those of `distance_matrix`; `images` [n, h, w, c] are the victims' (of one class for a
    class distance, of all others for a universal trigger). Give `variables` where several are
    measured: a function that holds its weights itself is compiled anew by every call.

    Raises:
      InputError: what is wrong with the images, the target, the budget or the model's output.

    Warns where the images are predicted as the target already.
    """
    call = with_variables(logits_fn, variables)
    images = as_images(images)
    num_classes = probe_logits(call, variables, images).shape[1]
    inversion = _method(inversion)
    budget = budget_of(inversion, num_steps, minibatch_size, mask_weight)
    check_option("target", target, int)
    if not 0 <= target < num_classes:
        raise InputError(f"target must be in 0..{num_classes - 1}, got {target}")
    there = float(np.mean(predict(call, variables, images) == target))
    if there >= least_rate(_success_bound(inversion)):
        warnings.warn(
            f"{100 * there:.0f} % of the images are predicted as {target} without a trigger, so "
            "their distance is 0; are they images of another class?",
            stacklevel=2,
        )
    check_seeds([seed])
    samples = Samples(unit_images(images), jnp.ones(len(images)), jnp.asarray(target, jnp.int32))
    if isinstance(inversion, Standard):
        return standard.search_one(over_samples(call), variables, samples, seed, inversion)
    start_key, key = jax.random.split(jax.random.key(seed))
    start = inversion.start(start_key, images.shape[1:])
    return _invert_one(
        over_samples(call), variables, samples, start, key, budget=budget, inversion=inversion
    )


_invert_one = jax.jit(invert, static_argnames=("logits_fn", "inversion"))
