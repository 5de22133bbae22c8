"""Many inversions in one call: directions, seeds, both directions of a pair, arms of a scan.

`for_each_run` is the one function that vmaps an inversion. Measuring, hardening and scanning call
it through the functions below, inside their own compiled programs.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moth_jax.inversion.base import Budget, Inversion, InversionResult, Samples, State
from moth_jax.inversion.loop import advance, begin, invert
from moth_jax.parallel.devices import over_samples, over_seeds
from moth_jax.triggers import AnyTrigger
from moth_jax.types import AnyArray, ImageShape, LogitsFn, Variables

Result = TypeVar("Result")


def for_each_run(
    function: Callable[..., Result],
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    *runs,
) -> Result:
    """Return `function(logits_fn, variables, samples, *run)` of D directions with S runs each.

    Where there are more devices than runs, the samples of each are cut among several devices.

    Args:
      function: a part of an inversion (`inversion.loop`), of one direction.
      logits_fn, variables: the model.
      samples: [D, ...].
      runs: further arguments, trees of arrays [D, S, ...].

    Returns:
      The results [D, S, ...].
    """
    num_runs = len(samples.target) * jax.tree.leaves(runs)[0].shape[1]
    model = over_samples(logits_fn, num_runs), variables

    def one(samples: Samples, run: tuple) -> Result:
        return function(*model, samples, *run)

    return over_seeds(one)(samples, runs)


def invert_directions(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    start: AnyTrigger,
    keys: Array,
    *,
    budget: Budget,
    inversion: Inversion,
) -> InversionResult:
    """Invert D directions from one start each: samples [D, ...], start and keys [D, ...] -> [D]."""
    function = functools.partial(invert, budget=budget, inversion=inversion)
    runs = jax.tree.map(lambda leaf: leaf[:, None], (start, keys))
    result = for_each_run(function, logits_fn, variables, samples, *runs)
    return jax.tree.map(lambda leaf: leaf[:, 0], result)


@functools.partial(jax.jit, static_argnames=("logits_fn", "inversion"))
def invert_with_seeds(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    victims: Array,
    seeds: Array,
    *,
    budget: Budget,
    inversion: Inversion,
) -> InversionResult:
    """Invert D directions with S seeds each: samples [D, ...], victims [D], seeds [S] -> [D, S]."""

    def one(logits_fn, variables, samples: Samples, run: tuple[Array, Array]) -> InversionResult:
        start_key, key = run_keys(*run, samples.target)
        start = inversion.start(start_key, samples.image_shape)
        model = logits_fn, variables, samples
        return invert(*model, start, key, budget=budget, inversion=inversion)

    runs = jnp.tile(seeds, (len(victims), 1)), jnp.tile(victims[:, None], (1, len(seeds)))
    return for_each_run(one, logits_fn, variables, samples, runs)


@functools.partial(jax.jit, static_argnames=("logits_fn", "inversion"))
def begin_directions(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    victims: Array,
    seed: Array,
    *,
    mask_weight: Array,
    inversion: Inversion,
) -> State:
    """Return the states [D] of D directions before their first step, of inversions in parts."""

    def one(logits_fn, variables, samples: Samples, victim: Array) -> State:
        start_key, key = run_keys(seed, victim, samples.target)
        return begin(
            logits_fn,
            variables,
            samples,
            inversion.start(start_key, samples.image_shape),
            jax.random.split(key)[0],
            mask_weight=mask_weight,
            inversion=inversion,
        )

    states = for_each_run(one, logits_fn, variables, samples, victims[:, None])
    return jax.tree.map(lambda leaf: leaf[:, 0], states)


@functools.partial(jax.jit, static_argnames=("logits_fn", "inversion"))
def advance_directions(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    victims: Array,
    seed: Array,
    progress: tuple[State, Array],
    *,
    budget: Budget,
    inversion: Inversion,
) -> State:
    """Return the states [D] one part of the budget later.

    `progress` are the states [D] and how many steps [D] each has had. The keys are those of one
    long inversion.
    """

    def one(logits_fn, variables, samples: Samples, victim, state: State, first: Array) -> State:
        _, key = run_keys(seed, victim, samples.target)
        model = logits_fn, variables, samples
        key = jax.random.split(key)[1]
        return advance(*model, state, key, first, budget=budget, inversion=inversion)

    runs = jax.tree.map(lambda leaf: leaf[:, None], (victims, *progress))
    states = for_each_run(one, logits_fn, variables, samples, *runs)
    return jax.tree.map(lambda leaf: leaf[:, 0], states)


def run_keys(seed: Array, victim: Array, target: AnyArray) -> tuple[Array, Array]:
    """Return the keys of a direction's start, and of its inversion.

    They are named by seed and classes, not by position: a direction's number does not depend on
    which others are measured with it.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), victim), target)
    start_key, key = jax.random.split(key)
    return start_key, key


@functools.partial(jax.jit, static_argnames=("count", "image_shape", "inversion"))
def start_triggers(
    key: Array, count: int, image_shape: ImageShape, inversion: Inversion
) -> AnyTrigger:
    """Return `count` triggers [count, ...] that inversions by this method start from."""
    return jax.vmap(lambda k: inversion.start(k, image_shape))(jax.random.split(key, count))
