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
from jax import Array

from moth_jax import scheduler
from moth_jax.data.augmentation import augment
from moth_jax.data.sampling import class_indices, pair_batch
from moth_jax.errors import InputError, require_choice
from moth_jax.evaluation import accuracy
from moth_jax.hardening import HardenInfo, StepConfig, make_harden_step, random_triggers
from moth_jax.inversion import neural_cleanse
from moth_jax.models import Classifier, Variables
from moth_jax.progress import Progress, as_progress
from moth_jax.scheduler import KArmState
from moth_jax.sharding import replicate
from moth_jax.training import NO_ADVERSARY, Adversary, TrainState, make_update, perturb, sgd
from moth_jax.trigger_bank import TriggerBank
from moth_jax.triggers import Trigger, stamp
from moth_jax.warmup import WarmUpResult, draw_samples, invert_towards

SCHEDULERS = ("k_arm", "uniform")
SCHEDULES = ("constant", "cosine")
_COUNTS = (
    "steps_per_round",
    "validate_every",
    "victims_per_class",
    "pairs_per_step",
    "trigger_capacity",
    "warmup_images_per_class",
    "minibatch_size",
)


@dataclasses.dataclass(frozen=True)
class MothConfig:
    """Options of hardening; the defaults are the published ones.

    Attributes:
      epochs: length of the main training in passes over the training images.
      max_steps: its length in steps instead; 0 means by epochs.
      max_accuracy_drop: stop when validation accuracy has fallen by more than this share of 1 and
        return the last state within it; 1 turns the check off.
      validate_every: steps between two checks.
      batch_size: images per training step.
      victims_per_class: samples of each class of the selected pair in a batch; the inversions use
        them.
      steps_per_round: training steps of one selection.
      pairs_per_step: disjoint pairs hardened together. The paper has 1.
      random_share: probability of a random pair.
      success_bound: of the pairwise inversions.
      first_steps, first_mask_weight: budget and λ of a round's first inversion and after a failure.
      next_steps, next_mask_weight: of the others.
      warmup_steps, warmup_mask_weight, warmup_success_bound, warmup_images_per_class: of the
        warm-up's inversions.
      minibatch_size: of all inversions.
      patience: steps before λ changes (`inversion.neural_cleanse`).
      stamp_share, max_trigger_share: `hardening.StepConfig`.
      symmetric: harden both directions of a pair in one step; False takes one direction, drawn at
        random each round ("w/o symmetric").
      dynamic: start from triggers found before, with the smaller budgets; False starts every
        inversion from a random trigger with the first budget ("w/o dynamic adjustment").
      approximate_warmup: universal triggers; False inverts every direction in the warm-up.
      scheduler: "k_arm", or "uniform" for random pairs ("w/o scheduler").
      batch_norm: "update" (as the authors' Keras code) or "frozen" (as their PyTorch code).
      learning_rate, momentum, weight_decay: of Nesterov SGD (`training.sgd`).
      schedule: "constant", as published, or "cosine", which lets the learning rate fall to 0 over
        the main training and so gives back some of the accuracy.
      augment: flips and shifts, as the data set allows.
      adversary: PGD on the rest of the batch, for adversarially trained models.
      trigger_capacity: directions whose triggers are stored.
      seed: of everything random.
    """

    epochs: float = 2.0
    max_steps: int = 0
    max_accuracy_drop: float = 0.01
    validate_every: int = 30
    batch_size: int = 128
    victims_per_class: int = 16
    steps_per_round: int = 3
    pairs_per_step: int = 1
    random_share: float = 0.3
    success_bound: float = 0.9
    first_steps: int = 200
    first_mask_weight: float = 1e-3
    next_steps: int = 50
    next_mask_weight: float = 1e-2
    warmup_steps: int = 500
    warmup_mask_weight: float = 1e-3
    warmup_success_bound: float = 0.99
    warmup_images_per_class: int = 10
    minibatch_size: int = 32
    patience: int = 10
    stamp_share: float = 0.1
    max_trigger_share: float = 0.25
    symmetric: bool = True
    dynamic: bool = True
    approximate_warmup: bool = True
    scheduler: str = "k_arm"
    batch_norm: str = "update"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "constant"
    augment: bool = True
    adversary: Adversary = NO_ADVERSARY
    trigger_capacity: int = 2048
    seed: int = 0

    def __post_init__(self):
        require_choice("scheduler", self.scheduler, SCHEDULERS)
        require_choice("schedule", self.schedule, SCHEDULES)
        if not 0 <= self.max_accuracy_drop <= 1:
            raise InputError(
                f"max_accuracy_drop is a share in [0, 1], got {self.max_accuracy_drop}"
            )
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2 * self.pairs_per_step * self.victims_per_class:
            raise InputError(
                f"batch_size {self.batch_size} has no room for {self.victims_per_class} samples of "
                f"each of {2 * self.pairs_per_step} classes; raise it or lower victims_per_class"
            )

    def num_steps(self, num_images: int) -> int:
        """Return the number of main training steps on `num_images` training images."""
        return self.max_steps or max(1, round(self.epochs * num_images / self.batch_size))


@dataclasses.dataclass
class MothState:
    """All that a hardening is between two rounds; saved whole, resumed exactly.

    Randomness is derived from the seed and the step, so there is no generator to save.

    Attributes:
      train: the model in training.
      kept: variables of the last check within the accuracy bound.
      scheduler: the arms.
      bank: triggers to start from.
      warmed_up: classes whose warm-up is done.
      step: main training steps done.
      initial_accuracy: validation accuracy before hardening.
      accuracy, accuracy_step: validation accuracy at the last check, and the step of it.
      kept_step: the step of `kept`.
      stopped: why it ended ("" while it goes on).
      warmup_sizes, warmup_prior: [K, K] what the warm-up found so far.
    """

    train: TrainState
    kept: Variables
    scheduler: KArmState | None
    bank: TriggerBank
    warmed_up: int
    step: int
    initial_accuracy: float
    accuracy: float
    accuracy_step: int
    kept_step: int
    stopped: str
    warmup_sizes: np.ndarray
    warmup_prior: np.ndarray


Records = list[dict]
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
      config: the options.
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
    _check_fit(dataset, config)
    programs = _compile(classifier, dataset, config)
    members = class_indices(dataset.train.labels, dataset.num_classes)
    total = config.num_steps(len(dataset.train))
    if state is None:
        state = _start(programs, classifier, variables, dataset, config)
    else:
        state = dataclasses.replace(state, train=replicate(state.train))
    reporter = as_progress(progress)

    def finish_round(state: MothState, records: Records) -> MothState:
        if on_round is not None:
            on_round(state, records)
        return state

    if not state.stopped and state.warmed_up < dataset.num_classes:
        with reporter.task(
            "warm-up", total=dataset.num_classes, unit="classes", completed=state.warmed_up
        ) as task:
            while state.warmed_up < dataset.num_classes:
                state, record = _warm_up(programs, state, dataset, members, config)
                task.advance(1, target=record["target"], size=record["size"])
                finish_round(state, [record])
    with reporter.task("hardening", total=total, unit="steps", completed=state.step) as task:
        while not state.stopped:
            done = state.step
            state, records = _round(programs, state, dataset, members, config, total)
            state = _check(state, classifier, dataset, config, total, since=done)
            if state.accuracy_step == state.step:
                records[-1]["validation_accuracy"] = state.accuracy
            task.advance(state.step - done, **_figures(state, records))
            finish_round(state, records)
    return state


def _check_fit(dataset, config: MothConfig) -> None:
    """Raise `InputError` if the options do not fit the data, before anything is computed."""
    most = dataset.num_classes // 2
    if config.pairs_per_step > most:
        raise InputError(
            f"pairs_per_step must be in 1..{most} for {dataset.num_classes} classes, "
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
            boundaries=[dataset.num_classes],  # the warm-up makes one step for each class
        )
    return sgd(learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The compiled computations of a hardening."""

    tx: optax.GradientTransformation
    invert_towards: Callable[..., WarmUpResult]
    warm_up_update: Callable[..., tuple[TrainState, Array]]
    step: Callable[..., tuple[TrainState, HardenInfo]]


def _compile(classifier: Classifier, dataset, config: MothConfig) -> _Programs:
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

    return _Programs(
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


def _start(
    programs: _Programs, classifier: Classifier, variables: Variables, dataset, config: MothConfig
) -> MothState:
    num_classes = dataset.num_classes
    variables = replicate(variables)
    initial = accuracy(classifier.predict, variables, dataset.validation)
    return MothState(
        train=replicate(TrainState(variables, programs.tx.init(variables["params"]))),
        kept=variables,
        scheduler=None,
        bank=TriggerBank(num_classes, dataset.image_shape, config.trigger_capacity),
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


def _rng(config: MothConfig, purpose: int, step: int) -> np.random.Generator:
    """Return the generator of one purpose at one step: the same after a resumption."""
    return np.random.default_rng([config.seed, purpose, step])


def _key(config: MothConfig, purpose: int, step: int) -> Array:
    """The same for randomness on the device."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), step)


_WARM_UP, _BATCH, _SELECT = 1, 2, 3


def _warm_up(
    programs: _Programs, state: MothState, dataset, members, config: MothConfig
) -> tuple[MothState, dict]:
    """Warm up one class as the target: invert, keep, and train one step."""
    target = state.warmed_up
    rng = _rng(config, _WARM_UP, target)
    samples = draw_samples(dataset.train, members, target, config.warmup_images_per_class, rng)
    invert_key, update_key = jax.random.split(_key(config, _WARM_UP, target))
    result = jax.device_get(
        programs.invert_towards(
            state.train.variables,
            samples,
            target,
            invert_key,
            num_steps=config.warmup_steps,
            mask_weight=config.warmup_mask_weight,
        )
    )
    sizes, prior = state.warmup_sizes.copy(), state.warmup_prior.copy()
    sizes[samples.victims, target] = result.sizes
    prior[samples.victims, target] = result.prior
    bank = state.bank.copy()
    _keep_warm_up(bank, samples.victims, target, result)

    # The trigger of each class: row 0 for all where it is universal.
    row = np.zeros(dataset.num_classes, np.int64)
    row[samples.victims] = np.arange(len(samples.victims)) % len(result.trigger.mask)
    indices = pair_batch(
        members, (), per_class=0, batch_size=min(config.batch_size, len(dataset.train)), rng=rng
    ).indices
    labels = dataset.train.labels[indices]
    train, loss = programs.warm_up_update(
        state.train,
        dataset.train.batch(indices),
        labels,
        target,
        jax.tree.map(lambda v: v[row[labels]], result.trigger),
        np.isfinite(sizes[labels, target]),
        rng.random(len(indices)) < 0.5,
        update_key,
    )
    found = np.isfinite(result.sizes)
    state = dataclasses.replace(
        state,
        train=train,
        bank=bank,
        warmed_up=target + 1,
        warmup_sizes=sizes,
        warmup_prior=prior,
    )
    if state.warmed_up == dataset.num_classes:
        arms = scheduler.init_state(prior, sizes, pairwise=not config.approximate_warmup)
        state = dataclasses.replace(state, scheduler=arms)
    return state, {
        "phase": "warm-up",
        "step": target,
        "target": dataset.class_names[target],
        "size": float(result.sizes[found].mean()) if found.any() else float("inf"),
        "prior": float(result.prior.mean()),
        "loss": float(loss),
    }


def _keep_warm_up(bank: TriggerBank, victims, target: int, result: WarmUpResult) -> None:
    universal = len(result.trigger.mask) == 1
    for i, victim in enumerate(victims):
        if np.isfinite(result.sizes[i]) and not universal:
            trigger = jax.tree.map(lambda v, i=i: v[i], result.trigger)
            bank.keep(int(victim), target, trigger, float(result.sizes[i]))
    if universal and np.isfinite(result.sizes[0]):
        bank.keep_universal(target, jax.tree.map(lambda v: v[0], result.trigger))


def _round(
    programs: _Programs, state: MothState, dataset, members, config: MothConfig, total: int
) -> tuple[MothState, Records]:
    """Select pairs and harden them for a round."""
    rng = _rng(config, _SELECT, state.step)
    pairs = scheduler.select_pairs(
        state.scheduler,
        state.step,
        rng,
        num_pairs=config.pairs_per_step,
        random_share=1.0 if config.scheduler == "uniform" else config.random_share,
    )
    if not config.symmetric:
        pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
    directions = [d for a, b in pairs for d in ([(a, b), (b, a)] if config.symmetric else [(a, b)])]
    bank, train, found_trigger, records = state.bank.copy(), state.train, None, []
    sizes: dict[tuple[int, int], list[float]] = {direction: [] for direction in directions}
    for step in range(state.step, min(state.step + config.steps_per_round, total)):
        key, start_key = jax.random.split(_key(config, _BATCH, step))
        afresh = found_trigger is None or not config.dynamic
        start = (
            _start_triggers(bank, directions, start_key, dataset, config)
            if afresh
            else found_trigger
        )
        batch = pair_batch(
            members,
            [k for pair in pairs for k in pair],
            per_class=config.victims_per_class,
            batch_size=config.batch_size,
            rng=_rng(config, _BATCH, step),
        )
        num_steps = config.first_steps if afresh else config.next_steps
        train, info = programs.step(
            train,
            dataset.train.batch(batch.indices),
            dataset.train.labels[batch.indices],
            batch.weights,
            np.asarray([target for _, target in directions]),
            start,
            key,
            num_steps=num_steps,
            mask_weight=config.first_mask_weight if afresh else config.next_mask_weight,
        )
        info = jax.device_get(info)
        for i, direction in enumerate(directions):
            sizes[direction].append(float(info.sizes[i]))
            if np.isfinite(info.sizes[i]):
                trigger = jax.tree.map(lambda v, i=i: v[i], info.trigger)
                bank.keep(*direction, trigger, float(info.sizes[i]))
        found_trigger = info.trigger if np.isfinite(info.sizes).all() else None
        records.append(_record(step, directions, info, num_steps, dataset.class_names))
    arms = scheduler.record(state.scheduler, sizes, pairs)
    step = state.step + len(records)
    return dataclasses.replace(state, train=train, bank=bank, scheduler=arms, step=step), records


def _start_triggers(
    bank: TriggerBank, directions, key: Array, dataset, config: MothConfig
) -> Trigger:
    """Return where the inversions of a round start: from the bank, or from random triggers."""
    random = jax.tree.map(np.array, random_triggers(key, len(directions), dataset.image_shape))
    if not config.dynamic:
        return random
    for i, direction in enumerate(directions):
        stored = bank.start(*direction)
        if stored is not None:
            random.mask[i], random.pattern[i] = stored.mask, stored.pattern
    return random


def _record(step: int, directions, info: HardenInfo, num_steps: int, names) -> dict:
    return {
        "phase": "hardening",
        "step": step,
        "directions": [[names[a], names[b]] for a, b in directions],
        "sizes": info.sizes.tolist(),
        "success_rates": info.success_rates.tolist(),
        "num_victims": info.num_victims.tolist(),
        "num_stamped": info.num_stamped.tolist(),
        "inversion_steps": num_steps,
        "loss": float(info.loss),
    }


def _check(
    state: MothState, classifier: Classifier, dataset, config: MothConfig, total: int, *, since: int
) -> MothState:
    """Check validation accuracy where it is due, and whether the hardening ends here."""
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


def _figures(state: MothState, records: Records) -> dict:
    """Return what a person watches."""
    last = records[-1]
    return {
        "pair": " & ".join(" -> ".join(direction) for direction in last["directions"][:1]),
        "sizes": "/".join(f"{size:.0f}" for size in last["sizes"]),
        "accuracy": state.accuracy,
        "loss": last["loss"],
    }
