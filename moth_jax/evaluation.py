"""What a classifier gets right: accuracy, and robustness under PGD (Section V-A)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moth_jax.data.dataset import ImageSplit, as_split
from moth_jax.errors import InputError
from moth_jax.options import AT_LEAST_1, POSITIVE, SHARE, option
from moth_jax.outputs import Rows, check_finite, check_rows, rows_of
from moth_jax.parallel.devices import fetch, read_batch, read_batches, replicate, spread
from moth_jax.progress import Progress, as_progress
from moth_jax.types import LogitsFn, Variables

_MOST_SEARCHED = 5_000  # images, for the cause of a loss that is not finite


# Libraries whose models are no functions of JAX, and what is to be done with them.
FOREIGN = {
    "torch": "turn the PyTorch model into one with moth_jax.models.from_torch",
    "tensorflow": "write the TensorFlow model in JAX, or bring it over by PyTorch",
    "keras": "use a Keras model with the JAX backend through moth_jax.models.from_function",
}


def check_function(logits_fn: object) -> None:
    """Raise `InputError` saying what to give if this is no function of JAX."""
    owner = getattr(logits_fn, "__self__", getattr(logits_fn, "func", logits_fn))
    kinds = {kind.__module__.partition(".")[0] for kind in type(owner).__mro__}
    if callable(logits_fn) and "torch" not in kinds:
        return
    remedy = FOREIGN["torch"] if "torch" in kinds else "give its function"
    if hasattr(logits_fn, "predict") and not callable(logits_fn):
        remedy = "give its predict, and its variables as `variables`"
    raise InputError(f"logits_fn must be a JAX function, got a {type(owner).__name__}; {remedy}")


@functools.partial(jax.jit, static_argnames="logits_fn")
def _rows(logits_fn: LogitsFn, variables: Variables, images: Array) -> Rows:
    return rows_of(logits_fn(variables, images))


def predictions(
    logits_fn: LogitsFn,
    variables: Variables,
    split,
    *,
    batch_size: int = 256,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Return the predicted class [n] of every image of an `ImageSplit`, or of (images, labels).

    `transform`, such as the stamp of a backdoor, is applied to the images [m, h, w, c] first.

    Raises:
      InputError: the outputs for an image are not finite, or those of all images are no logits.
    """
    check_function(logits_fn)
    split = as_split(split)
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
    parts = [fetch(_rows(logits_fn, variables, images)) for images in batches]
    rows = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(split)], *parts)

    def rows_of_images(images: np.ndarray) -> Rows:
        return fetch(_rows(logits_fn, variables, replicate(images)))

    check_rows(rows, rows_of_images, split.image_shape)
    return rows.predicted


def accuracy(logits_fn: LogitsFn, variables: Variables, split, *, batch_size: int = 256) -> float:
    """Return the share of an `ImageSplit` that is classified as labelled, in [0, 1]."""
    split = as_split(split)
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
    split = as_split(split)
    predictions(logits_fn, variables, _first(split, batch_size), batch_size=batch_size)
    attack = jax.jit(functools.partial(pgd, logits_fn, adversary=adversary))
    hits, total, is_finite = 0, len(split), []
    variables = replicate(variables)
    with as_progress(progress).task(label, total=total, unit="images") as task:
        for first in range(0, total, batch_size):
            indices = np.arange(first, first + batch_size) % total
            labels = split.labels[indices]
            key = jax.random.fold_in(jax.random.key(seed), first)
            perturbed = attack(variables, read_batch(split, indices), labels, key)
            rows = fetch(_rows(logits_fn, variables, perturbed))
            is_finite.append(rows.is_finite[: total - first])
            hits += int((rows.predicted == labels)[: total - first].sum())
            done = min(first + batch_size, total)
            task.advance(done - first, robust=hits / done)
    check_finite(np.concatenate(is_finite), "perturbed images")
    return hits / total


def check_loss(
    loss: float, where: str, logits_fn: LogitsFn, variables: Variables, split: ImageSplit
) -> None:
    """Raise `InputError` if a training loss is not finite, and say which images made it so.

    Args:
      loss: of a step.
      where: which step that is.
      logits_fn, variables: the model when it was last known to work.
      split: the images that it is trained on. The first 5,000 are looked at.
    """
    if np.isfinite(loss):
        return
    try:
        predictions(logits_fn, variables, _first(split, _MOST_SEARCHED))
    except InputError as error:
        raise InputError(f"the loss is {loss} at {where}: {error}") from error
    raise InputError(
        f"the loss is {loss} at {where}, and the model's outputs for the images were finite "
        "before: the training diverged; lower its learning_rate, or give batch_norm 'frozen'"
    )


def _first(split: ImageSplit, count: int) -> ImageSplit:
    return split if len(split) <= count else split.subset(np.arange(count))
