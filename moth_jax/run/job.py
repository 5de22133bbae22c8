"""One run as its phases see it: its options, its data, and what of them it is about."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moth_jax import backdoors
from moth_jax.data import ImageDataset
from moth_jax.data.checks import normal_name
from moth_jax.distance.directions import DirectionChoice, choose_directions
from moth_jax.errors import InputError
from moth_jax.hardening.base import HardeningConfig
from moth_jax.models.loading import AUTO
from moth_jax.options import POSITIVE_SHARE, SEED, SHARE, option
from moth_jax.progress import Progress
from moth_jax.run.metrics import MetricWriter, NoMetrics
from moth_jax.training import TrainingConfig

Options = TypeVar("Options")

SPLITS = ("train", "validation", "test")
_MAX_NAMES = 50


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Where the model of a run comes from.

    Attributes:
      name: of the architecture; "auto" reads it off the checkpoint.
      checkpoint: a file that `models.loading.load_source` reads, or a checkpoint folder of this
        package; "" trains a model.
      builder, trust, weights: as in `load_source`.
      mean, std: of the pixels that the model expects; () for those of the checkpoint or the data.
      fine_tune: train the checkpoint's model before it is measured, with a new head if its own has
        another number of classes than the data.
    """

    name: str = AUTO
    checkpoint: str = ""
    builder: str = ""
    trust: str = "nothing"
    weights: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    fine_tune: bool = False


@dataclasses.dataclass(frozen=True)
class BackdoorOptions:
    """The backdoor of a run: planted in a model that is trained here, and measured in any.

    Only the original model is trained on poisoned images; measuring and hardening see clean ones.

    Attributes:
      kind: one of `backdoors.ATTACKS`; "" for no backdoor.
      target: name of a class.
      victims: names of classes; () for all but the target.
      rate, cover_rate: as in `backdoors.poison`.
      seed: of the choice of images and of the trigger.
      of_attack: the attack's own options; those not given have its defaults.
    """

    kind: str = ""
    target: str = ""
    victims: tuple[str | int, ...] = ()
    rate: float = option(0.1, POSITIVE_SHARE)
    cover_rate: float = option(0.1, SHARE)
    seed: int = option(0, SEED)
    of_attack: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """All that the phases of one run need; made by `configuration.make_job`.

    Attributes:
      request: what was asked for, the value of config.phase.
      identity: a digest of the options that decide the results (`configuration.identity`).
      seed: of training, hardening, and the choice of directions.
      dataset: the data set.
      classes: labels of the classes that are measured and hardened among each other.
      directions: those to measure, the same before and after; where the nearest are asked for,
        those among which they are looked for.
      backdoor: what is planted or measured; None for none.
      poisoning: how it is planted.
      model: where the model comes from.
      training: options of training it.
      method: name of the method of hardening (`hardening.METHODS`).
      hardening: its options.
      check_order: whether classes in another order than the model's outputs are refused.
      clean_share: share of each class's training images that hardening may use.
      checkpoint_seconds: least time between two checkpoints within a phase.
      workdir: the work folder.
      progress: where progress is shown.
      metrics: where figures are recorded as the run goes.
      sections: options of the phases, by their types (`options`).
    """

    request: str
    identity: str
    seed: int
    dataset: ImageDataset
    classes: tuple[int, ...]
    directions: DirectionChoice
    backdoor: backdoors.Backdoor | None
    poisoning: BackdoorOptions
    model: ModelOptions
    training: TrainingConfig
    method: str
    hardening: HardeningConfig
    check_order: bool
    clean_share: float
    checkpoint_seconds: float
    workdir: Path
    progress: Progress
    metrics: MetricWriter | NoMetrics
    sections: Mapping[type, Any]

    def options(self, kind: type[Options]) -> Options:
        """Return the options of this type, such as `MeasureOptions`."""
        return self.sections[kind]

    @property
    def is_subset(self) -> bool:
        """Whether there are images of classes besides `classes`."""
        return not set(self.dataset.present) <= set(self.classes)


def choose_classes(names: Iterable, dataset: ImageDataset) -> tuple[int, ...]:
    """Return the labels of the classes in `names`, in their order; () for ().

    Raises:
      InputError: there is no class of such a name, or fewer than two are named.
    """
    names = list(names)
    labels = _labels("classes", names, dataset)
    if names and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise InputError(
            f"classes must name at least 2 different classes, got {', '.join(map(str, names))}"
        )
    return labels


def choose_measured(
    classes: tuple[int, ...],
    dataset: ImageDataset,
    *,
    victims: Iterable = (),
    targets: Iterable = (),
    num_directions: int = 0,
    nearest: int = 0,
    seed: int = 0,
) -> DirectionChoice:
    """Return the directions to measure, the same before and after.

    Args:
      classes: labels of the classes to measure among each other.
      dataset: the data set, which knows the names.
      victims, targets: names of classes to measure from and to; () for all of `classes`.
      num_directions: how many to draw by `seed`; 0 for all.
      nearest: how many of the nearest will be chosen among those that are returned; 0 for all.
      seed: of the draw.

    Raises:
      InputError: an unknown class, or one outside `classes`; more directions than there are; or
        both numbers are given.
    """
    ends = {}
    for name, names in (("victims", victims), ("targets", targets)):
        ends[name] = _labels(f"distance.{name}", names, dataset)
        outside = [dataset.class_names[k] for k in ends[name] if k not in classes]
        if outside:
            raise InputError(
                f"distance.{name} must be among the chosen classes, got {', '.join(outside)}; add "
                "them to classes"
            )
    if nearest and num_directions:
        raise InputError(
            "distance.nearest and distance.num_directions are two ways to choose directions: "
            f"leave one of them at 0, got {nearest} and {num_directions}"
        )
    every = choose_directions(classes, **ends)
    most = every.details["of"]
    for name, count in (("num_directions", num_directions), ("nearest", nearest)):
        if not 0 <= count <= most:
            raise InputError(f"distance.{name} must be in 0..{most}, got {count}")
    if not num_directions:
        return every
    return choose_directions(classes, **ends, num_directions=num_directions, seed=seed)


def choose_backdoor(options: BackdoorOptions, dataset: ImageDataset) -> backdoors.Backdoor | None:
    """Return the backdoor that the options describe, None if it is of no kind.

    Raises:
      InputError: an unknown class or option, or a trigger that does not fit into the images.
    """
    if not options.kind:
        return None
    if not options.target:
        raise InputError("backdoor.target must name a class, got ''")
    (target,) = _labels("backdoor.target", [_name(options.target, dataset)], dataset)
    of_attack = dict(options.of_attack)
    if "seed" in backdoors.options(options.kind):
        of_attack["seed"] = options.seed
    victims = [_name(victim, dataset) for victim in options.victims]
    return backdoors.Backdoor(
        backdoors.create(options.kind, dataset.image_shape, **of_attack),
        target,
        _labels("backdoor.victims", victims, dataset),
        options.kind,
    )


def _name(given, dataset: ImageDataset) -> str:
    """Return the name of a class that is given by name or, if no class has it, by number."""
    given, names = str(given), dataset.class_names
    is_number = given not in names and given.isdecimal() and int(given) < len(names)
    return names[int(given)] if is_number else given


def _labels(field: str, names: Iterable, dataset: ImageDataset) -> tuple[int, ...]:
    """Return the labels of `names`, the value of a field, in the order given."""
    labels = {name: k for k, name in enumerate(dataset.class_names)}
    names = [normal_name(str(name)) for name in names]
    unknown = sorted(set(names) - labels.keys())
    if unknown:
        more = len(labels) - _MAX_NAMES
        raise InputError(
            f"unknown classes in {field}: {', '.join(unknown)}; the classes are: "
            f"{', '.join(dataset.class_names[:_MAX_NAMES])}"
            + (f" and {more} more" if more > 0 else "")
        )
    return tuple(labels[name] for name in names)
