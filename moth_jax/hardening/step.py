"""One step of symmetric hardening (Section IV-B, Algorithm 1): invert, stamp, update.

The triggers of all directions of the step (both of a pair) are inverted in one vectorised
computation, each with its own λ, counters and best. They are stamped on a share of their victims,
which keep their true labels. Then the model takes one step on the whole, partly stamped batch.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moth_jax.data.augmentation import augment
from moth_jax.inversion import Budget, Inversion, InversionResult, Samples, invert_directions
from moth_jax.models import Classifier
from moth_jax.parallel.devices import constrain, constrain_replicated
from moth_jax.training import NO_ADVERSARY, Adversary, TrainState, make_update, perturb
from moth_jax.triggers import Trigger, stamp


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What is compiled into a hardening step.

    Attributes:
      stamp_share: share of the victims in the batch that are stamped: of a pair's class with the
        fewer samples, at least one, and as many of the other class.
      max_trigger_share: a trigger larger than this share of h*w*c is not stamped.
      symmetric: both directions of a pair; False inverts and stamps the first only.
      batch_norm: "update" or "frozen" (`training.make_update`).
      flip, shift: augmentation of the batch (`data.augmentation.augment`).
      augment_stamped: flip and shift the stamped images once more, trigger and all.
      adversary: PGD on the samples that are not stamped, for adversarially trained models.
    """

    stamp_share: float = 0.1
    max_trigger_share: float = 0.25
    symmetric: bool = True
    batch_norm: str = "update"
    flip: bool = False
    shift: int = 0
    augment_stamped: bool = False
    adversary: Adversary = NO_ADVERSARY

    def augmented(self, images: Array, key: Array) -> Array:
        """Return `images` [n, h, w, c], flipped and shifted at random."""
        return augment(images, key, flip=self.flip, shift=self.shift, fill="zero")

    def stamped(self, images: Array, trigger: Trigger, key: Array) -> Array:
        """Return `images` [n, h, w, c] with one trigger, or with a trigger for each [n, ...]."""
        images = stamp(images, trigger)
        return self.augmented(images, key) if self.augment_stamped else images


@flax.struct.dataclass
class StepBatch:
    """The samples of a step; those of the pairs' classes are in known places.

    Attributes:
      images, labels: [n, h, w, c] in [0, 1] and [n]; the first slots are for samples of the pairs'
        classes, class after class (`data.sampling.pair_batch`).
      weights: [C, V], for the V slots of each of the C classes: 1 for a sample of the class, 0
        where the class had too few and another sample fills the slot.
    """

    images: Array
    labels: Array | np.ndarray
    weights: Array | np.ndarray


@flax.struct.dataclass
class HardenInfo:
    """What one step did to each of its D directions.

    Attributes:
      trigger: [D, ...], what the inversions found.
      sizes: [D], inf where none was found.
      success_rates: [D], on the victims used.
      num_victims: [D], samples that the inversion had.
      num_stamped: [D], 0 where the trigger failed or was too large.
      loss: mean cross-entropy of the batch.
    """

    trigger: Trigger
    sizes: Array
    success_rates: Array
    num_victims: Array
    num_stamped: Array
    loss: Array


def make_harden_step(
    classifier: Classifier,
    inversion: Inversion,
    tx: optax.GradientTransformation,
    config: StepConfig,
) -> Callable[..., tuple[TrainState, HardenInfo]]:
    """Return the compiled step.

        step(state, batch, targets, start, key, *, budget) -> (state, info)

    Its arguments:
      state: a `TrainState`.
      batch: a `StepBatch` of C classes.
      targets: [D], the directions' targets; D = C if symmetric, else C / 2.
      start: the triggers [D, ...] to start from.
      key: randomness of the step.
      budget: of the inversions.

    Note: Each direction's loss is the weighted mean over its own victims, so that one λ means the
      same for one direction and for two. The published two-sided code takes the sum.
    """
    update = make_update(classifier, tx, batch_norm=config.batch_norm)

    @jax.jit
    def step(
        state: TrainState,
        batch: StepBatch,
        targets: Array,
        start: Trigger,
        key: Array,
        *,
        budget: Budget,
    ) -> tuple[TrainState, HardenInfo]:
        augment_key, invert_key, attack_key = jax.random.split(key, 3)
        images = constrain(config.augmented(batch.images, augment_key))
        labels, weights = map(jnp.asarray, (batch.labels, batch.weights))
        slots = jnp.arange(weights.size).reshape(weights.shape)
        if not config.symmetric:
            slots, weights = slots[::2], weights[::2]
        result = invert_directions(
            classifier.predict,
            state.variables,
            Samples(images[slots], weights, targets),
            start,
            jax.random.split(invert_key, len(targets)),
            budget=budget,
            inversion=inversion,
        )
        chosen = _choose_stamped(result, weights, config)
        others = perturb(classifier, state.variables, images, labels, attack_key, config.adversary)
        keys = jax.random.split(jax.random.fold_in(augment_key, 1), len(slots))
        stamped = jax.vmap(config.stamped)(images[slots], result.trigger, keys)
        chosen_only = jnp.where(chosen[:, :, None, None, None], stamped, others[slots])
        state, loss = update(state, others.at[slots].set(chosen_only), labels)
        info = HardenInfo(
            trigger=result.trigger,
            sizes=result.size,
            success_rates=result.success_rate,
            num_victims=weights.sum(1),
            num_stamped=chosen.sum(1),
            loss=loss,
        )
        return state, constrain_replicated(info)

    return step


def make_stamped_update(
    classifier: Classifier, tx: optax.GradientTransformation, config: StepConfig
) -> Callable[..., tuple[TrainState, Array]]:
    """Return the compiled training step on a batch of which some samples are stamped.

        update(state, images, labels, trigger, stamped, key) -> (state, mean cross-entropy)

    `trigger` [n, ...] holds a trigger for each sample, and `stamped` [n] says whether the sample is
    stamped. All keep their true labels. The adversary perturbs those that are not stamped.
    """
    update = make_update(classifier, tx, batch_norm=config.batch_norm)

    @jax.jit
    def stamped_update(state, images, labels, trigger, stamped, key):
        augment_key, attack_key = jax.random.split(key)
        images, trigger, stamped = constrain((images, trigger, stamped))
        images = config.augmented(images, augment_key)
        others = perturb(classifier, state.variables, images, labels, attack_key, config.adversary)
        with_trigger = config.stamped(images, trigger, jax.random.fold_in(augment_key, 1))
        images = jnp.where(stamped[:, None, None, None], with_trigger, others)
        return update(state, images, labels)

    return stamped_update


def _choose_stamped(result: InversionResult, weights: Array, config: StepConfig) -> Array:
    """Return [D, V] bool, the victims to stamp: as many on both sides, none with a bad trigger.

    The first slots of a class are taken; its samples are in random order.
    """
    sides = 2 if config.symmetric else 1
    fewest = jnp.repeat(weights.sum(1).reshape(-1, sides).min(1), sides)[:, None]
    count = jnp.maximum(1, jnp.floor(config.stamp_share * fewest))
    limit = config.max_trigger_share * result.trigger.pattern[0].size
    good = result.found & (result.size <= limit)
    position = jnp.cumsum(weights, axis=1)
    return (weights > 0) & (position <= count) & good[:, None]
