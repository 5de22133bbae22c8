"""The model of a run: imported, trained here, or both."""

import dataclasses
import warnings
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moth_jax import backdoors, models, training
from moth_jax.data import ImageDataset
from moth_jax.errors import InputError
from moth_jax.models import Classifier, checkpoint
from moth_jax.models.loading import check_alone, head_is_fixed, load_source
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.progress import Progress
from moth_jax.run import checkpoints, configuration, inputs
from moth_jax.run.job import chosen_backdoor
from moth_jax.run.metrics import MetricWriter
from moth_jax.run.pacing import Pacer, Saver
from moth_jax.run.phases.harden import check_hardening
from moth_jax.storage.files import read_json, write_json
from moth_jax.storage.folders import current_folder
from moth_jax.types import Variables

_OF_FILES = ("mean", "std", "builder", "trust")  # options of config.model


def original_model(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    metrics: MetricWriter,
    progress: Progress,
) -> tuple[Classifier, Variables]:
    """Return the model to measure and harden: imported, trained here, or both."""
    folder = workdir / "original"
    if broadcast_from_main(folder.exists):
        inputs.check_unchanged(read_json(workdir / "original.json"), config, dataset)
    else:
        source = config.model.checkpoint
        classifier, variables = (
            import_model(config, dataset) if source else new_model(config, dataset)
        )
        check_hardening(config, dataset, classifier, variables)  # not after the training
        seconds = None
        if not source or config.model.fine_tune:
            images = training_images(config, dataset)
            variables, seconds = _train(
                config, images, workdir, classifier, variables, metrics, progress
            )
        write_json(
            workdir / "original.json",
            {"training_seconds": seconds, **inputs.describe(config, dataset)},
        )
        checkpoint.save_model(folder, classifier, variables)
    checkpoints.RunCheckpoints(workdir / "training").clear()
    saved = checkpoint.load_model(folder)
    check_hardening(config, dataset, saved.classifier, saved.variables)  # not after the measuring
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
    path = current_folder(Path(config.model.checkpoint).expanduser())
    num_classes = dataset.num_classes if config.model.fine_tune else None
    if path.is_dir():
        check_alone(path, {name: config.model[name] for name in _OF_FILES}, prefix="model.")
        classifier, variables = load_source(path, num_classes=num_classes)
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
    else:
        _check_names(path, spec.class_names, dataset)
    return models.outline(spec)[0], variables


def check_model(config: ml_collections.ConfigDict, dataset: ImageDataset) -> None:
    """Raise `InputError` if there is no model as asked for, or it cannot be hardened as asked."""
    make = import_model if config.model.checkpoint else new_model
    check_hardening(config, dataset, *make(config, dataset))


def _check_names(path: Path, theirs: tuple[str, ...], dataset: ImageDataset) -> None:
    """Refuse a model whose classes are those of the data in another order; warn of other names."""
    ours = dataset.class_names
    differing = [i for i, pair in enumerate(zip(theirs, ours, strict=True)) if len(set(pair)) > 1]
    if not differing:
        return
    i = differing[0]
    told = f"output {i} of {path} is {theirs[i]!r}, class {i} of {dataset.name} is {ours[i]!r}"
    if set(theirs) == set(ours):
        raise InputError(
            f"{told}: the same classes in another order; give the data in the model's order, such "
            "as with data.class_list"
        )
    warnings.warn(
        f"{told}{f', and {len(differing) - 1} more differ' if len(differing) > 1 else ''}; are "
        "they the same classes in the same order?",
        stacklevel=2,
    )


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
    """Train, or go on training; return the variables and the seconds of all processes."""
    options = configuration.training_config(config)
    tx = training.optimiser(options, len(dataset.train))
    saved = checkpoints.RunCheckpoints(workdir / "training")
    state, first_epoch, losses, earlier = None, 0, (), None
    latest = saved.latest()
    if latest is not None:
        arrays, metadata = latest
        state = training.train_state_from_arrays(arrays, tx)
        first_epoch, earlier = metadata["epoch"], metadata["spent"]
        losses = arrays.get("losses", ())
    metrics.rewind({"training": first_epoch})
    pacer = Pacer(config.checkpoint_seconds, earlier)
    saver = Saver(saved, pacer)
    steps = training.steps_per_epoch(options, len(dataset.train))

    def on_step(epoch: int, state, losses: tuple) -> None:
        def parts() -> tuple[dict, dict]:
            arrays = training.train_state_arrays(state)
            if losses:  # Orbax keeps no empty arrays
                arrays["losses"] = np.asarray(jax.device_get(losses))
            return arrays, {"epoch": epoch}

        saver.offer(epoch * steps + len(losses), parts)

    def on_epoch(epoch: int, state, figures: dict) -> None:
        metrics.write("training", epoch, **figures)
        on_step(epoch, state, ())

    with saver:
        variables = training.train(
            classifier,
            variables,
            dataset,
            options,
            start=None if state is None else training.Place(first_epoch, state, losses),
            on_step=on_step,
            on_epoch=on_epoch,
            progress=progress,
        )
    return variables, pacer.spent()["seconds"]
