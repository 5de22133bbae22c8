"""Backdoors: what attackers plant, to see whether hardening takes it out.

One file per attack; a new one is a function of the image's shape with keyword-only options, and a
line in `ATTACKS`.
"""

import inspect
import typing
from collections.abc import Iterable

import numpy as np

from moth_jax.backdoors.base import Backdoor, Stamp
from moth_jax.backdoors.blend import blend
from moth_jax.backdoors.filter import photo_filter
from moth_jax.backdoors.patch import patch
from moth_jax.backdoors.poisoning import poison
from moth_jax.backdoors.polygon import polygon
from moth_jax.backdoors.success import AttackSuccess, attack_success
from moth_jax.errors import InputError, require_choice
from moth_jax.types import ImageShape

__all__ = [
    "ATTACKS",
    "AttackSuccess",
    "Backdoor",
    "Stamp",
    "attack_success",
    "check_known",
    "create",
    "option_types",
    "options",
    "poison",
]

ATTACKS = {"blend": blend, "filter": photo_filter, "patch": patch, "polygon": polygon}


def create(kind: str, image_shape: ImageShape, **chosen) -> Stamp:
    """Return the stamp of the attack `kind` of `ATTACKS` with its options.

    Raises:
      InputError: for an unknown kind or option, a value out of range, and later for images that are
        not float32 [n, h, w, c] of that shape.

    Example:
      >>> create("patch", (8, 8, 1), width=3)
      Traceback (most recent call last):
      ...
      moth_jax.errors.InputError: backdoor 'patch' has no option width; its options are: colour, \
margin, position, seed, size
    """
    check_known(kind, chosen)
    attack = ATTACKS[kind](image_shape, **chosen)

    def stamp(images: np.ndarray) -> np.ndarray:
        # Others would be stamped in the wrong place or with the wrong brightness.
        if images.dtype != np.float32 or images.shape[1:] != tuple(image_shape):
            raise InputError(
                f"images to stamp must be float32 [n, {', '.join(map(str, image_shape))}] in "
                f"[0, 1], got {images.dtype} {list(images.shape)}"
            )
        return attack(images)

    return stamp


def check_known(kind: str, chosen: Iterable[str]) -> None:
    """Raise `InputError` for an unknown attack, or options that it does not have."""
    allowed = options(kind)
    unknown = [option for option in chosen if option not in allowed]
    if unknown:
        raise InputError(
            f"backdoor {kind!r} has no option {', '.join(unknown)}; its options are: "
            f"{', '.join(allowed)}"
        )


def options(kind: str) -> list[str]:
    """Return the names of the options of the attack `kind`."""
    require_choice("backdoor", kind, ATTACKS)
    return sorted(set(inspect.signature(ATTACKS[kind]).parameters) - {"image_shape"})


def option_types() -> dict[str, type]:
    """Return the type of every option of any attack: one of a name has one type everywhere.

    >>> option_types()["size"], option_types()["colour"]
    (<class 'int'>, <class 'tuple'>)
    """
    types = {}
    for kind, attack in ATTACKS.items():
        parameters = inspect.signature(attack).parameters
        for name in options(kind):
            annotation = parameters[name].annotation
            types[name] = typing.get_origin(annotation) or annotation
    return types
