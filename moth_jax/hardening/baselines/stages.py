"""The loop of the methods that MOTH is compared with: stages of steps, checked and resumable."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moth_jax.data.augmentation import augment
from moth_jax.data.sampling import epoch_batches
from moth_jax.hardening.base import (
    HardeningConfig,
    HardeningState,
    check_accuracy,
    check_fit,
    initial_fields,
    key_of,
    optimiser,
)
from moth_jax.hardening.step import StepConfig
from moth_jax.hardening.warmup import WarmUpResult, invert_towards
from moth_jax.inversion import NeuralCleanse
from moth_jax.models import Classifier
from moth_jax.parallel.devices import read_batch, replicate
from moth_jax.progress import Progress, as_progress
from moth_jax.training import TrainState, make_update, perturb, sgd
from moth_jax.types import Variables

PREPARATION, HARDENING = "preparation", "hardening"
OnRound = Callable[["BaselineState", list[dict]], None]


@dataclasses.dataclass
class BaselineState(HardeningState):
    """What a method knows between two steps, beside what every method knows.

    Attributes:
      prepared: steps done before the main training.
      memory: arrays of the method's own, such as triggers or a teacher, by name.
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
    """A method: what it does before the main training, and one step of that.

    Attributes:
      tx: the optimiser.
      step: (state, index) -> (state, figures), one step of the main training.
      prepare: the same, before it.
      num_prepare: how many of those.
      begin: state -> state, at the beginning of the main training.
    """

    tx: optax.GradientTransformation
    step: Step
    prepare: Step | None = None
    num_prepare: int = 0
    begin: Callable[[BaselineState], BaselineState] = lambda state: state


def as_method(
    make_stages: Callable[[Classifier, Variables, object, HardeningConfig], Stages],
    *,
    check: Callable[[Classifier, Variables, object, HardeningConfig], None] = check_fit,
) -> Callable[..., BaselineState]:
    """Return the method of these stages, to be called as `moth.harden`.

    harden(classifier, variables, dataset, config, *, state, on_round, progress)

    `check` raises `InputError` if model, data and options do not fit.
    """

    @functools.wraps(make_stages, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def harden(
        classifier: Classifier,
        variables: Variables,
        dataset,
        config: HardeningConfig,
        *,
        state: BaselineState | None = None,
        on_round: OnRound | None = None,
        progress: bool | Progress = True,
    ) -> BaselineState:
        check(classifier, variables, dataset, config)
        stages = make_stages(classifier, variables, dataset, config)
        if state is None:
            state = _start(classifier, variables, dataset, stages)
        else:
            state = dataclasses.replace(
                state, train=replicate(state.train), memory=replicate(state.memory)
            )
        report = (lambda state, records: None) if on_round is None else on_round
        progress = as_progress(progress)
        state = _prepare(stages, state, report, progress)
        return _train(classifier, dataset, config, stages, state, report, progress)

    return harden


def _start(classifier, variables, dataset, stages: Stages) -> BaselineState:
    variables = replicate(variables)
    train = replicate(TrainState(variables, stages.tx.init(variables["params"])))
    return BaselineState(**initial_fields(classifier, train, dataset), prepared=0, memory={})


def _prepare(stages: Stages, state: BaselineState, report: OnRound, progress: Progress):
    if state.prepared == stages.num_prepare:
        return state
    with progress.task(
        PREPARATION, total=stages.num_prepare, unit="steps", completed=state.prepared
    ) as task:
        while state.prepared < stages.num_prepare:
            index = state.prepared
            state, figures = stages.prepare(state, index)
            state = dataclasses.replace(state, prepared=index + 1)
            report(state, [{"phase": PREPARATION, "step": index, **figures}])
            task.advance(1, **figures)
    return state


def _train(
    classifier: Classifier,
    dataset,
    config: HardeningConfig,
    stages: Stages,
    state: BaselineState,
    report: OnRound,
    progress: Progress,
) -> BaselineState:
    total = config.num_steps(len(dataset.train))
    with progress.task(HARDENING, total=total, unit="steps", completed=state.step) as task:
        while not state.stopped:
            index = state.step
            state = stages.begin(state) if index == 0 else state
            state, figures = stages.step(state, index)
            state = dataclasses.replace(state, step=index + 1)
            state = check_accuracy(classifier, dataset, config, state, since=index, total=total)
            record = {"phase": HARDENING, "step": index, **figures}
            if state.accuracy_step == state.step:
                record["validation_accuracy"] = state.accuracy
            report(state, [record])
            task.advance(1, accuracy=state.accuracy, **figures)
    return state


def optimiser_structure() -> optax.GradientTransformation:
    """Return an optimiser whose state is of the structure that all methods' have."""
    return sgd(optax.constant_schedule(0.0), momentum=0.9, weight_decay=0.0)


class Batch(NamedTuple):
    """Training samples: images [n, h, w, c] in [0, 1], labels [n], and a key for what is random."""

    images: np.ndarray
    labels: np.ndarray
    key: Array


def draw(dataset, config: HardeningConfig, index: int, *, purpose: int = 0) -> Batch:
    """Return the batch of a step: passes over the training images, each in another order.

    The same after a resumption; `purpose` tells the stages of a method apart.
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
    classifier: Classifier, dataset, config: HardeningConfig
) -> Callable[[Variables, Array, Array, Array], Array]:
    """Return images(variables, images, labels, key): augmented, and perturbed by the adversary."""
    flip, shift = (dataset.flip, dataset.shift) if config.augment else (False, 0)

    def images_of(variables, images, labels, key):
        augment_key, attack_key = jax.random.split(key)
        images = augment(jnp.asarray(images), augment_key, flip=flip, shift=shift, fill="zero")
        return perturb(classifier, variables, images, labels, attack_key, config.adversary)

    return images_of


def plain_stages(classifier: Classifier, dataset, config: HardeningConfig) -> Stages:
    """Return training as it is, on the batches of `prepared_images`."""
    tx = optimiser(config, dataset)
    update = make_plain_update(classifier, dataset, config, tx)

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        train, loss = update(state.train, draw(dataset, config, index))
        return dataclasses.replace(state, train=train), {"loss": float(loss)}

    return Stages(tx=tx, step=step)


def step_config(dataset, config: HardeningConfig, **options) -> StepConfig:
    """Return what is compiled into updates with stamped samples; `options` are further fields."""
    return StepConfig(
        batch_norm=config.batch_norm,
        flip=dataset.flip and config.augment,
        shift=dataset.shift if config.augment else 0,
        adversary=config.adversary,
        **options,
    )


def make_universal_inversion(
    classifier: Classifier, config, **options
) -> Callable[..., WarmUpResult]:
    """Return the compiled `warmup.invert_towards` of one universal trigger.

    `config` has success_bound and patience; `options` are further arguments.
    """
    return jax.jit(
        functools.partial(
            invert_towards,
            classifier.predict,
            inversion=NeuralCleanse(success_bound=config.success_bound, patience=config.patience),
            universal=True,
            **options,
        )
    )


def make_plain_update(
    classifier: Classifier, dataset, config: HardeningConfig, tx: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Array]]:
    """Return the compiled training step (state, batch) -> (state, mean cross-entropy)."""
    update = make_update(classifier, tx, batch_norm=config.batch_norm)
    images_of = prepared_images(classifier, dataset, config)

    @jax.jit
    def plain_update(train: TrainState, batch: Batch) -> tuple[TrainState, Array]:
        images = images_of(train.variables, batch.images, batch.labels, batch.key)
        return update(train, images, batch.labels)

    return plain_update
