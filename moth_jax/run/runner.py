"""One run: its phases, each of which leaves its result in the work folder and is not done twice.

    original/             the model before, a checkpoint of this package
    distance_before.npz   its class distances
    hardened/             the model after
    distance_after.npz    its class distances
    scan.json, scan.npz   whether the model before looks poisoned
    robustness.json       accuracy of both models under PGD
    summary.json, report.html, metrics.jsonl, tensorboard/

A phase that was interrupted goes on from its last checkpoint (`training/`, `hardening/`) or its
last finished chunk of directions (`distances/`), and gives the numbers it would have given.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moth_jax.data import ImageDataset
from moth_jax.data.streaming import StreamedImages
from moth_jax.errors import InputError
from moth_jax.models.checkpoint import SavedModel
from moth_jax.parallel import devices
from moth_jax.parallel.processes import broadcast_from_main, check_same, is_main
from moth_jax.progress import Progress
from moth_jax.run import configuration
from moth_jax.run.job import Job
from moth_jax.run.metrics import MetricWriter, NoMetrics
from moth_jax.run.phases import PHASES, Models, asked
from moth_jax.run.phases.base import MODEL_FOLDERS, REPORT
from moth_jax.run.phases.original import make_model
from moth_jax.run.summary import Summary, summarise
from moth_jax.run.workdir import claim, locked


def run(
    config: ml_collections.ConfigDict, workdir: Path, *, overwrite: bool, progress: Progress
) -> Summary:
    """Do the phases that `config.phase` asks for and are not done yet; return the summary.

    Raises:
      InputError: something given cannot be used, or another run is at work in `workdir`.
    """
    configuration.check(config)
    devices.use_devices(configuration.num_devices(config))
    check_same("the configuration", config.to_json_best_effort(), jax.__version__)
    dataset = configuration.load_data(config)
    if jax.process_count() > 1:
        _check_same_data(dataset)
    # A wrong class name is found now, not after the training.
    job = configuration.make_job(config, dataset, workdir, progress=progress)
    _check(job, None)
    if overwrite:
        _check_overwriting(job)
    with locked(workdir) as check_folder:
        fields = configuration.as_json(config)
        broadcast_from_main(functools.partial(claim, workdir, fields, overwrite=overwrite))
        return _do(job, check_folder)


def _check(job: Job, model: SavedModel | None) -> None:
    """Raise `InputError` if a phase that is asked for cannot be done."""
    if model is None and job.request == REPORT:
        _check_report(job.workdir)
    for phase in asked(job.request):
        phase.check(job, model)


def _check_report(workdir: Path) -> None:
    if not broadcast_from_main((workdir / MODEL_FOLDERS["before"]).exists):
        raise InputError(f"there is no run in {workdir} to report on; do another phase first")


def _check_overwriting(job: Job) -> None:
    """Raise `InputError` where the run that is there would be removed for nothing."""
    if job.request == REPORT:
        raise InputError("there is nothing to report on once --overwrite has removed the run")
    source = job.model.checkpoint
    if source and Path(source).expanduser().resolve().is_relative_to(job.workdir.resolve()):
        raise InputError(
            f"model.checkpoint {source} is in {job.workdir}, which --overwrite would remove; "
            "choose another --workdir"
        )
    _check(job, make_model(job))


def _check_same_data(dataset: ImageDataset) -> None:
    """Raise `InputError` if the labels or images are not the same in all processes.

    Each process reads its part of a batch from what it finds itself. Of streamed images the names
    and the first ones are compared.
    """
    parts = (dataset.train, dataset.validation, dataset.test)
    values = []
    for part in parts:
        values.append(part.labels)
        if isinstance(part.images, StreamedImages):
            values += [ascii(part.images.names()), part.batch(np.arange(min(2, len(part))))]
        else:
            values.append(part.images)
    check_same("the data", *values)


def _do(job: Job, check_folder: Callable[[], None]) -> Summary:
    """Do what is asked for, up to the summary; `check_folder` is that of `locked`."""
    models = Models(job.workdir, functools.partial(_check, job))
    writes = is_main() and job.request != REPORT
    with MetricWriter(job.workdir, job.identity) if writes else NoMetrics() as metrics:
        job = dataclasses.replace(job, metrics=metrics)
        first, *others = asked(job.request)  # the first gets the model that all others are of
        first.do(job, models)
        for phase in PHASES.values():
            phase.verify(job, models)
        for phase in others:
            phase.do(job, models)
            check_folder()
    summary = summarise(job, models)
    check_folder()
    return summary
