"""The configuration of a run: defaults, and how its parts become the options of the functions.

Configuration files (`configs/*.py`) define `get_config()`, which changes what `default_config`
returns. Every option of a dataclass (`MothConfig`, `TrainingConfig`) is there under its own name,
so there is one list of options and one place that documents each.
"""

import dataclasses
import functools
import math

import ml_collections

from moth_jax import data
from moth_jax.errors import InputError, require_choice
from moth_jax.inversion import INVERSIONS
from moth_jax.models import MODELS
from moth_jax.moth import MothConfig
from moth_jax.training import BATCH_NORM_MODES, Adversary, TrainingConfig

PHASES = ("all", "train", "measure", "harden", "report")
METHODS = ("moth",)
SPLITS = ("train", "validation", "test")
AUTO = "auto"

_RANGES = (
    (
        "at least 1",
        lambda value: value >= 1,
        """distance.num_images distance.num_steps distance.minibatch_size distance.patience
        training.epochs training.batch_size training.adversary.num_steps
        harden.steps_per_round harden.validate_every harden.victims_per_class harden.batch_size
        harden.pairs_per_step harden.first_steps harden.next_steps harden.warmup_steps
        harden.warmup_images_per_class harden.minibatch_size harden.patience
        harden.trigger_capacity harden.adversary.num_steps""",
    ),
    (
        "0 or more",
        lambda value: 0 <= value < math.inf,
        """distance.num_directions distance.directions_per_chunk harden.max_steps
        training.weight_decay harden.weight_decay checkpoint_seconds""",
    ),
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        """distance.mask_weight training.learning_rate harden.learning_rate harden.epochs
        harden.first_mask_weight harden.next_mask_weight harden.warmup_mask_weight
        training.adversary.step_size harden.adversary.step_size""",
    ),
    (
        "in [0, 1]",
        lambda value: 0 <= value <= 1,
        """harden.max_accuracy_drop harden.random_share harden.stamp_share
        harden.max_trigger_share training.adversary.epsilon harden.adversary.epsilon""",
    ),
    (
        "in (0, 1]",
        lambda value: 0 < value <= 1,
        "distance.success_bound harden.success_bound harden.warmup_success_bound",
    ),
    ("in [0, 1)", lambda value: 0 <= value < 1, "training.momentum harden.momentum"),
    ("in [0, 2**31)", lambda value: 0 <= value < 2**31, "seed"),
)


def default_config() -> ml_collections.ConfigDict:
    """Return the published options, for a data set and a model that the file has yet to name.

    Fields:
      phase: "train" stops when there is a model, "measure" when its distances are known, "harden"
        hardens without measuring, "all" does everything, "report" writes the report anew.
      method: how to harden.
      seed: of training and hardening.
      data: name, and the options of its loader (`data.DATASETS`).
      model: name ("auto": read off the checkpoint), checkpoint (a file of PyTorch, safetensors or
        Keras weights, or a checkpoint folder of this package; "" trains one), mean and std of the
        pixels it expects (() for those of the checkpoint or the data).
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
            "data": {"name": "", "validation_fraction": 0.1, "seed": 0},
            "model": {"name": AUTO, "checkpoint": "", "mean": (), "std": ()},
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
    """Return the defaults of a dataclass of options, without the seed (a run has one)."""
    fields = dataclasses.asdict(options())
    del fields["seed"]
    return fields


def training_config(config: ml_collections.ConfigDict) -> TrainingConfig:
    """Return the options of training."""
    return _options(TrainingConfig, config.training, config.seed)


def moth_config(config: ml_collections.ConfigDict) -> MothConfig:
    """Return the options of hardening."""
    return _options(MothConfig, config.harden, config.seed)


def _options(options: type, node: ml_collections.ConfigDict, seed: int):
    fields = node.to_dict()
    return options(**{**fields, "adversary": Adversary(**fields["adversary"]), "seed": seed})


def check(config: ml_collections.ConfigDict) -> None:
    """Raise `InputError` at the first field whose value is no choice or out of range."""
    require_choice("phase", config.phase, PHASES)
    require_choice("method", config.method, METHODS)
    require_choice("data set", config.data.name, data.DATASETS)
    require_choice("model", config.model.name, (AUTO, *MODELS))
    require_choice("inversion", config.distance.inversion, INVERSIONS)
    require_choice("split", config.distance.split, SPLITS)
    require_choice("harden.batch_norm", config.harden.batch_norm, BATCH_NORM_MODES)
    for allowed, is_allowed, names in _RANGES:
        for name in names.split():
            value = functools.reduce(getattr, name.split("."), config)
            if not is_allowed(value):
                raise InputError(f"{name} must be {allowed}, got {value}")
    seeds = config.distance.seeds
    if not seeds or not all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds):
        raise InputError(
            f"distance.seeds must be whole numbers in [0, 2**31), such as (0, 1, 2), got {seeds}"
        )
    moth_config(config)


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
