"""Pixel: a trigger that is added, in two parts (Tao et al., CVPR 2022, "Better Trigger Inversion").

Two variables of the image's shape, one that adds and one that takes away, each clipped to [0, 1]:

    δ = clip(v⁺, 0, 1) - clip(v⁻, 0, 1),    x' = clip(x + δ, 0, 1)

What is small is the number of pixels that change. A penalty that falls with the variables
themselves stands for it, and goes on pushing where they are below 0 and change nothing.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from moth_jax.inversion.base import Budget, Inversion, InversionResult, Objective, Score
from moth_jax.inversion.candidates import (
    least_rate,
    no_candidate,
    patient,
    reached_bound,
    verify,
    where,
)
from moth_jax.options import ABOVE_1, AT_LEAST_1, BELOW_1, POSITIVE, POSITIVE_SHARE, option
from moth_jax.triggers import AddedTrigger, clip_to_unit, needed_mask
from moth_jax.types import ImageShape

SPAN = 2.0 - 1e-7  # tanh(v) / SPAN + 1/2 maps any real number onto [0, 1], as published
SLOPE = 10.0  # variables are divided by it before the tanh
THRESHOLD = 1 / 255  # what is added, or taken away, below it is nothing


class Parts(NamedTuple):
    """The free variables [h, w, c], any real number: what is added, and what is taken away."""

    plus: Array
    minus: Array


@flax.struct.dataclass
class PixelState:
    """State of one direction.

    Attributes:
      parts: where the search is.
      used: the parts of the latest minibatch, before its update.
      opt_state: Adam's.
      mask_weight: λ, the weight of the penalty in the loss.
      above, below: consecutive steps with a success rate at or above, and below, the bound.
      hits, count, penalties: weighted hits, samples and penalties of the minibatches of the present
        step.
      candidate: latest trigger whose step reached the bound, not yet verified.
      candidate_size, candidate_penalty: how many pixels it changes, and its step's mean penalty. A
        next one must have less of both.
      result: the verified trigger that changes the fewest pixels; its size is their number.
      result_penalty: its step's mean penalty.
      needed: the size of the mask that `result` needs, in aggregated pixels.
    """

    parts: Parts
    used: Parts
    opt_state: optax.OptState
    mask_weight: Array
    above: Array
    below: Array
    hits: Array
    count: Array
    penalties: Array
    candidate: AddedTrigger
    candidate_size: Array
    candidate_penalty: Array
    result: InversionResult
    result_penalty: Array
    needed: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixel(Inversion):
    """The published Pixel inversion.

    Each minibatch is one Adam update of cross-entropy (weighted mean over its samples) + λ·R, where
    R sums `penalty` of both parts. λ moves as in `NeuralCleanse`. A step that reaches the bound
    with a smaller mean R, and fewer pixels that change, than all before makes its trigger the
    candidate, without the values below 1/255, and the variables go on from it.

    The size of its result is that of the mask that the trigger needs (`triggers.needed_mask`).

    Attributes:
      success_bound: share of the samples that must be sent to the target, in (0, 1].
      patience: consecutive steps before λ changes, at least 1.
      increase, decrease: factors above 1.
      learning_rate, b1, b2, eps: Adam's.

    Raises:
      InputError: an option is out of its range.

    Note: The published code calls a step's mean success rate, in which the trigger moved, that of
      the trigger. Here a candidate is measured again on all samples, and a next one only has to be
      smaller than the last that held.
    Note: The published code drops the minibatch that is not full (3 of 32 for 100 samples). The
      loop cuts all samples into equal ones (4 of 25).
    """

    success_bound: float = option(0.9, POSITIVE_SHARE)
    patience: int = option(10, AT_LEAST_1)
    increase: float = option(1.5, ABOVE_1)
    decrease: float = option(1.5**1.5, ABOVE_1)
    learning_rate: float = option(0.1, POSITIVE)
    b1: float = option(0.5, BELOW_1)
    b2: float = option(0.9, BELOW_1)
    eps: float = option(1e-8, POSITIVE)

    method: ClassVar[str] = "pixel"
    kind: ClassVar[type] = AddedTrigger
    budget: ClassVar[Budget] = Budget(num_steps=1000, minibatch_size=32, mask_weight=1e-3)

    @property
    def _adam(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate, b1=self.b1, b2=self.b2, eps=self.eps)

    def start(self, key: Array, image_shape: ImageShape) -> AddedTrigger:
        """Return the difference of two parts that are uniform in [0, 1)."""
        plus, minus = jax.random.uniform(key, (2, *image_shape))
        return AddedTrigger(plus - minus)

    def init(self, start: AddedTrigger, mask_weight: Array, score: Score, key: Array) -> PixelState:
        """Return the first state: at `start`, with something added and taken away again.

        Of two uniform parts whose difference is δ the smaller is uniform in [0, 1 - |δ|): from a
        random start, the parts are distributed as published.
        """
        both = jax.random.uniform(key, start.delta.shape) * (1 - jnp.abs(start.delta))
        parts = Parts(both + jnp.maximum(start.delta, 0.0), both + jnp.maximum(-start.delta, 0.0))
        zero = jnp.zeros((), score.losses.dtype)
        none = jnp.full_like(zero, jnp.inf)
        return PixelState(
            parts=parts,
            used=parts,
            opt_state=self._adam.init(parts),  # pyright: ignore[reportArgumentType]
            mask_weight=mask_weight,
            above=jnp.zeros((), jnp.int32),
            below=jnp.zeros((), jnp.int32),
            hits=zero,
            count=zero,
            penalties=zero,
            candidate_penalty=none,
            result_penalty=none,
            needed=none,
            **no_candidate(start, score),
        )

    def update(self, state: PixelState, objective: Objective, progress: Array) -> PixelState:
        """Return the state after one Adam update."""
        del progress  # the published schedule has no end in sight

        def loss_fn(parts: Parts) -> tuple[Array, tuple[Score, Array]]:
            score = objective(added(parts))
            total = penalty(parts.plus) + penalty(parts.minus)
            return score.mean(score.losses) + state.mask_weight * total, (score, total)

        gradient, (score, total) = jax.grad(loss_fn, has_aux=True)(state.parts)
        updates, opt_state = self._adam.update(gradient, state.opt_state)
        weight = jnp.sum(score.weights)
        return dataclasses.replace(
            state,
            parts=jax.tree.map(jnp.add, state.parts, updates),
            used=state.parts,
            opt_state=opt_state,
            hits=state.hits + jnp.sum(score.hits * score.weights),
            count=state.count + weight,
            penalties=state.penalties + total * weight,
        )

    def observe(self, state: PixelState, key: Array) -> PixelState:
        """Move λ; nominate a trigger that is smaller than all before, and go on from it.

        Adam's averages stay, as published.
        """
        del key  # no noise
        reached = reached_bound(state, self.success_bound)
        mean = state.penalties / jnp.maximum(state.count, 1.0)
        parts = without_small(state.used)
        trigger = added(parts)
        size = jnp.sum(jnp.any(trigger.delta != 0, axis=-1)).astype(mean.dtype)
        better = reached & (mean < state.candidate_penalty) & (size < state.candidate_size)
        state = dataclasses.replace(
            state,
            parts=where(better, parts, state.parts),
            penalties=jnp.zeros_like(state.penalties),
            candidate=where(better, trigger, state.candidate),
            candidate_size=jnp.where(better, size, state.candidate_size),
            candidate_penalty=jnp.where(better, mean, state.candidate_penalty),
        )
        return patient(state, reached, self.patience, self.increase, self.decrease)

    def verify(self, state: PixelState, objective: Objective) -> PixelState:
        """Measure the candidate and its mask on all samples, and keep it if it holds."""
        score = objective(state.candidate)
        verified = verify(self.success_bound, state, lambda _: score)
        better = verified.result.size < state.result.size
        kept = jnp.where(better, state.candidate_penalty, state.result_penalty)
        share = least_rate(self.success_bound)
        mask = needed_mask(state.candidate, score.images, score.weights, score.hits, share)
        size = score.images.shape[-1] * jnp.sum(mask)
        return dataclasses.replace(
            verified,
            candidate_penalty=kept,
            result_penalty=kept,
            needed=jnp.where(better, size, state.needed),
        )

    def result(self, state: PixelState) -> InversionResult:
        """Return the verified trigger, with the size of the mask that it needs."""
        return dataclasses.replace(state.result, size=state.needed)


def added(parts: Parts) -> AddedTrigger:
    """Return the trigger of the free variables."""
    return AddedTrigger(clip_to_unit(parts.plus) - clip_to_unit(parts.minus))


def penalty(part: Array) -> Array:
    """Return the penalty of one part [h, w, c]: the sum over pixels of the largest channel.

    A channel counts tanh(v / 10) / (2 - 1e-7) + 1/2, between 0 and 1. Of equal ones the first
    alone has a gradient.
    """
    first = jnp.argmax(part, axis=-1, keepdims=True)
    largest = jnp.take_along_axis(part, first, axis=-1)
    return jnp.sum(jnp.tanh(largest / SLOPE) / SPAN + 0.5)


def without_small(parts: Parts) -> Parts:
    """Return the parts within [0, 1], 0 where they are below 1/255."""
    return jax.tree.map(lambda v: jnp.where(v < THRESHOLD, 0.0, jnp.minimum(v, 1.0)), parts)
