"""MOTH (Model Orthogonalization, IEEE S&P 2022) in JAX.

How easily does a small sticker flip this classifier, and how is it made harder?

    from moth_jax import distance
    matrix = distance.distance_matrix(logits_fn, images, labels)

The packages follow the paper. `triggers` is Definition III.1, `inversion` and `distance` are
Definition III.2. `hardening` holds MOTH (Section IV) and the methods it is compared with (Section
V-B). `scanning` says whether a model looks poisoned (Section VI-A), and `backdoors` poisons one, to
see the backdoor removed (Section VI-B). `docs/architecture.md` draws the whole.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moth_jax.distance.matrix import DistanceMatrix, relative_increase
    from moth_jax.distance.measure import class_distance, distance_matrix
    from moth_jax.errors import InputError
    from moth_jax.hardening.moth import MothConfig, harden
    from moth_jax.triggers import AddedTrigger, Trigger, stamp, trigger_size

__version__ = "0.1.0"

__all__ = [
    "AddedTrigger",
    "DistanceMatrix",
    "InputError",
    "MothConfig",
    "Trigger",
    "class_distance",
    "distance_matrix",
    "harden",
    "relative_increase",
    "stamp",
    "trigger_size",
]

# Imported when asked for: the commands must be able to take a signal before JAX is there.
_HOMES = {
    "distance.matrix": ("DistanceMatrix", "relative_increase"),
    "distance.measure": ("class_distance", "distance_matrix"),
    "errors": ("InputError",),
    "hardening.moth": ("MothConfig", "harden"),
    "triggers": ("AddedTrigger", "Trigger", "stamp", "trigger_size"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
_PARTS = ("backdoors", "data", "distance", "hardening", "inversion", "models", "scanning")


def __getattr__(name: str):
    if name in _PARTS:
        return importlib.import_module(f"moth_jax.{name}")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"moth_jax.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'moth_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, *_MODULE_OF})
