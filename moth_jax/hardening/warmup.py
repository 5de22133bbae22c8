"""The warm-up: one universal trigger per target class, and the prior of every pair (Section IV-C).

A universal trigger sends samples of every other class to the target. The prior of a direction is
how far that trigger lowers the loss of its victim, and later inversions of the direction start from
it. Without the approximation (Table III) every direction is inverted by itself. Universal triggers
then count only where they are unusually small, if at all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.anomaly import anomaly_indices
from moth_jax.data.dataset import ImageSplit
from moth_jax.inversion import (
    Budget,
    Inversion,
    InversionResult,
    Samples,
    invert_directions,
    start_triggers,
)
from moth_jax.parallel.devices import constrain_replicated
from moth_jax.triggers import Trigger
from moth_jax.types import LogitsFn, Variables

# The anomaly index above which a target looks like that of a universal backdoor. Neural Cleanse
# takes 2. By chance one of 43 clean targets is above 2, and one of 740 above 3.
UNUSUAL = 3.0


class WarmUpSamples(NamedTuple):
    """Samples of every class but the target.

    Attributes:
      images: [K - 1, n, h, w, c] in [0, 1].
      weights: [K - 1, n], 0 where a class has fewer than n samples.
      victims: [K - 1], their labels.
    """

    images: np.ndarray
    weights: np.ndarray
    victims: np.ndarray


class WarmUpResult(NamedTuple):
    """Triggers towards one target.

    Attributes:
      trigger: [T, ...]: one universal trigger (T = 1), or one for each victim (T = K - 1).
      sizes: [K - 1], size of each victim's trigger; inf where none was found.
      prior: [K - 1], mean relative fall of each victim's loss; 0 where none was found.
    """

    trigger: Trigger
    sizes: Array
    prior: Array


def draw_samples(
    split: ImageSplit,
    class_indices: list[np.ndarray],
    target: int,
    per_class: int,
    rng: np.random.Generator,
    *,
    classes: Sequence[int] | None = None,
) -> WarmUpSamples:
    """Draw up to `per_class` samples of every class but `target`.

    Args:
      split: where they are drawn from.
      class_indices: of the samples of each label.
      target: a label.
      per_class: samples of each class.
      rng: randomness.
      classes: labels that are drawn from; all if None.
    """
    classes = range(len(class_indices)) if classes is None else classes
    victims = np.asarray([k for k in classes if k != target])
    images, weights = [], np.zeros((len(victims), per_class), np.float32)
    for row, victim in enumerate(victims):
        members = class_indices[victim]
        chosen = rng.permutation(members)[:per_class]
        weights[row, : len(chosen)] = 1
        images.append(split.batch(np.resize(chosen, per_class)))
    return WarmUpSamples(np.stack(images), weights, victims)


def invert_towards(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: WarmUpSamples,
    target: Array | int,
    key: Array,
    *,
    budget: Budget,
    inversion: Inversion,
    universal: bool,
    start: Trigger | None = None,
) -> WarmUpResult:
    """Invert one universal trigger towards `target`, or one for each victim; measure the prior.

    They start from `start` [T, ...], or from random triggers if it is None.

    Note: Every target starts from a fresh random trigger; the published code starts all targets
      after the first from class 0's.
    """
    num_victims, per_class = samples.weights.shape
    image_shape = samples.images.shape[2:]
    count = 1 if universal else num_victims
    grouped = (count, num_victims * per_class // count)
    start_key, key = jax.random.split(key)
    weights = jnp.asarray(samples.weights)
    result = invert_directions(
        logits_fn,
        variables,
        Samples(
            jnp.asarray(samples.images).reshape(*grouped, *image_shape),
            weights.reshape(grouped),
            jnp.full(count, target),
        ),
        start_triggers(start_key, count, image_shape, inversion) if start is None else start,
        jax.random.split(key, count),
        budget=budget,
        inversion=inversion,
    )
    found = WarmUpResult(
        trigger=result.trigger,
        sizes=jnp.broadcast_to(result.size, num_victims),
        prior=loss_fall(result, weights),
    )
    return constrain_replicated(found)


def loss_fall(result: InversionResult, weights: Array) -> Array:
    """Return the prior [K - 1]: each victim's mean of (loss before - loss after) / loss before.

    Note: The ratio of a sample is kept within [-1, 1], so that a sample whose loss is near 0 from
      the beginning does not decide the mean of its class. A failed inversion has equal losses
      before and after, and so gives 0. The published PyTorch code gives 1 everywhere.
    """
    before = result.losses_before.reshape(weights.shape)
    after = result.losses_after.reshape(weights.shape)
    ratio = jnp.clip((before - after) / jnp.maximum(before, 1e-6), -1.0, 1.0)
    return jnp.sum(ratio * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)


def unusual_universals(own: np.ndarray, universal: np.ndarray) -> np.ndarray:
    """Return [K, K] bool, row victim: directions that the target's universal trigger stands for.

    It stands for a direction if it is unusually small among the universal ones, by Neural Cleanse's
    anomaly index (above 3), and smaller than the direction's own trigger.

    Args:
      own: [K, K] sizes of the directions' own triggers; inf where none was found.
      universal: [K] sizes of the targets' universal ones; inf where none was found.

    Note: An extension. The samples of one class are too few to show a backdoor of all victims: its
      inversion stops at a natural trigger. The samples of all classes together show it, but not a
      backdoor of a single victim. If every smaller universal trigger counted, it would change the
      usual size of a victim, by which the backdoor of a single victim stands out
      (`scheduler.pair_ranks`).
    """
    unusual = anomaly_indices(universal) > UNUSUAL  # an undefined index (NaN) is not unusual
    shared = unusual[None, :] & (universal[None, :] < own)
    return shared & ~np.eye(len(own), dtype=bool)
