"""The closing steps of a hardening: random batches, a few samples with triggers found before.

In a round up to half of a batch is of two classes, and what the round before taught fades. A
fine-tuning on random batches brings the accuracy back, and some of a planted backdoor with it.
Where a few of its samples carry what the rounds found, and keep their true labels, less comes back,
and it costs no inversion. An extension: the paper ends with the rounds.
"""

import collections
import dataclasses

import numpy as np

from moth_jax.data.sampling import batch_for_classes
from moth_jax.hardening.base import key_of, rng_of
from moth_jax.hardening.moth_state import MothState
from moth_jax.hardening.rounds import BATCH, Records, Setting
from moth_jax.hardening.trigger_bank import TriggerBank
from moth_jax.parallel.devices import read_batch
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.triggers import Trigger


def close(setting: Setting, state: MothState) -> tuple[MothState, Records]:
    """Take as many closing steps as a round has."""
    config, dataset = setting.config, setting.dataset
    bank, train, records = state.bank.copy(), state.train, []
    hardened = np.argwhere(state.scheduler.num_selected > 0)
    for step in range(state.step, min(state.step + config.steps_per_round, setting.total)):
        rng = rng_of(config, BATCH, step)
        indices = batch_for_classes(
            setting.members, setting.classes, batch_size=config.batch_size, rng=rng
        )
        labels = dataset.train.labels[indices]
        # The bank of the writer is the one that is kept.
        stamped, found = broadcast_from_main(_remembered, setting, bank, hardened, labels, rng)
        train, loss = setting.programs.stamped_update(
            train,
            read_batch(dataset.train, indices),
            labels,
            _spread(found, stamped, dataset.image_shape),
            stamped,
            key_of(config, BATCH, step),
        )
        record = {"phase": "hardening", "step": step, "num_stamped": len(found)}
        records.append({**record, "loss": float(loss)})
    step = state.step + len(records)
    return dataclasses.replace(state, train=train, bank=bank, step=step), records


def _remembered(
    setting: Setting,
    bank: TriggerBank,
    hardened: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[Trigger]]:
    """Return bool [n], which samples are stamped, and for each of these a trigger of its class.

    `hardened` [M, 2] are the directions that have been in a round, `labels` [n] those of the
    samples. A sample's trigger is one of those of its class that are not above the limit, each as
    likely as another.
    """
    config = setting.config
    limit = config.max_trigger_share * np.prod(setting.dataset.image_shape)
    directions = collections.defaultdict(list)
    for victim, target in hardened.tolist():
        if bank.size(victim, target) <= limit:
            directions[setting.classes[victim]].append((victim, target))
    stamped = rng.random(len(labels)) < config.closing_share
    stamped &= np.isin(labels, list(directions))
    found = []
    for label in labels[stamped].tolist():
        known = directions[label]
        found.append(bank.start(*known[rng.integers(len(known))]))
    return stamped, found


def _spread(found: list[Trigger], stamped: np.ndarray, shape: tuple[int, int, int]) -> Trigger:
    """Return triggers [n, ...]: those found where `stamped` [n], none elsewhere."""
    mask = np.zeros((len(stamped), *shape[:2], 1), np.float32)
    pattern = np.zeros((len(stamped), *shape), np.float32)
    for i, trigger in zip(np.flatnonzero(stamped), found, strict=True):
        mask[i], pattern[i] = trigger.mask, trigger.pattern
    return Trigger(mask, pattern)
