"""What a method of trigger inversion is: options, and pure functions of a state (Definition III.2).

A method is a frozen dataclass, one file in this package. Its fields are its options, and its
methods are pure. Two with equal options are equal, and `jax.jit` takes them as static arguments.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import Array

from moth_jax.errors import require_choice
from moth_jax.options import AT_LEAST_1, check_options, option
from moth_jax.triggers import Trigger, random_trigger
from moth_jax.types import AnyArray, ImageShape

PRECISIONS = ("float32", "bfloat16")
# A dataclass of arrays (`flax.struct.dataclass`), of a method's own.
State = Any


@flax.struct.dataclass
class Samples:
    """The images of an inversion and where they are to be sent. Leading axes `*d` when batched.

    Attributes:
      images: [*d, n, h, w, c] in [0, 1], of the victim class(es).
      weights: [*d, n], 1 for a sample, 0 for padding.
      target: [*d], the target class.
    """

    images: AnyArray
    weights: AnyArray
    target: AnyArray

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        height, width, channels = self.images.shape[-3:]
        return height, width, channels


@flax.struct.dataclass
class Budget:
    """What an inversion may spend. All but the minibatch size may be traced.

    Attributes:
      num_steps: passes over the samples.
      mask_weight: the first λ.
      minibatch_size: the largest minibatch.
      steps_before: the passes that the start trigger stands for. From a trigger that was found
        before, an inversion is the last `num_steps` of a longer one: a learning rate that falls
        over the budget begins as low as it would have fallen.
    """

    num_steps: Array | int
    mask_weight: Array | float
    minibatch_size: int = flax.struct.field(pytree_node=False)
    steps_before: Array | int = 0


class Score(NamedTuple):
    """How a trigger does on some samples. Everything at a sample of weight 0 is to be ignored.

    Attributes:
      losses: [n], cross-entropy of the stamped sample towards the target.
      hits: [n], 1.0 where the stamped sample is classified as the target.
      weights: [n], 1.0 for a sample, 0.0 for padding.
      margins: [n], the target's logit minus the largest other one.
      indices: [n], the places of these among the inversion's samples; past the last for padding.
      images: [n, h, w, c], the samples as they are without the trigger.
    """

    losses: Array
    hits: Array
    weights: AnyArray
    margins: Array
    indices: Array
    images: AnyArray

    def mean(self, values: Array) -> Array:
        """Return the weighted mean of `values` [n]; 0 if there is no sample."""
        return jnp.sum(values * self.weights) / jnp.maximum(jnp.sum(self.weights), 1.0)


Objective = Callable[[Any], Score]  # of a trigger of the method's kind


@flax.struct.dataclass
class InversionResult:
    """The smallest verified trigger of a direction. Leading axes `*d` when batched.

    Attributes:
      trigger: the trigger, of the kind that the method finds (`Inversion.kind`); all zeros where
        none was found.
      size: [*d], its size: the sum of its mask in aggregated pixels (`trigger_size`), or of the
        mask that it needs (`needed_mask`); inf where none was found.
      success_rate: [*d], of this very trigger on all samples used; 0 if none was found.
      losses_before: [*d, n], the samples' cross-entropy to the target under the start trigger.
      losses_after: [*d, n], the same under `trigger`; equal to `losses_before` if none was found.
    """

    trigger: Any
    size: Array
    success_rate: Array
    losses_before: Array
    losses_after: Array

    @property
    def found(self) -> Array:
        """[*d], whether a trigger that reaches the success bound was found."""
        return jnp.isfinite(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inversion(abc.ABC):
    """A method of trigger inversion. A subclass is one file, and one line in `INVERSIONS`.

    `inversion.loop` calls `init` once; `update` for every minibatch; `observe` after the last
    minibatch of a step; `verify` every `verify_every` steps and after the last one.

    Attributes:
      precision: "float32" or "bfloat16", of the model in `update` (`inversion.precision`). `init`
        and `verify` are always in float32.
      verify_every: steps between two verifications of the candidate; one costs a forward pass.
      method: its name in `INVERSIONS`.
      kind: the type of its triggers, of starts as well: `Trigger` or `AddedTrigger`.
      budget: what it is run with where nobody says otherwise.
    """

    precision: str = "float32"
    verify_every: int = option(10, AT_LEAST_1)

    method: ClassVar[str]
    kind: ClassVar[type] = Trigger
    budget: ClassVar[Budget]

    def __post_init__(self):
        require_choice("precision", self.precision, PRECISIONS)
        check_options(self)

    @property
    def name(self) -> str:
        """The method with its options: two of one name do the same.

        Files of finished measurements are named by a digest of it.
        """
        common = ("precision", "verify_every")
        own = [field.name for field in dataclasses.fields(self) if field.name not in common]
        name = f"{self.method}{tuple(getattr(self, field) for field in (*own, 'verify_every'))}"
        return name if self.precision == "float32" else f"{name} in {self.precision}"

    def start(self, key: Array, image_shape: ImageShape) -> Any:
        """Return the trigger to start from where there is nothing better."""
        return random_trigger(key, image_shape)

    @abc.abstractmethod
    def init(self, start: Any, mask_weight: Array, score: Score, key: Array) -> State:
        """Return the first state; `score` is that of `start` on all samples."""

    @abc.abstractmethod
    def update(self, state: State, objective: Objective, progress: Array) -> State:
        """Return the state after a minibatch.

        `progress` is the share of the budget, in [0, 1), that was spent before the step.
        """

    @abc.abstractmethod
    def observe(self, state: State, key: Array) -> State:
        """Return the state after a step: λ, candidates and restarts move here."""

    @abc.abstractmethod
    def verify(self, state: State, objective: Objective) -> State:
        """Return the state with its candidate measured on all samples, and kept if it holds."""

    def result(self, state: State) -> InversionResult:
        """Return the smallest verified trigger."""
        return state.result
