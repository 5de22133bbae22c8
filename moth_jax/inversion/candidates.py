"""From a moving trigger to a verified one: what every method of inversion does alike.

A step whose success rate reaches the bound nominates its trigger; nominated while it moved, it is
only a candidate until its own success rate is measured on all samples. The states that these
functions take have the fields of `no_candidate`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from moth_jax.inversion.base import InversionResult, Objective, Score, State
from moth_jax.triggers import AnyTrigger, Trigger, trigger_size


def least_rate(success_bound: float) -> float:
    """Return the least success rate that counts.

    It is a hair below `success_bound`: XLA may divide by multiplying with a reciprocal, and 41 hits
    of 41 samples are 0.99999994.
    """
    return success_bound - 1e-6


def no_candidate(start: AnyTrigger, score: Score) -> dict:
    """Return the fields candidate, candidate_size and result of a state before the first step."""
    nothing = jax.tree.map(jnp.zeros_like, start)
    none = jnp.full((), jnp.inf, score.losses.dtype)
    return {
        "candidate": nothing,
        "candidate_size": none,
        "result": InversionResult(
            trigger=nothing,
            size=none,
            success_rate=jnp.zeros_like(none),
            losses_before=score.losses,
            losses_after=score.losses,
        ),
    }


def nominate(state: State, trigger: Trigger, reached: Array) -> tuple[State, Array]:
    """Return the state with `trigger` as its candidate if it is smaller, and whether it is."""
    size = trigger_size(trigger)
    better = reached & (size < state.candidate_size)
    return dataclasses.replace(
        state,
        candidate=where(better, trigger, state.candidate),
        candidate_size=jnp.where(better, size, state.candidate_size),
    ), better


def reached_bound(state: State, success_bound: float) -> Array:
    """Return whether the minibatches of the present step reach the bound, from `hits` and `count`.

    Note: It is the mean over a step in which the trigger moved, as published.
    """
    return state.hits / jnp.maximum(state.count, 1.0) >= least_rate(success_bound)


def patient(state: State, reached: Array, patience: int, increase: float, decrease: float) -> State:
    """Return the state with λ moved by the published schedule, and the step's counts at 0.

    After `patience` consecutive steps that reach the bound λ grows by `increase`; after as many
    below it shrinks by `decrease`.
    """
    above = jnp.where(reached, state.above + 1, 0)
    below = jnp.where(reached, 0, state.below + 1)
    grow, shrink = above >= patience, below >= patience
    factor = jnp.where(grow, increase, jnp.where(shrink, 1 / decrease, 1.0))
    return dataclasses.replace(
        state,
        mask_weight=state.mask_weight * factor,
        above=jnp.where(grow, 0, above),
        below=jnp.where(shrink, 0, below),
        hits=jnp.zeros_like(state.hits),
        count=jnp.zeros_like(state.count),
    )


def verify(success_bound: float, state: State, objective: Objective) -> State:
    """Measure the candidate on all samples, and keep it if it holds."""
    score = objective(state.candidate)
    rate = score.mean(score.hits)
    holds = (rate >= least_rate(success_bound)) & (state.candidate_size < state.result.size)
    verified = dataclasses.replace(
        state.result,
        trigger=state.candidate,
        size=state.candidate_size,
        success_rate=rate,
        losses_after=score.losses,
    )
    result = where(holds, verified, state.result)
    # A candidate that failed is forgotten, so that the next one need not be smaller than it.
    return dataclasses.replace(
        state, result=result, candidate=result.trigger, candidate_size=result.size
    )


def where(condition: Array, chosen, other):
    """Return `chosen` where the scalar `condition` holds, else `other`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)
