"""The phase that hardens the model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from moth_jax.data import ImageDataset
from moth_jax.data.splitting import split_validation
from moth_jax.hardening import METHODS
from moth_jax.hardening.base import PHASES, HardeningState
from moth_jax.hardening.moth import MothState
from moth_jax.models import checkpoint
from moth_jax.models.checkpoint import SavedModel
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.run.checkpoints import RunCheckpoints, Saver, Timer
from moth_jax.run.job import Job
from moth_jax.run.phases.base import MODEL_FOLDERS, Models, Phase
from moth_jax.storage.files import read_json, write_json
from moth_jax.training import check_batch_norm
from moth_jax.types import Variables

_RECORD, _CHECKPOINTS = "hardening.json", "hardening"
Watch = Callable[[HardeningState, dict[str, float]], None]


def harden(job: Job, model: SavedModel, watch: Watch | None = None) -> Variables:
    """Harden a model by the job's method, or go on with it; return the hardened variables.

    `watch` is called after each round with the state and the seconds spent (`Timer.spent`).
    """
    folder = job.workdir / MODEL_FOLDERS["after"]
    saved = RunCheckpoints(job.workdir / _CHECKPOINTS)
    if broadcast_from_main(folder.exists):
        saved.clear()
        return checkpoint.load_model(folder).variables
    method = METHODS[job.method]
    dataset = clean_part(job.dataset, job.clean_share, job.seed)
    latest, state, earlier = saved.latest(), None, None
    if latest is not None:
        arrays, metadata = latest
        earlier = metadata.pop("spent")
        state = method.state.from_arrays(arrays, metadata, method.tx(job.hardening, dataset))
    job.metrics.rewind(dict.fromkeys(PHASES, -1) if state is None else state.positions())
    timer = Timer(job.checkpoint_seconds, earlier)
    saver = Saver(saved, timer)

    def on_round(state: HardeningState, records: list[dict]) -> None:
        for record in records:
            figures = dict(record)
            job.metrics.write(figures.pop("phase"), figures.pop("step"), **figures)
        if watch is not None:
            watch(state, timer.spent())
        done = sum(last + 1 for last in state.positions().values())
        saver.offer(done, state.to_arrays)

    with saver:
        state = method.harden(
            model.classifier,
            model.variables,
            dataset,
            job.hardening,
            state=state,
            on_round=on_round,
            progress=job.progress,
        )
    write_json(job.workdir / _RECORD, {**timer.spent(), **_record(state)})
    checkpoint.save_model(folder, model.classifier, state.kept)
    saved.clear()
    return state.kept


def _record(state: HardeningState) -> dict:
    """Return what is told of a finished hardening besides its time."""
    return {
        "steps": state.kept_step,
        "stopped": state.stopped,
        "validation_accuracy_before": state.initial_accuracy,
        "validation_accuracy_at_stop": state.accuracy,
        "num_selected": state.scheduler.num_selected if isinstance(state, MothState) else None,
    }


def load_hardening(workdir: Path) -> dict:
    """Return the record of a finished hardening, {} if there is none."""
    return read_json(workdir / _RECORD)


def clean_part(dataset: ImageDataset, share: float, seed: int) -> ImageDataset:
    """Return the data that hardening may use: all, or a share of each class's training images."""
    if share == 1:
        return dataset
    _, taken = split_validation(dataset.train.labels, share, seed)
    return dataclasses.replace(dataset, train=dataset.train.subset(taken))


def _do(job: Job, models: Models) -> None:
    harden(job, models["before"])


def _check(job: Job, model: SavedModel | None) -> None:
    """Raise `InputError` if the method cannot train this model."""
    if model is None:
        return
    check_batch_norm(model.classifier, job.hardening.batch_norm)
    dataset = clean_part(job.dataset, job.clean_share, job.seed)
    METHODS[job.method].check(*model, dataset, job.hardening)


def _figures(job: Job, models: Models) -> dict:
    record = load_hardening(job.workdir)
    names = ("seconds", "cpu_seconds", "steps", "stopped")
    return {f"harden_{name}": record.get(name) for name in names}


PHASE = Phase(
    do=_do,
    requests=("all", "harden"),
    check=_check,
    figures=_figures,
    files=(MODEL_FOLDERS["after"], _CHECKPOINTS, _RECORD),
)
