"""Fine-tuning: a little more training on clean images, nothing else."""

import dataclasses

from moth_jax import addon
from moth_jax.addon import AddOnConfig
from moth_jax.baselines.base import (
    BaselineState,
    OnRound,
    Stages,
    draw,
    make_plain_update,
    run_stages,
)
from moth_jax.models import Classifier, Variables
from moth_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class FineTuningConfig(AddOnConfig):
    """Options of fine-tuning: those of every method."""

    learning_rate: float = 1e-2


def harden(
    classifier: Classifier,
    variables: Variables,
    dataset,
    config: AddOnConfig,
    *,
    state: BaselineState | None = None,
    on_round: OnRound | None = None,
    progress: bool | Progress = True,
) -> BaselineState:
    """Train on clean images; arguments and result as in `moth.harden`."""
    tx = addon.optimiser(config, dataset)
    update = make_plain_update(classifier, dataset, config, tx)

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        train, loss = update(state.train, draw(dataset, config, index))
        return dataclasses.replace(state, train=train), {"loss": float(loss)}

    return run_stages(
        classifier,
        variables,
        dataset,
        config,
        Stages(tx=tx, step=step),
        state=state,
        on_round=on_round,
        progress=progress,
    )
