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
import jax.numpy as jnp
import numpy as np
import optax

from moth_jax.data.augmentation import augment
from moth_jax.data.sampling import class_indices
from moth_jax.errors import InputError
from moth_jax.evaluation import accuracy
from moth_jax.hardening import StepConfig, make_harden_step
from moth_jax.inversion import neural_cleanse
from moth_jax.models import Classifier, Variables
from moth_jax.moth_config import SCHEDULERS, SCHEDULES, MothConfig
from moth_jax.moth_rounds import Programs, Records, Setting, harden_round, warm_up_class
from moth_jax.moth_state import MothState
from moth_jax.progress import Progress, as_progress
from moth_jax.sharding import replicate
from moth_jax.training import TrainState, make_update, perturb, sgd
from moth_jax.trigger_bank import TriggerBank
from moth_jax.triggers import stamp
from moth_jax.warmup import invert_towards

__all__ = [
    "SCHEDULERS",
    "SCHEDULES",
    "MothConfig",
    "MothState",
    "OnRound",
    "Records",
    "harden",
    "optimiser",
]

OnRound = Callable[[MothState, Records], None]


def harden(
    classifier: Classifier,
    variables: Variables,
    dataset,
    config: MothConfig,
    *,
    state: MothState | None = None,
    on_round: OnRound | None = None,
    progress: bool | Progress = True,
) -> MothState:
    """Enlarge the class distances of a trained classifier.

    Args:
      classifier, variables: the model.
      dataset: an `ImageDataset`; `train` is hardened on, `validation` watches the accuracy, `test`
        is not touched.
      config: the options; `config.classes` chooses the classes that are hardened among each other.
      state: where an interrupted hardening goes on (what `on_round` was last given).
      on_round: called after each class of the warm-up and each round with the state and one record
        (a dict of figures) for each training step it made. The state it is given is not changed
        later.
      progress: as in `distance.distance_matrix`.

    Returns:
      The final state; its `kept` are the hardened variables: those of the last check within the
      accuracy bound.

    Note: Progress is watched on validation data. The published code watches the test set.
    """
    setting = _setting(classifier, dataset, config)
    num_classes = len(setting.classes)
    state = _start(setting, classifier, variables) if state is None else _resume(setting, state)
    report = (lambda state, records: None) if on_round is None else on_round
    progress = as_progress(progress)
    if not state.stopped and state.warmed_up < num_classes:
        with progress.task(
            "warm-up", total=num_classes, unit="classes", completed=state.warmed_up
        ) as task:
            while state.warmed_up < num_classes:
                state, record = warm_up_class(setting, state)
                task.advance(1, target=record["target"], size=record["size"])
                report(state, [record])
    with progress.task(
        "hardening", total=setting.total, unit="steps", completed=state.step
    ) as task:
        while not state.stopped:
            done = state.step
            state, records = harden_round(setting, state)
            state = _check(setting, state, classifier, since=done)
            if state.accuracy_step == state.step:
                records[-1]["validation_accuracy"] = state.accuracy
            task.advance(state.step - done, **_figures(state, records))
            report(state, records)
    return state


def _setting(classifier: Classifier, dataset, config: MothConfig) -> Setting:
    """Return what all rounds share, if the options fit the data."""
    classes = config.chosen(dataset)
    _check_fit(classifier, dataset, config, len(classes))
    return Setting(
        programs=_compile(classifier, dataset, config),
        dataset=dataset,
        config=config,
        classes=classes,
        members=class_indices(dataset.train.labels, dataset.num_classes),
        total=config.num_steps(len(dataset.train)),
    )


def _check_fit(classifier: Classifier, dataset, config: MothConfig, num_classes: int) -> None:
    """Raise `InputError` if model, data and options do not fit, before anything is computed."""
    outputs = classifier.spec.num_classes
    if outputs != dataset.num_classes:
        raise InputError(
            f"the model has {outputs} outputs, {dataset.name} names {dataset.num_classes} classes; "
            "every output needs a class name, but not every class needs images"
        )
    most = num_classes // 2
    if config.pairs_per_step > most:
        raise InputError(
            f"pairs_per_step must be in 1..{most} for {num_classes} classes, "
            f"got {config.pairs_per_step}"
        )
    if config.batch_size > len(dataset.train):
        raise InputError(
            f"batch_size {config.batch_size} is larger than the data: "
            f"{len(dataset.train)} training images"
        )


def optimiser(config: MothConfig, dataset) -> optax.GradientTransformation:
    """Return the optimiser of the hardening of a model on `dataset`."""
    learning_rate = config.learning_rate
    if config.schedule == "cosine":
        total = config.num_steps(len(dataset.train))
        learning_rate = optax.join_schedules(
            [
                optax.constant_schedule(learning_rate),
                optax.cosine_decay_schedule(learning_rate, total),
            ],
            boundaries=[len(config.chosen(dataset))],  # the warm-up's steps, one for each class
        )
    return sgd(learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


def _compile(classifier: Classifier, dataset, config: MothConfig) -> Programs:
    tx = optimiser(config, dataset)
    step_config = StepConfig(
        minibatch_size=config.minibatch_size,
        stamp_share=config.stamp_share,
        max_trigger_share=config.max_trigger_share,
        symmetric=config.symmetric,
        batch_norm=config.batch_norm,
        flip=config.augment and dataset.flip,
        shift=dataset.shift if config.augment else 0,
        adversary=config.adversary,
    )
    pairwise = neural_cleanse(success_bound=config.success_bound, patience=config.patience)
    universal = neural_cleanse(success_bound=config.warmup_success_bound, patience=config.patience)
    update = make_update(classifier, tx, batch_norm=config.batch_norm)

    def warm_up_update(state, images, labels, target, trigger, found, chosen, key):
        """Train on a batch with the target's triggers on the `chosen` samples.

        `trigger` [n, ...] and `found` [n] hold each sample's own.
        """
        augment_key, attack_key = jax.random.split(key)
        images = augment(
            images, augment_key, flip=step_config.flip, shift=step_config.shift, fill="zero"
        )
        others = perturb(classifier, state.variables, images, labels, attack_key, config.adversary)
        stamped = (chosen & found & (labels != target))[:, None, None, None]
        return update(state, jnp.where(stamped, stamp(images, trigger), others), labels)

    return Programs(
        tx=tx,
        invert_towards=jax.jit(
            functools.partial(
                invert_towards,
                classifier.predict,
                minibatch_size=config.minibatch_size,
                inversion=universal,
                universal=config.approximate_warmup,
            )
        ),
        warm_up_update=jax.jit(warm_up_update),
        step=make_harden_step(classifier, pairwise, tx, step_config),
    )


def _start(setting: Setting, classifier: Classifier, variables: Variables) -> MothState:
    dataset, num_classes = setting.dataset, len(setting.classes)
    variables = replicate(variables)
    initial = accuracy(classifier.predict, variables, dataset.validation)
    tx = setting.programs.tx
    return MothState(
        train=replicate(TrainState(variables, tx.init(variables["params"]))),
        kept=variables,
        scheduler=None,
        bank=TriggerBank(num_classes, dataset.image_shape, setting.config.trigger_capacity),
        warmed_up=0,
        step=0,
        initial_accuracy=initial,
        accuracy=initial,
        accuracy_step=0,
        kept_step=0,
        stopped="",
        warmup_sizes=np.full((num_classes, num_classes), np.inf, np.float32),
        warmup_prior=np.zeros((num_classes, num_classes), np.float32),
    )


def _resume(setting: Setting, state: MothState) -> MothState:
    theirs, ours = len(state.warmup_sizes), len(setting.classes)
    if theirs != ours:
        raise InputError(
            f"this state is of a hardening among {theirs} classes, the configuration has {ours}; "
            "go on with the configuration it began with"
        )
    return dataclasses.replace(state, train=replicate(state.train))


def _check(setting: Setting, state: MothState, classifier: Classifier, *, since: int) -> MothState:
    """Check validation accuracy where it is due, and whether the hardening ends here."""
    config, finished = setting.config, state.step >= setting.total
    if state.step // config.validate_every == since // config.validate_every and not finished:
        return state
    variables = state.train.variables
    now = accuracy(classifier.predict, variables, setting.dataset.validation)
    state = dataclasses.replace(state, accuracy=now, accuracy_step=state.step)
    # Accuracies are ratios of counts: a fall of exactly the bound must not pass it by rounding.
    if state.initial_accuracy - now > config.max_accuracy_drop + 1e-9:
        return dataclasses.replace(state, stopped="accuracy")
    state = dataclasses.replace(state, kept=variables, kept_step=state.step)
    return dataclasses.replace(state, stopped="budget") if finished else state


def _figures(state: MothState, records: Records) -> dict:
    """Return what a person watches."""
    last = records[-1]
    return {
        "pair": " & ".join(" -> ".join(direction) for direction in last["directions"][:1]),
        "sizes": "/".join(f"{size:.0f}" for size in last["sizes"]),
        "accuracy": state.accuracy,
        "loss": last["loss"],
    }
