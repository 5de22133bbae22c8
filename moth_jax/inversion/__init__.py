"""Trigger inversion: one file per method, all driven by the one loop in `base.invert`."""

import inspect

from moth_jax.errors import InputError, require_choice
from moth_jax.inversion.base import Budget, Inversion, InversionResult
from moth_jax.inversion.loop import advance, begin, invert
from moth_jax.inversion.neural_cleanse import neural_cleanse
from moth_jax.inversion.precision import PRECISIONS, with_precision
from moth_jax.inversion.trimmed import trimmed
from moth_jax.types import LogitsFn, Variables

INVERSIONS = {"neural_cleanse": neural_cleanse, "trimmed": trimmed}
# What distances are measured by where nobody says otherwise (experiments/inversions.py).
DEFAULT = "trimmed"


def create(name: str, *, precision: str = "float32", **options) -> Inversion:
    """Return the method called `name`; an option of None is the method's own default.

    `precision` is that of the model while triggers are searched (`precision.with_precision`).

    Raises:
      InputError: there is no such method, it has no such option, or an option is out of its range.
    """
    require_choice("inversion", name, INVERSIONS)
    known = inspect.signature(INVERSIONS[name]).parameters
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := [option for option in given if option not in known]:
        raise InputError(
            f"the inversion {name!r} has no option {unknown[0]!r} (it has {', '.join(known)}); "
            "leave it out, or choose another inversion"
        )
    return with_precision(INVERSIONS[name](**given), precision)


__all__ = [
    "DEFAULT",
    "INVERSIONS",
    "PRECISIONS",
    "Budget",
    "Inversion",
    "InversionResult",
    "LogitsFn",
    "Variables",
    "advance",
    "begin",
    "create",
    "invert",
    "neural_cleanse",
    "trimmed",
    "with_precision",
]
