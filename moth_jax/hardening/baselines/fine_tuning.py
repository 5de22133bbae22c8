"""Fine-tuning: a little more training on clean images, nothing else."""

import dataclasses

from moth_jax.data.dataset import ImageDataset
from moth_jax.hardening.base import HardeningConfig, Method
from moth_jax.hardening.baselines.stages import BaselineState, Stages, as_method, plain_stages
from moth_jax.models import Classifier
from moth_jax.options import POSITIVE, option
from moth_jax.types import Variables


@dataclasses.dataclass(frozen=True)
class FineTuningConfig(HardeningConfig):
    """Options of fine-tuning: those of every method."""

    learning_rate: float = option(1e-2, POSITIVE)


@as_method
def harden(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: FineTuningConfig
) -> Stages:
    """Train on clean images; arguments and result as in `moth.harden`."""
    del variables
    return plain_stages(classifier, dataset, config)


METHOD = Method(harden, FineTuningConfig, BaselineState)
