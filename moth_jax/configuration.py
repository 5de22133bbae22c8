"""The configuration of a run: defaults, and how its parts become the options of the functions.

Configuration files (`configs/*.py`) define `get_config()`, which changes what `default_config`
returns. Every option of a dataclass (`MothConfig`, `TrainingConfig`) is there under its own name,
so there is one list of options and one place that documents each.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from moth_jax import data
from moth_jax.errors import InputError, require_choice
from moth_jax.inversion import INVERSIONS
from moth_jax.models import MODELS
from moth_jax.models.sources import AUTO, TRUST
from moth_jax.moth import MothConfig
from moth_jax.training import BATCH_NORM_MODES, Adversary, TrainingConfig

PHASES = ("all", "train", "measure", "harden", "report")
METHODS = ("moth",)
SPLITS = ("train", "validation", "test")


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
_RANGES = {
    "seed": _SEED,
    "checkpoint_seconds": _NOT_NEGATIVE,
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
        "num_images": _AT_LEAST_1,
        "num_steps": _AT_LEAST_1,
        "minibatch_size": _AT_LEAST_1,
        "mask_weight": _POSITIVE,
        "patience": _AT_LEAST_1,
        "success_bound": _POSITIVE_SHARE,
        "directions_per_chunk": _NOT_NEGATIVE,
    },
    "harden": {
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
        "minibatch_size": _AT_LEAST_1,
        "patience": _AT_LEAST_1,
        "stamp_share": _SHARE,
        "max_trigger_share": _SHARE,
        "learning_rate": _POSITIVE,
        "momentum": _BELOW_1,
        "weight_decay": _NOT_NEGATIVE,
        "adversary": _ADVERSARY_RANGES,
        "trigger_capacity": _AT_LEAST_1,
    },
}


def default_config() -> ml_collections.ConfigDict:
    """Return the published options, for a data set and a model that the file has yet to name.

    Fields:
      phase: "train" stops when there is a model, "measure" when its distances are known, "harden"
        hardens without measuring, "all" does everything, "report" writes the report anew.
      method: how to harden.
      seed: of training and hardening.
      classes: names of the classes to measure and harden among each other; () for all there are
        images of. The others' images are trained on as they are.
      data: name, and the options of its loader (`data.DATASETS`).
      model: name ("auto": read off the checkpoint), checkpoint (a file that
        `models.sources.load_source` reads, or a checkpoint folder of this package; "" trains one),
        builder and trust as there, mean and std of the pixels it expects (() for those of the
        checkpoint or the data).
      training: `training.TrainingConfig`.
      distance: `distance.distance_matrix`, with patience and success_bound of the inversion, the
        split whose images are used, victims: names of classes to measure from (() for all), and
        num_directions: so many directions, drawn at random by the run's seed (0 for all).
      harden: `moth.MothConfig`.
      checkpoint_seconds: least time between two checkpoints within a phase.
    """
    config = ml_collections.ConfigDict(
        {
            "phase": "all",
            "method": "moth",
            "seed": 0,
            "classes": (),
            "data": {"name": "", "validation_fraction": 0.1, "seed": 0},
            "model": {
                "name": AUTO,
                "checkpoint": "",
                "builder": "",
                "trust": "nothing",
                "mean": (),
                "std": (),
            },
            "training": _fields(TrainingConfig),
            "distance": {
                "split": "test",
                "victims": (),
                "num_directions": 0,
                "num_images": 100,
                "num_steps": 1000,
                "minibatch_size": 32,
                "mask_weight": 1e-3,
                "seeds": (0,),
                "inversion": "neural_cleanse",
                "patience": 10,
                "success_bound": 0.9,
                "directions_per_chunk": 0,
            },
            "harden": _fields(MothConfig),
            "checkpoint_seconds": 30.0,
        }
    )
    # A field mistyped in a configuration file is found; the options of data depend on its name.
    config.lock()
    config.data.unlock()
    return config


def _fields(options: type) -> dict:
    """Return the defaults of a dataclass of options, without those that a whole run has."""
    fields = dataclasses.asdict(options())
    return {name: value for name, value in fields.items() if name not in ("seed", "classes")}


def training_config(config: ml_collections.ConfigDict) -> TrainingConfig:
    """Return the options of training."""
    return _options(TrainingConfig, config.training, seed=config.seed)


def moth_config(config: ml_collections.ConfigDict, classes: tuple[int, ...] = ()) -> MothConfig:
    """Return the options of hardening; `classes` are the labels of `config.classes`."""
    return _options(MothConfig, config.harden, seed=config.seed, classes=classes)


def _options(options: type, node: ml_collections.ConfigDict, **of_the_run):
    fields = node.to_dict()
    return options(**{**fields, "adversary": Adversary(**fields["adversary"]), **of_the_run})


def check(config: ml_collections.ConfigDict) -> None:
    """Raise `InputError` at the first field whose value is no choice or out of range."""
    require_choice("phase", config.phase, PHASES)
    require_choice("method", config.method, METHODS)
    require_choice("data set", config.data.name, data.DATASETS)
    if not config.model.checkpoint:  # else it may be any of torchvision
        require_choice("model", config.model.name, (AUTO, *MODELS))
    require_choice("model.trust", config.model.trust, TRUST)
    require_choice("inversion", config.distance.inversion, INVERSIONS)
    require_choice("split", config.distance.split, SPLITS)
    require_choice("harden.batch_norm", config.harden.batch_norm, BATCH_NORM_MODES)
    _check_ranges(config, _RANGES)
    seeds = config.distance.seeds
    if not seeds or not all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds):
        raise InputError(
            f"distance.seeds must be whole numbers in [0, 2**31), such as (0, 1, 2), got {seeds}"
        )
    moth_config(config)


def _check_ranges(config: ml_collections.ConfigDict, ranges: dict, prefix: str = "") -> None:
    for name, allowed in ranges.items():
        if isinstance(allowed, dict):
            _check_ranges(config[name], allowed, f"{prefix}{name}.")
        elif not allowed.contains(config[name]):
            raise InputError(f"{prefix}{name} must be {allowed.name}, got {config[name]}")


def data_options(config: ml_collections.ConfigDict) -> dict:
    """Return the options of the data set's loader."""
    return {name: value for name, value in config.data.to_dict().items() if name != "name"}


def field_names(config: ml_collections.ConfigDict, prefix: str = "config") -> list[str]:
    """Return the full names of all fields, as they are given on the command line."""
    names = []
    for name, value in config.items():
        full = f"{prefix}.{name}"
        nested = isinstance(value, ml_collections.ConfigDict)
        names += field_names(value, full) if nested else [full]
    return names
