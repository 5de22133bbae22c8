"""The phases of a run once there is a model: measure its class distances, harden it.

Each leaves its result in the working folder, goes on from its checkpoints where it was interrupted,
and is not done twice.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_collections

from moth_jax.data import ImageDataset
from moth_jax.data.splitting import split_validation
from moth_jax.hardening import METHODS
from moth_jax.hardening.base import PHASES, HardeningState
from moth_jax.hardening.moth import MothState
from moth_jax.models import Classifier, checkpoint
from moth_jax.parallel.processes import broadcast_from_main, on_main
from moth_jax.progress import Progress
from moth_jax.run import checkpoints, configuration
from moth_jax.run.job import chosen_classes
from moth_jax.run.metrics import MetricWriter
from moth_jax.run.pacing import Pacer, Saver
from moth_jax.storage.files import write_json
from moth_jax.training import check_batch_norm
from moth_jax.types import Variables


def harden(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    classifier: Classifier,
    variables: Variables,
    metrics: MetricWriter,
    progress: Progress,
    watch: Callable[[HardeningState, dict[str, float]], None] | None = None,
) -> Variables:
    """Harden by `config.method`, or go on with it; return the hardened variables.

    `watch` is called after each round with the state and the seconds spent (`Pacer.spent`).
    """
    folder = workdir / "hardened"
    saved = checkpoints.RunCheckpoints(workdir / "hardening")
    scratch = workdir / "hardening_triggers"
    if broadcast_from_main(folder.exists):
        saved.clear()
        on_main(shutil.rmtree, scratch, True)
        return checkpoint.load_model(folder).variables
    method = METHODS[config.method]
    dataset = clean_part(config, dataset)
    options = configuration.method_config(config, classes=chosen_classes(config, dataset))
    latest, state, earlier = saved.latest(), None, None
    if latest is not None:
        arrays, metadata = latest
        earlier = metadata.pop("spent")
        tx = method.tx(options, dataset)
        state = method.state.from_arrays(arrays, metadata, tx)
    metrics.rewind(dict.fromkeys(PHASES, -1) if state is None else state.positions())
    pacer = Pacer(config.checkpoint_seconds, earlier)
    saver = Saver(saved, pacer)

    def on_round(state: HardeningState, records: list[dict]) -> None:
        for record in records:
            figures = dict(record)
            metrics.write(figures.pop("phase"), figures.pop("step"), **figures)
        if watch is not None:
            watch(state, pacer.spent())
        done = sum(last + 1 for last in state.positions().values())
        saver.offer(done, state.to_arrays)

    with saver:
        state = method.harden(
            classifier,
            variables,
            dataset,
            options,
            state=state,
            on_round=on_round,
            progress=progress,
            scratch_dir=scratch,
        )
    write_json(
        workdir / "hardening.json",
        {
            **pacer.spent(),
            "steps": state.kept_step,
            "stopped": state.stopped,
            "validation_accuracy_before": state.initial_accuracy,
            "validation_accuracy_at_stop": state.accuracy,
            "num_selected": state.scheduler.num_selected if isinstance(state, MothState) else None,
        },
    )
    checkpoint.save_model(folder, classifier, state.kept)
    saved.clear()
    on_main(shutil.rmtree, scratch, True)
    return state.kept


def check_hardening(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    classifier: Classifier,
    variables: Variables,
) -> None:
    """Raise `InputError` if the run is to harden, and its method cannot train this classifier."""
    if config.phase not in ("all", "harden"):
        return
    options = configuration.method_config(config, classes=chosen_classes(config, dataset))
    check_batch_norm(classifier, options.batch_norm)
    METHODS[config.method].check(classifier, variables, clean_part(config, dataset), options)


def clean_part(config: ml_collections.ConfigDict, dataset: ImageDataset) -> ImageDataset:
    """Return the data that hardening may use: all, or a share of each class's training images."""
    if config.clean_share == 1:
        return dataset
    _, taken = split_validation(dataset.train.labels, config.clean_share, config.seed)
    return dataclasses.replace(dataset, train=dataset.train.subset(taken))
