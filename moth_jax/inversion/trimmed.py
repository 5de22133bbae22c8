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

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from moth_jax.errors import InputError
from moth_jax.inversion.base import Budget, Inversion, InversionResult, Objective, Score
from moth_jax.inversion.candidates import least_rate, no_candidate, verify, where
from moth_jax.options import (
    ABOVE_1,
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    option,
)
from moth_jax.triggers import Trigger, random_trigger, trigger_size
from moth_jax.types import AnyArray, ImageShape

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
    weights: AnyArray
    candidate: Trigger
    candidate_size: Array
    result: InversionResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trimmed(Inversion):
    """The trimmed-margin inversion.

    Each minibatch is one Adam update of the mean of softplus(safety - margin) over its samples but
    the hardest, + λ·Σm. The hardest are those past the first `success_bound` of all samples, in the
    order of their margins when they were last visited.

    Attributes:
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
      InputError: an option is out of its range.

    Note: This is not the published schedule, which is `NeuralCleanse`. Both distances are sizes of
      verified triggers, so the smaller one is the better measurement.
    """

    success_bound: float = option(0.9, POSITIVE_SHARE)
    safety: float = option(0.5, NOT_NEGATIVE)
    increase: float = option(1.28, ABOVE_1)
    decrease: float = option(1.28**1.5, ABOVE_1)
    learning_rate: float = option(0.1, POSITIVE)
    last_learning_rate: float = option(0.001, NOT_NEGATIVE)
    b1: float = option(0.9, BELOW_1)
    b2: float = option(0.9, BELOW_1)
    eps: float = option(1e-7, POSITIVE)
    start_mask: float = option(0.1, POSITIVE_SHARE)
    verify_every: int = option(5, AT_LEAST_1)

    method: ClassVar[str] = "trimmed"
    budget: ClassVar[Budget] = Budget(num_steps=100, minibatch_size=10, mask_weight=0.02)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.last_learning_rate <= self.learning_rate:
            raise InputError(
                f"last_learning_rate must be in [0, {self.learning_rate}] (learning_rate), got "
                f"{self.last_learning_rate}"
            )

    @property
    def _adam(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate, b1=self.b1, b2=self.b2, eps=self.eps)

    def _rate(self, progress: Array) -> Array:
        """Return the learning rate, as a share of the first one."""
        last = self.last_learning_rate / self.learning_rate
        return last + (1 - last) * (1 + jnp.cos(jnp.pi * progress)) / 2

    def start(self, key: Array, image_shape: ImageShape) -> Trigger:
        """Return a random trigger with a faint mask."""
        trigger = random_trigger(key, image_shape)
        return dataclasses.replace(trigger, mask=self.start_mask * trigger.mask)

    def init(self, start: Trigger, mask_weight: Array, score: Score, key: Array) -> TrimmedState:
        """Return the first state: at `start`."""
        del key  # nothing is random: a trigger at exactly 0 or 1 can move
        return TrimmedState(
            trigger=start,
            opt_state=self._adam.init(start),  # pyright: ignore[reportArgumentType]
            mask_weight=mask_weight,
            margins=score.margins,
            weights=score.weights,
            **no_candidate(start, score),
        )

    def update(self, state: TrimmedState, objective: Objective, progress: Array) -> TrimmedState:
        """Return the state after one Adam update, with λ moved by the minibatch's part."""
        hardest = self._hardest_wanted(state)

        def loss_fn(trigger: Trigger) -> tuple[Array, Score]:
            score = objective(trigger)
            wanted = state.margins[score.indices] >= hardest
            losses = jnp.where(wanted, jax.nn.softplus(self.safety - score.margins), 0.0)
            return score.mean(losses) + state.mask_weight * self._penalty(trigger), score

        gradient, score = jax.grad(loss_fn, has_aux=True)(state.trigger)
        updates, opt_state = self._adam.update(gradient, state.opt_state)
        updates = jax.tree.map(lambda v: self._rate(progress) * v, updates)
        # Padding has an index past the last sample, and is dropped.
        margins = state.margins.at[score.indices].set(score.margins, mode="drop")
        part = jnp.sum(score.weights) / jnp.maximum(jnp.sum(state.weights), 1.0)
        trigger = jax.tree.map(self._moved, state.trigger, updates)
        state = dataclasses.replace(state, trigger=trigger, opt_state=opt_state, margins=margins)
        factor = jnp.where(self._reached(state), self.increase, 1 / self.decrease)
        # Few minibatches would leave λ, and with it the size, swinging at the end.
        part = jnp.minimum(part, jnp.maximum(self._rate(progress), LAST_PART))
        return dataclasses.replace(state, mask_weight=state.mask_weight * factor**part)

    def observe(self, state: TrimmedState, key: Array) -> TrimmedState:
        """Return the state after a step, with the latest trigger that reached the bound nominated.

        Not the smallest: of many, each judged by a pass in which it moved, the smallest is the one
        that is judged too well.
        """
        del key  # no restarts
        size = self._size(state.trigger)
        nominated = self._reached(state) & (size < state.result.size)
        return dataclasses.replace(
            state,
            candidate=where(nominated, state.trigger, state.candidate),
            candidate_size=jnp.where(nominated, size, state.candidate_size),
        )

    def verify(self, state: TrimmedState, objective: Objective) -> TrimmedState:
        """Measure the candidate on all samples, and keep it if it holds."""
        return verify(self.success_bound, state, objective)

    def _size(self, trigger: Any) -> Array:
        """Return the size that is made small."""
        return trigger_size(trigger)

    def _penalty(self, trigger: Any) -> Array:
        """Return what λ weighs in the loss."""
        return jnp.sum(trigger.mask)

    def _moved(self, value: Array, update: Array) -> Array:
        """Return the values of mask or pattern after an update."""
        return jnp.clip(value + update, 0.0, 1.0)

    def _reached(self, state: TrimmedState) -> Array:
        """Return whether the margins of the last visits reach the bound."""
        hits = jnp.sum((state.margins > 0) * state.weights)
        rate = hits / jnp.maximum(jnp.sum(state.weights), 1.0)
        return rate >= least_rate(self.success_bound)

    def _hardest_wanted(self, state: TrimmedState) -> Array:
        """Return the margin of the hardest sample that the bound asks for."""
        bound = least_rate(self.success_bound)
        wanted = jnp.ceil(bound * jnp.sum(state.weights)).astype(jnp.int32)
        margins = jnp.where(state.weights > 0, state.margins, -jnp.inf)
        return jnp.sort(margins, descending=True)[jnp.maximum(wanted, 1) - 1]
