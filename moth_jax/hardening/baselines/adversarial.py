"""Adversarial training (Madry et al., ICLR 2018) as add-on training: PGD on every batch."""

import dataclasses

from moth_jax.errors import InputError
from moth_jax.hardening.base import HardeningConfig
from moth_jax.hardening.baselines.stages import Stages, as_method, plain_stages
from moth_jax.models import Classifier
from moth_jax.options import POSITIVE, SHARE, option
from moth_jax.training import PUBLISHED_ADVERSARIES, Adversary
from moth_jax.types import Variables


@dataclasses.dataclass(frozen=True)
class AdversarialConfig(HardeningConfig):
    """Options of adversarial training; the adversary is CIFAR-10's in the paper.

    Those of its other data sets are in `training.PUBLISHED_ADVERSARIES`.
    """

    learning_rate: float = option(1e-2, POSITIVE)
    max_accuracy_drop: float = option(1.0, SHARE)
    adversary: Adversary = PUBLISHED_ADVERSARIES["cifar10"]

    def __post_init__(self):
        super().__post_init__()
        if self.adversary.epsilon <= 0:
            raise InputError(
                f"adversarial training needs adversary.epsilon above 0, got "
                f"{self.adversary.epsilon}"
            )


@as_method
def harden(
    classifier: Classifier, variables: Variables, dataset, config: AdversarialConfig
) -> Stages:
    """Train on perturbed images; arguments and result as in `moth.harden`.

    Note: The accuracy bound is off by default: robustness costs more accuracy than any other method
      may lose, and the untouched model would be returned.
    """
    del variables
    return plain_stages(classifier, dataset, config)
