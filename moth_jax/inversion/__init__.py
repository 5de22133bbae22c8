"""Trigger inversion: one file per method, all driven by the one loop in `loop.invert`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

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
from moth_jax.inversion.standard import Standard
from moth_jax.inversion.trimmed import Trimmed

Method = TypeVar("Method")
INVERSIONS: dict[str, type[Inversion]] = {
    "neural_cleanse": NeuralCleanse,
    "pixel": Pixel,
    "trimmed": Trimmed,
}
# What distances are searched by: an ensemble of inversions, or one.
Search = Standard | Inversion
# What distances are measured by where nobody says otherwise (experiments/studies/inversions.py).
DEFAULT = "trimmed"


def create(name: str, **options) -> Inversion:
    """Return the method called `name` of `INVERSIONS`; an option of None has its default.

    Raises:
      InputError: there is no such method, it has no such option, or an option is out of its range.

    >>> create("trimmed", success_bound=0.95, patience=None).success_bound
    0.95
    """
    if name == Standard.method:
        raise InputError(
            f"the inversion {name!r} is an ensemble that measures distances; choose one of "
            f"{', '.join(INVERSIONS)} here"
        )
    return _create(name, INVERSIONS, options)


def create_search(name: str, **options) -> Search:
    """Return the search of distances called `name`, "standard" or one of `INVERSIONS`.

    The rest is as in `create`.

    >>> create_search("standard").name
    'standard-1(0.9)'
    """
    return _create(name, {Standard.method: Standard, **INVERSIONS}, options)


def _create(name: str, choices: Mapping[str, type[Method]], options: dict[str, Any]) -> Method:
    require_choice("inversion", name, choices)
    known = [field.name for field in dataclasses.fields(choices[name])]  # pyright: ignore
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := [option for option in given if option not in known]:
        raise InputError(
            f"the inversion {name!r} has no option {unknown[0]!r} (it has {', '.join(known)}); "
            "leave it out, or choose another inversion"
        )
    return choices[name](**given)


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
    "Search",
    "Standard",
    "Trimmed",
    "create",
    "create_search",
    "invert",
    "invert_directions",
    "start_triggers",
]
