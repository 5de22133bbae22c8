"""The anomaly index of the arms of a scan."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moth_jax.anomaly import MIN_CLASSES, anomaly_indices
from moth_jax.scanning.result import Arm


def with_anomaly_indices(arms: Sequence[Arm]) -> tuple[tuple[Arm, ...], str]:
    """Return `arms` with their anomaly index as suspicion, and why there is none, else "".

    Arms whose victims are predicted as the target without a trigger do not count.
    """
    indices = anomaly_indices(np.array([np.inf if arm.there else arm.size for arm in arms]))
    arms = tuple(
        dataclasses.replace(arm, anomaly_index=float(index), suspicion=float(index))
        for arm, index in zip(arms, indices, strict=True)
    )
    if np.isfinite(indices).any():
        return arms, ""
    found = sum(arm.found and not arm.there for arm in arms)
    return arms, (
        f"the anomaly index needs {MIN_CLASSES} triggers of different sizes, found "
        f"{found or 'none'} on {len(arms)} arms: raise num_steps"
    )
