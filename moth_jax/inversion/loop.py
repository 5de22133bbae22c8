"""The only loop of trigger inversion.

It is written for one direction (victim class to target class) and has no host round trip inside.
Callers `jax.vmap` it over directions, over the two directions of a pair, and over restarts. The
number of steps is a traced value: one compilation serves every budget.
"""

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

from moth_jax.inversion.base import Inversion, InversionResult, Score, State
from moth_jax.inversion.precision import in_precision
from moth_jax.triggers import Trigger, stamp
from moth_jax.types import LogitsFn, Variables


def invert(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    target: Array,
    start: Trigger,
    key: Array,
    *,
    num_steps: Array | int,
    mask_weight: Array | float,
    minibatch_size: int,
    inversion: Inversion,
    done: Array | int = 0,
) -> InversionResult:
    """Search the smallest trigger that sends `images` to class `target`.

    One step is one pass over the samples in shuffled minibatches.

    Args:
      logits_fn: (variables, images) -> logits, in inference mode.
      variables: what `logits_fn` needs; no gradient of it is taken.
      images: [n, h, w, c] in [0, 1], samples of the victim class(es).
      weights: [n], 1 for a sample, 0 for padding.
      target: the target class, an integer scalar.
      start: the trigger to start from.
      key: randomness of the minibatches and of restarts.
      num_steps: how many passes; may be traced.
      mask_weight: the first λ; may be traced.
      minibatch_size: the largest minibatch.
      inversion: the method.
      done: how many passes the start stands for. From a trigger that was found before, an inversion
        is the last `num_steps` of a longer one, and a learning rate that falls over the budget
        begins as low as it would have fallen; may be traced.

    Returns:
      The smallest trigger whose success rate, measured again on all `images` with that very
      trigger, reaches the method's bound.

    Note: The published code cuts 100 samples into minibatches of 32, 32, 32 and 4. The minibatches
      here are as equal as can be (4 of 25): as many updates, no padding to compute, and no update
      that hangs on four samples. Real samples are dealt evenly among them, padding last, and
      minibatches of padding alone are left out.
    """
    init_key, loop_key = jax.random.split(key)
    samples = (logits_fn, variables, images, weights, target)
    state = begin(*samples, start, init_key, mask_weight=mask_weight, inversion=inversion)
    state = advance(
        *samples,
        state,
        loop_key,
        0,
        num_steps=num_steps,
        minibatch_size=minibatch_size,
        inversion=inversion,
        done=done,
    )
    return inversion.result(state)


def begin(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    target: Array,
    start: Trigger,
    key: Array,
    *,
    mask_weight: Array | float,
    inversion: Inversion,
) -> State:
    """Return the state of an inversion before its first step; the arguments are those of `invert`.

    With `advance` an inversion is done in parts, each of which may wait for what others find.
    """
    chex.assert_rank((images, weights, target), (4, 1, 0))
    chex.assert_equal_shape_prefix((images, weights), 1)
    every = jnp.arange(len(images))
    score = _score(logits_fn, variables, start, images, weights, target, every)
    return inversion.init(start, jnp.asarray(mask_weight, images.dtype), score, key)


def advance(
    logits_fn: LogitsFn,
    variables: Variables,
    images: Array,
    weights: Array,
    target: Array,
    state: State,
    key: Array,
    first: Array | int,
    *,
    num_steps: Array | int,
    minibatch_size: int,
    inversion: Inversion,
    total: Array | int | None = None,
    done: Array | int = 0,
) -> State:
    """Return the state `num_steps` later; `first` steps were done before.

    Parts of a multiple of `inversion.verify_every` steps give what one of their sum would, if all
    are told the `total`, which is the end of this part where it is not given. `done` is as for
    `invert`, and counts in addition.
    """
    total = first + num_steps if total is None else total
    num_samples = images.shape[0]
    num_minibatches = -(-num_samples // minibatch_size)

    def score_all(trigger: Trigger) -> Score:
        every = jnp.arange(num_samples)
        return _score(logits_fn, variables, trigger, images, weights, target, every)

    def minibatch(progress: Array, state: State, samples: tuple[Array, Array, Array]) -> State:
        chosen, chosen_weights, indices = samples

        def update(logits_fn: LogitsFn) -> State:
            def objective(trigger: Trigger) -> Score:
                return _score(
                    logits_fn, variables, trigger, chosen, chosen_weights, target, indices
                )

            return inversion.update(state, objective, progress)

        updated = in_precision(update, logits_fn, inversion.precision, progress)
        # A class with fewer samples than minibatches leaves some of padding alone: no update.
        real = jnp.any(chosen_weights > 0)
        return jax.tree.map(lambda new, old: jnp.where(real, new, old), updated, state)

    def minibatches(progress: Array, state: State, key: Array) -> State:
        if num_minibatches == 1:  # in any order; small kernels are what a step of few samples costs
            return minibatch(progress, state, (images, weights, jnp.arange(num_samples)))
        # One index past the last sample is padding: it reads the last image and weighs nothing.
        padded_weights = jnp.append(weights, jnp.zeros((-num_samples) % num_minibatches))

        def one(state: State, indices: Array) -> tuple[State, None]:
            chosen = images[jnp.minimum(indices, num_samples - 1)]
            return minibatch(progress, state, (chosen, padded_weights[indices], indices)), None

        return jax.lax.scan(one, state, _deal(key, padded_weights, num_minibatches))[0]

    def step(index: Array, state: State) -> State:
        order_key, observe_key = jax.random.split(jax.random.fold_in(key, first + index))
        progress = jnp.asarray((done + first + index) / (done + total), images.dtype)
        state = minibatches(progress, state, order_key)
        state = inversion.observe(state, observe_key)
        # The index is common to all vmapped directions, so this stays a branch that is skipped.
        due = ((index + 1) % inversion.verify_every == 0) | (index + 1 == num_steps)
        return jax.lax.cond(due, lambda s: inversion.verify(s, score_all), lambda s: s, state)

    return jax.lax.fori_loop(0, num_steps, step, state)


def _score(
    logits_fn: LogitsFn,
    variables: Variables,
    trigger: Trigger,
    images: Array,
    weights: Array,
    target: Array,
    indices: Array,
) -> Score:
    """Return how `trigger` does on `images`, which are those of `indices`."""
    logits = logits_fn(variables, stamp(images, trigger))
    labels = jnp.full(logits.shape[:1], target)
    others = jnp.where(jnp.arange(logits.shape[1]) == target, -jnp.inf, logits)
    return Score(
        losses=optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        hits=(jnp.argmax(logits, axis=-1) == target).astype(logits.dtype),
        weights=weights,
        margins=logits[:, target] - jnp.max(others, axis=-1),
        indices=indices,
    )


def _deal(key: Array, weights: Array, num_minibatches: int) -> Array:
    """Return shuffled indices [num_minibatches, n / num_minibatches], real samples dealt evenly."""
    priority = jax.random.uniform(key, weights.shape) + 2.0 * (weights == 0)
    return jnp.argsort(priority).reshape(-1, num_minibatches).T
