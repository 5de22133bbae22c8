"""Universal adversarial training (Shafahi et al., AAAI 2020): one perturbation for all images."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moth_jax.data.dataset import ImageDataset
from moth_jax.hardening import base
from moth_jax.hardening.base import HardeningConfig, Method
from moth_jax.hardening.baselines.stages import (
    BaselineState,
    Batch,
    Stages,
    as_method,
    draw,
    prepared_images,
)
from moth_jax.models import Classifier
from moth_jax.options import AT_LEAST_1, POSITIVE, POSITIVE_SHARE, option
from moth_jax.parallel.devices import constrain_replicated
from moth_jax.training import TrainState, make_update
from moth_jax.types import Variables


@dataclasses.dataclass(frozen=True)
class UapConfig(HardeningConfig):
    """Options of universal adversarial training.

    Attributes:
      epsilon: bound of every pixel's change, in units of [0, 1].
      step_size: of one ascent step by the gradient's sign.
      ascent_steps: before each training step.
      loss_bound: the largest loss that a sample counts with in the ascent, so that none dominates.
    """

    epsilon: float = option(8 / 255, POSITIVE_SHARE)
    step_size: float = option(2 / 255, POSITIVE)
    ascent_steps: int = option(1, AT_LEAST_1)
    loss_bound: float = option(9.0, POSITIVE)


def ascend(
    classifier: Classifier,
    variables: Variables,
    images: Array,
    labels: Array,
    perturbation: Array,
    config: UapConfig,
) -> Array:
    """Return the perturbation [h, w, c] after `ascent_steps` steps that raise the clipped loss."""

    def loss(perturbation: Array) -> Array:
        logits = classifier.predict(variables, jnp.clip(images + perturbation[None], 0.0, 1.0))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.minimum(losses, config.loss_bound).mean()

    def step(_: int, perturbation: Array) -> Array:
        moved = perturbation + config.step_size * jnp.sign(jax.grad(loss)(perturbation))
        return jnp.clip(moved, -config.epsilon, config.epsilon)

    return jax.lax.fori_loop(0, config.ascent_steps, step, perturbation)


@as_method
def harden(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: UapConfig
) -> Stages:
    """Train on images that carry the perturbation; arguments and result as in `moth.harden`.

    Note: With an adversary (for adversarially trained models) the perturbation is added to the
      images that the adversary perturbed, so a pixel may change by the sum of both bounds.
    """
    del variables
    tx = base.optimiser(config, dataset)
    update = make_update(classifier, tx, batch_norm=config.batch_norm)
    images_of = prepared_images(classifier, dataset, config)

    @jax.jit
    def train_step(
        train: TrainState, perturbation: Array, batch: Batch
    ) -> tuple[TrainState, Array, Array]:
        images, labels = images_of(train.variables, batch), jnp.asarray(batch.labels)
        perturbation = ascend(classifier, train.variables, images, labels, perturbation, config)
        perturbed = jnp.clip(images + perturbation[None], 0.0, 1.0)
        train, loss = update(train, perturbed, labels)
        return train, constrain_replicated(perturbation), loss

    def begin(state: BaselineState) -> BaselineState:
        return dataclasses.replace(
            state, memory={"perturbation": jnp.zeros(dataset.image_shape, jnp.float32)}
        )

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        train, perturbation, loss = train_step(
            state.train, state.memory["perturbation"], draw(dataset, config, index)
        )
        memory = {"perturbation": perturbation}
        return dataclasses.replace(state, train=train, memory=memory), {"loss": float(loss)}

    return Stages(tx=tx, step=step, begin=begin)


METHOD = Method(harden, UapConfig, BaselineState)
