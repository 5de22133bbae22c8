"""The phases of a run once there is a model: measure its class distances, harden it.

Each leaves its result in the working folder, goes on from its checkpoints where it was interrupted,
and is not done twice.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_collections
import numpy as np

from moth_jax import checkpoints, configuration, distance
from moth_jax.addon import PHASES, AddOnState
from moth_jax.data import ImageDataset, ImageSplit
from moth_jax.data.splitting import split_validation
from moth_jax.direction_choice import DirectionChoice
from moth_jax.distributed import by_writer, from_writer, stored
from moth_jax.matrix import DistanceMatrix
from moth_jax.methods import METHODS
from moth_jax.metrics import MetricWriter
from moth_jax.models import Classifier, Variables
from moth_jax.moth import MothState
from moth_jax.nearest import nearest_directions
from moth_jax.pacing import Pacer, Saver
from moth_jax.progress import Progress
from moth_jax.selection import chosen_classes, directions
from moth_jax.training import check_batch_norm
from moth_jax.workdir import write_json


def measure(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    when: str,
    classifier: Classifier,
    variables: Variables,
    progress: Progress,
) -> DistanceMatrix:
    """Measure the class distances "before" or "after", and put them into the model's checkpoint."""
    path = workdir / f"distance_{when}.npz"
    measured = stored(DistanceMatrix.load, path)
    if measured is not None:
        return measured
    options = config.distance.to_dict()
    for field in ("victims", "targets", "num_directions", "nearest"):
        del options[field]  # read by `directions`
    for field in ("inversion", "precision", "patience", "settle_after", "success_bound"):
        del options[field]  # read by `distance_inversion`
    split = getattr(dataset, options.pop("split"))
    classes = chosen_classes(config, dataset)
    chosen = directions(config, dataset)
    if config.distance.nearest:
        chosen = _nearest(config, workdir, classifier, variables, split, chosen, classes, progress)
    victims = {victim for victim, _ in chosen.directions}
    images, labels = _first_images(split, victims, options["num_images"])
    matrix = distance.distance_matrix(
        classifier.predict,
        images,
        labels,
        variables=variables,
        class_names=dataset.class_names,
        classes=classes,
        directions=chosen,
        directions_per_chunk=options.pop("directions_per_chunk") or None,
        inversion=configuration.distance_inversion(config),
        resume_dir=workdir / "distances",
        label=f"distances {when}",
        progress=progress,
        **options,
    )
    folder = workdir / {"before": "original", "after": "hardened"}[when]
    checkpoints.save_distances(folder, matrix)
    by_writer(matrix.save, path)
    by_writer(shutil.rmtree, workdir / "distances")
    return matrix


def _first_images(
    split: ImageSplit, labels: Iterable[int], num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images of each label, and their labels, in the order of the split.

    No other image is used, and all of them may be more than fit in memory.
    """
    used = np.sort(np.concatenate([split.of_class(k, num_images) for k in labels]))
    return split.batch(used), split.labels[used]


def _nearest(
    config: ml_collections.ConfigDict,
    workdir: Path,
    classifier: Classifier,
    variables: Variables,
    split: ImageSplit,
    candidates: DirectionChoice,
    classes: tuple[int, ...],
    progress: Progress,
) -> DirectionChoice:
    """Return the nearest of the candidates: those of the given model, after hardening too."""
    before = stored(DistanceMatrix.load, workdir / "distance_before.npz")
    if before is not None:
        pairs = np.asarray(classes)[np.argwhere(~np.isnan(before.values))]
        return DirectionChoice(list(map(tuple, pairs.tolist())), before.details["selection"])
    given = {name: candidates.details.get(name, ()) for name in ("victims", "targets")}
    return nearest_directions(
        classifier.predict,
        *_first_images(split, classes, config.distance.num_images),
        config.distance.nearest,
        variables=variables,
        classes=classes,
        **given,
        num_images=config.distance.num_images,
        success_bound=config.distance.success_bound,
        seed=config.seed,
        resume_dir=workdir / "distances" / "universal",
        progress=progress,
    )


def harden(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    classifier: Classifier,
    variables: Variables,
    metrics: MetricWriter,
    progress: Progress,
    watch: Callable[[AddOnState, dict[str, float]], None] | None = None,
) -> Variables:
    """Harden by `config.method`, or go on with it; return the hardened variables.

    `watch` is called after each round with the state and the seconds spent (`Pacer.spent`).
    """
    folder = workdir / "hardened"
    saved = checkpoints.RunCheckpoints(workdir / "hardening")
    scratch = workdir / "hardening_triggers"
    if from_writer(folder.exists):
        saved.clear()
        by_writer(shutil.rmtree, scratch, True)
        return checkpoints.load_model(folder).variables
    method = METHODS[config.method]
    dataset = clean_part(config, dataset)
    options = configuration.method_config(config, classes=chosen_classes(config, dataset))
    latest, state, earlier = saved.latest(), None, None
    if latest is not None:
        arrays, metadata = latest
        earlier = metadata.pop("spent")
        tx = method.tx(options, dataset)
        state = checkpoints.state_from_arrays(method.state, arrays, metadata, tx)
    metrics.rewind(dict.fromkeys(PHASES, -1) if state is None else state.positions())
    pacer = Pacer(config.checkpoint_seconds, earlier)
    saver = Saver(saved, pacer)

    def on_round(state: AddOnState, records: list[dict]) -> None:
        for record in records:
            figures = dict(record)
            metrics.write(figures.pop("phase"), figures.pop("step"), **figures)
        if watch is not None:
            watch(state, pacer.spent())
        done = sum(last + 1 for last in state.positions().values())
        saver.offer(done, lambda: checkpoints.state_arrays(state))

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
    checkpoints.save_model(folder, classifier, state.kept)
    saved.clear()
    by_writer(shutil.rmtree, scratch, True)
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
