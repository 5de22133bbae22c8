"""The state of MOTH between two rounds."""

import dataclasses

import numpy as np

from moth_jax.hardening.base import HardeningState
from moth_jax.hardening.scheduler import KArmState
from moth_jax.hardening.trigger_bank import TriggerBank


@dataclasses.dataclass
class MothState(HardeningState):
    """What MOTH knows between two rounds, beside what every method knows.

    Scheduler, bank and warm-up number the K classes that are hardened among each other by their
    positions in `MothConfig.chosen`, not by their labels. Randomness is derived from the seed and
    the step, so there is no generator to save.

    Attributes:
      scheduler: the arms; they know nothing before the warm-up is done.
      bank: triggers to start from.
      warmed_up: how many of the classes have been warmed up as the target.
      warmup_sizes, warmup_prior: [K, K], what the warm-up found so far.
      universal_sizes: [K], sizes of the universal triggers beside the directions' own
        (`MothConfig.universal_too`); inf where there is none.
    """

    scheduler: KArmState
    bank: TriggerBank
    warmed_up: int
    warmup_sizes: np.ndarray
    warmup_prior: np.ndarray
    universal_sizes: np.ndarray

    def positions(self) -> dict[str, int]:
        """Return the last step whose record is part of this state, by phase."""
        return {"warm-up": self.warmed_up - 1, "hardening": self.step - 1}

    def to_arrays(self) -> tuple[dict, dict]:
        """Return the state as a tree of arrays and a JSON dict."""
        arrays, metadata = super().to_arrays()
        arrays["bank"] = self.bank.arrays
        arrays["warmup"] = {
            "sizes": self.warmup_sizes,
            "prior": self.warmup_prior,
            "universal_sizes": self.universal_sizes,
        }
        arrays["scheduler"] = self.scheduler._asdict()
        return arrays, {**metadata, "warmed_up": self.warmed_up}

    @classmethod
    def _own_fields(cls, arrays: dict, metadata: dict) -> dict:
        warmup = arrays["warmup"]
        return {
            "scheduler": KArmState(**arrays["scheduler"]),
            "bank": TriggerBank.from_arrays(arrays.get("bank", {})),
            "warmed_up": metadata["warmed_up"],
            "warmup_sizes": warmup["sizes"],
            "warmup_prior": warmup["prior"],
            "universal_sizes": warmup["universal_sizes"],
        }
