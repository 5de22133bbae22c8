"""An inversion whose loss is the success bound itself: smaller triggers in fewer gradients.

A distance asks for nine in ten of the samples, and the published loss for all of them: it goes on
pushing the one that no small trigger sends, and those that are sent already. Here the hardest tenth
is left out (they are the ones the bound forgives, chosen anew at every update), a sample counts by
its margin to the target and hardly at all once it is past it, and λ follows the success rate after
every minibatch instead of waiting for ten equal verdicts.

Mask and pattern are moved themselves and clipped to [0, 1]. Behind a tanh a small value of the mask
has almost no gradient, and Adam, which knows no size, answers with steps of noise; here λ holds
what is not needed at exactly 0. The learning rate begins high and falls to nothing by the end of
the budget: the trigger is coarse at first and free to move, and settles as it falls.
"""

import functools
import operator
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from moth_jax.errors import InputError
from moth_jax.inversion.base import Budget, Inversion, InversionResult, Objective, Score
from moth_jax.inversion.candidates import checked_bound, no_candidate, verify, where
from moth_jax.triggers import Trigger, random_trigger, trigger_size

LAST_PART = 0.1  # of a pass: what λ moves by at most with a minibatch at the end of the budget


@flax.struct.dataclass
class TrimmedState:
    """State of one direction.

    Attributes:
      trigger: where the search is.
      opt_state: Adam's.
      mask_weight: λ, the weight of the mask's sum in the loss.
      margins: [n], of each sample when it was last visited.
      weights: [n], 1 for a sample, 0 for padding.
      candidate, candidate_size: latest trigger whose step reached the bound, not yet verified.
      result: the smallest verified trigger.
    """

    trigger: Trigger
    opt_state: optax.OptState
    mask_weight: Array
    margins: Array
    weights: Array
    candidate: Trigger
    candidate_size: Array
    result: InversionResult


def trimmed(
    *,
    success_bound: float = 0.9,
    safety: float = 0.5,
    increase: float = 1.28,
    decrease: float = 1.28**1.5,
    learning_rate: float = 0.1,
    last_learning_rate: float = 0.001,
    b1: float = 0.9,
    b2: float = 0.9,
    eps: float = 1e-7,
    start_mask: float = 0.1,
    verify_every: int = 5,
) -> Inversion:
    """Return the trimmed-margin inversion.

    Each minibatch is one Adam update of the mean of softplus(safety - margin) over its samples but
    the hardest, + λ·Σm. The hardest are those past the first `success_bound` of all samples, in the
    order of their margins when they were last visited.

    Args:
      success_bound: share of the samples that must be sent to the target, in (0, 1].
      safety: margin (in logits) at which a sample counts half as much as one that is far off.
      increase, decrease: above 1; what λ is multiplied and divided by over a pass whose samples
        reach, or miss, the bound. It changes with every minibatch by that minibatch's part, which
        falls with the learning rate to a tenth where it is larger.
      learning_rate, last_learning_rate: Adam's first and last; between them it falls as a cosine
        over the budget.
      b1, b2, eps: Adam's.
      start_mask: the first masks are uniform in [0, start_mask]: little to undo.
      verify_every: steps between two verifications of the candidate; one costs a forward pass.

    Raises:
      InputError: an option out of its range.

    Note: This is not the published schedule, which is `neural_cleanse`. Both distances are sizes of
      verified triggers, so the smaller one is the better measurement.
    """
    options = _Options(
        success_bound,
        safety,
        increase,
        decrease,
        learning_rate,
        last_learning_rate,
        b1,
        b2,
        eps,
        start_mask,
        verify_every,
    )
    return _inversion(options)


class _Options(NamedTuple):
    """Those of `trimmed`, under their names."""

    success_bound: float
    safety: float
    increase: float
    decrease: float
    learning_rate: float
    last_learning_rate: float
    b1: float
    b2: float
    eps: float
    start_mask: float
    verify_every: int

    def check(self) -> None:
        checked_bound(self.success_bound)
        if self.verify_every < 1:
            raise InputError(f"verify_every must be at least 1, got {self.verify_every}")
        if self.increase <= 1 or self.decrease <= 1:
            raise InputError(
                f"increase and decrease must be above 1, got {self.increase} and {self.decrease}"
            )
        if not 0 <= self.last_learning_rate <= self.learning_rate:
            raise InputError(
                f"last_learning_rate must be in [0, {self.learning_rate}] (learning_rate), got "
                f"{self.last_learning_rate}"
            )
        if not 0 < self.start_mask <= 1:
            raise InputError(f"start_mask must be in (0, 1], got {self.start_mask}")

    @property
    def adam(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate, b1=self.b1, b2=self.b2, eps=self.eps)

    @property
    def bound(self) -> float:
        return checked_bound(self.success_bound)

    def rate(self, progress: Array) -> Array:
        """Return the learning rate, as a share of the first one."""
        last = self.last_learning_rate / self.learning_rate
        return last + (1 - last) * (1 + jnp.cos(jnp.pi * progress)) / 2


@functools.cache  # equal options give the same object, so that jit compiles once
def _inversion(options: _Options) -> Inversion:
    options.check()
    return Inversion(
        name=f"trimmed{tuple(options)}",
        init=functools.partial(_init, options),
        update=functools.partial(_update, options),
        observe=functools.partial(_observe, options),
        verify=functools.partial(verify, options.bound),
        result=operator.attrgetter("result"),
        verify_every=options.verify_every,
        budget=Budget(num_steps=100, minibatch_size=10, mask_weight=0.02),
        start=functools.partial(_start, options),
    )


def _start(options: _Options, key: Array, image_shape: tuple[int, int, int]) -> Trigger:
    trigger = random_trigger(key, image_shape)
    return trigger.replace(mask=options.start_mask * trigger.mask)


def _init(
    options: _Options, start: Trigger, mask_weight: Array, score: Score, key: Array
) -> TrimmedState:
    del key  # nothing is random: a trigger at exactly 0 or 1 can move
    return TrimmedState(
        trigger=start,
        opt_state=options.adam.init(start),
        mask_weight=mask_weight,
        margins=score.margins,
        weights=score.weights,
        **no_candidate(start, score),
    )


def _update(
    options: _Options, state: TrimmedState, objective: Objective, progress: Array
) -> TrimmedState:
    hardest = _hardest_wanted(options.bound, state)

    def loss_fn(trigger: Trigger) -> tuple[Array, Score]:
        score = objective(trigger)
        wanted = state.margins[score.indices] >= hardest
        losses = jnp.where(wanted, jax.nn.softplus(options.safety - score.margins), 0.0)
        return score.mean(losses) + state.mask_weight * jnp.sum(trigger.mask), score

    gradient, score = jax.grad(loss_fn, has_aux=True)(state.trigger)
    updates, opt_state = options.adam.update(gradient, state.opt_state)
    updates = jax.tree.map(lambda v: options.rate(progress) * v, updates)
    # Padding has an index past the last sample, and is dropped.
    margins = state.margins.at[score.indices].set(score.margins, mode="drop")
    part = jnp.sum(score.weights) / jnp.maximum(jnp.sum(state.weights), 1.0)
    trigger = jax.tree.map(lambda v, u: jnp.clip(v + u, 0.0, 1.0), state.trigger, updates)
    state = state.replace(trigger=trigger, opt_state=opt_state, margins=margins)
    factor = jnp.where(_reached(options.bound, state), options.increase, 1 / options.decrease)
    # Few minibatches would leave λ, and with it the size, swinging at the end.
    part = jnp.minimum(part, jnp.maximum(options.rate(progress), LAST_PART))
    return state.replace(mask_weight=state.mask_weight * factor**part)


def _observe(options: _Options, state: TrimmedState, key: Array) -> TrimmedState:
    del key  # no restarts
    # The latest trigger that reached the bound, not the smallest: of many, each judged by a pass in
    # which it moved, the smallest is the one that is judged too well.
    smaller = trigger_size(state.trigger) < state.result.size
    nominated = _reached(options.bound, state) & smaller
    return state.replace(
        candidate=where(nominated, state.trigger, state.candidate),
        candidate_size=jnp.where(nominated, trigger_size(state.trigger), state.candidate_size),
    )


def _reached(bound: float, state: TrimmedState) -> Array:
    """Return whether the margins of the last visits reach the bound."""
    hits = jnp.sum((state.margins > 0) * state.weights)
    return hits / jnp.maximum(jnp.sum(state.weights), 1.0) >= bound


def _hardest_wanted(bound: float, state: TrimmedState) -> Array:
    """Return the margin of the hardest sample that the bound asks for."""
    wanted = jnp.ceil(bound * jnp.sum(state.weights)).astype(jnp.int32)
    descending = jnp.sort(jnp.where(state.weights > 0, state.margins, -jnp.inf), descending=True)
    return descending[jnp.maximum(wanted, 1) - 1]
