"""The phases of a run by name, in the order in which they are done.

A new one is a file with a `Phase` and a line here.
"""

from moth_jax.run.phases import (
    accuracy,
    backdoor,
    harden,
    measure,
    original,
    robustness,
    scan,
)
from moth_jax.run.phases.base import REPORT, Models, Phase

__all__ = ["PHASES", "Models", "Phase", "asked", "requests"]

PHASES = {
    "original": original.PHASE,
    "measure_before": measure.BEFORE,
    "harden": harden.PHASE,
    "measure_after": measure.AFTER,
    "scan": scan.PHASE,
    "backdoor": backdoor.PHASE,
    "robustness": robustness.PHASE,
    "accuracy": accuracy.PHASE,
}


def asked(request: str) -> list[Phase]:
    """Return the phases that a value of config.phase asks for, in order."""
    return [phase for phase in PHASES.values() if phase.is_asked(request)]


def requests() -> list[str]:
    """Return the values that config.phase may have."""
    of_phases = (request for phase in PHASES.values() for request in phase.requests or ())
    return list(dict.fromkeys(("all", "train", *of_phases, REPORT)))
