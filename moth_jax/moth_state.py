"""What a hardening is between two rounds."""

import dataclasses

import numpy as np

from moth_jax.addon import AddOnState
from moth_jax.scheduler import KArmState
from moth_jax.trigger_bank import TriggerBank


@dataclasses.dataclass
class MothState(AddOnState):
    """All that a hardening is between two rounds, beside what every method knows.

    Scheduler, bank and warm-up know the K classes that are hardened among each other by their
    positions in `MothConfig.chosen`, not by their labels. Randomness is derived from the seed and
    the step, so there is no generator to save.

    Attributes:
      scheduler: the arms; None before the warm-up is done.
      bank: triggers to start from.
      warmed_up: how many of the classes have been warmed up as the target.
      warmup_sizes, warmup_prior: [K, K] what the warm-up found so far.
      universal_sizes: [K], of the universal triggers beside the directions' own
        (`MothConfig.universal_too`); inf where there is none.
    """

    scheduler: KArmState | None
    bank: TriggerBank
    warmed_up: int
    warmup_sizes: np.ndarray
    warmup_prior: np.ndarray
    universal_sizes: np.ndarray

    def positions(self) -> dict[str, int]:
        """Return the last step whose record is part of this state, by phase."""
        return {"warm-up": self.warmed_up - 1, "hardening": self.step - 1}
