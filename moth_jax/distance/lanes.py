"""Directions in lanes: one that has settled makes room for the next, so that none waits for others.

All lanes advance together, a part of the budget in each compiled call. Between two calls settled
directions leave and waiting ones take their lanes; where none waits any more, and half of the lanes
are empty, the rest move together into half as many. A direction's number is what it would be alone.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.distance.store import Chunk, Directions
from moth_jax.errors import InputError
from moth_jax.inversion import Inversion, InversionResult, advance, begin
from moth_jax.inversion.base import State
from moth_jax.inversion.directions import direction_key
from moth_jax.parallel.devices import (
    constrain_spread,
    fetch,
    over_samples,
    over_seeds,
    replicate,
    spread,
)
from moth_jax.parallel.memory import smaller
from moth_jax.types import LogitsFn, Variables

_VERIFICATIONS = 5  # about so many in each part

Inputs = Callable[[Directions, int], tuple]


def measure_in_lanes(
    logits_fn: LogitsFn,
    inputs: Inputs,
    directions: Directions,
    size: int,
    *,
    num_steps: int,
    mask_weight: float,
    minibatch_size: int,
    inversion: Inversion,
) -> Iterator[Chunk]:
    """Yield the directions' results, those that end together in one chunk.

    Args:
      logits_fn: (variables, images) -> logits.
      inputs: (directions, size) -> variables, images, weights, victims, targets and seeds of so
        many lanes, on the devices.
      directions: (victim, target) label numbers.
      size: how many lanes.
      num_steps, mask_weight, minibatch_size, inversion: as in `inversion.invert`; the inversion has
        a `settled`.

    Raises:
      InputError: `num_steps` is no multiple of the inversion's `verify_every`: lanes that began at
        different times would be verified at different steps.
    """
    part = steps_of_a_part(num_steps, inversion.verify_every)
    waiting, lanes = deque(directions), [None] * size
    done, running = np.zeros(size, np.int32), None
    started = time.perf_counter()
    while waiting or any(lanes):
        fresh = np.zeros(len(lanes), bool)
        for i, lane in enumerate(lanes):
            if lane is None and waiting:
                lanes[i], fresh[i] = waiting.popleft(), True
        if fresh.any():
            # An empty lane has what some direction has; nobody asks what it finds.
            filled = [directions[0] if lane is None else lane for lane in lanes]
            variables, *samples, seeds = inputs(filled, len(lanes))
            begun = _begin_lanes(
                logits_fn,
                variables,
                *samples,
                seeds,
                mask_weight=mask_weight,
                inversion=inversion,
            )
            running = begun if running is None else _renewed(running, spread(fresh), begun)
        images, weights, _, targets = samples
        state, settled = _advance_lanes(
            logits_fn,
            variables,
            images,
            weights,
            targets,
            running,
            spread(done),
            num_steps=part,
            total=num_steps,
            minibatch_size=minibatch_size,
            inversion=inversion,
        )
        running, done = (state, running[1]), done + part
        ended = fetch(settled).all(1) | (done >= num_steps)
        leaving = [i for i, lane in enumerate(lanes) if lane is not None and ended[i]]
        if leaving:
            seconds, started = time.perf_counter() - started, time.perf_counter()
            chosen = [lanes[i] for i in leaving]
            yield _chunk(chosen, np.asarray(leaving), inversion.result(state), seconds)
        lanes = [None if ended[i] else lane for i, lane in enumerate(lanes)]
        done = np.where([lane is None for lane in lanes], 0, done).astype(np.int32)
        if not waiting:
            lanes, done, (running, samples) = _compacted(lanes, done, (running, samples))


def steps_of_a_part(num_steps: int, verify_every: int) -> int:
    """Return how many steps to do in one call: a part of the budget, in whole verifications.

    Raises:
      InputError: the budget is no whole number of verifications.
    """
    verifications, rest = divmod(num_steps, verify_every)
    if rest:
        raise InputError(
            f"num_steps must be a multiple of verify_every ({verify_every}) where directions leave "
            f"as they settle, got {num_steps}"
        )
    divisors = [n for n in range(1, verifications + 1) if verifications % n == 0]
    return verify_every * min(divisors, key=lambda n: abs(n - _VERIFICATIONS))


def _chunk(
    directions: Directions, places: np.ndarray, result: InversionResult, seconds: float
) -> Chunk:
    """Return the results of the lanes at `places`."""
    sizes, rates, trigger = jax.tree.map(
        lambda leaf: leaf[places], fetch((result.size, result.success_rate, result.trigger))
    )
    best = np.arange(len(places)), sizes.argmin(1)
    return Chunk(
        directions=np.asarray(directions),
        sizes=sizes,
        rates=rates,
        trigger=jax.tree.map(lambda leaf: leaf[best], trigger),
        seconds=seconds,
    )


def _compacted(lanes: list, done: np.ndarray, arrays: tuple) -> tuple[list, np.ndarray, tuple]:
    """Return what is left in half as many lanes, and half again, while it has room there.

    `arrays` [D, ...] are those of the lanes.
    """
    taken = [i for i, lane in enumerate(lanes) if lane is not None]
    size = len(lanes)
    while len(taken) <= smaller(size) < size:
        size = smaller(size)
    if size == len(lanes) or not taken:
        return lanes, done, arrays
    kept = np.array((taken + [i for i in range(len(lanes)) if i not in taken])[:size])
    return [lanes[i] for i in kept], done[kept], _take(arrays, replicate(kept))


@jax.jit
def _take(arrays: tuple, kept: Array) -> tuple:
    return constrain_spread(jax.tree.map(lambda leaf: leaf[kept], arrays))


@jax.jit
def _renewed(running: tuple, fresh: Array, begun: tuple) -> tuple:
    """Return `running` with the `fresh` lanes [D] of `begun` in place of its own."""

    def choose(old: Array, new: Array) -> Array:
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return constrain_spread(jax.tree.map(choose, running, begun))


@functools.partial(jax.jit, static_argnames=("logits_fn", "inversion"))
def _begin_lanes(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    victims: Array,
    targets: Array,
    seeds: Array,
    *,
    mask_weight: Array,
    inversion: Inversion,
) -> tuple[State, Array]:
    """Return the states of D lanes with S seeds before their first step, and the steps' keys."""

    def one(images, weights, victim, target, seed) -> tuple[State, Array]:
        start_key, key = jax.random.split(direction_key(seed, victim, target))
        init_key, key = jax.random.split(key)  # as in `inversion.invert`
        start = inversion.start(start_key, images.shape[1:])
        samples = logits_fn, variables, images, weights, target
        state = begin(*samples, start, init_key, mask_weight=mask_weight, inversion=inversion)
        return state, key

    seeds = jnp.tile(seeds, (len(images), 1))
    return constrain_spread(over_seeds(one)(images, weights, victims, targets, seeds))


@functools.partial(jax.jit, static_argnames=("logits_fn", "minibatch_size", "inversion"))
def _advance_lanes(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    targets: Array,
    running: tuple[State, Array],
    done: Array,
    *,
    num_steps: Array,
    total: Array,
    minibatch_size: int,
    inversion: Inversion,
) -> tuple[State, Array]:
    """Return the states [D, S] `num_steps` of `total` later, and which of them have settled."""
    num_runs = math.prod(jax.tree.leaves(running)[0].shape[:2])
    logits_fn = over_samples(logits_fn, num_runs)

    def one(images, weights, target, done, running) -> tuple[State, Array]:
        state = advance(
            logits_fn,
            variables,
            images,
            weights,
            target,
            *running,
            done,
            num_steps=num_steps,
            total=total,
            minibatch_size=minibatch_size,
            inversion=inversion,
        )
        return state, inversion.settled(state)

    return constrain_spread(over_seeds(one)(images, weights, targets, done, running))
