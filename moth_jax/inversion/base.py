"""What a method of trigger inversion has to provide (Definition III.2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import Array

from moth_jax.triggers import Trigger, random_trigger

State = Any


class Score(NamedTuple):
    """How a trigger does on some samples. All but the `weights` of padding is to be ignored.

    Attributes:
      losses: [n], cross-entropy of the stamped sample towards the target.
      hits: [n], 1.0 where the stamped sample is classified as the target.
      weights: [n], 1.0 for a sample, 0.0 for padding.
      margins: [n], the target's logit minus the largest other one.
      indices: [n], which of the inversion's samples these are; past the last one for padding.
    """

    losses: Array
    hits: Array
    weights: Array
    margins: Array
    indices: Array

    def mean(self, values: Array) -> Array:
        """Return the weighted mean of `values` [n]; 0 if there is no sample."""
        return jnp.sum(values * self.weights) / jnp.maximum(jnp.sum(self.weights), 1.0)


Objective = Callable[[Trigger], Score]


@flax.struct.dataclass
class InversionResult:
    """The smallest verified trigger of a direction. Leading axes `*d` when batched.

    Attributes:
      trigger: the trigger; all zeros where none was found.
      size: [*d], its size (`trigger_size`); inf where none was found.
      success_rate: [*d], of this very trigger on all samples used; 0 if none was found.
      losses_before: [*d, n], the samples' cross-entropy to the target under the start trigger.
      losses_after: [*d, n], the same under `trigger`; equal to `losses_before` if none was found.
    """

    trigger: Trigger
    size: Array
    success_rate: Array
    losses_before: Array
    losses_after: Array

    @property
    def found(self) -> Array:
        """[*d], whether a trigger that reaches the success bound was found."""
        return jnp.isfinite(self.size)


class Budget(NamedTuple):
    """What a method is run with where nobody says otherwise: arguments of `invert`."""

    num_steps: int
    minibatch_size: int
    mask_weight: float


class Inversion(NamedTuple):
    """A method of trigger inversion.

    Attributes:
      name: the method and its options: two with one name do the same.
      init: (start, mask_weight, score, key) -> state. `mask_weight` is the first λ of the method,
        `score` that of `start` on all samples.
      update: (state, objective, progress) -> state. One minibatch; `progress` is the share of the
        budget that was spent before the step, in [0, 1).
      observe: (state, key) -> state. Once per step, after its last minibatch: λ, candidates,
        restarts.
      verify: (state, objective) -> state. Measures the state's candidate on all samples and keeps
        it if it holds. Called every `verify_every` steps and after the last one.
      result: state -> InversionResult.
      verify_every: steps between two verifications.
      budget: what it was made for.
      start: (key, image shape) -> trigger. Where it starts from if there is nothing better.
      settled: state -> bool, whether going on is no use; None if only the budget ends a search.
        Settled directions make room for others while measuring (`lanes.py`).
      precision: "float32" or "bfloat16": of the model in `update` (`precision.with_precision`);
        `init` and `verify` are always in float32.
    """

    name: str
    init: Callable[[Trigger, Array, Score, Array], State]
    update: Callable[[State, Objective, Array], State]
    observe: Callable[[State, Array], State]
    verify: Callable[[State, Objective], State]
    result: Callable[[State], InversionResult]
    verify_every: int
    budget: Budget
    start: Callable[[Array, tuple[int, int, int]], Trigger] = random_trigger
    settled: Callable[[State], Array] | None = None
    precision: str = "float32"
