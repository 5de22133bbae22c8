"""Adversarial training (Madry et al., ICLR 2018) as add-on training: PGD on every batch."""

import dataclasses

from moth_jax.data.dataset import ImageDataset
from moth_jax.errors import InputError
from moth_jax.hardening.base import HardeningConfig, Method
from moth_jax.hardening.baselines.stages import BaselineState, Stages, as_method, plain_stages
from moth_jax.models import Classifier
from moth_jax.options import POSITIVE, SHARE, option
from moth_jax.training import PUBLISHED_ADVERSARIES, Adversary
from moth_jax.types import Variables


@dataclasses.dataclass(frozen=True)
class AdversarialConfig(HardeningConfig):
    """Options of adversarial training; the adversary is the paper's for CIFAR-10.

    The paper's adversaries for other data sets are in `training.PUBLISHED_ADVERSARIES`.
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
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: AdversarialConfig
) -> Stages:
    """Train on perturbed images; arguments and result as in `moth.harden`.

    Note: The accuracy bound is off by default. Robustness costs more accuracy than other methods
      may lose, so within their bound the untouched model would be returned.
    """
    del variables
    return plain_stages(classifier, dataset, config)


METHOD = Method(harden, AdversarialConfig, BaselineState)
