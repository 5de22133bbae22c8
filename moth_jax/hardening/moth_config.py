"""The options of MOTH."""

import dataclasses

from moth_jax.errors import InputError, require_choice
from moth_jax.hardening.base import HardeningConfig
from moth_jax.inversion import Budget, Inversion, create
from moth_jax.options import (
    AT_LEAST_1,
    POSITIVE,
    POSITIVE_SHARE,
    SHARE,
    option,
)
from moth_jax.triggers import Trigger

SCHEDULERS = ("k_arm", "nearest", "uniform", "sweep")


@dataclasses.dataclass(frozen=True)
class MothConfig(HardeningConfig):
    """Options of hardening beside those of every method; the defaults are the published ones.

    Attributes:
      victims_per_class: samples of each class of the selected pair in a batch; the inversions use
        them.
      steps_per_round: training steps of one selection.
      pairs_per_step: disjoint pairs hardened together. The paper has 1.
      random_share: probability of a random pair.
      inversion: how triggers are searched (`inversion.INVERSIONS`).
      success_bound: of the pairwise inversions.
      first_steps, first_mask_weight: steps and first λ of a round's first inversion, and of the
        next one after a failure.
      next_steps, next_mask_weight: steps and first λ of the other inversions.
      warmup_steps, warmup_mask_weight, warmup_success_bound, warmup_images_per_class: of the
        warm-up's inversions.
      warmup_max_images: the most images of one inversion of the warm-up, all classes together, but
        at least one of each class: with more than a hundred classes it uses fewer of each. The
        paper has no limit, and its warm-up grows with the square of the number of classes.
      minibatch_size: of all inversions.
      patience: steps before λ changes, for inversions that have this option
        (`inversion.neural_cleanse`); None for the inversion's default, which is the published 10.
      stamp_share, max_trigger_share: see `step.StepConfig`. The limit on the size also holds in the
        warm-up, where the published code has none.
      augment_stamped: flip and shift images once more after they are stamped. The trigger is then
        unlearned in neighbouring places as well, as planted triggers are found where poisoned
        images were augmented. An extension; the paper stamps augmented images.
      symmetric: harden both directions of a pair in one step; False takes one direction, drawn at
        random each round ("w/o symmetric").
      dynamic: start from triggers found before, with the smaller budgets; False starts every
        inversion from a random trigger with the first budget ("w/o dynamic adjustment").
      approximate_warmup: universal triggers; False inverts every direction in the warm-up.
      universal_too: where the warm-up inverts every direction, invert the universal triggers as
        well, and count those that are unusually small among them: this finds backdoors of one
        victim and backdoors of all (`warmup.unusual_universals`). An extension.
      scheduler: which pair comes next.
        "k_arm": the paper's.
        "nearest": the pair that looks most like a planted backdoor (`scheduler.pair_ranks`), to
          find one early. An extension.
        "uniform": random pairs after the warm-up ("w/o scheduler").
        "sweep": all pairs in random order, again and again, without a warm-up
          (`baselines.pairwise`).
      trigger_memory_mb: megabytes of triggers that are kept as warm starts; past that the one used
        longest ago is forgotten (`TriggerBank`).
    """

    victims_per_class: int = option(16, AT_LEAST_1)
    steps_per_round: int = option(3, AT_LEAST_1)
    pairs_per_step: int = option(1, AT_LEAST_1)
    random_share: float = option(0.3, SHARE)
    inversion: str = "neural_cleanse"
    success_bound: float = option(0.9, POSITIVE_SHARE)
    first_steps: int = option(200, AT_LEAST_1)
    first_mask_weight: float = option(1e-3, POSITIVE)
    next_steps: int = option(50, AT_LEAST_1)
    next_mask_weight: float = option(1e-2, POSITIVE)
    warmup_steps: int = option(500, AT_LEAST_1)
    warmup_mask_weight: float = option(1e-3, POSITIVE)
    warmup_success_bound: float = option(0.99, POSITIVE_SHARE)
    warmup_images_per_class: int = option(10, AT_LEAST_1)
    warmup_max_images: int = option(1000, AT_LEAST_1)
    minibatch_size: int = option(32, AT_LEAST_1)
    patience: int | None = option(None, AT_LEAST_1)
    stamp_share: float = option(0.1, SHARE)
    max_trigger_share: float = option(0.25, SHARE)
    augment_stamped: bool = False
    symmetric: bool = True
    dynamic: bool = True
    approximate_warmup: bool = True
    universal_too: bool = False
    scheduler: str = "k_arm"
    trigger_memory_mb: int = option(512, AT_LEAST_1)

    def __post_init__(self):
        super().__post_init__()
        require_choice("scheduler", self.scheduler, SCHEDULERS)
        self.inversion_at(self.success_bound)
        if self.universal_too and self.approximate_warmup:
            raise InputError(
                "universal_too is for a warm-up that inverts every direction: set "
                "approximate_warmup to False, or leave universal_too"
            )
        if self.scheduler == "sweep" and self.pairs_per_step > 1:
            raise InputError(
                f"scheduler 'sweep' takes one pair at a time, got pairs_per_step "
                f"{self.pairs_per_step}"
            )
        if self.batch_size < 2 * self.pairs_per_step * self.victims_per_class:
            raise InputError(
                f"batch_size {self.batch_size} has no room for {self.victims_per_class} samples of "
                f"each of {2 * self.pairs_per_step} classes; raise it or lower victims_per_class"
            )

    def warmup_images(self, num_classes: int) -> int:
        """Return how many images of each class the warm-up uses among `num_classes` classes.

        >>> [MothConfig().warmup_images(k) for k in (10, 43, 200, 1000)]
        [10, 10, 5, 1]
        """
        most = self.warmup_max_images // max(1, num_classes - 1)
        return max(1, min(self.warmup_images_per_class, most))

    def inversion_at(self, success_bound: float) -> Inversion:
        """Return the method of inversion for this success bound."""
        method = create(self.inversion, success_bound=success_bound, patience=self.patience)
        if method.kind is not Trigger:
            raise InputError(
                f"the inversion {self.inversion!r} finds triggers that are added to images, and "
                "hardening goes on from masks and patterns; choose another inversion"
            )
        return method

    @property
    def warmup_budget(self) -> Budget:
        """The budget of a warm-up's inversion."""
        return Budget(self.warmup_steps, self.warmup_mask_weight, self.minibatch_size)

    @property
    def first_budget(self) -> Budget:
        """The budget of a round's first inversion, and of the next one after a failure."""
        return Budget(self.first_steps, self.first_mask_weight, self.minibatch_size)

    @property
    def next_budget(self) -> Budget:
        """The budget of the other inversions, which go on from a trigger that was just found."""
        before = max(0, self.first_steps - self.next_steps)
        return Budget(self.next_steps, self.next_mask_weight, self.minibatch_size, before)
