"""Pairwise: symmetric hardening of all pairs in random order, without warm-up and scheduler."""

import dataclasses

from moth_jax.data.dataset import ImageDataset
from moth_jax.hardening import moth
from moth_jax.hardening.base import Method
from moth_jax.hardening.moth import MothConfig, MothState
from moth_jax.models import Classifier
from moth_jax.progress import Progress
from moth_jax.types import Variables


def harden(
    classifier: Classifier,
    variables: Variables,
    dataset: ImageDataset | tuple,
    config: MothConfig,
    *,
    state: MothState | None = None,
    on_round: moth.OnRound | None = None,
    progress: bool | Progress = True,
) -> MothState:
    """Harden pair after pair: `moth.harden` with the scheduler "sweep".

    Note: The published Pairwise goes through all pairs for as long as it takes (up to 1,683
      minutes). Here it has the budget of its options, as every method has; one pass over the pairs
      takes `steps_per_round` * K(K-1)/2 steps.
    """
    options = {"state": state, "on_round": on_round, "progress": progress}
    return moth.harden(classifier, variables, dataset, _sweeping(config), **options)


def check_fit(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: MothConfig
) -> None:
    """Raise `InputError` if model, data and options do not fit, before anything is computed."""
    moth.check_fit(classifier, variables, dataset, _sweeping(config))


def _sweeping(config: MothConfig) -> MothConfig:
    return dataclasses.replace(config, scheduler="sweep")


METHOD = Method(harden, MothConfig, MothState, moth.optimiser, check_fit)
