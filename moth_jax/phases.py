"""The phases of a run: get a model, measure its class distances, harden it.

Each leaves its result in the working folder, goes on from its checkpoints where it was interrupted,
and is not done twice.
"""

import dataclasses
import shutil
import time
from pathlib import Path

import ml_collections
import numpy as np

from moth_jax import backdoors, checkpoints, configuration, distance, models, training
from moth_jax.addon import PHASES, AddOnState
from moth_jax.data import ImageDataset
from moth_jax.data.splitting import split_validation
from moth_jax.errors import InputError
from moth_jax.inversion import INVERSIONS
from moth_jax.matrix import DistanceMatrix
from moth_jax.methods import METHODS
from moth_jax.metrics import MetricWriter
from moth_jax.models import Classifier, Variables
from moth_jax.models.sources import head_is_fixed, load_source, with_classes
from moth_jax.moth import MothState
from moth_jax.progress import Progress
from moth_jax.selection import chosen_backdoor, chosen_classes, directions
from moth_jax.workdir import write_json


def original_model(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    metrics: MetricWriter,
    progress: Progress,
) -> tuple[Classifier, Variables]:
    """Return the model to measure and harden: imported, trained here, or both."""
    folder = workdir / "original"
    if not folder.exists():
        source = config.model.checkpoint
        classifier, variables = (
            import_model(config, dataset) if source else new_model(config, dataset)
        )
        started = time.perf_counter()
        seconds = 0.0
        trains = not source or config.model.fine_tune
        if trains:
            images = training_images(config, dataset)
            variables, seconds = _train(
                config, images, workdir, classifier, variables, metrics, progress
            )
        write_json(
            workdir / "original.json",
            {"training_seconds": seconds + time.perf_counter() - started if trains else None},
        )
        checkpoints.save_model(folder, classifier, variables)
    checkpoints.RunCheckpoints(workdir / "training").clear()
    saved = checkpoints.load_model(folder)
    return saved.classifier, saved.variables


def training_images(config: ml_collections.ConfigDict, dataset: ImageDataset) -> ImageDataset:
    """Return what the original model is trained on: poisoned if a backdoor is to be planted."""
    backdoor = chosen_backdoor(config, dataset)
    if backdoor is None:
        return dataset
    options = {name: config.backdoor[name] for name in ("rate", "cover_rate", "seed")}
    return backdoors.poison(dataset, backdoor, **options)


def import_model(
    config: ml_collections.ConfigDict, dataset: ImageDataset
) -> tuple[Classifier, Variables]:
    """Return the model of `config.model.checkpoint`, checked against the data."""
    path = Path(config.model.checkpoint).expanduser()
    num_classes = dataset.num_classes if config.model.fine_tune else None
    if path.is_dir():
        classifier, variables, _ = checkpoints.load_model(path)
        if num_classes is not None:
            classifier, variables = with_classes(classifier, variables, num_classes, path)
    else:
        classifier, variables = load_source(
            path,
            arch=config.model.name,
            builder=config.model.builder,
            trust=config.model.trust,
            num_classes=num_classes,
            mean=tuple(config.model.mean) or None,
            std=tuple(config.model.std) or None,
            image_shape=dataset.image_shape,
        )
    spec = classifier.spec
    if spec.image_shape != dataset.image_shape or spec.num_classes != dataset.num_classes:
        raise InputError(
            f"{path} is a model of {spec.num_classes} classes and images {spec.image_shape}, but "
            f"{dataset.name} has {dataset.num_classes} classes and images {dataset.image_shape}"
            + _ways_out(config, spec.num_classes, dataset)
        )
    if config.model.fine_tune or not spec.class_names:
        spec = dataclasses.replace(spec, class_names=dataset.class_names)
    return models.outline(spec)[0], variables


def _ways_out(config: ml_collections.ConfigDict, num_classes: int, dataset: ImageDataset) -> str:
    """Return what a message says to do about a head of `num_classes`."""
    ways = []
    if num_classes > dataset.num_classes:
        ways.append("name all classes of the model (data.class_list), images of some will do")
    if num_classes != dataset.num_classes and not head_is_fixed(
        config.model.checkpoint, config.model.trust
    ):
        ways.append(
            f"set model.fine_tune=True for a new head of {dataset.num_classes} classes and "
            "training with config.training"
        )
    return f"; {', or '.join(ways)}" if ways else ""


def new_model(
    config: ml_collections.ConfigDict, dataset: ImageDataset
) -> tuple[Classifier, Variables]:
    """Return an untrained model."""
    name = config.model.name
    return models.create(
        "resnet20" if name == configuration.AUTO else name,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        mean=tuple(config.model.mean) or dataset.mean,
        std=tuple(config.model.std) or dataset.std,
        class_names=dataset.class_names,
        seed=config.seed,
    )


def _train(
    config, dataset, workdir, classifier, variables, metrics, progress
) -> tuple[Variables, float]:
    """Train, or go on training; return the variables and the seconds of earlier processes."""
    options = configuration.training_config(config)
    tx = training.optimiser(options, len(dataset.train))
    saved = checkpoints.RunCheckpoints(workdir / "training")
    state, first_epoch, earlier = None, 0, 0.0
    latest = saved.latest()
    if latest is not None:
        arrays, metadata = latest
        state = checkpoints.train_state_from_arrays(arrays, tx)
        first_epoch, earlier = metadata["epoch"], metadata["seconds"]
    metrics.rewind({"training": first_epoch})
    save = _Pacer(config.checkpoint_seconds, earlier)

    def on_epoch(epoch: int, state, figures: dict) -> None:
        metrics.write("training", epoch, **figures)
        if save.due():
            arrays = checkpoints.train_state_arrays(state)
            saved.save(epoch, arrays, {"epoch": epoch, "seconds": save.seconds()})

    variables = training.train(
        classifier,
        variables,
        dataset,
        options,
        state=state,
        first_epoch=first_epoch,
        on_epoch=on_epoch,
        progress=progress,
    )
    return variables, earlier


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
    if path.exists():
        return DistanceMatrix.load(path)
    options = config.distance.to_dict()
    del options["victims"], options["num_directions"]  # read by `directions`
    split = getattr(dataset, options.pop("split"))
    classes = chosen_classes(config, dataset)
    # No other image is used, and all of them may be more than fit in memory.
    used = np.sort(np.concatenate([split.of_class(k, options["num_images"]) for k in classes]))
    inversion = INVERSIONS[options.pop("inversion")](
        patience=options.pop("patience"), success_bound=options.pop("success_bound")
    )
    matrix = distance.distance_matrix(
        classifier.predict,
        split.batch(used),
        split.labels[used],
        variables=variables,
        class_names=dataset.class_names,
        classes=classes,
        directions=directions(config, dataset),
        directions_per_chunk=options.pop("directions_per_chunk") or None,
        inversion=inversion,
        resume_dir=workdir / "distances",
        label=f"distances {when}",
        progress=progress,
        **options,
    )
    folder = workdir / {"before": "original", "after": "hardened"}[when]
    checkpoints.save_distances(folder, matrix)
    matrix.save(path)
    shutil.rmtree(workdir / "distances")
    return matrix


def harden(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    classifier: Classifier,
    variables: Variables,
    metrics: MetricWriter,
    progress: Progress,
) -> Variables:
    """Harden by `config.method`, or go on with it; return the hardened variables."""
    folder = workdir / "hardened"
    saved = checkpoints.RunCheckpoints(workdir / "hardening")
    if folder.exists():
        saved.clear()
        return checkpoints.load_model(folder).variables
    method = METHODS[config.method]
    dataset = clean_part(config, dataset)
    options = configuration.method_config(config, classes=chosen_classes(config, dataset))
    latest, state, earlier = saved.latest(), None, 0.0
    if latest is not None:
        arrays, metadata = latest
        earlier = metadata.pop("seconds")
        tx = method.tx(options, dataset)
        state = checkpoints.state_from_arrays(method.state, arrays, metadata, tx)
    metrics.rewind(dict.fromkeys(PHASES, -1) if state is None else state.positions())
    save = _Pacer(config.checkpoint_seconds, earlier)

    def on_round(state: AddOnState, records: list[dict]) -> None:
        for record in records:
            figures = dict(record)
            metrics.write(figures.pop("phase"), figures.pop("step"), **figures)
        if save.due():
            arrays, metadata = checkpoints.state_arrays(state)
            done = sum(last + 1 for last in state.positions().values())
            saved.save(done, arrays, {**metadata, "seconds": save.seconds()})

    state = method.harden(
        classifier, variables, dataset, options, state=state, on_round=on_round, progress=progress
    )
    write_json(
        workdir / "hardening.json",
        {
            "seconds": save.seconds(),
            "steps": state.kept_step,
            "stopped": state.stopped,
            "validation_accuracy_before": state.initial_accuracy,
            "validation_accuracy_at_stop": state.accuracy,
            "num_selected": state.scheduler.num_selected if isinstance(state, MothState) else None,
        },
    )
    checkpoints.save_model(folder, classifier, state.kept)
    saved.clear()
    return state.kept


def clean_part(config: ml_collections.ConfigDict, dataset: ImageDataset) -> ImageDataset:
    """Return the data that hardening may use: all, or a share of each class's training images."""
    if config.clean_share == 1:
        return dataset
    _, taken = split_validation(dataset.train.labels, config.clean_share, config.seed)
    return dataclasses.replace(dataset, train=dataset.train.subset(taken))


class _Pacer:
    """Says when a checkpoint is due, and how long the phase took in all processes."""

    def __init__(self, interval: float, earlier: float):
        self._interval, self._earlier = interval, earlier
        self._started = self._last = time.perf_counter()

    def due(self) -> bool:
        if time.perf_counter() - self._last < self._interval:
            return False
        self._last = time.perf_counter()
        return True

    def seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._started
