"""The options of hardening."""

import dataclasses

from moth_jax.data.checks import listed
from moth_jax.errors import InputError, require_choice
from moth_jax.training import NO_ADVERSARY, Adversary

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
      classes: label numbers of the classes to harden among each other, at least two; () for all
        there are training images of. The others' images stay in the batches, without triggers.
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
    classes: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        require_choice("scheduler", self.scheduler, SCHEDULERS)
        require_choice("schedule", self.schedule, SCHEDULES)
        if not 0 <= self.max_accuracy_drop <= 1:
            raise InputError(
                f"max_accuracy_drop is a share in [0, 1], got {self.max_accuracy_drop}"
            )
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise InputError(
                f"classes must name at least 2 different classes, got {listed(self.classes)}"
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

    def chosen(self, dataset) -> tuple[int, ...]:
        """Return the label numbers of the classes to harden among each other.

        Raises:
          InputError: `dataset` has no such class, or no training image of one.
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
