"""Inversions that go on in turns: a few arms a round, the most promising ones most often."""

import operator
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from moth_jax.distance.chunks import chunk_size
from moth_jax.distance.universal import Arm, ArmImages
from moth_jax.inversion import Budget, Samples
from moth_jax.inversion.directions import advance_directions, begin_directions
from moth_jax.parallel.devices import fetch, replicate, spread
from moth_jax.scanning.base import inversion_of
from moth_jax.scanning.options import ScanOptions
from moth_jax.triggers import Trigger

_GIVE_UP_STEPS = 200  # an arm without a trigger by then is hopeless, as published
_IDLE_ROUNDS = 2  # in a row without progress, after which an arm gets no more
_PROGRESS = 0.99  # a round that leaves more than this of the size has made none


class Bandit:
    """Inversions of arms (victim, target), each of which can be left and taken up again.

    Args:
      images: of the arms.
      options: the budget.
      arms: the most promising first.
      like: another one, whose compiled calls will do for these arms too.
    """

    def __init__(
        self,
        images: ArmImages,
        options: ScanOptions,
        arms: Sequence[Arm],
        *,
        like: "Bandit | None" = None,
    ):
        self.arms = list(arms)
        self.num_gradients = 0
        self._images, self._options = images, options
        self._inversion = inversion_of(options)
        counts = images.counts(self.arms)
        self._counts = dict(zip(self.arms, counts.tolist(), strict=True))
        self._size = chunk_size(options.arms_per_chunk or None, len(self.arms), 1)
        self._capacity = int(counts.max())
        if like is not None:
            self._size = like._size
            self._capacity = max(self._capacity, like._capacity)
        self._model = images.subject.logits_fn, replicate(images.subject.variables)
        self._states: dict = {}
        self._steps = dict.fromkeys(self.arms, 0)
        self._idle = dict.fromkeys(self.arms, 0)
        self._rng = np.random.default_rng(options.seed)

    def size(self, arm: Arm) -> float:
        """The size of the arm's smallest verified trigger so far; inf if there is none."""
        return float(self._result(arm).size) if arm in self._states else float("inf")

    def sizes(self) -> np.ndarray:
        """The sizes of all arms."""
        return np.array([self.size(arm) for arm in self.arms])

    def rate(self, arm: Arm) -> float:
        """The success rate of that trigger."""
        return float(self._result(arm).success_rate)

    def trigger(self, arm: Arm) -> Trigger:
        """That trigger."""
        return self._result(arm).trigger

    def steps(self, arm: Arm) -> int:
        """How many steps the arm has had."""
        return self._steps[arm]

    def _result(self, arm: Arm):
        return self._inversion.result(self._states[arm])

    def chunks(self, arms: Sequence[Arm]) -> list[Sequence[Arm]]:
        """Return `arms` in parts that run together."""
        return [arms[i : i + self._size] for i in range(0, len(arms), self._size)]

    def turns(self) -> Iterator[Sequence[Arm]]:
        """Yield the arms to play together, round after round, until the budget is spent.

        First every arm is played for `warmup_rounds`, and until it has found a trigger or is given
        up: λ has to grow before sizes tell arms apart. Then the rounds of the shared budget go to
        the smallest triggers of either kind, or with probability `random_share` to a random arm. It
        ends early once the best universal arm and the best pair make no more progress.
        """
        while waiting := [arm for arm in self.arms if self._is_new(arm)]:
            yield from self.chunks(waiting)
        for _ in range(self._options.num_rounds):
            chosen = self._choose()
            if not chosen:
                return
            yield chosen

    def _choose(self) -> list[Arm]:
        """Return the arms of a round; none if the best of either kind is idle.

        Universal arms and pairs take turns: the trigger of a pair is smaller in any model.
        """
        ranked = sorted(filter(self._found, self.arms), key=self.size)
        kinds = [
            [arm for arm in ranked if self._is_universal(arm) == kind] for kind in (True, False)
        ]
        if not any(self._is_open(arms[0]) for arms in kinds if arms):
            return []
        free = [[arm for arm in arms if self._is_open(arm)] for arms in kinds]
        chosen: list[Arm] = []
        while any(free) and len(chosen) < self._size:
            free.sort(key=bool, reverse=True)  # a kind without open arms leaves its turns
            explore = self._rng.random() < self._options.random_share
            chosen.append(free[0].pop(self._rng.integers(len(free[0])) if explore else 0))
            free.reverse()
        return chosen

    def _is_universal(self, arm: Arm) -> bool:
        return arm[0] == self._images.any

    def _found(self, arm: Arm) -> bool:
        return np.isfinite(self.size(arm))

    def _is_new(self, arm: Arm) -> bool:
        """Whether the arm is still in the warm-up."""
        warmup = self._options.warmup_rounds * self._options.steps_per_round
        return self._is_open(arm) and (not self._found(arm) or self._steps[arm] < warmup)

    def _is_open(self, arm: Arm) -> bool:
        """Whether more steps may change anything."""
        most = self._options.num_steps
        if not self._found(arm):
            return self._steps[arm] < min(most, _GIVE_UP_STEPS)
        return self._steps[arm] < most and self._idle[arm] < _IDLE_ROUNDS

    def play(self, chosen: Sequence[Arm]) -> None:
        """Give each of `chosen` the steps of one round, in one compiled call."""
        options = self._options
        filled = np.resize(np.asarray(chosen, np.int32), (self._size, 2))
        images, weights = spread(self._images.draw(self._capacity, filled))
        victims, targets = spread(tuple(filled.T))
        shared = (*self._model, Samples(images, weights, targets), victims, options.seed)
        if any(arm not in self._states for arm in chosen):
            fresh = begin_directions(
                *shared, mask_weight=options.mask_weight, inversion=self._inversion
            )
            self._keep([arm for arm in chosen if arm not in self._states], chosen, fresh)
        arms = [(victim, target) for victim, target in filled.tolist()]
        states = jax.tree.map(lambda *leaves: np.stack(leaves), *(self._states[a] for a in arms))
        steps = np.array([self._steps[arm] for arm in arms], np.int32)
        before = {arm: self.size(arm) for arm in chosen}
        states = advance_directions(
            *shared,
            spread((states, steps)),
            budget=Budget(options.steps_per_round, options.mask_weight, options.minibatch_size),
            inversion=self._inversion,
        )
        self._keep(chosen, chosen, states)
        for arm in chosen:
            self._steps[arm] += options.steps_per_round
            self.num_gradients += options.steps_per_round * self._counts[arm]
            stuck = self._found(arm) and self.size(arm) > _PROGRESS * before[arm]
            self._idle[arm] = self._idle[arm] + 1 if stuck else 0

    def _keep(self, arms: Sequence[Arm], order: Sequence[Arm], states) -> None:
        """Store the states of `arms`, which stand in the `order` they were computed in."""
        leaves = fetch(states)
        for arm in arms:
            row = operator.itemgetter(order.index(arm))
            self._states[arm] = jax.tree.map(row, leaves)
