"""What a hardening is between two rounds, and its randomness."""

import dataclasses

import jax
import numpy as np
from jax import Array

from moth_jax.models import Variables
from moth_jax.moth_config import MothConfig
from moth_jax.scheduler import KArmState
from moth_jax.training import TrainState
from moth_jax.trigger_bank import TriggerBank

WARM_UP, BATCH, SELECT = 1, 2, 3  # purposes of randomness


@dataclasses.dataclass
class MothState:
    """All that a hardening is between two rounds; saved whole, resumed exactly.

    Scheduler, bank and warm-up know the K classes that are hardened among each other by their
    positions in `MothConfig.chosen`, not by their labels. Randomness is derived from the seed and
    the step, so there is no generator to save.

    Attributes:
      train: the model in training.
      kept: variables of the last check within the accuracy bound.
      scheduler: the arms; None before the warm-up is done.
      bank: triggers to start from.
      warmed_up: how many of the classes have been warmed up as the target.
      step: main training steps done.
      initial_accuracy: validation accuracy before hardening.
      accuracy, accuracy_step: validation accuracy at the last check, and the step of it.
      kept_step: the step of `kept`.
      stopped: why it ended ("" while it goes on).
      warmup_sizes, warmup_prior: [K, K] what the warm-up found so far.
    """

    train: TrainState
    kept: Variables
    scheduler: KArmState | None
    bank: TriggerBank
    warmed_up: int
    step: int
    initial_accuracy: float
    accuracy: float
    accuracy_step: int
    kept_step: int
    stopped: str
    warmup_sizes: np.ndarray
    warmup_prior: np.ndarray


def rng_of(config: MothConfig, purpose: int, step: int) -> np.random.Generator:
    """Return the generator of one purpose at one step: the same after a resumption."""
    return np.random.default_rng([config.seed, purpose, step])


def key_of(config: MothConfig, purpose: int, step: int) -> Array:
    """The same for randomness on the device."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), step)
