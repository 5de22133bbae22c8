"""The phase that hardens the model."""

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path

import jax
import optax

from moth_jax.data import ImageDataset
from moth_jax.data.splitting import split_validation
from moth_jax.errors import InputError
from moth_jax.hardening import METHODS
from moth_jax.hardening.base import PHASES, HardeningState
from moth_jax.hardening.moth import MothState
from moth_jax.models import checkpoint
from moth_jax.models.checkpoint import SavedModel
from moth_jax.models.digest import weights_digest
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.run.binding import Bond, bond_of
from moth_jax.run.checkpoints import RunCheckpoints, Saver, Spent, Timer
from moth_jax.run.job import Job
from moth_jax.run.phases.base import MODEL_FOLDERS, Models, Phase
from moth_jax.storage.files import read_record, write_record
from moth_jax.training import check_batch_norm, outline
from moth_jax.typed import is_of, shown
from moth_jax.types import Variables

_RECORD, _CHECKPOINTS = "hardening.json", "hardening"


@dataclasses.dataclass(frozen=True)
class _Record:
    """The fields of hardening.json.

    Attributes:
      seconds, cpu_seconds: `Timer.spent`.
      steps, stopped, validation_accuracy_before, validation_accuracy_at_stop: see `HardeningState`.
      num_selected: [K, K], how often each pair was selected; None for other methods than MOTH.
      of: the `Bond` of the hardening, with the model that was hardened.
      model: the digest of the hardened weights.
    """

    seconds: float
    cpu_seconds: float
    steps: int
    stopped: str
    validation_accuracy_before: float
    validation_accuracy_at_stop: float
    num_selected: list[list[int]] | None
    of: Bond
    model: str


Watch = Callable[[HardeningState, dict[str, float]], None]


def harden(job: Job, model: SavedModel, watch: Watch | None = None) -> Variables:
    """Harden a model by the job's method, or go on with it; return the hardened variables.

    `watch` is called after each round with the state and the seconds spent (`Timer.spent`).
    """
    folder = job.workdir / MODEL_FOLDERS["after"]
    bond = bond_of(job, weights_digest(model.variables)).to_json()
    saved = RunCheckpoints(job.workdir / _CHECKPOINTS, of=bond)
    if broadcast_from_main(folder.exists):
        saved.clear()
        return checkpoint.load_model(folder).variables
    method = METHODS[job.method]
    dataset = clean_part(job.dataset, job.clean_share, job.seed)
    latest, state, earlier = saved.latest(), None, None
    if latest is not None:
        earlier = latest[1].get("spent")
        state = _restored(job, model, saved, *latest, method.tx(job.hardening, dataset))
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
    record = {**timer.spent(), **_record(state), "of": bond, "model": weights_digest(state.kept)}
    write_record(job.workdir / _RECORD, record)
    checkpoint.save_model(folder, model.classifier, state.kept)
    saved.clear()
    return state.kept


def _restored(
    job: Job,
    model: SavedModel,
    saved: RunCheckpoints,
    arrays: dict,
    metadata: dict,
    tx: optax.GradientTransformation,
) -> HardeningState:
    """Return the state of a checkpoint, which must be of this model and method."""
    kept = jax.eval_shape(lambda: model.variables)
    saved.check_like(arrays, {"train": outline(model.variables, tx), "kept": kept})
    of = METHODS[job.method].state
    hints = typing.get_type_hints(of)
    try:
        state = of.from_arrays(arrays, metadata, tx)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise saved.unusable(f"it lacks {error}") from error
    for name in metadata.keys() & hints.keys():
        if not is_of(metadata[name], hints[name]):
            raise saved.unusable(f"{name} is {shown(metadata[name])}")
    if not is_of(metadata.get("spent"), Spent):
        raise saved.unusable("it does not say how long it took")
    return state


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
    return read_record(workdir / _RECORD, _Record)


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


def _verify(job: Job, models: Models) -> None:
    """Raise `InputError` unless the hardened model is of this run's original one."""
    path, weights = job.workdir / _RECORD, models.digest("after")
    if weights is None:
        return  # the record is written first
    record = load_hardening(job.workdir)
    if not record:
        raise InputError(
            f"there is no {path}, which says how {MODEL_FOLDERS['after']} was made; bring it back, "
            f"or move {MODEL_FOLDERS['after']} away, and the same command hardens again"
        )
    models.check_of(job, "before", path, record["of"])
    if record["model"] != weights:
        raise InputError(
            f"{job.workdir / MODEL_FOLDERS['after']} is not the model that {path} tells of; bring "
            "back both as they were, or move both away, and the same command hardens again"
        )


def _figures(job: Job, models: Models) -> dict:
    record = {} if models.get("after") is None else load_hardening(job.workdir)
    names = ("seconds", "cpu_seconds", "steps", "stopped")
    return {f"harden_{name}": record.get(name) for name in names}


PHASE = Phase(
    do=_do,
    requests=("all", "harden"),
    check=_check,
    verify=_verify,
    figures=_figures,
    files=(MODEL_FOLDERS["after"], _CHECKPOINTS, _RECORD),
)
