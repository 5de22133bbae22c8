"""The configuration of a run: its defaults, its checks, and the `Job` that is made from it.

Configuration files (`configs/*.py`) define `get_config()`, which changes what `default_config`
returns. Its parts are the fields of dataclasses (`MothConfig`, `MeasureOptions`, ...) under their
own names, so there is one list of options and one place that documents each. No other module but
the command knows of `ConfigDict`s.
"""

import dataclasses
import hashlib
import json
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from moth_jax import backdoors, data
from moth_jax.errors import InputError, require_choice
from moth_jax.hardening import METHODS
from moth_jax.hardening.base import HardeningConfig
from moth_jax.hardening.moth import MothConfig
from moth_jax.models import MODELS
from moth_jax.models.classifier import check_normalisation
from moth_jax.models.loading import AUTO, TRUST, check_architecture, head_is_fixed
from moth_jax.options import (
    BELOW_1,
    BYTES,
    NOT_NEGATIVE,
    POSITIVE_SHARE,
    SEED,
    check_option,
    check_options,
    option,
)
from moth_jax.progress import Progress
from moth_jax.run.job import (
    BackdoorOptions,
    Job,
    ModelOptions,
    choose_backdoor,
    choose_classes,
    choose_measured,
)
from moth_jax.run.metrics import MetricWriter, NoMetrics
from moth_jax.run.phases import PHASES, requests
from moth_jax.run.phases.measure import MeasureOptions
from moth_jax.training import BATCH_NORM_MODES, Adversary, TrainingConfig

# A ConfigDict: its fields are of any type, and the library annotates them as a union of some.
Config = Any
_NO_METRICS = NoMetrics()


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of the run as a whole.

    Attributes:
      phase: "train" stops when there is a model, "measure" when its distances are known, "harden"
        hardens without measuring, "all" does everything, "scan" says whether the model looks
        poisoned, "report" writes the report anew.
      method: how to harden (`hardening.METHODS`).
      seed: of training and hardening.
      classes: names of the classes to measure and harden among each other; () for all that have
        images. The others' images are trained on as they are.
      check_order: refuse a model whose predictions show that the classes of the data are in another
        order than its outputs.
      clean_share: share of each class's training images that hardening may use; published 0.05 for
        the removal of backdoors.
      checkpoint_seconds: least time between two checkpoints within a phase.
    """

    phase: str = "all"
    method: str = "moth"
    seed: int = option(0, SEED)
    classes: tuple[str | int, ...] = ()
    check_order: bool = True
    clean_share: float = option(1.0, POSITIVE_SHARE)
    checkpoint_seconds: float = option(30.0, NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """`devices`: how many devices of every process compute; 0 for all."""

    devices: int = option(0, NOT_NEGATIVE)


def default_config() -> Config:
    """Return the published options, for a data set and a model that the file has yet to name.

    Fields: those of `RunOptions`, and the sections
      data: name, and the options of its loader (`data.DATASETS`).
      model: `job.ModelOptions`.
      backdoor: `job.BackdoorOptions`, and the options of the attacks (`backdoors.ATTACKS`), None
        for an attack's own default.
      training: `training.TrainingConfig`.
      distance, scan, robustness: `MeasureOptions`, `ScanPhaseOptions` and `RobustnessOptions` of
        the files in `run/phases/`; a phase says itself which sections it has.
      harden: `hardening.MothConfig`, for the methods "moth" and "pairwise".
      universal, uap, nc, nad, adversarial, fine_tuning, fine_pruning: the options of these methods
        (`hardening/baselines/`).
      mesh: `MeshOptions`.
    """
    config: Config = ml_collections.ConfigDict(
        {
            **dataclasses.asdict(RunOptions()),
            "data": {"name": "", "validation_fraction": 0.1, "seed": 0},
            "model": _fields(ModelOptions),
            "backdoor": {**_fields(BackdoorOptions), **_attack_options(), "seed": 0},
            "training": _fields(TrainingConfig),
            **{name: _fields(options) for name, options in _phase_sections().items()},
            "mesh": _fields(MeshOptions),
            **{node_of(name): _fields(method.config) for name, method in METHODS.items()},
        }
    )
    # A field mistyped in a configuration file is found; the options of data depend on its name.
    config.lock()
    config.data.unlock()
    return config


def _phase_sections() -> dict[str, type]:
    """Return the sections that the phases have of their own, by name."""
    return {name: of for phase in PHASES.values() for name, of in phase.options.items()}


def _attack_options() -> dict:
    """Return a field without a value for every option of any attack, by its type."""
    types = backdoors.option_types()
    return {name: config_dict.placeholder(types[name]) for name in types}


_OF_THE_RUN = ("seed", "check_order")  # one for all sections
_NO_FIELDS = (*_OF_THE_RUN, "classes", "of_attack")


def _fields(options: type) -> dict:
    """Return the defaults of a dataclass of options that are fields of its section."""
    fields = dataclasses.asdict(options())
    for field in dataclasses.fields(options):
        if fields[field.name] is None:  # a value may be set, of the other type of "... | None"
            fields[field.name] = config_dict.placeholder(typing.get_args(field.type)[0])
    return {name: value for name, value in fields.items() if name not in _NO_FIELDS}


def node_of(method: str) -> str:
    """Return the name of the section that holds a method's options."""
    return "harden" if METHODS[method].config is MothConfig else method


_TRAINED = ("training", *map(node_of, METHODS))  # the sections that train


def set_adversary(config: Config, adversary: Adversary, *, parts: Sequence[str] = ()) -> None:
    """Let an adversary perturb the images in some sections of a configuration.

    Without `parts` it does in training and in every method: the model is trained adversarially,
    and whichever method hardens it goes on with that.

    >>> config = default_config()
    >>> set_adversary(config, Adversary(epsilon=0.03))
    >>> config.training.adversary.epsilon, config.uap.adversary.epsilon
    (0.03, 0.03)
    """
    for part in parts or _TRAINED:
        config[part].adversary.update(dataclasses.asdict(adversary))


def check(config: Config) -> None:
    """Raise `InputError` at the first field whose value is no choice or out of range."""
    require_choice("phase", config.phase, requests())
    require_choice("method", config.method, METHODS)
    require_choice("data set", config.data.name, data.DATASETS)
    check_options(config.model, of=ModelOptions, prefix="model.")
    _check_model(config)
    _check_backdoor(config)
    for part in _TRAINED:
        require_choice(f"{part}.batch_norm", config[part].batch_norm, BATCH_NORM_MODES)
    _check_data_options(config)
    check_options(config, of=RunOptions)
    methods = {node_of(name): method.config for name, method in METHODS.items()}
    sections = {
        "backdoor": BackdoorOptions,
        "training": TrainingConfig,
        "mesh": MeshOptions,
        **methods,
        **_phase_sections(),
    }
    for name, options in sections.items():
        check_options(config[name], of=options, prefix=f"{name}.")
    phase_options(config)
    for name, options in methods.items():  # also of the methods that this run does not use
        try:
            _options(options, config, name)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


_RANGES_OF_DATA = {"seed": SEED, "validation_fraction": BELOW_1, "in_memory_limit": BYTES}


def _check_data_options(config: Config) -> None:
    """Raise `InputError` at an option of the data that their loader does not have, or its type."""
    given, hints = data_options(config), typing.get_type_hints(data.DATASETS[config.data.name])
    data.check_known(config.data.name, given)
    for name, value in given.items():
        if value is not None:
            check_option(f"data.{name}", value, hints[name], _RANGES_OF_DATA.get(name))


def _check_model(config: Config) -> None:
    require_choice("model.trust", config.model.trust, TRUST)
    for name in ("mean", "std"):
        if config.model[name] != ():
            check_normalisation(**{"mean": None, "std": None, name: config.model[name]})
    if config.model.checkpoint:  # it may be of any of torchvision's
        if not config.model.builder and not head_is_fixed(
            config.model.checkpoint, config.model.trust
        ):
            check_architecture(config.model.name)
    else:
        require_choice("model", config.model.name, (AUTO, *MODELS))
        given = {name: config.model[name] for name in ("builder", "trust", "weights")}
        unread = [f"model.{name}" for name, value in given.items() if value not in ("", TRUST[0])]
        if unread:
            raise InputError(
                f"{', '.join(unread)} says how to read model.checkpoint, which names none; give a "
                "checkpoint, or leave that out to train a model"
            )
    if config.model.fine_tune and not config.model.checkpoint:
        raise InputError(
            "model.fine_tune trains a given model further, and model.checkpoint names none; leave "
            "it False to train one from scratch"
        )


def _check_backdoor(config: Config) -> None:
    given = backdoor_options(config)
    if given.kind:
        backdoors.check_known(given.kind, given.of_attack)
        return
    unread = [name for name in ("target", "victims") if config.backdoor[name]]
    unread += given.of_attack
    if unread:
        warnings.warn(
            f"backdoor.{' and backdoor.'.join(unread)} is given, but no backdoor.kind: none is "
            "planted",
            stacklevel=2,
        )


def make_job(
    config: Config,
    dataset: data.ImageDataset,
    workdir: Path,
    *,
    progress: Progress,
    metrics: MetricWriter | NoMetrics = _NO_METRICS,
) -> Job:
    """Return the job of a configuration: names of classes become labels, sections dataclasses.

    Raises:
      InputError: what the configuration names does not exist in the data, or does not fit it.
    """
    named = choose_classes(config.classes, dataset)
    classes = method_config(config, named).chosen(dataset)
    sections = phase_options(config)
    measured = sections[MeasureOptions]
    poisoning = backdoor_options(config)
    return Job(
        request=config.phase,
        identity=identity(config),
        seed=config.seed,
        dataset=dataset,
        classes=classes,
        directions=choose_measured(
            classes,
            dataset,
            victims=measured.victims,
            targets=measured.targets,
            num_directions=measured.num_directions,
            nearest=measured.nearest,
            seed=config.seed,
        ),
        backdoor=choose_backdoor(poisoning, dataset),
        poisoning=poisoning,
        model=ModelOptions(**config.model.to_dict()),
        training=training_config(config),
        method=config.method,
        hardening=method_config(config, classes),
        check_order=config.check_order,
        clean_share=config.clean_share,
        checkpoint_seconds=config.checkpoint_seconds,
        workdir=workdir,
        progress=progress,
        metrics=metrics,
        sections=sections,
    )


def phase_options(config: Config) -> dict[type, Any]:
    """Return the options of the phases by their types.

    Raises:
      InputError: a value is no choice, or out of its range.
    """
    return {of: _options(of, config, name) for name, of in _phase_sections().items()}


def training_config(config: Config) -> TrainingConfig:
    """Return the options of training."""
    return _options(TrainingConfig, config, "training")


def method_config(config: Config, classes: tuple[int, ...] = ()) -> HardeningConfig:
    """Return the options of `config.method`; `classes` are the labels of `config.classes`."""
    options = METHODS[config.method].config
    return dataclasses.replace(_options(options, config, node_of(config.method)), classes=classes)


def backdoor_options(config: Config) -> BackdoorOptions:
    """Return the options of the backdoor; those of its attack that are None are left out."""
    fields = config.backdoor.to_dict()
    own = {field.name for field in dataclasses.fields(BackdoorOptions)}
    of_attack = {
        name: value for name, value in fields.items() if name not in own and value is not None
    }
    given = {name: value for name, value in fields.items() if name in own}
    return BackdoorOptions(**given, of_attack=of_attack)


def _options(options: type, config: Config, section: str) -> Any:
    """Return a section as its dataclass, with what the run has one of for all of them."""
    fields = config[section].to_dict()
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(field.default):
            fields[field.name] = type(field.default)(**fields[field.name])
        elif field.name in _OF_THE_RUN:
            fields[field.name] = config[field.name]
    return options(**fields)


# The memory of a step grows with these options of the methods that have them.
_MEMORY_OPTIONS = ("batch_size", "victims_per_class", "warmup_max_images", "num_images")


def memory_fields(config: Config) -> str:
    """Return the fields that a run on the same devices needs less memory with if they are lower."""
    section = node_of(config.method)
    fields = [f"{section}.{name}" for name in _MEMORY_OPTIONS if name in config[section]]
    return f"training.batch_size or {', '.join(fields)}"


def load_data(config: Config) -> data.ImageDataset:
    """Return the data set of a configuration."""
    return data.load(config.data.name, **data_options(config))


def data_options(config: Config) -> dict:
    """Return the options of the data set's loader."""
    return {name: value for name, value in config.data.to_dict().items() if name != "name"}


def num_devices(config: Config) -> int:
    """Return how many devices of every process compute, 0 for all."""
    return config.mesh.devices


def as_json(config: Config) -> dict:
    """Return the configuration as JSON can carry it."""
    return json.loads(config.to_json_best_effort())


# Fields that change no result but by rounding: the same run may go on with others.
_FREE_FIELDS = ("phase", "check_order", "checkpoint_seconds", "distance.directions_per_chunk")
# What these ask for is made anew if their own fields differ.
_FREE_PARTS = ("scan.", "robustness.", "mesh.")


def decisive(fields: dict) -> dict:
    """Return the fields that decide a result, by their full names."""
    return {
        name: value
        for name, value in _flat(fields).items()
        if name not in _FREE_FIELDS and not name.startswith(_FREE_PARTS)
    }


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def identity(config: Config) -> str:
    """Return a digest of the fields that decide a result, by which results know their run.

    Fields at their defaults do not count: a later version may have more of them.
    """
    ours, defaults = map(decisive, map(as_json, (config, default_config())))
    changed = {name: value for name, value in ours.items() if value != defaults.get(name)}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()


def field_names(config: Config, prefix: str = "config") -> list[str]:
    """Return the full names of all fields, as they are given on the command line."""
    names = []
    for name, value in config.items():
        full = f"{prefix}.{name}"
        nested = isinstance(value, ml_collections.ConfigDict)
        names += field_names(value, full) if nested else [full]
    return names
