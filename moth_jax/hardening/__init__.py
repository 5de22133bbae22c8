"""The methods of hardening by name: MOTH, and those it is compared with (Section V-B).

All have one signature, that of `moth.harden`. A new method is a file in `baselines/` and a line
here.
"""

from moth_jax.hardening import moth
from moth_jax.hardening.base import Method
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

__all__ = ["METHODS", "Method"]

METHODS: dict[str, Method] = {
    "moth": moth.METHOD,
    "pairwise": pairwise.METHOD,
    "universal": universal.METHOD,
    "uap": uap.METHOD,
    "nc": nc.METHOD,
    "nad": nad.METHOD,
    "adversarial": adversarial.METHOD,
    "fine_tuning": fine_tuning.METHOD,
    "fine_pruning": fine_pruning.METHOD,
}
