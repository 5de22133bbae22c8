"""The nearest of many directions, found without measuring all of them.

One universal trigger per target, inverted from images of all other classes together, sends nearly
every class to it. Scaled down until it only just sends one class's images, it is a trigger of that
direction: its size is an upper bound of the class distance. How far the target's logit is below the
largest on the class's own images says how much there is to overcome. Directions where the product
of both is small are near: K inversions say of K(K-1) directions which are worth measuring.

Note: The prior of the warm-up (Section IV-C) does not tell near directions from far ones: nearly
every class's loss falls by nearly all of it. On a CNN of the digits its rank correlation with the
90 measured distances is 0.2, that of the bounds 0.6, of the margins 0.6, of their product 0.76.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.distance.directions import DirectionChoice, choose_directions
from moth_jax.distance.store import Chunk, ChunkStore, Directions
from moth_jax.distance.subject import Subject, check_at_least_one, check_seeds
from moth_jax.distance.universal import ArmImages, universal_triggers
from moth_jax.errors import InputError
from moth_jax.inversion import Budget, NeuralCleanse
from moth_jax.parallel.devices import fetch, replicate
from moth_jax.progress import Progress, as_progress
from moth_jax.triggers import Trigger, stamp
from moth_jax.types import LogitsFn, Variables

# Images [K, n, h, w, c] of each class, and their weights [K, n].
ClassSamples = tuple[np.ndarray, np.ndarray]
_SHARES = np.arange(1, 17, dtype=np.float32) / 16  # of a universal trigger's mask
_IMAGES_TOGETHER = 256  # images of several classes that run in one call
_MASK_WEIGHT, _PATIENCE = 1e-3, 5  # of the universal triggers, as Neural Cleanse scans with


def nearest_directions(
    logits_fn: LogitsFn | Callable[[Array], Array],
    images: np.ndarray,
    labels: np.ndarray,
    num_directions: int,
    *,
    variables: Variables | None = None,
    classes: Sequence[int] | None = None,
    victims: Sequence[int] = (),
    targets: Sequence[int] = (),
    num_images: int = 100,
    num_steps: int = 200,
    minibatch_size: int = 32,
    images_per_class: int = 10,
    success_bound: float = 0.9,
    seed: int = 0,
    check_order: bool = True,
    resume_dir: str | Path | None = None,
    progress: bool | Progress = True,
) -> DirectionChoice:
    """Choose the directions that look nearest by universal triggers and margins, nearest first.

    Args:
      logits_fn, images, labels, variables, classes: as for `distance.distance_matrix`, to which the
        result is given as `directions`.
      num_directions: how many to choose.
      victims, targets: only directions out of these and into those (labels); () for all.
      num_images, num_steps, minibatch_size, seed: of one universal trigger's inversion; its images
        are of all other classes together.
      images_per_class: images of each class that the scaled triggers are tried on.
      success_bound: share of them that has to be sent to the target.
      resume_dir: a folder for finished universal triggers, and how their parts did.
      check_order, progress: as for `distance.distance_matrix`.

    Raises:
      InputError: what is wrong with the model, the images, or the numbers.
    """
    check_at_least_one(
        num_directions=num_directions, num_images=num_images, images_per_class=images_per_class
    )
    check_seeds([seed])
    if not 0 < success_bound <= 1:
        raise InputError(f"success_bound must be in (0, 1], got {success_bound}")
    subject = Subject.of(
        logits_fn,
        images,
        labels,
        variables=variables,
        classes=classes,
        num_images=max(num_images, images_per_class),
        check_order=check_order,
    )
    classes = subject.classes
    candidates = choose_directions(classes, victims=victims, targets=targets)
    if num_directions > len(candidates.directions):
        raise InputError(
            f"num_directions must be in 1..{len(candidates.directions)}, got {num_directions}"
        )
    folder = None if resume_dir is None else Path(resume_dir)
    progress = as_progress(progress)
    found = universal_triggers(
        ArmImages(subject, num_images, seed),
        budget=Budget(num_steps, _MASK_WEIGHT, minibatch_size),
        inversion=NeuralCleanse(patience=_PATIENCE, success_bound=success_bound),
        resume_dir=folder,
        progress=progress,
    )
    samples = _samples(subject, images_per_class)
    bounds = distance_bounds(subject, found, samples, success_bound, folder, progress)
    far = margins(subject, samples, success_bound)
    place = {label: i for i, label in enumerate(classes)}
    pairs = tuple(np.array([[place[k] for k in d] for d in candidates.directions]).T)
    promise = np.where(np.isfinite(bounds), bounds, 0.0) * far
    # The margin alone ranks those whose bound is not known.
    order = np.lexsort((far[pairs], promise[pairs], np.isinf(bounds[pairs])))[:num_directions]
    return DirectionChoice(
        [candidates.directions[i] for i in order], {**candidates.details, "kind": "nearest"}
    )


def distance_bounds(
    subject: Subject,
    found: Chunk,
    samples: ClassSamples,
    success_bound: float,
    folder: Path | None,
    progress: Progress,
) -> np.ndarray:
    """Return [K, K] bounds of the class distances, row victim, column target; inf on the diagonal.

    A bound is the size of the smallest sixteenth part of the target's universal trigger that sends
    the success bound's share of the victim's images to it, and larger parts do too. Where the whole
    does not, it is the size over the share that it does send: a guess, and no bound.

    Args:
      subject: the model.
      found: the universal triggers of its classes.
      samples: on which their parts are tried.
      success_bound: share of the samples that has to be sent to the target.
      folder: for finished targets; None keeps none.
      progress: where it is shown.
    """
    classes = subject.classes
    sizes = found.sizes[:, 0]
    reaching = np.flatnonzero(np.isfinite(sizes))
    store = ChunkStore(
        folder, {"shares": _SHARES.tolist()}, (*samples, found.trigger, subject.model)
    )
    directions = {k: [(victim, classes[k]) for victim in classes] for k in reaching.tolist()}
    done = store.load(list(itertools.chain.from_iterable(directions.values())))
    rates = {classes.index(chunk.directions[0, 1]): chunk.rates for chunk in done}
    inputs = subject.logits_fn, *replicate((subject.variables, *samples))
    with progress.task("shares of universal triggers", total=len(classes), unit="targets") as task:
        task.skip(len(classes) - len(reaching) + len(rates))
        for k in (k for k in directions if k not in rates):
            trigger = jax.tree.map(lambda leaf, k=k: leaf[k], found.trigger)
            rates[k] = fetch(_rates(*inputs, classes[k], trigger)).T
            store.save(_of_shares(directions[k], sizes[k], rates[k]))
            task.advance(1)
    bounds = np.full((len(classes), len(classes)), np.inf, np.float32)
    for k in rates:
        bounds[:, k] = _bound(rates[k].T, sizes[k], success_bound)
    np.fill_diagonal(bounds, np.inf)
    return bounds


def _of_shares(directions: Directions, size: float, rates: np.ndarray) -> Chunk:
    """Return the success `rates` [K, shares] of a target's trigger, which is kept elsewhere."""
    nothing = np.zeros((len(directions), 0, 0, 1), np.float32)
    return Chunk(
        directions=np.asarray(directions),
        sizes=np.broadcast_to(size * _SHARES, rates.shape),
        rates=rates,
        trigger=Trigger(nothing, nothing),
        changed_pixels=np.full(len(directions), np.nan, np.float32),
        seconds=0.0,
    )


def margins(subject: Subject, samples: ClassSamples, share: float) -> np.ndarray:
    """Return [K, K]: how far the target's logit is below the largest, for `share` of the victim's.

    Infinite where the victim has no images.
    """
    images, weights = samples
    predict = jax.jit(subject.logits_fn)
    variables = replicate(subject.variables)
    far = np.full((len(images), len(images)), np.inf, np.float32)
    for row, (own, known) in enumerate(zip(images, weights > 0, strict=True)):
        if known.any():
            logits = fetch(predict(variables, own))[known]
            below = logits.max(1, keepdims=True) - logits[:, list(subject.classes)]
            far[row] = np.quantile(below, share, axis=0)
    return far


def _samples(subject: Subject, images_per_class: int) -> ClassSamples:
    """Return the first images of each class, and their weights."""
    directions = np.array([[victim, -1] for victim in subject.classes])
    return subject.victims_images(images_per_class, directions)


def _bound(rates: np.ndarray, size: float, success_bound: float) -> np.ndarray:
    """Return the bounds [K] of the success rates [shares, K] of a trigger of `size`."""
    # Reached from this share on: a rate that falls again is an accident.
    reached = np.minimum.accumulate(rates[::-1] >= success_bound, axis=0)[::-1]
    share = _SHARES[reached.argmax(0)]
    guess = size / np.maximum(rates[-1], 1e-6)
    return np.where(reached.any(0), size * share, np.where(rates[-1] > 0, guess, np.inf))


@functools.partial(jax.jit, static_argnames=("logits_fn",))
def _rates(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    target: Array,
    trigger: Trigger,
) -> Array:
    """Return the success rates [shares, K] of parts of a trigger on images [K, n, h, w, c]."""

    def of_class(scaled: Trigger, class_images: Array, class_weights: Array) -> Array:
        logits = logits_fn(variables, stamp(class_images, scaled))
        hits = (jnp.argmax(logits, axis=-1) == target) * class_weights
        return hits.sum() / jnp.maximum(class_weights.sum(), 1.0)

    def of_share(share: Array) -> Array:
        scaled = Trigger(share * trigger.mask, trigger.pattern)

        def of_one(each: tuple[Array, Array]) -> Array:
            return of_class(scaled, *each)

        return jax.lax.map(of_one, (images, weights), batch_size=together)

    together = min(len(images), max(1, _IMAGES_TOGETHER // images.shape[1]))
    return jax.lax.map(of_share, jnp.asarray(_SHARES))
