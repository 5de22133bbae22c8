"""The rounds of a hardening: a class is warmed up as the target, or selected pairs are hardened.

A round takes a `MothState` to the next one and returns records of what it did. Scheduler and
trigger bank number the chosen classes by position. Batches, targets and names go by label.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from moth_jax.data.dataset import ImageDataset
from moth_jax.data.sampling import batch_for_classes, pair_batch
from moth_jax.hardening import scheduler
from moth_jax.hardening.base import key_of, rng_of
from moth_jax.hardening.moth_config import MothConfig
from moth_jax.hardening.moth_state import MothState
from moth_jax.hardening.step import HardenInfo, StepBatch
from moth_jax.hardening.trigger_bank import TriggerBank
from moth_jax.hardening.warmup import WarmUpResult, draw_samples, unusual_universals
from moth_jax.inversion import Budget, start_triggers
from moth_jax.parallel.devices import fetch, read_batch
from moth_jax.parallel.processes import broadcast_from_main, on_main
from moth_jax.training import TrainState
from moth_jax.triggers import Trigger

Records = list[dict]
Direction = tuple[int, int]
WARM_UP, BATCH, SELECT = 1, 2, 3  # purposes of randomness


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled computations of a hardening, and its optimiser.

    Attributes:
      tx: the optimiser.
      invert_towards: `warmup.invert_towards`, of the warm-up.
      invert_universal: the same for one universal trigger (`MothConfig.universal_too`).
      stamped_update: `step.make_stamped_update`'s, the training step of the warm-up.
      step: `step.make_harden_step`'s.
    """

    tx: optax.GradientTransformation
    invert_towards: Callable[..., WarmUpResult]
    invert_universal: Callable[..., WarmUpResult]
    stamped_update: Callable[..., tuple[TrainState, Array]]
    step: Callable[..., tuple[TrainState, HardenInfo]]


class Setting(NamedTuple):
    """What stays the same over all rounds.

    Attributes:
      programs: the compiled computations.
      dataset: the images.
      config: the options.
      classes: labels of the K classes that are hardened among each other.
      members: indices of the training images of each label.
      total: steps of the main training.
      sums: of the scheduler's matrices, kept between rounds to save time.
    """

    programs: Programs
    dataset: ImageDataset
    config: MothConfig
    classes: tuple[int, ...]
    members: list[np.ndarray]
    total: int
    sums: scheduler.PairSums

    def name(self, position: int) -> str:
        """Return the name of a chosen class."""
        return self.dataset.class_names[self.classes[position]]


def warm_up_class(setting: Setting, state: MothState) -> tuple[MothState, dict]:
    """Warm up the next class as the target: invert, keep, and train one step."""
    config, position = setting.config, state.warmed_up
    target = setting.classes[position]
    rng = rng_of(config, WARM_UP, position)
    samples = draw_samples(
        setting.dataset.train,
        setting.members,
        target,
        config.warmup_images(len(setting.classes)),
        rng,
        classes=setting.classes,
    )
    invert_key, update_key = jax.random.split(key_of(config, WARM_UP, position))
    inputs, budget = (state.train.variables, samples, target), config.warmup_budget
    result = fetch(setting.programs.invert_towards(*inputs, invert_key, budget=budget))
    universal = None
    if config.universal_too:
        key = jax.random.fold_in(invert_key, 1)
        universal = fetch(setting.programs.invert_universal(*inputs, key, budget=budget))
    train, loss = _train_on_warm_up(setting, state, samples.victims, result, rng, update_key)
    state = _after_warm_up(setting, dataclasses.replace(state, train=train), result, universal)
    found = np.isfinite(result.sizes)
    record = {
        "phase": "warm-up",
        "step": position,
        "target": setting.name(position),
        "size": float(result.sizes[found].mean()) if found.any() else float("inf"),
        "prior": float(result.prior.mean()),
        "loss": float(loss),
    }
    if universal is not None:
        record["universal_size"] = float(universal.sizes[0])
    return state, record


def _train_on_warm_up(
    setting: Setting,
    state: MothState,
    victims: np.ndarray,
    result: WarmUpResult,
    rng: np.random.Generator,
    key: Array,
) -> tuple[TrainState, Array]:
    """Train on a random batch with the triggers found on half of the victims' samples.

    Note: Where a few of many classes are hardened among each other, half of the batch is drawn from
      them: a random batch would have few or no samples of them to stamp. The published code always
      hardens all classes.
    """
    dataset, config = setting.dataset, setting.config
    # The row of each label's trigger (0 for all if it is universal), and whether it can be stamped.
    row = np.zeros(dataset.num_classes, np.int64)
    row[victims] = np.arange(len(victims)) % len(result.trigger.mask)
    limit = config.max_trigger_share * np.prod(dataset.image_shape)
    stampable = np.zeros(dataset.num_classes, bool)
    stampable[victims] = result.sizes <= limit  # inf where none was found
    indices = batch_for_classes(
        setting.members, setting.classes, batch_size=config.batch_size, rng=rng
    )
    labels = dataset.train.labels[indices]
    return setting.programs.stamped_update(
        state.train,
        read_batch(dataset.train, indices),
        labels,
        jax.tree.map(lambda v: v[row[labels]], result.trigger),
        stampable[labels] & (rng.random(len(indices)) < 0.5),
        key,
    )


def _after_warm_up(
    setting: Setting, state: MothState, result: WarmUpResult, universal: WarmUpResult | None
) -> MothState:
    """Return the state that keeps what the warm-up of its next class found.

    `universal` is the target's universal trigger beside the directions' own triggers. Directions
    that it stands for in the end (`unusual_universals`) have its size and start from it. The prior
    and the training of the warm-up take the directions' own triggers all the same.

    Note: Where every direction is inverted, the first sizes of a pair in a round are compared with
      the warm-up's. Those reach another bound (`warmup_success_bound`, 0.99 instead of 0.9) and are
      somewhat larger, so the first growth comes out smaller than it is.
    """
    position, num_classes = state.warmed_up, len(setting.classes)
    victims = np.flatnonzero(np.arange(num_classes) != position)
    sizes, prior = state.warmup_sizes.copy(), state.warmup_prior.copy()
    universal_sizes = state.universal_sizes.copy()
    sizes[victims, position] = result.sizes
    prior[victims, position] = result.prior
    bank = state.bank.copy()
    on_main(_keep_warm_up, bank, victims, position, result)
    if universal is not None:
        universal_sizes[position] = universal.sizes[0]
        on_main(_keep_warm_up, bank, victims, position, universal)
    arms = state.scheduler
    if position + 1 == num_classes:
        shared = unusual_universals(sizes, universal_sizes)
        on_main(_forget, bank, shared)
        arms = scheduler.init_state(
            prior,
            np.where(shared, universal_sizes, sizes),
            pairwise=~shared & (not setting.config.approximate_warmup),
        )
    return dataclasses.replace(
        state,
        bank=bank,
        scheduler=arms,
        warmed_up=position + 1,
        warmup_sizes=sizes,
        warmup_prior=prior,
        universal_sizes=universal_sizes,
    )


def _keep_warm_up(
    bank: TriggerBank, victims: np.ndarray, target: int, result: WarmUpResult
) -> None:
    """Keep the triggers that were found towards `target`: one universal, or one for each victim."""
    universal = len(result.trigger.mask) == 1
    for i in range(len(result.trigger.mask)):
        if np.isfinite(result.sizes[i]):
            trigger = jax.tree.map(lambda v, i=i: v[i], result.trigger)
            if universal:
                bank.keep_universal(target, trigger)
            else:
                bank.keep(int(victims[i]), target, trigger, float(result.sizes[i]))


def _forget(bank: TriggerBank, directions: np.ndarray) -> None:
    """Forget the own triggers of `directions` [K, K] bool: they start from the universal ones."""
    for victim, target in np.argwhere(directions).tolist():
        bank.forget(victim, target)


def harden_round(setting: Setting, state: MothState) -> tuple[MothState, Records]:
    """Select pairs and harden them for a round.

    Later steps of a round start from the triggers just found, with the smaller budget.

    Note: If one of the triggers was not found, the next step has the first budget again, as in the
      paper, and all directions start from the bank, also those whose trigger was found: the first
      budget is made for the largest trigger that was found, and that is in the bank.
    """
    config = setting.config
    pairs, directions = _select(setting, state)
    labels = [setting.classes[k] for pair in pairs for k in pair]
    targets = np.asarray([setting.classes[target] for _, target in directions])
    bank, train, records = state.bank.copy(), state.train, []
    start: Trigger | None = None
    steps = range(state.step, min(state.step + config.steps_per_round, setting.total))
    batch = _draw(setting, labels, steps[0])
    for step in steps:
        key, start_key = jax.random.split(key_of(config, BATCH, step))
        budget = config.next_budget
        if start is None or not config.dynamic:
            # The bank of the main process is the one that is kept.
            start = broadcast_from_main(_start_triggers, setting, bank, directions, start_key)
            budget = config.first_budget
        train, info = setting.programs.step(train, batch, targets, start, key, budget=budget)
        if step + 1 in steps:  # while the device is at this step
            batch = _draw(setting, labels, step + 1)
        info = fetch(info)
        on_main(_keep_found, bank, directions, info)
        start = info.trigger if np.isfinite(info.sizes).all() else None
        records.append(_record(setting, step, directions, info, budget))
    arms = scheduler.record(
        state.scheduler,
        {d: [record["sizes"][i] for record in records] for i, d in enumerate(directions)},
        pairs,
        forget_failed=config.scheduler == "nearest",
        sums=setting.sums,
    )
    step = state.step + len(records)
    return dataclasses.replace(state, train=train, bank=bank, scheduler=arms, step=step), records


def _draw(setting: Setting, labels: list[int], step: int) -> StepBatch:
    """Return the batch of a step on the classes `labels`."""
    config, train = setting.config, setting.dataset.train
    batch = pair_batch(
        setting.members,
        labels,
        per_class=config.victims_per_class,
        batch_size=config.batch_size,
        rng=rng_of(config, BATCH, step),
    )
    return StepBatch(read_batch(train, batch.indices), train.labels[batch.indices], batch.weights)


def _keep_found(bank: TriggerBank, directions: list[Direction], info: HardenInfo) -> None:
    """Keep the triggers that a step found."""
    for i, direction in enumerate(directions):
        if np.isfinite(info.sizes[i]):
            trigger = jax.tree.map(lambda v, i=i: v[i], info.trigger)
            bank.keep(*direction, trigger, float(info.sizes[i]))


def _select(setting: Setting, state: MothState) -> tuple[list[Direction], list[Direction]]:
    """Return the pairs of a round, and their directions that are hardened."""
    config = setting.config
    rng = rng_of(config, SELECT, state.step)
    if config.scheduler == "sweep":
        turn = state.step // config.steps_per_round
        pairs = [scheduler.sweep_pair(len(setting.classes), turn, config.seed)]
    else:
        pairs = scheduler.select_pairs(
            state.scheduler,
            state.step,
            rng,
            num_pairs=config.pairs_per_step,
            random_share=1.0 if config.scheduler == "uniform" else config.random_share,
            nearest=config.scheduler == "nearest",
            sums=setting.sums,
        )
    if config.symmetric:
        return pairs, [direction for a, b in pairs for direction in ((a, b), (b, a))]
    pairs = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in pairs]
    return pairs, pairs


def _start_triggers(
    setting: Setting, bank: TriggerBank, directions: list[Direction], key: Array
) -> Trigger:
    """Return the start of each direction's inversion: from the bank, or a random trigger."""
    inversion = setting.config.inversion_at(setting.config.success_bound)
    triggers = start_triggers(key, len(directions), setting.dataset.image_shape, inversion)
    triggers = jax.tree.map(np.array, triggers)
    if not setting.config.dynamic:
        return triggers
    for i, direction in enumerate(directions):
        stored = bank.start(*direction)
        if stored is not None:
            triggers.mask[i], triggers.pattern[i] = stored.mask, stored.pattern
    return triggers


def _record(
    setting: Setting, step: int, directions: list[Direction], info: HardenInfo, budget: Budget
) -> dict:
    """Return the figures of a step."""
    return {
        "phase": "hardening",
        "step": step,
        "directions": [[setting.name(a), setting.name(b)] for a, b in directions],
        "sizes": info.sizes.tolist(),
        "success_rates": info.success_rates.tolist(),
        "num_victims": info.num_victims.tolist(),
        "num_stamped": info.num_stamped.tolist(),
        "inversion_steps": budget.num_steps,
        "loss": float(info.loss),
    }
