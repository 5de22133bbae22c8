"""Trigger inversion: one file per method, all driven by the one loop in `loop.invert`."""

import dataclasses

from moth_jax.errors import InputError, require_choice
from moth_jax.inversion.base import (
    PRECISIONS,
    Budget,
    Inversion,
    InversionResult,
    Samples,
)
from moth_jax.inversion.directions import invert_directions, start_triggers
from moth_jax.inversion.loop import invert
from moth_jax.inversion.neural_cleanse import NeuralCleanse
from moth_jax.inversion.pixel import Pixel
from moth_jax.inversion.trimmed import Trimmed

INVERSIONS: dict[str, type[Inversion]] = {
    "neural_cleanse": NeuralCleanse,
    "pixel": Pixel,
    "trimmed": Trimmed,
}
# What distances are measured by where nobody says otherwise (experiments/studies/inversions.py).
DEFAULT = "trimmed"


def create(name: str, **options) -> Inversion:
    """Return the method called `name` of `INVERSIONS`; an option of None has its default.

    Raises:
      InputError: there is no such method, it has no such option, or an option is out of its range.

    >>> create("trimmed", success_bound=0.95, patience=None).success_bound
    0.95
    """
    require_choice("inversion", name, INVERSIONS)
    known = [field.name for field in dataclasses.fields(INVERSIONS[name])]
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := [option for option in given if option not in known]:
        raise InputError(
            f"the inversion {name!r} has no option {unknown[0]!r} (it has {', '.join(known)}); "
            "leave it out, or choose another inversion"
        )
    return INVERSIONS[name](**given)


__all__ = [
    "DEFAULT",
    "INVERSIONS",
    "PRECISIONS",
    "Budget",
    "Inversion",
    "InversionResult",
    "NeuralCleanse",
    "Pixel",
    "Samples",
    "Trimmed",
    "create",
    "invert",
    "invert_directions",
    "start_triggers",
]
