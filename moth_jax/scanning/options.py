"""The options of the scanners."""

import dataclasses

from moth_jax.options import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SEED, SHARE, check_options, option
from moth_jax.scanning.result import ANY


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """Options of the scanners.

    Attributes:
      num_images: images of the victims that a trigger has to send to its target; for a universal
        trigger the other classes give as many each, give or take one.
      num_steps: the most steps of one inversion.
      minibatch_size, mask_weight, patience: of the inversions (`inversion.neural_cleanse`). The
        patience is that of Neural Cleanse and K-Arm, half of the published MOTH's.
      success_bound: share of the images that a trigger has to send to its target; 0 is the
        method's own: 0.99 (Neural Cleanse), 0.9 (pairs, as in Definition III.2, and K-Arm).
      max_pair_size, max_universal_size: relative sizes below which an arm is suspect, for K-Arm and
        where there is no anomaly index. K-Arm's bounds on 224x224 images: 1,000 and 1,720 pixels.
      min_ratio: K-Arm's bound on size(b→a) / size(a→b).
      top_k: how many of the largest logits K-Arm's pre-screening looks at; 0 is the published
        rule: 2 of up to 8 classes, else a quarter of them.
      pair_share, universal_share: a pair, a universal arm survives the pre-screening if the target
        is among them for at least this share of the victims' images.
      victims_per_target: the most pairs to one target that survive. The published number is 3.
      min_pairs, min_universal: how many survive in any case, those with the largest shares.
      num_rounds: K-Arm's budget after its warm-up, which all arms share. A round takes the arms
        that run together `steps_per_round` steps further.
      steps_per_round: steps of a round.
      warmup_rounds: how many rounds every arm gets before the budget begins.
      random_share: probability of a random arm instead of the most promising one.
      num_checked: how many pairs K-Arm measures in the reverse direction, too, the smallest first.
      arms_per_chunk: arms in one compiled call; 0 suits the device.
      seed: of everything random.
    """

    num_images: int = option(100, AT_LEAST_1)
    num_steps: int = option(300, AT_LEAST_1)
    minibatch_size: int = option(32, AT_LEAST_1)
    mask_weight: float = option(1e-3, POSITIVE)
    patience: int = option(5, AT_LEAST_1)
    success_bound: float = option(0.0, SHARE)
    max_pair_size: float = option(0.02, POSITIVE)
    max_universal_size: float = option(0.034, POSITIVE)
    min_ratio: float = option(10.0, POSITIVE)
    top_k: int = option(0, NOT_NEGATIVE)
    pair_share: float = option(0.9, SHARE)
    universal_share: float = option(0.95, SHARE)
    victims_per_target: int = option(3, NOT_NEGATIVE)
    min_pairs: int = option(20, NOT_NEGATIVE)
    min_universal: int = option(10, NOT_NEGATIVE)
    num_rounds: int = option(30, NOT_NEGATIVE)
    steps_per_round: int = option(20, AT_LEAST_1)
    warmup_rounds: int = option(3, AT_LEAST_1)
    random_share: float = option(0.3, SHARE)
    num_checked: int = option(4, NOT_NEGATIVE)
    arms_per_chunk: int = option(0, NOT_NEGATIVE)
    seed: int = option(0, SEED)

    def __post_init__(self):
        check_options(self)

    def max_size(self, victim: str) -> float:
        """Return the relative size below which an arm from `victim` is suspect."""
        return self.max_universal_size if victim == ANY else self.max_pair_size
