"""What a classifier gets right: accuracy, and robustness under PGD (Section V-A)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moth_jax.options import AT_LEAST_1, POSITIVE, SHARE, option
from moth_jax.parallel.devices import fetch, read_batch, read_batches, replicate, spread
from moth_jax.progress import Progress, as_progress
from moth_jax.types import LogitsFn, Variables


@functools.partial(jax.jit, static_argnames="logits_fn")
def _predicted(logits_fn: LogitsFn, variables: Variables, images: Array) -> Array:
    return jnp.argmax(logits_fn(variables, images), axis=-1)


def predictions(
    logits_fn: LogitsFn,
    variables: Variables,
    split,
    *,
    batch_size: int = 256,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return the predicted class [n] of every image of an `ImageSplit`.

    `transform`, such as the stamp of a backdoor, is applied to the images [m, h, w, c] first.
    """
    # The last batch is filled up with repeats, so that one compilation serves all.
    order = [
        np.arange(first, first + batch_size) % len(split)
        for first in range(0, len(split), batch_size)
    ]
    if transform is None:
        batches = read_batches(split, order)
    else:
        batches = map(spread, map(transform, split.batches(order)))
    variables = replicate(variables)
    # One after the other: batches that wait on the device would fill it.
    predicted = [fetch(_predicted(logits_fn, variables, images)) for images in batches]
    return np.concatenate(predicted)[: len(split)]


def accuracy(logits_fn: LogitsFn, variables: Variables, split, *, batch_size: int = 256) -> float:
    """Return the share of an `ImageSplit` that is classified as labelled, in [0, 1]."""
    predicted = predictions(logits_fn, variables, split, batch_size=batch_size)
    return float(np.mean(predicted == split.labels))


@dataclasses.dataclass(frozen=True)
class Adversary:
    """PGD, in units of pixels in [0, 1].

    Attributes:
      epsilon: the largest change of a pixel, such as 8/255; 0 for no adversary.
      step_size: of a step along the gradient's sign, such as 2/255.
      num_steps: how many steps.
    """

    epsilon: float = option(0.0, SHARE)
    step_size: float = option(2 / 255, POSITIVE)
    num_steps: int = option(7, AT_LEAST_1)


def pgd(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    labels: Array,
    key: Array,
    *,
    adversary: Adversary,
) -> Array:
    """Return `images` moved within ±epsilon and [0, 1] to raise their loss; random start.

    `images` are [n, h, w, c] in [0, 1], `labels` [n].
    """
    epsilon = adversary.epsilon

    def loss(perturbed: Array) -> Array:
        logits = logits_fn(variables, perturbed)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    def step(_: int, perturbed: Array) -> Array:
        moved = perturbed + adversary.step_size * jnp.sign(jax.grad(loss)(perturbed))
        return jnp.clip(jnp.clip(moved, images - epsilon, images + epsilon), 0.0, 1.0)

    noise = jax.random.uniform(key, images.shape, minval=-epsilon, maxval=epsilon)
    return jax.lax.fori_loop(0, adversary.num_steps, step, jnp.clip(images + noise, 0.0, 1.0))


def pgd_accuracy(
    logits_fn: LogitsFn,
    variables: Variables,
    split,
    *,
    adversary: Adversary,
    seed: int = 0,
    batch_size: int = 256,
    label: str = "robustness",
    progress: bool | Progress = False,
) -> float:
    """Return the share of an `ImageSplit` still classified as labelled after PGD, in [0, 1].

    `label` is what `progress` (as in `distance.distance_matrix`) calls it.

    Note: The published code measures the same first batch ten times; this goes through the split.
    """
    attack = jax.jit(functools.partial(pgd, logits_fn, adversary=adversary))
    hits, total = 0, len(split)
    variables = replicate(variables)
    with as_progress(progress).task(label, total=total, unit="images") as task:
        for first in range(0, total, batch_size):
            indices = np.arange(first, first + batch_size) % total
            labels = split.labels[indices]
            key = jax.random.fold_in(jax.random.key(seed), first)
            perturbed = attack(variables, read_batch(split, indices), labels, key)
            right = fetch(_predicted(logits_fn, variables, perturbed)) == labels
            hits += int(right[: total - first].sum())
            done = min(first + batch_size, total)
            task.advance(done - first, robust=hits / done)
    return hits / total
