"""One run: its phases, each of which leaves its result in the working folder and is not done twice.

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

import functools
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moth_jax import data
from moth_jax.errors import InputError
from moth_jax.parallel import devices
from moth_jax.parallel.processes import broadcast_from_main, check_same, is_main
from moth_jax.progress import Progress
from moth_jax.run import configuration
from moth_jax.run.job import chosen_backdoor, directions
from moth_jax.run.metrics import MetricWriter, NoMetrics
from moth_jax.run.phases.harden import harden
from moth_jax.run.phases.measure import measure
from moth_jax.run.phases.original import check_model, original_model
from moth_jax.run.phases.robustness import measure_robustness
from moth_jax.run.phases.scan import check_scan, scan_model
from moth_jax.run.summary import summarise
from moth_jax.run.workdir import claim
from moth_jax.run.workdir_lock import locked


def run(
    config: ml_collections.ConfigDict, workdir: Path, *, overwrite: bool, progress: Progress
) -> dict:
    """Do the phases that `config.phase` asks for and are not done yet; return the summary.

    Raises:
      InputError: something given cannot be used, or another run is at work in `workdir`.
    """
    configuration.check(config)
    devices.use_devices(config.mesh.devices)
    check_same("the configuration", config.to_json_best_effort(), jax.__version__)
    dataset = data.load(config.data.name, **configuration.data_options(config))
    if jax.process_count() > 1:
        _check_same_data(dataset)
    # A wrong class name is found now, not after the training.
    directions(config, dataset)
    chosen_backdoor(config, dataset)
    phase = config.phase
    if phase == "scan":
        check_scan(config, dataset)
    if phase == "report" and not broadcast_from_main((workdir / "original").exists):
        raise InputError(f"there is no run in {workdir} to report on; do another phase first")
    if overwrite:
        _check_overwriting(config, dataset, workdir)
    with locked(workdir):
        broadcast_from_main(functools.partial(claim, workdir, config, overwrite=overwrite))
        if phase != "report":
            _do(config, dataset, workdir, progress)
        measure_robustness(config, dataset, workdir, progress)
        return summarise(config, dataset, workdir)


def _check_overwriting(
    config: ml_collections.ConfigDict, dataset: data.ImageDataset, workdir: Path
) -> None:
    """Raise `InputError` where the run that is there would be removed for nothing."""
    if config.phase == "report":
        raise InputError("there is nothing to report on once --overwrite has removed the run")
    checkpoint = config.model.checkpoint
    if checkpoint and Path(checkpoint).expanduser().resolve().is_relative_to(workdir.resolve()):
        raise InputError(
            f"model.checkpoint {checkpoint} is in {workdir}, which --overwrite would remove; "
            "choose another --workdir"
        )
    check_model(config, dataset)


def _check_same_data(dataset: data.ImageDataset) -> None:
    """Raise `InputError` unless all processes see the same images, as far as labels and a few tell.

    Each reads its part of a batch from what it finds itself.
    """
    parts = (dataset.train, dataset.validation, dataset.test)
    some = [part.batch(np.arange(min(2, len(part)))) for part in parts]
    check_same("the data", *(part.labels for part in parts), *some)


def _do(
    config: ml_collections.ConfigDict, dataset: data.ImageDataset, workdir: Path, progress: Progress
) -> None:
    """Do what the phase asks for, up to the summary."""
    phase = config.phase
    with MetricWriter(workdir) if is_main() else NoMetrics() as metrics:
        classifier, variables = original_model(config, dataset, workdir, metrics, progress)
        if phase in ("all", "measure"):
            measure(config, dataset, workdir, "before", classifier, variables, progress)
        if phase in ("all", "harden"):
            hardened = harden(config, dataset, workdir, classifier, variables, metrics, progress)
        if phase == "all":
            measure(config, dataset, workdir, "after", classifier, hardened, progress)
        if phase == "scan":
            scan_model(config, dataset, workdir, classifier, variables, progress)
