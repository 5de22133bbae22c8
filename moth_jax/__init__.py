"""MOTH (Model Orthogonalization, IEEE S&P 2022) in JAX.

How easily does a small sticker flip this classifier, and how is it made harder?

    from moth_jax import distance
    matrix = distance.distance_matrix(logits_fn, images, labels)

The modules follow the paper: `triggers` (Definition III.1), `inversion` and `distance` (Definition
III.2), `warmup` and `scheduler` (Section IV-C), `hardening` (Section IV-B), `moth` (Figure 5).
`baselines` has the methods it is compared with (Section V-B), on what `addon` gives to all, and
`methods` their list; `scanning` says whether a model looks poisoned (Section VI-A), and `backdoors`
poisons one, to see the backdoor removed (Section VI-B).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moth_jax.distance import DistanceMatrix, class_distance, distance_matrix, relative_increase
    from moth_jax.errors import InputError
    from moth_jax.moth import MothConfig, harden
    from moth_jax.triggers import Trigger, stamp, trigger_size

__version__ = "0.1.0"

__all__ = [
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
_MODULES = {
    "distance": ("DistanceMatrix", "class_distance", "distance_matrix", "relative_increase"),
    "errors": ("InputError",),
    "moth": ("MothConfig", "harden"),
    "triggers": ("Trigger", "stamp", "trigger_size"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"moth_jax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"moth_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moth_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_HOMES})
