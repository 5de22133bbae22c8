"""Certified class distances: proven lower bounds of every static trigger's size."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.distance.bounds.linear import least_optimum
from moth_jax.distance.bounds.reach import reached_by_images
from moth_jax.distance.bounds.relaxation import affine_form
from moth_jax.distance.bounds.tape import Tape, record
from moth_jax.distance.directions import DirectionChoice
from moth_jax.distance.measure import checked_directions
from moth_jax.distance.store import BoundStore
from moth_jax.distance.subject import Subject, check_at_least_one, unit_images
from moth_jax.errors import InputError
from moth_jax.inversion.candidates import least_rate
from moth_jax.progress import Progress, as_progress
from moth_jax.types import ImageShape, LogitsFn, Variables

VERSION = 1  # of the bounds: finished ones of another version are not taken up
_AGREES = 1e-3  # of the largest logit


def certified_distances(
    logits_fn: LogitsFn | Callable[[Array], Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    variables: Variables | None = None,
    class_names: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    directions: Sequence[tuple[int, int]] | DirectionChoice | None = None,
    num_images: int = 100,
    success_bound: float = 0.9,
    check_order: bool = True,
    resume_dir: str | Path | None = None,
    label: str = "certified distances",
    progress: bool | Progress = True,
) -> np.ndarray:
    """Return proven lower bounds [K, K] of the class distances, in aggregated pixels.

    No static trigger, whatever its mask and pattern, that sends as many of the images to the target
    as `success_bound` asks for is smaller. The images are those that `distance_matrix` measures
    with, for the same arguments. A bound is that of the images one by one: a trigger that sends k
    of them is at least as large as the k-th smallest of their own bounds; an image that is
    predicted as the target needs none. Of a classifier whose logits are affine in the pixels it is
    the optimum for all images together (`bounds.linear.TIME_LIMIT` seconds a direction).

    Args:
      logits_fn, images, labels, variables, class_names, classes, directions, num_images,
        check_order: as in `distance_matrix`.
      success_bound: the share of the images that a trigger has to send.
      resume_dir: a folder for the bounds of finished victim classes, as in `distance_matrix`.
      label, progress: as in `distance_matrix`.

    Returns:
      Row victim, column target; NaN where nothing was asked for, inf where it is proven that there
      is no such trigger. It goes into a matrix by `dataclasses.replace(matrix, lower=...)`.

    Raises:
      InputError: a layer of the model that is not known, by its name, or what `distance_matrix`
        raises.

    Note: what is proven is about the network in exact arithmetic; bounds leave room for the
    rounding of the computation in float32 (`bounds.relaxation`).

    >>> import jax.numpy as jnp, numpy as np
    >>> def brightness(images):                    # two classes: dark and bright
    ...     level = images.mean((1, 2, 3))
    ...     return 20 * jnp.stack([0.5 - level, level - 0.5], axis=1)
    >>> images = np.concatenate([np.full((4, 4, 4, 1), 0.1), np.full((4, 4, 4, 1), 0.9)])
    >>> images, labels = images.astype("float32"), np.repeat([0, 1], 4)
    >>> lower = certified_distances(brightness, images, labels, progress=False)
    >>> print(lower.round(2))                                        # (0.5-0.1) * 16 / (1-0.1)
    [[ nan 7.11]
     [7.11  nan]]
    """
    if not 0 < success_bound <= 1:
        raise InputError(f"success_bound must be in (0, 1], got {success_bound}")
    check_at_least_one(num_images=num_images)
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
    wanted, _ = checked_directions(directions, subject)
    network = certifiable(subject.logits_fn, subject.variables, subject.image_shape)
    _check_agrees(network, subject)
    settings = {
        "certified": VERSION,
        "num_images": int(num_images),
        "success_bound": float(success_bound),
    }
    store = BoundStore(resume_dir, settings, (subject.images, subject.labels, subject.model))
    lower = np.full((len(subject.classes),) * 2, np.nan, np.float32)
    position = {k: place for place, k in enumerate(subject.classes)}
    with as_progress(progress).task(label, total=len(wanted), unit="directions") as task:
        left: dict[int, list[int]] = {}
        for victim, target in dict.fromkeys(wanted):
            left.setdefault(victim, []).append(target)

        def enter(victim: int, bounds: np.ndarray) -> int:
            targets = left.pop(victim)
            lower[position[victim], [position[k] for k in targets]] = bounds
            return len(targets)

        known = {victim: store.load(victim, targets) for victim, targets in left.items()}
        done = [enter(victim, bounds) for victim, bounds in known.items() if bounds is not None]
        if done:
            task.resume(sum(done))
        for victim, targets in list(left.items()):
            bounds = _bounds_of_victim(network, subject, victim, targets, num_images, success_bound)
            store.save(victim, targets, bounds)  # before the progress, which may end the process
            task.advance(enter(victim, bounds), average=float(np.nanmean(lower)))
    return lower


Network = tuple[Tape, list[Array]]


def certifiable(logits_fn: LogitsFn, variables: Variables, image_shape: ImageShape) -> Network:
    """Return the network of a model whose distances can be certified.

    Raises:
      InputError: it has a layer that is not known; the message names it.
    """
    return record(logits_fn, variables, image_shape)


def _check_agrees(network: Network, subject: Subject) -> None:
    """Raise `InputError` unless the network of one image does what the model does with many."""
    tape, constants = network
    images, logits = subject.images[: len(subject.probe_logits)], subject.probe_logits
    for image, expected in zip(jnp.asarray(unit_images(images)), logits, strict=True):
        found = np.asarray(tape.values(image[None], constants)[tape.output][0])
        if np.abs(found - expected).max() > _AGREES * max(1.0, np.abs(expected).max()):
            raise InputError(
                "no certified distances: the model's outputs for an image depend on the other "
                "images of its batch; give the function in inference mode"
            )


def least_hits(num_images: int, success_bound: float) -> int:
    """Return how many images a trigger must send, at least, for its success rate to count.

    >>> least_hits(10, 0.9), least_hits(41, 1.0), least_hits(3, 0.9), least_hits(5, 1e-7)
    (9, 41, 3, 1)
    """
    # A hair below what is asked of a rate, which is rounded itself: fewer hits, a smaller bound.
    return max(1, math.ceil((least_rate(success_bound) - 1e-6) * num_images))


def _bounds_of_victim(
    network: Network,
    subject: Subject,
    victim: int,
    targets: list[int],
    num_images: int,
    success_bound: float,
) -> np.ndarray:
    """Return the bounds [T] of a victim's directions."""
    tape, constants = network
    images, weights = subject.victims_images(num_images, np.array([[victim, targets[0]]]))
    images = images[0][weights[0] > 0]
    predicted = subject.predictions_of(victim)
    needed = least_hits(len(images), success_bound)
    there = predicted[:, None] == np.asarray(targets)
    reached = np.where(there, 0.0, reached_by_images(tape, constants, images, targets, needed))
    bounds = np.sort(reached, 0)[needed - 1]
    if not tape.kinks:
        weights, offsets = (np.asarray(part, np.float64) for part in affine_form(tape, constants))
        optimum = [least_optimum(weights, offsets, images, target, needed) for target in targets]
        bounds = np.maximum(bounds, optimum)
    # Rounded down: float32 has the last word.
    sizes = images.shape[-1] * bounds * (1 - 1e-6)
    return np.asarray(sizes, np.float32)
