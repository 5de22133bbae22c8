"""The contract of a method of hardening: its entry, its options, its state, and when it ends.

MOTH and the methods it is compared with (Section V-B) take a trained model, train it a little more,
each in its own way, and stop when the budget is spent or the accuracy has fallen too far.
"""

import abc
import dataclasses
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jax import Array

from moth_jax.data.checks import check_labels
from moth_jax.data.dataset import ImageDataset, as_split
from moth_jax.data.splitting import split_validation
from moth_jax.errors import InputError, listed, require_choice
from moth_jax.evaluation import accuracy, check_function, check_loss, predictions
from moth_jax.models import Classifier
from moth_jax.models.classifier import complete
from moth_jax.options import (
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    check_options,
    option,
    whole_numbers,
)
from moth_jax.outputs import check_order
from moth_jax.training import (
    NO_ADVERSARY,
    Adversary,
    TrainState,
    sgd,
    train_state_arrays,
    train_state_from_arrays,
)
from moth_jax.typed import shown
from moth_jax.types import Variables

SCHEDULES = ("constant", "cosine")
PHASES = ("warm-up", "preparation", "hardening")  # of records
_FEW, _BATCH_SIZE = 5, 256  # validation images of a class; training images instead of them
_VALIDATION_SHARE = 0.1  # of images that come without a validation part


@dataclasses.dataclass(frozen=True)
class HardeningConfig:
    """Options of every method; the defaults are those published for MOTH.

    Attributes:
      epochs: length of the main training in passes over the training images.
      max_steps: its length in steps instead; 0 means by epochs.
      max_accuracy_drop: bound of the fall in validation accuracy, as a share of 1. Past it the
        method stops and returns the last state within it; 1 turns the check off.
      validate_every: steps between two checks.
      batch_size: images per training step.
      batch_norm: "update" (as the authors' Keras code) or "frozen" (as their PyTorch code).
      learning_rate, momentum, weight_decay: of Nesterov SGD (`training.sgd`).
      schedule: "constant", as published, or "cosine": the learning rate falls to 0 over the main
        training, which gives back some of the accuracy.
      augment: flips and shifts, as the data set allows.
      adversary: PGD on the samples that the method does not change, for adversarially trained
        models.
      classes: label numbers of the classes to harden among each other, at least two; () for all
        that have training images. Images of other classes stay in the batches, without triggers.
      check_order: refuse labels that are in another order than the model's outputs, as its
        predictions of the validation images show.
      seed: of all randomness.
    """

    epochs: float = option(2.0, POSITIVE)
    max_steps: int = option(0, NOT_NEGATIVE)
    max_accuracy_drop: float = option(0.01, SHARE)
    validate_every: int = option(30, AT_LEAST_1)
    batch_size: int = option(128, AT_LEAST_1)
    batch_norm: str = "update"
    learning_rate: float = option(1e-3, POSITIVE)
    momentum: float = option(0.9, BELOW_1)
    weight_decay: float = option(1e-4, NOT_NEGATIVE)
    schedule: str = "constant"
    augment: bool = True
    adversary: Adversary = NO_ADVERSARY
    classes: tuple[int, ...] = ()
    check_order: bool = True
    seed: int = option(0, SEED)

    def __post_init__(self):
        # Compiled programs are kept under their options, and a list is not hashable.
        object.__setattr__(self, "classes", whole_numbers("classes", self.classes))
        require_choice("schedule", self.schedule, SCHEDULES)
        check_options(self)
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise InputError(
                f"classes must name at least 2 different classes, got {listed(self.classes)}"
            )

    def num_steps(self, num_images: int) -> int:
        """Return the number of main training steps on `num_images` training images."""
        return self.max_steps or max(1, round(self.epochs * num_images / self.batch_size))

    def chosen(self, dataset: ImageDataset) -> tuple[int, ...]:
        """Return the label numbers of the classes to harden among each other.

        Raises:
          InputError: `dataset` lacks one of `classes`, or has no training image of it.
        """
        chosen = self.classes or dataset.present
        outside = [k for k in chosen if not 0 <= k < dataset.num_classes]
        if outside:
            raise InputError(
                f"classes must be in 0..{dataset.num_classes - 1}, got {listed(outside)}"
            )
        present = set(dataset.present)
        empty = [dataset.class_names[k] for k in chosen if k not in present]
        if empty:
            raise InputError(
                f"no training images of {listed(empty)}; leave them out of the classes to harden"
            )
        return tuple(int(k) for k in chosen)


State = TypeVar("State", bound="HardeningState")
# The fields of a state that JSON can carry.
_PLAIN = ("step", "initial_accuracy", "accuracy", "accuracy_step", "kept_step", "stopped")


@dataclasses.dataclass
class HardeningState(abc.ABC):
    """What every method knows between two steps; saved whole, resumed exactly.

    Attributes:
      train: the model in training.
      kept: variables of the last check within the accuracy bound.
      step: main training steps done.
      initial_accuracy: validation accuracy before the method began.
      accuracy, accuracy_step: validation accuracy at the last check, and its step.
      kept_step: the step of `kept`.
      stopped: why the method ended: "budget" or "accuracy"; "" while it goes on.
    """

    train: TrainState
    kept: Variables
    step: int
    initial_accuracy: float
    accuracy: float
    accuracy_step: int
    kept_step: int
    stopped: str

    @abc.abstractmethod
    def positions(self) -> dict[str, int]:
        """Return the last step whose record is part of this state, by phase (`PHASES`)."""

    def to_arrays(self) -> tuple[dict, dict]:
        """Return the state as a tree of arrays and a JSON dict; a method adds its own fields."""
        arrays = {"train": train_state_arrays(self.train), "kept": self.kept}
        return arrays, {name: getattr(self, name) for name in _PLAIN}

    @classmethod
    def from_arrays(
        cls: type[State], arrays: dict, metadata: dict, tx: optax.GradientTransformation
    ) -> State:
        """Return the state that `to_arrays` took apart; `tx` is as `Method.tx`."""
        train = train_state_from_arrays(arrays["train"], tx)
        plain = {name: metadata[name] for name in _PLAIN}
        own = cls._own_fields(arrays, metadata)
        return cls(train=train, kept=complete(arrays["kept"]), **plain, **own)

    @classmethod
    def _own_fields(cls, arrays: dict, metadata: dict) -> dict:
        """Return the fields that a method has beside those of every method."""
        return {}


def initial_fields(
    classifier: Classifier, train: TrainState, dataset: ImageDataset, config: HardeningConfig
) -> dict:
    """Return the fields of the `HardeningState` of a model that is about to be trained.

    Raises:
      InputError: the model's outputs are no logits, or in another order than the labels.
    """
    model, validation = (classifier.predict, train.variables), dataset.validation
    predicted = predictions(*model, validation)
    if config.check_order:
        names = dict(enumerate(dataset.class_names))
        parts = [(predicted, validation.labels)]
        if len(validation) < _FEW * dataset.num_classes:  # too few to tell by
            some = dataset.train.subset(np.arange(min(len(dataset.train), _BATCH_SIZE)))
            parts.append((predictions(*model, some), some.labels))
        told, labels = map(np.concatenate, zip(*parts, strict=True))
        check_order(told, labels, dataset.num_classes, names)
    initial = float(np.mean(predicted == validation.labels))
    return {
        "train": train,
        "kept": train.variables,
        "step": 0,
        "initial_accuracy": initial,
        "accuracy": initial,
        "accuracy_step": 0,
        "kept_step": 0,
        "stopped": "",
    }


def as_dataset(
    given: ImageDataset | tuple, classifier: Classifier, config: HardeningConfig
) -> ImageDataset:
    """Return the data set of a hardening, also of a pair (images, labels) of arrays.

    A tenth of the images of each class, drawn by `config.seed`, is then kept for validation.

    Raises:
      InputError: it is neither, or the images cannot be used.
    """
    if not isinstance(classifier, Classifier):
        check_function(classifier)
        raise InputError(
            f"the model must be a Classifier, got {shown(classifier)}; make one with "
            "moth_jax.models.from_function, from_torch or load"
        )
    if isinstance(given, ImageDataset):
        return given
    spec = classifier.spec
    every = as_split(given)
    check_labels(every.labels, spec.num_classes)
    kept, taken = split_validation(every.labels, _VALIDATION_SHARE, config.seed)
    if not len(taken):
        raise InputError(
            f"{len(every)} images are too few to keep some for validation: give at least 2 of a "
            "class"
        )
    validation = every.subset(taken)
    names = spec.class_names or tuple(map(str, range(spec.num_classes)))
    return ImageDataset(
        "the images", every.subset(kept), validation, validation, names, spec.mean, spec.std
    )


def check_losses(
    records: list[dict], classifier: Classifier, variables: Variables, dataset: ImageDataset
) -> None:
    """Raise `InputError` at the first record of a loss that is not finite.

    `variables` are those of the model when it was last known to work.
    """
    for record in records:
        where = f"step {record['step']} of the {record['phase']}"
        loss = record.get("loss", 0.0)
        check_loss(loss, where, classifier.predict, variables, dataset.train)


def check_accuracy(
    classifier: Classifier,
    dataset: ImageDataset,
    config: HardeningConfig,
    state: State,
    *,
    since: int,
    total: int,
) -> State:
    """Return `state` after the check of its validation accuracy, where one is due.

    A check is due when the steps after `since` have passed a multiple of `validate_every`, and at
    the end. The method ends at `total` steps, or where the accuracy has fallen by more than the
    bound.
    """
    finished = state.step >= total
    if state.step // config.validate_every == since // config.validate_every and not finished:
        return state
    variables = state.train.variables
    now = accuracy(classifier.predict, variables, dataset.validation)
    state = dataclasses.replace(state, accuracy=now, accuracy_step=state.step)
    # Accuracies are ratios of counts: a fall of exactly the bound must not pass it by rounding.
    if state.initial_accuracy - now > config.max_accuracy_drop + 1e-9:
        return dataclasses.replace(state, stopped="accuracy")
    state = dataclasses.replace(state, kept=variables, kept_step=state.step)
    return dataclasses.replace(state, stopped="budget") if finished else state


def check_fit(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: HardeningConfig
) -> None:
    """Raise `InputError` if model, data and options do not fit, before anything is trained.

    Warns of classes without training images where `config.classes` names none. They are left out,
    which may be an oversight, or meant: a user may have images of a few classes of a large head.
    """
    del variables  # methods that look into the model check more
    outputs = classifier.spec.num_classes
    if outputs != dataset.num_classes:
        raise InputError(
            f"the model has {outputs} outputs, {dataset.name} names {dataset.num_classes} classes; "
            "every output needs a class name, but not every class needs images"
        )
    without = set(range(outputs)) - set(config.chosen(dataset))
    if without and not config.classes:
        warnings.warn(
            f"no training images of {listed([dataset.class_names[k] for k in sorted(without)])}: "
            "they are not hardened, and training may forget them; name the classes to harden in "
            "`classes` if that is meant",
            stacklevel=2,
        )
    if config.batch_size > len(dataset.train):
        raise InputError(
            f"batch_size {config.batch_size} is larger than the data: "
            f"{len(dataset.train)} training images"
        )


def optimiser(
    config: HardeningConfig, dataset: ImageDataset, *, steps_before: int = 0
) -> optax.GradientTransformation:
    """Return the optimiser of a method that takes `steps_before` steps before its main training."""
    schedule = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        total = config.num_steps(len(dataset.train))
        schedule = optax.join_schedules(
            [schedule, optax.cosine_decay_schedule(config.learning_rate, total)],
            boundaries=[steps_before],
        )
    return sgd(schedule, momentum=config.momentum, weight_decay=config.weight_decay)


def rng_of(config: HardeningConfig, purpose: int, step: int) -> np.random.Generator:
    """Return the generator of one purpose at one step; it is the same after a resumption."""
    return np.random.default_rng([config.seed, purpose, step])


def key_of(config: HardeningConfig, purpose: int, step: int) -> Array:
    """Return the key of one purpose at one step; it is the same after a resumption."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), step)


def optimiser_structure() -> optax.GradientTransformation:
    """Return an optimiser whose state has the structure that the states of all optimisers have."""
    return sgd(optax.constant_schedule(0.0), momentum=0.9, weight_decay=0.0)


class Method(NamedTuple):
    """The entry of a method in `METHODS`.

    Attributes:
      harden: the method, with arguments and result as `moth.harden`.
      config: the type of its options.
      state: the type of its state.
      tx: (options, data set) -> an optimiser whose state has the structure of the method's.
      check: (classifier, variables, data set, options) -> None; raises `InputError` where `harden`
        would, before anything is trained.
    """

    harden: Callable[..., HardeningState]
    config: type[HardeningConfig]
    state: type[HardeningState]
    tx: Callable[..., optax.GradientTransformation] = lambda config, dataset: optimiser_structure()
    check: Callable[..., None] = check_fit
