"""Trigger inversion: one file per method, all driven by the one loop in `base.invert`."""

from moth_jax.inversion.base import (
    Inversion,
    InversionResult,
    LogitsFn,
    Variables,
    advance,
    begin,
    invert,
)
from moth_jax.inversion.neural_cleanse import neural_cleanse

INVERSIONS = {"neural_cleanse": neural_cleanse}

__all__ = [
    "INVERSIONS",
    "Inversion",
    "InversionResult",
    "LogitsFn",
    "Variables",
    "advance",
    "begin",
    "invert",
    "neural_cleanse",
]
