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
