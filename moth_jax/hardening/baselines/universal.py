"""Universal: hardening with universal triggers, all other classes to one, instead of pairs."""

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
from moth_jax.hardening.warmup import draw_samples
from moth_jax.inversion import Budget, NeuralCleanse, start_triggers
from moth_jax.models import Classifier
from moth_jax.options import AT_LEAST_1, POSITIVE, POSITIVE_SHARE, SHARE, option
from moth_jax.triggers import Trigger
from moth_jax.types import Variables

_ORDER, _SAMPLES, _START = 1, 2, 3  # purposes of randomness


@dataclasses.dataclass(frozen=True)
class UniversalConfig(HardeningConfig):
    """Options of universal hardening; those it shares with `moth.MothConfig` mean the same.

    Attributes:
      num_images: samples of an inversion, about as many of each class.
      steps_per_round: training steps with one target, before the next one in random order.
    """

    num_images: int = option(100, AT_LEAST_1)
    steps_per_round: int = option(3, AT_LEAST_1)
    success_bound: float = option(0.9, POSITIVE_SHARE)
    first_steps: int = option(200, AT_LEAST_1)
    first_mask_weight: float = option(1e-3, POSITIVE)
    next_steps: int = option(50, AT_LEAST_1)
    next_mask_weight: float = option(1e-2, POSITIVE)
    minibatch_size: int = option(32, AT_LEAST_1)
    patience: int = option(10, AT_LEAST_1)
    stamp_share: float = option(0.1, SHARE)
    max_trigger_share: float = option(0.25, SHARE)


@as_method
def harden(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: UniversalConfig
) -> Stages:
    """Invert and train one target after the other; arguments and result as in `moth.harden`.

    Inversions start from the target's last trigger, with MOTH's budgets; the trigger is stamped on
    a share of the batch's samples of the other classes, which keep their true labels.
    """
    classes = config.chosen(dataset)
    tx = base.optimiser(config, dataset)
    update = make_stamped_update(classifier, tx, step_config(dataset, config))
    inversion = NeuralCleanse(success_bound=config.success_bound, patience=config.patience)
    invert = make_universal_inversion(classifier, inversion)
    members = class_indices(dataset.train.labels, dataset.num_classes)
    per_class = max(1, round(config.num_images / (len(classes) - 1)))
    limit = config.max_trigger_share * np.prod(dataset.image_shape)

    def begin(state: BaselineState) -> BaselineState:
        start = start_triggers(
            key_of(config, _START, 0), len(classes), dataset.image_shape, NeuralCleanse()
        )
        memory = {"mask": start.mask, "pattern": start.pattern, "found": jnp.zeros((), bool)}
        return dataclasses.replace(state, memory=memory)

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        memory, rng = state.memory, rng_of(config, _SAMPLES, index)
        position, place = _turn(config, index, len(classes))
        target = classes[position]
        afresh = place == 0 or not memory["found"]
        result = invert(
            state.train.variables,
            draw_samples(dataset.train, members, target, per_class, rng, classes=classes),
            target,
            key_of(config, _SAMPLES, index),
            budget=Budget(
                config.first_steps if afresh else config.next_steps,
                config.first_mask_weight if afresh else config.next_mask_weight,
                config.minibatch_size,
            ),
            start=Trigger(memory["mask"][position][None], memory["pattern"][position][None]),
        )
        size = float(result.sizes[0])
        batch = draw(dataset, config, index)
        is_victim = np.isin(batch.labels, classes) & (batch.labels != target)
        stamped = is_victim & (size <= limit) & (rng.random(len(is_victim)) < config.stamp_share)
        trigger = jax.tree.map(
            lambda v: jnp.broadcast_to(v, (len(stamped), *v.shape[1:])), result.trigger
        )
        train, loss = update(state.train, batch.images, batch.labels, trigger, stamped, batch.key)
        memory = _remember(memory, position, jax.tree.map(lambda v: v[0], result.trigger), size)
        figures = {
            "target": dataset.class_names[target],
            "size": size,
            "num_stamped": int(stamped.sum()),
            "loss": float(loss),
        }
        return dataclasses.replace(state, train=train, memory=memory), figures

    return Stages(tx=tx, step=step, begin=begin)


def _turn(config: UniversalConfig, index: int, num_classes: int) -> tuple[int, int]:
    """Return the position of a step's target among the classes, and the step's place in a round."""
    turn, place = divmod(index, config.steps_per_round)
    pass_number, turn = divmod(turn, num_classes)
    return int(rng_of(config, _ORDER, pass_number).permutation(num_classes)[turn]), place


def _remember(memory: dict, position: int, trigger: Trigger, size: float) -> dict:
    """Return the memory after an inversion: its trigger, if it found one."""
    if not np.isfinite(size):
        return {**memory, "found": jnp.zeros((), bool)}
    return {
        "mask": memory["mask"].at[position].set(trigger.mask),
        "pattern": memory["pattern"].at[position].set(trigger.pattern),
        "found": jnp.ones((), bool),
    }


METHOD = Method(harden, UniversalConfig, BaselineState)
