"""Many inversions in one call."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moth_jax.inversion import (
    Inversion,
    InversionResult,
    LogitsFn,
    Variables,
    advance,
    begin,
    invert,
)
from moth_jax.parallel.devices import (
    over_directions,
    over_samples,
    over_seeds,
)
from moth_jax.triggers import Trigger, random_trigger


def invert_directions(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    targets: Array,
    start: Trigger,
    keys: Array,
    *,
    num_steps: Array,
    mask_weight: Array,
    minibatch_size: int,
    inversion: Inversion,
    done: Array | int = 0,
) -> InversionResult:
    """Invert D directions together: images [D, n, h, w, c], weights [D, n], the rest [D, ...].

    Where there are more devices than directions, each direction's samples are cut among several.
    """
    logits_fn = over_samples(logits_fn, len(targets))

    def one(images, weights, target, start, key):
        return invert(
            logits_fn,
            variables,
            images,
            weights,
            target,
            start,
            key,
            num_steps=num_steps,
            mask_weight=mask_weight,
            minibatch_size=minibatch_size,
            inversion=inversion,
            done=done,
        )

    return over_directions(one)(images, weights, targets, start, keys)


@functools.partial(jax.jit, static_argnames=("count", "image_shape", "start"))
def random_triggers(
    key: Array,
    count: int,
    image_shape: tuple[int, int, int],
    start: Callable[[Array, tuple[int, int, int]], Trigger] = random_trigger,
) -> Trigger:
    """Return a batch of `count` random triggers; `start` is that of an `Inversion`."""
    return jax.vmap(lambda k: start(k, image_shape))(jax.random.split(key, count))


def direction_key(seed: Array, victim: Array, target: Array) -> Array:
    """Return the key of a direction.

    Named by seed and classes, not by position: a direction's number does not depend on which others
    are measured with it.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), victim), target)


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
    seeds = jnp.tile(seeds, (len(images), 1))
    logits_fn = over_samples(logits_fn, seeds.size)

    def one(images, weights, victim, target, seed) -> InversionResult:
        start_key, key = jax.random.split(direction_key(seed, victim, target))
        return invert(
            logits_fn,
            variables,
            images,
            weights,
            target,
            inversion.start(start_key, images.shape[1:]),
            key,
            num_steps=num_steps,
            mask_weight=mask_weight,
            minibatch_size=minibatch_size,
            inversion=inversion,
        )

    return over_seeds(one)(images, weights, victims, targets, seeds)


@functools.partial(jax.jit, static_argnames=("logits_fn", "inversion"))
def _begin(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    victims: Array,
    targets: Array,
    seed: Array,
    *,
    mask_weight: Array,
    inversion: Inversion,
):
    """Return the states of D arms before their first step: images [D, n, h, w, c]."""

    def one(images, weights, victim, target):
        start_key, key = jax.random.split(direction_key(seed, victim, target))
        return begin(
            logits_fn,
            variables,
            images,
            weights,
            target,
            random_trigger(start_key, images.shape[1:]),
            jax.random.split(key)[0],
            mask_weight=mask_weight,
            inversion=inversion,
        )

    return jax.vmap(one)(images, weights, victims, targets)


@functools.partial(jax.jit, static_argnames=("logits_fn", "minibatch_size", "inversion"))
def _advance(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    victims: Array,
    targets: Array,
    seed: Array,
    states,
    first: Array,
    *,
    num_steps: Array,
    minibatch_size: int,
    inversion: Inversion,
):
    """Return the states of D arms `num_steps` later, the keys being those of one long inversion."""

    def one(images, weights, victim, target, state, first):
        _, key = jax.random.split(direction_key(seed, victim, target))
        return advance(
            logits_fn,
            variables,
            images,
            weights,
            target,
            state,
            jax.random.split(key)[1],
            first,
            num_steps=num_steps,
            minibatch_size=minibatch_size,
            inversion=inversion,
        )

    return jax.vmap(one)(images, weights, victims, targets, states, first)
