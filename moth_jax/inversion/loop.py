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

from moth_jax.inversion.base import Budget, Inversion, InversionResult, Samples, Score, State
from moth_jax.inversion.precision import in_precision
from moth_jax.triggers import AnyTrigger, stamp
from moth_jax.types import LogitsFn, Variables


def invert(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    start: AnyTrigger,
    key: Array,
    *,
    budget: Budget,
    inversion: Inversion,
) -> InversionResult:
    """Search the smallest trigger that sends `samples` to their target.

    One step is one pass over the samples in shuffled minibatches.

    Args:
      logits_fn: (variables, images) -> logits, in inference mode.
      variables: what `logits_fn` needs; no gradient of it is taken.
      samples: those of one direction.
      start: the trigger to start from.
      key: randomness of the minibatches and of restarts.
      budget: steps, the first λ and the minibatch size.
      inversion: the method.

    Returns:
      The smallest trigger whose success rate, measured again on all samples with that very trigger,
      reaches the method's bound.

    Note: The published code cuts 100 samples into minibatches of 32, 32, 32 and 4. The minibatches
      here are as equal as can be (4 of 25): as many updates, no padding to compute, and no update
      that hangs on four samples. Real samples are dealt evenly among them, padding last, and
      minibatches of padding alone are left out.
    """
    init_key, loop_key = jax.random.split(key)
    model = logits_fn, variables, samples
    state = begin(*model, start, init_key, mask_weight=budget.mask_weight, inversion=inversion)
    state = advance(*model, state, loop_key, 0, budget=budget, inversion=inversion)
    return inversion.result(state)


def begin(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    start: AnyTrigger,
    key: Array,
    *,
    mask_weight: Array | float,
    inversion: Inversion,
) -> State:
    """Return the state of an inversion before its first step; the arguments are those of `invert`.

    With `advance` an inversion is done in parts, each of which may wait for what others find.
    """
    images, weights, target = samples.images, samples.weights, samples.target
    chex.assert_rank((images, weights, target), (4, 1, 0))
    chex.assert_equal_shape_prefix((images, weights), 1)
    every = jnp.arange(len(images))
    score = _score(logits_fn, variables, start, samples, every)
    return inversion.init(start, jnp.asarray(mask_weight, images.dtype), score, key)


def advance(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    state: State,
    key: Array,
    first: Array | int,
    *,
    budget: Budget,
    inversion: Inversion,
) -> State:
    """Return the state `budget.num_steps` later; `first` steps were done before.

    Parts of a multiple of `inversion.verify_every` steps give what one of their sum would, if the
    method does not ask for its `progress`: each part takes its own end for the end of the whole.
    """
    images, weights = samples.images, samples.weights
    before, total = budget.steps_before, first + budget.num_steps
    num_samples = images.shape[0]
    num_minibatches = -(-num_samples // budget.minibatch_size)

    def score_all(trigger: AnyTrigger) -> Score:
        return _score(logits_fn, variables, trigger, samples, jnp.arange(num_samples))

    def minibatch(progress: Array, state: State, chosen: Samples, indices: Array) -> State:
        def update(logits_fn: LogitsFn) -> State:
            def objective(trigger: AnyTrigger) -> Score:
                return _score(logits_fn, variables, trigger, chosen, indices)

            return inversion.update(state, objective, progress)

        updated = in_precision(update, logits_fn, inversion.precision, progress)
        # A class with fewer samples than minibatches leaves some of padding alone: no update.
        real = jnp.any(chosen.weights > 0)
        return jax.tree.map(lambda new, old: jnp.where(real, new, old), updated, state)

    def minibatches(progress: Array, state: State, key: Array) -> State:
        if num_minibatches == 1:  # in any order; small kernels are what a step of few samples costs
            return minibatch(progress, state, samples, jnp.arange(num_samples))
        # One index past the last sample is padding: it reads the last image and weighs nothing.
        padded_weights = jnp.append(weights, jnp.zeros((-num_samples) % num_minibatches))

        def one(state: State, indices: Array) -> tuple[State, None]:
            chosen = images[jnp.minimum(indices, num_samples - 1)]
            batch = Samples(chosen, padded_weights[indices], samples.target)
            return minibatch(progress, state, batch, indices), None

        return jax.lax.scan(one, state, _deal(key, padded_weights, num_minibatches))[0]

    def step(index: Array, state: State) -> State:
        order_key, observe_key = jax.random.split(jax.random.fold_in(key, first + index))
        progress = jnp.asarray((before + first + index) / (before + total), images.dtype)
        state = minibatches(progress, state, order_key)
        state = inversion.observe(state, observe_key)
        # The index is common to all vmapped directions, so this stays a branch that is skipped.
        due = ((index + 1) % inversion.verify_every == 0) | (index + 1 == budget.num_steps)
        return jax.lax.cond(due, lambda s: inversion.verify(s, score_all), lambda s: s, state)

    return jax.lax.fori_loop(0, budget.num_steps, step, state)


def _score(
    logits_fn: LogitsFn, variables: Variables, trigger: AnyTrigger, samples: Samples, indices: Array
) -> Score:
    """Return how `trigger` does on `samples`, whose places among all samples are `indices`."""
    target = samples.target
    logits = logits_fn(variables, stamp(samples.images, trigger))
    labels = jnp.full(logits.shape[:1], target)
    others = jnp.where(jnp.arange(logits.shape[1]) == target, -jnp.inf, logits)
    return Score(
        losses=optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        hits=(jnp.argmax(logits, axis=-1) == target).astype(logits.dtype),
        weights=samples.weights,
        margins=logits[:, target] - jnp.max(others, axis=-1),
        indices=indices,
        images=samples.images,
    )


def _deal(key: Array, weights: Array, num_minibatches: int) -> Array:
    """Return shuffled indices [num_minibatches, n / num_minibatches], real samples dealt evenly."""
    priority = jax.random.uniform(key, weights.shape) + 2.0 * (weights == 0)
    return jnp.argsort(priority).reshape(-1, num_minibatches).T
