"""How often a backdoor works: the attack success rate (Section V)."""

from typing import NamedTuple

import jax
import numpy as np

from moth_jax.backdoors.base import Backdoor
from moth_jax.data.dataset import as_split
from moth_jax.errors import InputError
from moth_jax.evaluation import predictions
from moth_jax.types import LogitsFn, Variables


class AttackSuccess(NamedTuple):
    """Shares of stamped images that are classified as the target, in [0, 1].

    Attributes:
      rates: {label: share}, for each victim, and for every other class with images but the target;
        NaN for a victim without images.
      overall: of the victims' images together; NaN if there are none.
      others: of the images of classes that are neither victim nor target, which a label-specific
        backdoor should leave alone; NaN for a universal one.
    """

    rates: dict[int, float]
    overall: float
    others: float


def attack_success(
    logits_fn: LogitsFn,
    variables: Variables,
    split,
    backdoor: Backdoor,
    *,
    batch_size: int = 256,
) -> AttackSuccess:
    """Return how many stamped images of an `ImageSplit` are classified as the backdoor's target.

    Images of the target itself never count. The rate of a model that has no such backdoor is not 0:
    it also takes some clean images for the target.

    Raises:
      InputError: the backdoor's target or a victim is no class of the model.
    """
    split = as_split(split)
    num_classes = jax.eval_shape(logits_fn, variables, split.batch(np.arange(1))).shape[1]
    outside = [k for k in (backdoor.target, *backdoor.victims) if not 0 <= k < num_classes]
    if outside:
        raise InputError(
            f"target and victims must be in 0..{num_classes - 1}, the model's classes, got "
            f"{', '.join(map(str, outside))}"
        )
    predicted = predictions(
        logits_fn, variables, split, batch_size=batch_size, transform=backdoor.stamp
    )
    hits = predicted == backdoor.target
    counted = split.labels != backdoor.target
    is_victim = backdoor.is_victim(split.labels)
    classes = sorted({*backdoor.victims, *split.labels[counted].tolist()})
    rates = {k: _share(hits, split.labels == k) for k in classes}
    return AttackSuccess(rates, _share(hits, is_victim), _share(hits, counted & ~is_victim))


def _share(hits: np.ndarray, among: np.ndarray) -> float:
    return float(hits[among].mean()) if among.any() else float("nan")
