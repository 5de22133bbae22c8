"""The loop of the methods that MOTH is compared with: preparation, then main training.

Every step is reported, and a method goes on from any of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moth_jax.data.augmentation import augment
from moth_jax.data.dataset import ImageDataset
from moth_jax.data.sampling import epoch_batches
from moth_jax.hardening.base import (
    HardeningConfig,
    HardeningState,
    as_dataset,
    check_accuracy,
    check_fit,
    check_losses,
    initial_fields,
    key_of,
    optimiser,
)
from moth_jax.hardening.step import StepConfig
from moth_jax.hardening.warmup import WarmUpResult, invert_towards
from moth_jax.inversion import Inversion
from moth_jax.models import Classifier
from moth_jax.parallel.devices import read_batch, replicate
from moth_jax.progress import Progress, as_progress
from moth_jax.training import TrainState, make_update, perturb
from moth_jax.types import Variables

PREPARATION, HARDENING = "preparation", "hardening"
OnRound = Callable[["BaselineState", list[dict]], None]


@dataclasses.dataclass
class BaselineState(HardeningState):
    """What one of these methods knows between two steps.

    Attributes:
      prepared: steps done before the main training.
      memory: what the method remembers, such as triggers or a teacher: arrays by name.
    """

    prepared: int
    memory: dict[str, Array]

    def positions(self) -> dict[str, int]:
        """Return the last step whose record is part of this state, by phase."""
        return {PREPARATION: self.prepared - 1, HARDENING: self.step - 1}

    def to_arrays(self) -> tuple[dict, dict]:
        """Return the state as a tree of arrays and a JSON dict."""
        arrays, metadata = super().to_arrays()
        return {**arrays, "memory": self.memory}, {**metadata, "prepared": self.prepared}

    @classmethod
    def _own_fields(cls, arrays: dict, metadata: dict) -> dict:
        # Orbax keeps no empty collections.
        return {"memory": arrays.get("memory", {}), "prepared": metadata["prepared"]}


Step = Callable[[BaselineState, int], tuple[BaselineState, dict]]


class Stages(NamedTuple):
    """The steps of a method.

    Attributes:
      tx: the optimiser.
      step: (state, index) -> (state, figures), one step of the main training.
      prepare: (state, index) -> (state, figures), one step of the preparation.
      num_prepare: steps of the preparation.
      begin: state -> state, at the beginning of the main training.
    """

    tx: optax.GradientTransformation
    step: Step
    prepare: Step = lambda state, index: (state, {})
    num_prepare: int = 0
    begin: Callable[[BaselineState], BaselineState] = lambda state: state


Config = TypeVar("Config", bound=HardeningConfig)


def as_method(
    make_stages: Callable[[Classifier, Variables, ImageDataset, Config], Stages],
    *,
    check: Callable[[Classifier, Variables, ImageDataset, Config], None] = check_fit,
) -> Callable[..., BaselineState]:
    """Return the method of these stages, to be called as `moth.harden`.

    harden(classifier, variables, dataset, config, *, state, on_round, progress)

    `check` raises `InputError` if model, data and options do not fit.
    """

    @functools.wraps(make_stages, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def harden(
        classifier: Classifier,
        variables: Variables,
        dataset: ImageDataset | tuple,
        config: Config,
        *,
        state: BaselineState | None = None,
        on_round: OnRound | None = None,
        progress: bool | Progress = True,
    ) -> BaselineState:
        dataset = as_dataset(dataset, classifier, config)
        check(classifier, variables, dataset, config)
        stages = make_stages(classifier, variables, dataset, config)
        if state is None:
            state = _start(classifier, variables, dataset, config, stages)
        else:
            state = dataclasses.replace(
                state, train=replicate(state.train), memory=replicate(state.memory)
            )
        report = (lambda state, records: None) if on_round is None else on_round
        progress = as_progress(progress)
        state = _prepare(classifier, dataset, stages, state, report, progress)
        return _train(classifier, dataset, config, stages, state, report, progress)

    return harden


def _start(
    classifier: Classifier,
    variables: Variables,
    dataset: ImageDataset,
    config: HardeningConfig,
    stages: Stages,
) -> BaselineState:
    variables = replicate(variables)
    train = replicate(TrainState(variables, stages.tx.init(variables["params"])))
    initial = initial_fields(classifier, train, dataset, config)
    return BaselineState(**initial, prepared=0, memory={})


def _prepare(
    classifier: Classifier,
    dataset: ImageDataset,
    stages: Stages,
    state: BaselineState,
    report: OnRound,
    progress: Progress,
) -> BaselineState:
    """Take the steps of the preparation that are left."""
    if state.prepared == stages.num_prepare:
        return state
    with progress.task(
        PREPARATION, total=stages.num_prepare, unit="steps", completed=state.prepared
    ) as task:
        while state.prepared < stages.num_prepare:
            index = state.prepared
            state, figures = stages.prepare(state, index)
            state = dataclasses.replace(state, prepared=index + 1)
            record = {"phase": PREPARATION, "step": index, **figures}
            check_losses([record], classifier, state.kept, dataset)
            report(state, [record])
            task.advance(1, **figures)
    return state


def _train(
    classifier: Classifier,
    dataset: ImageDataset,
    config: HardeningConfig,
    stages: Stages,
    state: BaselineState,
    report: OnRound,
    progress: Progress,
) -> BaselineState:
    """Take the steps of the main training that are left."""
    total = config.num_steps(len(dataset.train))
    with progress.task(HARDENING, total=total, unit="steps", completed=state.step) as task:
        while not state.stopped:
            index = state.step
            state = stages.begin(state) if index == 0 else state
            state, figures = stages.step(state, index)
            record = {"phase": HARDENING, "step": index, **figures}
            check_losses([record], classifier, state.kept, dataset)
            state = dataclasses.replace(state, step=index + 1)
            state = check_accuracy(classifier, dataset, config, state, since=index, total=total)
            if state.accuracy_step == state.step:
                record["validation_accuracy"] = state.accuracy
            report(state, [record])
            task.advance(1, accuracy=state.accuracy, **figures)
    return state


class Batch(NamedTuple):
    """Training samples: images [n, h, w, c] in [0, 1], labels [n], and a key for augmentation."""

    images: Array
    labels: np.ndarray
    key: Array


def draw(dataset: ImageDataset, config: HardeningConfig, index: int, *, purpose: int = 0) -> Batch:
    """Return the batch of a step; it is the same after a resumption.

    The batches pass over the training images again and again, each time in another order.
    `purpose` tells the stages of a method apart.
    """
    per_epoch = len(dataset.train) // config.batch_size
    epoch, place = divmod(index, per_epoch)
    order = _epoch_order(len(dataset.train), config.batch_size, (config.seed, purpose, epoch))
    chosen = order[place]
    images, labels = read_batch(dataset.train, chosen), dataset.train.labels[chosen]
    return Batch(images, labels, key_of(config, purpose, index))


@functools.lru_cache(maxsize=2)
def _epoch_order(num_images: int, batch_size: int, seed: tuple[int, ...]) -> list[np.ndarray]:
    return epoch_batches(num_images, batch_size, np.random.default_rng(seed), drop_last=True)


def prepared_images(
    classifier: Classifier, dataset: ImageDataset, config: HardeningConfig
) -> Callable[[Variables, Batch], Array]:
    """Return images(variables, batch): augmented, and perturbed by the adversary."""
    flip, shift = (dataset.flip, dataset.shift) if config.augment else (False, 0)

    def images_of(variables: Variables, batch: Batch) -> Array:
        augment_key, attack_key = jax.random.split(batch.key)
        images = augment(batch.images, augment_key, flip=flip, shift=shift, fill="zero")
        labels = jnp.asarray(batch.labels)
        return perturb(classifier, variables, images, labels, attack_key, config.adversary)

    return images_of


def plain_stages(classifier: Classifier, dataset: ImageDataset, config: HardeningConfig) -> Stages:
    """Return the stages of plain training on `prepared_images`."""
    tx = optimiser(config, dataset)
    update = make_plain_update(classifier, dataset, config, tx)

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        train, loss = update(state.train, draw(dataset, config, index))
        return dataclasses.replace(state, train=train), {"loss": float(loss)}

    return Stages(tx=tx, step=step)


def step_config(dataset: ImageDataset, config: HardeningConfig) -> StepConfig:
    """Return what is compiled into updates with stamped samples."""
    return StepConfig(
        batch_norm=config.batch_norm,
        flip=dataset.flip and config.augment,
        shift=dataset.shift if config.augment else 0,
        adversary=config.adversary,
    )


def make_universal_inversion(
    classifier: Classifier, inversion: Inversion
) -> Callable[..., WarmUpResult]:
    """Return the compiled `warmup.invert_towards` for one universal trigger."""
    return jax.jit(
        functools.partial(invert_towards, classifier.predict, inversion=inversion, universal=True)
    )


def make_plain_update(
    classifier: Classifier,
    dataset: ImageDataset,
    config: HardeningConfig,
    tx: optax.GradientTransformation,
) -> Callable[[TrainState, Batch], tuple[TrainState, Array]]:
    """Return the compiled training step (state, batch) -> (state, mean cross-entropy)."""
    update = make_update(classifier, tx, batch_norm=config.batch_norm)
    images_of = prepared_images(classifier, dataset, config)

    @jax.jit
    def plain_update(train: TrainState, batch: Batch) -> tuple[TrainState, Array]:
        return update(train, images_of(train.variables, batch), batch.labels)

    return plain_update
