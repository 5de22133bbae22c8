"""MOTH: model orthogonalization (Section IV, Figure 5).

warm up every class as a target
until the budget is spent or the accuracy has dropped by the bound:
    1 the scheduler selects the most promising pair
    2 both directions' triggers are inverted, stamped, and the model takes a step (3 times)
    3 the scheduler records how the distances changed
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax

from moth_jax.data.dataset import ImageDataset
from moth_jax.data.sampling import class_indices
from moth_jax.errors import InputError
from moth_jax.hardening import base, scheduler
from moth_jax.hardening.base import (
    Method,
    as_dataset,
    check_accuracy,
    check_losses,
    initial_fields,
)
from moth_jax.hardening.moth_config import MothConfig
from moth_jax.hardening.moth_state import MothState
from moth_jax.hardening.rounds import Programs, Records, Setting, harden_round, warm_up_class
from moth_jax.hardening.step import StepConfig, make_harden_step, make_stamped_update
from moth_jax.hardening.trigger_bank import TriggerBank
from moth_jax.hardening.warmup import invert_towards
from moth_jax.models import Classifier
from moth_jax.parallel.devices import replicate
from moth_jax.progress import Progress, as_progress
from moth_jax.training import TrainState
from moth_jax.types import Variables

__all__ = [
    "METHOD",
    "MothConfig",
    "MothState",
    "OnRound",
    "check_fit",
    "harden",
    "optimiser",
]

OnRound = Callable[[MothState, Records], None]
_MEGABYTE = 2**20


def harden(
    classifier: Classifier,
    variables: Variables,
    dataset: ImageDataset | tuple,
    config: MothConfig,
    *,
    state: MothState | None = None,
    on_round: OnRound | None = None,
    progress: bool | Progress = True,
) -> MothState:
    """Enlarge the class distances of a trained classifier.

    Args:
      classifier, variables: the model.
      dataset: the images: `train` to harden on, `validation` to watch the accuracy; `test` is not
        used. Or a pair (images, labels) of arrays, a tenth of which is kept for validation.
      config: the options; `config.classes` chooses the classes that are hardened among each other.
      state: where an interrupted hardening goes on: the state that `on_round` was last given.
      on_round: called after each class of the warm-up and each round with the state and one record
        (a dict of figures) for each training step. The state is not changed later. It is called
        before the progress advances, so whatever `progress` raises finds the state reported.
      progress: as in `distance.distance_matrix`.

    Returns:
      The final state. Its `kept` are the hardened variables: those of the last check within the
      accuracy bound.

    Raises:
      InputError: model, data and options do not fit, the outputs are no logits or in another order
        than the labels, a loss is not finite, or `state` is of a hardening among another number of
        classes.

    Note: The accuracy is watched on validation data; the published code watches the test set. The
      warm-up trains too, one step for each class, and the accuracy is first checked after it.
    """
    dataset = as_dataset(dataset, classifier, config)
    check_fit(classifier, variables, dataset, config)
    setting = _setting(classifier, dataset, config)
    state = _start(setting, classifier, variables) if state is None else _resume(setting, state)
    max_bytes = config.trigger_memory_mb * _MEGABYTE
    state = dataclasses.replace(state, bank=state.bank.copy(max_bytes))
    report = (lambda state, records: None) if on_round is None else on_round
    progress = as_progress(progress)
    state = _warm_up(classifier, setting, state, progress, report)
    return _harden_rounds(classifier, setting, state, progress, report)


def _warm_up(
    classifier: Classifier,
    setting: Setting,
    state: MothState,
    progress: Progress,
    report: OnRound,
) -> MothState:
    """Warm up the classes that are left."""
    total = num_warmups(setting.config, setting.dataset)
    if state.stopped or state.warmed_up >= total:
        return state
    with progress.task("warm-up", total=total, unit="classes", completed=state.warmed_up) as task:
        while state.warmed_up < total:
            state, record = warm_up_class(setting, state)
            check_losses([record], classifier, state.kept, setting.dataset)
            report(state, [record])
            task.advance(1, target=record["target"], size=record["size"])
    return state


def _harden_rounds(
    classifier: Classifier,
    setting: Setting,
    state: MothState,
    progress: Progress,
    report: OnRound,
) -> MothState:
    """Do the rounds that are left."""
    dataset, config, total = setting.dataset, setting.config, setting.total
    if state.stopped or state.step >= total:
        return state
    with progress.task("hardening", total=total, unit="steps", completed=state.step) as task:
        while not state.stopped:
            since = state.step
            state, records = harden_round(setting, state)
            check_losses(records, classifier, state.kept, dataset)
            state = check_accuracy(classifier, dataset, config, state, since=since, total=total)
            if state.accuracy_step == state.step:
                records[-1]["validation_accuracy"] = state.accuracy
            report(state, records)
            task.advance(state.step - since, **_figures(state, records))
    return state


def _setting(classifier: Classifier, dataset: ImageDataset, config: MothConfig) -> Setting:
    """Return what all rounds share."""
    return Setting(
        # No program depends on the seed.
        programs=_compile(classifier, dataset, dataclasses.replace(config, seed=0)),
        dataset=dataset,
        config=config,
        classes=config.chosen(dataset),
        members=class_indices(dataset.train.labels, dataset.num_classes),
        total=config.num_steps(len(dataset.train)),
        sums=scheduler.PairSums(),
    )


def check_fit(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: MothConfig
) -> None:
    """Raise `InputError` if model, data and options do not fit, before anything is computed."""
    base.check_fit(classifier, variables, dataset, config)
    num_classes = len(config.chosen(dataset))
    most = num_classes // 2
    if config.pairs_per_step > most:
        raise InputError(
            f"pairs_per_step must be in 1..{most} for {num_classes} classes, "
            f"got {config.pairs_per_step}"
        )


def optimiser(config: MothConfig, dataset: ImageDataset) -> optax.GradientTransformation:
    """Return the optimiser of the hardening of a model on `dataset`."""
    return base.optimiser(config, dataset, steps_before=num_warmups(config, dataset))


def num_warmups(config: MothConfig, dataset: ImageDataset) -> int:
    """Return how many targets are warmed up: all chosen classes, or none if no prior is needed."""
    return 0 if config.scheduler == "sweep" else len(config.chosen(dataset))


# So that the next hardening of a model does not compile again. Only one: it keeps the data alive.
@functools.lru_cache(maxsize=1)
def _compile(classifier: Classifier, dataset: ImageDataset, config: MothConfig) -> Programs:
    tx = optimiser(config, dataset)
    step_config = StepConfig(
        stamp_share=config.stamp_share,
        max_trigger_share=config.max_trigger_share,
        symmetric=config.symmetric,
        batch_norm=config.batch_norm,
        flip=dataset.flip and config.augment,
        shift=dataset.shift if config.augment else 0,
        augment_stamped=config.augment_stamped,
        adversary=config.adversary,
    )
    pairwise = config.inversion_at(config.success_bound)
    warm_up = functools.partial(
        invert_towards,
        classifier.predict,
        inversion=config.inversion_at(config.warmup_success_bound),
    )
    return Programs(
        tx=tx,
        invert_towards=jax.jit(functools.partial(warm_up, universal=config.approximate_warmup)),
        invert_universal=jax.jit(functools.partial(warm_up, universal=True)),
        stamped_update=make_stamped_update(classifier, tx, step_config),
        step=make_harden_step(classifier, pairwise, tx, step_config),
    )


def _start(setting: Setting, classifier: Classifier, variables: Variables) -> MothState:
    """Return the state before the warm-up."""
    dataset, num_classes = setting.dataset, len(setting.classes)
    variables = replicate(variables)
    train = replicate(TrainState(variables, setting.programs.tx.init(variables["params"])))
    sizes = np.full((num_classes, num_classes), np.inf, np.float32)
    prior = np.zeros((num_classes, num_classes), np.float32)
    return MothState(
        **initial_fields(classifier, train, dataset, setting.config),
        scheduler=scheduler.init_state(prior, sizes),
        bank=TriggerBank(),
        warmed_up=0,
        warmup_sizes=sizes,
        warmup_prior=prior,
        universal_sizes=np.full(num_classes, np.inf, np.float32),
    )


def _resume(setting: Setting, state: MothState) -> MothState:
    """Return `state` on this process's devices; raise `InputError` if it is of other classes."""
    theirs, ours = len(state.warmup_sizes), len(setting.classes)
    if theirs != ours:
        raise InputError(
            f"this state is of a hardening among {theirs} classes, the configuration has {ours}; "
            "go on with the configuration it began with"
        )
    return dataclasses.replace(state, train=replicate(state.train))


def _figures(state: MothState, records: Records) -> dict:
    """Return the figures that the progress shows."""
    last = records[-1]
    return {
        "pair": " -> ".join(last["directions"][0]),
        "sizes": "/".join(f"{size:.0f}" for size in last["sizes"]),
        "accuracy": state.accuracy,
        "loss": last["loss"],
    }


METHOD = Method(harden, MothConfig, MothState, optimiser, check_fit)
