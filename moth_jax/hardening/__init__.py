"""The methods of hardening by name: MOTH, and those it is compared with (Section V-B).

All have one signature, `moth.harden`'s. A new one is a file in `baselines/` and a line here.
"""

from collections.abc import Callable
from typing import NamedTuple

import optax

from moth_jax.hardening import moth
from moth_jax.hardening.base import HardeningConfig, HardeningState, check_fit
from moth_jax.hardening.baselines import (
    adversarial,
    fine_pruning,
    fine_tuning,
    nad,
    nc,
    pairwise,
    uap,
    universal,
)
from moth_jax.hardening.baselines.stages import BaselineState, optimiser_structure
from moth_jax.hardening.moth import MothConfig, MothState

__all__ = ["METHODS", "Method"]


class Method(NamedTuple):
    """A method of hardening.

    Attributes:
      harden: as `moth.harden`.
      config: the type of its options.
      state: the type of its state.
      tx: (options, data set) -> an optimiser of the structure of the state's.
      check: (classifier, variables, data set, options) -> None; raises `InputError` where `harden`
        would, before anything is trained.
    """

    harden: Callable[..., HardeningState]
    config: type[HardeningConfig]
    state: type[HardeningState] = BaselineState
    tx: Callable[..., optax.GradientTransformation] = lambda config, dataset: optimiser_structure()
    check: Callable[..., None] = check_fit


METHODS = {
    "moth": Method(moth.harden, MothConfig, MothState, moth.optimiser, moth.check_fit),
    "pairwise": Method(pairwise.harden, MothConfig, MothState, moth.optimiser, pairwise.check_fit),
    "universal": Method(universal.harden, universal.UniversalConfig),
    "uap": Method(uap.harden, uap.UapConfig),
    "nc": Method(nc.harden, nc.NcConfig),
    "nad": Method(nad.harden, nad.NadConfig, check=nad.check_fit),
    "adversarial": Method(adversarial.harden, adversarial.AdversarialConfig),
    "fine_tuning": Method(fine_tuning.harden, fine_tuning.FineTuningConfig),
    "fine_pruning": Method(
        fine_pruning.harden, fine_pruning.FinePruningConfig, check=fine_pruning.check_fit
    ),
}
