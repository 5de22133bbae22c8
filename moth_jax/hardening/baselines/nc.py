"""NC: Neural Cleanse's unlearning (Wang et al., S&P 2019), for every class as the target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moth_jax.data.dataset import ImageDataset
from moth_jax.data.sampling import class_indices
from moth_jax.hardening import base
from moth_jax.hardening.base import HardeningConfig, Method, key_of, rng_of
from moth_jax.hardening.baselines.stages import (
    BaselineState,
    Stages,
    as_method,
    draw,
    make_universal_inversion,
    step_config,
)
from moth_jax.hardening.step import make_stamped_update
from moth_jax.hardening.warmup import WarmUpResult, draw_samples
from moth_jax.inversion import Budget, NeuralCleanse
from moth_jax.models import Classifier
from moth_jax.options import AT_LEAST_1, POSITIVE, POSITIVE_SHARE, option
from moth_jax.triggers import Trigger
from moth_jax.types import Variables

_INVERT, _CHOOSE = 1, 2  # purposes of randomness


@dataclasses.dataclass(frozen=True)
class NcConfig(HardeningConfig):
    """Options of unlearning by Neural Cleanse; published with 10 % of the training images.

    Attributes:
      stamp_share: share of the images that are stamped.
      num_images: samples of an inversion, about as many of each class.
      inversion_steps, mask_weight, success_bound, minibatch_size, patience: of the inversions
        (`inversion.neural_cleanse`).
    """

    epochs: float = option(1.0, POSITIVE)
    stamp_share: float = option(0.2, POSITIVE_SHARE)
    num_images: int = option(100, AT_LEAST_1)
    inversion_steps: int = option(500, AT_LEAST_1)
    mask_weight: float = option(1e-3, POSITIVE)
    success_bound: float = option(0.99, POSITIVE_SHARE)
    minibatch_size: int = option(32, AT_LEAST_1)
    patience: int = option(10, AT_LEAST_1)


@as_method
def harden(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: NcConfig
) -> Stages:
    """Invert a universal trigger for every class, then train with them stamped on true labels.

    Arguments and result as in `moth.harden`.

    Note: Neural Cleanse unlearns the trigger of the class that it took for the backdoor's target. A
      defender who hardens does not know the target, so every stamped image gets the trigger of a
      random class other than its own.
    """
    del variables
    classes = config.chosen(dataset)
    tx = base.optimiser(config, dataset)
    update = make_stamped_update(classifier, tx, step_config(dataset, config))
    invert = make_universal_inversion(
        classifier, NeuralCleanse(success_bound=config.success_bound, patience=config.patience)
    )
    budget = Budget(config.inversion_steps, config.mask_weight, config.minibatch_size)
    members = class_indices(dataset.train.labels, dataset.num_classes)
    per_class = max(1, round(config.num_images / (len(classes) - 1)))

    def prepare(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        target, rng = classes[index], rng_of(config, _INVERT, index)
        samples = draw_samples(dataset.train, members, target, per_class, rng, classes=classes)
        inputs = state.train.variables, samples, target, key_of(config, _INVERT, index)
        result = invert(*inputs, budget=budget)
        figures = {"target": dataset.class_names[target], "size": float(result.sizes[0])}
        return dataclasses.replace(state, memory=_remember(state.memory, result)), figures

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        batch, memory = draw(dataset, config, index), jax.device_get(state.memory)
        rng = rng_of(config, _CHOOSE, index)
        row = rng.integers(len(classes), size=len(batch.labels))
        is_victim = np.isin(batch.labels, classes) & (np.asarray(classes)[row] != batch.labels)
        found = np.isfinite(memory["size"])[row]
        stamped = is_victim & found & (rng.random(len(row)) < config.stamp_share)
        trigger = Trigger(memory["mask"][row], memory["pattern"][row])
        train, loss = update(state.train, batch.images, batch.labels, trigger, stamped, batch.key)
        figures = {"num_stamped": int(stamped.sum()), "loss": float(loss)}
        return dataclasses.replace(state, train=train), figures

    return Stages(tx=tx, step=step, prepare=prepare, num_prepare=len(classes))


def _remember(memory: dict, result: WarmUpResult) -> dict:
    """Return `memory` with one more trigger [T, ...] and its size [T] (inf: not found)."""
    trigger = result.trigger
    found = {"mask": trigger.mask, "pattern": trigger.pattern, "size": result.sizes[:1]}
    if not memory:
        return found
    return {name: jnp.concatenate([memory[name], value]) for name, value in found.items()}


METHOD = Method(harden, NcConfig, BaselineState)
