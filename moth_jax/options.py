"""The ranges of the numbers in a configuration, and in the options that it becomes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from moth_jax.errors import InputError


class _Range(NamedTuple):
    """The values a field may have, and how a message calls them."""

    name: str
    contains: Callable[[float], bool]


_AT_LEAST_1 = _Range("at least 1", lambda value: value >= 1)
_NOT_NEGATIVE = _Range("0 or more", lambda value: 0 <= value < math.inf)
_POSITIVE = _Range("above 0", lambda value: 0 < value < math.inf)
_SHARE = _Range("in [0, 1]", lambda value: 0 <= value <= 1)
_POSITIVE_SHARE = _Range("in (0, 1]", lambda value: 0 < value <= 1)
_BELOW_1 = _Range("in [0, 1)", lambda value: 0 <= value < 1)
_SEED = _Range("in [0, 2**31)", lambda value: 0 <= value < 2**31)

_ADVERSARY_RANGES = {"epsilon": _SHARE, "step_size": _POSITIVE, "num_steps": _AT_LEAST_1}
RANGES = {
    "seed": _SEED,
    "checkpoint_seconds": _NOT_NEGATIVE,
    "clean_share": _POSITIVE_SHARE,
    "mesh": {"devices": _NOT_NEGATIVE},
    "backdoor": {"rate": _POSITIVE_SHARE, "cover_rate": _SHARE, "seed": _SEED},
    "robustness": {
        "epsilon": _SHARE,
        "step_size": _POSITIVE,
        "num_steps": _AT_LEAST_1,
        "num_images": _AT_LEAST_1,
    },
    "training": {
        "epochs": _AT_LEAST_1,
        "batch_size": _AT_LEAST_1,
        "learning_rate": _POSITIVE,
        "momentum": _BELOW_1,
        "weight_decay": _NOT_NEGATIVE,
        "adversary": _ADVERSARY_RANGES,
    },
    "distance": {
        "num_directions": _NOT_NEGATIVE,
        "nearest": _NOT_NEGATIVE,
        "num_images": _AT_LEAST_1,
        "num_steps": _AT_LEAST_1,
        "minibatch_size": _AT_LEAST_1,
        "mask_weight": _POSITIVE,
        "patience": _AT_LEAST_1,
        "settle_after": _NOT_NEGATIVE,
        "success_bound": _POSITIVE_SHARE,
        "directions_per_chunk": _NOT_NEGATIVE,
    },
    "scan": {
        "threshold": _NOT_NEGATIVE,
        "num_images": _AT_LEAST_1,
        "num_steps": _AT_LEAST_1,
        "minibatch_size": _AT_LEAST_1,
        "mask_weight": _POSITIVE,
        "patience": _AT_LEAST_1,
        "success_bound": _SHARE,
        "max_pair_size": _POSITIVE,
        "max_universal_size": _POSITIVE,
        "min_ratio": _POSITIVE,
        "top_k": _NOT_NEGATIVE,
        "pair_share": _SHARE,
        "universal_share": _SHARE,
        "victims_per_target": _NOT_NEGATIVE,
        "min_pairs": _NOT_NEGATIVE,
        "min_universal": _NOT_NEGATIVE,
        "num_rounds": _NOT_NEGATIVE,
        "steps_per_round": _AT_LEAST_1,
        "warmup_rounds": _AT_LEAST_1,
        "random_share": _SHARE,
        "num_checked": _NOT_NEGATIVE,
        "arms_per_chunk": _NOT_NEGATIVE,
    },
}
# Of the options of all methods: one of a name means the same everywhere.
METHOD_RANGES = {
    "seed": _SEED,
    "epochs": _POSITIVE,
    "max_steps": _NOT_NEGATIVE,
    "max_accuracy_drop": _SHARE,
    "validate_every": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "victims_per_class": _AT_LEAST_1,
    "steps_per_round": _AT_LEAST_1,
    "pairs_per_step": _AT_LEAST_1,
    "random_share": _SHARE,
    "success_bound": _POSITIVE_SHARE,
    "first_steps": _AT_LEAST_1,
    "first_mask_weight": _POSITIVE,
    "next_steps": _AT_LEAST_1,
    "next_mask_weight": _POSITIVE,
    "warmup_steps": _AT_LEAST_1,
    "warmup_mask_weight": _POSITIVE,
    "warmup_success_bound": _POSITIVE_SHARE,
    "warmup_images_per_class": _AT_LEAST_1,
    "warmup_max_images": _AT_LEAST_1,
    "minibatch_size": _AT_LEAST_1,
    "patience": _AT_LEAST_1,
    "stamp_share": _SHARE,
    "max_trigger_share": _SHARE,
    "learning_rate": _POSITIVE,
    "momentum": _BELOW_1,
    "weight_decay": _NOT_NEGATIVE,
    "adversary": _ADVERSARY_RANGES,
    "closing_steps": _NOT_NEGATIVE,
    "closing_share": _SHARE,
    "closing_learning_rate": _POSITIVE,
    "trigger_memory_mb": _AT_LEAST_1,
    "num_images": _AT_LEAST_1,
    "epsilon": _POSITIVE_SHARE,
    "step_size": _POSITIVE,
    "ascent_steps": _AT_LEAST_1,
    "loss_bound": _POSITIVE,
    "inversion_steps": _AT_LEAST_1,
    "mask_weight": _POSITIVE,
    "teacher_epochs": _POSITIVE,
    "high_epochs": _NOT_NEGATIVE,
    "max_prune_drop": _SHARE,
}


def check_ranges(options: Any, ranges: dict, prefix: str = "") -> None:
    """Raise `InputError` at the first attribute of `options` that is out of its range.

    A field without a value (None) is what the method that it belongs to has for it.
    """
    for name, allowed in ranges.items():
        value = getattr(options, name)
        if isinstance(allowed, dict):
            check_ranges(value, allowed, f"{prefix}{name}.")
        elif value is not None and not allowed.contains(value):
            raise InputError(f"{prefix}{name} must be {allowed.name}, got {value}")


def check_options(options: Any, ranges: dict) -> None:
    """The same of a dataclass, which need not have all that there are `ranges` of."""
    names = [field.name for field in dataclasses.fields(options)]
    check_ranges(options, {name: ranges[name] for name in names if name in ranges})
