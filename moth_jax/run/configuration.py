"""The configuration of a run: defaults, and how its parts become the options of the functions.

Configuration files (`configs/*.py`) define `get_config()`, which changes what `default_config`
returns. Every option of a dataclass (`MothConfig`, `TrainingConfig`) is there under its own name,
so there is one list of options and one place that documents each.
"""

import dataclasses
import typing
import warnings
from collections.abc import Sequence

import ml_collections
from ml_collections import config_dict

from moth_jax import backdoors, data
from moth_jax.errors import InputError, require_choice
from moth_jax.hardening import METHODS
from moth_jax.hardening.base import HardeningConfig
from moth_jax.hardening.moth import MothConfig
from moth_jax.inversion import DEFAULT, Inversion, create
from moth_jax.models import MODELS
from moth_jax.models.loading import AUTO, TRUST
from moth_jax.options import check_options
from moth_jax.scanning import SCANNERS, ScanOptions
from moth_jax.training import BATCH_NORM_MODES, Adversary, TrainingConfig

PHASES = ("all", "train", "measure", "harden", "scan", "report")
SPLITS = ("train", "validation", "test")


def default_config() -> ml_collections.ConfigDict:
    """Return the published options, for a data set and a model that the file has yet to name.

    Fields:
      phase: "train" stops when there is a model, "measure" when its distances are known, "harden"
        hardens without measuring, "all" does everything, "scan" says whether the model looks
        poisoned, "report" writes the report anew.
      method: how to harden.
      seed: of training and hardening.
      classes: names of the classes to measure and harden among each other; () for all there are
        images of. The others' images are trained on as they are.
      data: name, and the options of its loader (`data.DATASETS`).
      model: name ("auto": read off the checkpoint), checkpoint (a file that
        `models.sources.load_source` reads, or a checkpoint folder of this package; "" trains one),
        builder and trust as there, mean and std of the pixels it expects (() for those of the
        checkpoint or the data), fine_tune: train the checkpoint's model as `training` says before
        it is measured, and give it a new head if its own has another number of classes than the
        data.
      backdoor: what is planted in the model that is trained here, and measured in any: kind
        ("" for none; `backdoors.ATTACKS`), target and victims (names of classes; () for all but the
        target), rate and cover_rate of `backdoors.poison`, seed of the choice of images and of the
        trigger; the other fields are the attacks' options, None for an attack's own default. Only
        the original model is trained on poisoned images; measuring and hardening see the clean
        ones.
      training: `training.TrainingConfig`.
      distance: `distance.distance_matrix`, with the inversion's name (`inversion.INVERSIONS`), its
        patience, success_bound and precision; None for what the inversion was made for;
        the split whose images are used, and which directions: victims, targets: names of classes to measure from and to
        (() for all); of these num_directions, drawn at random by the run's seed (0 for all), or the
        nearest so many as universal triggers of the given model find them
        (`nearest.nearest_directions`; 0 for all).
      scan: `scanning.ScanOptions`, with the method (`scanning.SCANNERS`), the split whose images
        are used, and the threshold of its statistic (`scanning.calibrate`; 0 for the method's own).
        Where "distance" has measured all directions, "pairs" takes those distances as they are.
      robustness: the attack under which accuracy is measured as well (`evaluation.pgd_accuracy`):
        epsilon (0 for none) and step_size in units of [0, 1], num_steps, and num_images of the test
        set (`robustness.attacked_images`). Published: 8/255 and 20 steps of 2/255 for CIFAR-10,
        0.03 and 100 of 0.001 for SVHN and GTSRB, 0.1 and 100 of 0.01 for LISA.
      harden: `moth.MothConfig`, for the methods "moth" and "pairwise".
      universal, uap, nc, nad, adversarial, fine_tuning, fine_pruning: the options of these methods
        (`methods.METHODS`, `baselines/`).
      clean_share: share of each class's training images that hardening may use; published 0.05 for
        the removal of backdoors.
      mesh: devices: how many to compute on, of every process as many (0 for all).
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
                "fine_tune": False,
            },
            "backdoor": {
                "kind": "",
                "target": "",
                "victims": (),
                "rate": 0.1,
                "cover_rate": 0.1,
                "seed": 0,
                **_attack_options(),
            },
            "training": _fields(TrainingConfig),
            "distance": {
                "split": "test",
                "victims": (),
                "targets": (),
                "num_directions": 0,
                "nearest": 0,
                "num_images": 100,
                "num_steps": config_dict.placeholder(int),
                "minibatch_size": config_dict.placeholder(int),
                "mask_weight": config_dict.placeholder(float),
                "seeds": (0,),
                "inversion": DEFAULT,
                "precision": "float32",
                "patience": config_dict.placeholder(int),
                "success_bound": 0.9,
                "directions_per_chunk": 0,
            },
            "scan": {
                "method": "neural_cleanse",
                "split": "test",
                "threshold": 0.0,
                **_fields(ScanOptions),
            },
            "robustness": {
                "epsilon": 0.0,
                "step_size": 2 / 255,
                "num_steps": 20,
                "num_images": 1000,
            },
            "mesh": {"devices": 0},
            "clean_share": 1.0,
            **{node_of(name): _fields(method.config) for name, method in METHODS.items()},
            "checkpoint_seconds": 30.0,
        }
    )
    # A field mistyped in a configuration file is found; the options of data depend on its name.
    config.lock()
    config.data.unlock()
    return config


def _attack_options() -> dict:
    """Return a field without a value for every option of any attack but the seed, by its type."""
    types = backdoors.option_types()
    return {name: config_dict.placeholder(types[name]) for name in types if name != "seed"}


def _fields(options: type) -> dict:
    """Return the defaults of a dataclass of options, without those that a whole run has."""
    fields = dataclasses.asdict(options())
    for field in dataclasses.fields(options):
        if fields[field.name] is None:  # a value may be set, of the other type of "... | None"
            fields[field.name] = config_dict.placeholder(typing.get_args(field.type)[0])
    return {name: value for name, value in fields.items() if name not in ("seed", "classes")}


def training_config(config: ml_collections.ConfigDict) -> TrainingConfig:
    """Return the options of training."""
    return _options(TrainingConfig, config.training, seed=config.seed)


def method_config(
    config: ml_collections.ConfigDict, classes: tuple[int, ...] = ()
) -> HardeningConfig:
    """Return the options of `config.method`; `classes` are the labels of `config.classes`."""
    options = METHODS[config.method].config
    node = config[node_of(config.method)]
    return _options(options, node, seed=config.seed, classes=classes)


def node_of(method: str) -> str:
    """Return the name of the part of a configuration that holds a method's options."""
    return "harden" if METHODS[method].config is MothConfig else method


_TRAINED = ("training", *map(node_of, METHODS))  # the parts that train


def set_adversary(
    config: ml_collections.ConfigDict, adversary: Adversary, *, parts: Sequence[str] = ()
) -> None:
    """Let an adversary perturb the images in some parts of a configuration.

    Without `parts` it does in training and in every method: the model is trained adversarially,
    and whichever method hardens it goes on with that.

    >>> config = default_config()
    >>> set_adversary(config, Adversary(epsilon=0.03))
    >>> config.training.adversary.epsilon, config.uap.adversary.epsilon
    (0.03, 0.03)
    """
    for part in parts or _TRAINED:
        config[part].adversary.update(dataclasses.asdict(adversary))


def scan_options(config: ml_collections.ConfigDict) -> ScanOptions:
    """Return the options of scanning."""
    fields = config.scan.to_dict()
    of_the_run = ("method", "split", "threshold")
    options = {name: value for name, value in fields.items() if name not in of_the_run}
    return ScanOptions(**options, seed=config.seed)


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
    if config.model.fine_tune and not config.model.checkpoint:
        raise InputError(
            "model.fine_tune trains a given model further, and model.checkpoint names none; leave "
            "it False to train one from scratch"
        )
    if config.backdoor.kind:
        require_choice("backdoor", config.backdoor.kind, backdoors.ATTACKS)
    elif config.backdoor.target or config.backdoor.victims:
        warnings.warn(
            "backdoor.target or victims is given, but no backdoor.kind: none is planted",
            stacklevel=2,
        )
    require_choice("split", config.distance.split, SPLITS)
    require_choice("scan.method", config.scan.method, SCANNERS)
    require_choice("scan.split", config.scan.split, SPLITS)
    for part in _TRAINED:
        require_choice(f"{part}.batch_norm", config[part].batch_norm, BATCH_NORM_MODES)
    check_options(config.training, of=TrainingConfig, prefix="training.")
    check_options(config.scan, of=ScanOptions, prefix="scan.")
    distance_inversion(config)
    for name, method in METHODS.items():
        part = node_of(name)
        check_options(config[part], of=method.config, prefix=f"{part}.")
    seeds = config.distance.seeds
    if not seeds or not all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds):
        raise InputError(
            f"distance.seeds must be whole numbers in [0, 2**31), such as (0, 1, 2), got {seeds}"
        )
    method_config(config)


def distance_inversion(config: ml_collections.ConfigDict) -> Inversion:
    """Return the method by which distances are measured.

    Raises:
      InputError: there is no such method, or an option is none of it or out of its range.
    """
    options = config.distance
    return create(
        options.inversion,
        precision=options.precision,
        patience=options.patience,
        success_bound=options.success_bound,
    )


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
