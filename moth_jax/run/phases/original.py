"""The phase that makes the model of a run: imported, trained here, or both."""

import dataclasses
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moth_jax import backdoors, models, training
from moth_jax.data import ImageDataset
from moth_jax.data.checks import normal_name
from moth_jax.errors import InputError, listed
from moth_jax.evaluation import accuracy
from moth_jax.models import checkpoint
from moth_jax.models.checkpoint import SavedModel
from moth_jax.models.classifier import Reading
from moth_jax.models.digest import weights_digest
from moth_jax.models.loading import AUTO, check_alone, head_is_fixed, load_source
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.run import inputs
from moth_jax.run.binding import ORIGINAL, Bond, bond_with
from moth_jax.run.checkpoints import RunCheckpoints, Saver, Spent, Timer
from moth_jax.run.job import Job, ModelOptions
from moth_jax.run.phases.base import MODEL_FOLDERS, Models, Phase
from moth_jax.storage.files import read_record, write_record
from moth_jax.storage.folders import current_folder
from moth_jax.types import Variables

_CHECKPOINTS = "training"
_DEFAULT_ARCHITECTURE = "resnet20"


@dataclasses.dataclass(frozen=True)
class _Record:
    """The fields of original.json: seconds of the training, `inputs.describe`, and a `Bond`."""

    training_seconds: float | None
    checkpoint_sha256: str | None
    data: dict[str, Any]
    of: Bond


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What a checkpoint of the training says beside its arrays."""

    epoch: int
    spent: Spent
    began: dict[str, Any]  # `inputs.describe`


def original_model(job: Job, given: Models | None = None) -> SavedModel:
    """Return the model to measure and harden, made unless it is there.

    It is checked by `given.check` before it is trained, and once it is there, before anything else
    is done with it.
    """
    given = Models(job.workdir) if given is None else given
    folder = job.workdir / MODEL_FOLDERS["before"]
    if broadcast_from_main(folder.exists):
        _check_original(job, given)
    else:
        model, seconds = make_model(job), None
        given.check(model)
        reading = model.classifier.reading
        about = inputs.describe(job.model.checkpoint, job.dataset)
        if not job.model.checkpoint or job.model.fine_tune:
            variables, seconds = _train(job, model, about)
            model = model._replace(variables=variables)
        bond = bond_with(job, about["data"], weights_digest(model.variables))
        record = {"training_seconds": seconds, **about, "of": bond.to_json()}
        write_record(job.workdir / ORIGINAL, record)
        inputs.keep_fingerprints(job.dataset, job.workdir / inputs.IMAGES)
        checkpoint.save_model(folder, *model)
        if job.model.checkpoint and not job.model.fine_tune:
            _state_accuracy(job, given["before"], reading)
    RunCheckpoints(job.workdir / _CHECKPOINTS).clear()
    model = given["before"]
    given.check(model)
    return model


def _check_original(job: Job, given: Models) -> None:
    """Raise `InputError` unless model and images are those that the run began with."""
    path, record = job.workdir / ORIGINAL, load_original(job.workdir)
    if not record:
        raise InputError(
            f"there is no {path}, which says what the run began with; bring it back, or choose "
            "another --workdir, or --overwrite to start afresh"
        )
    kept = job.workdir / inputs.IMAGES
    inputs.check_unchanged(record, job.model.checkpoint, job.dataset, kept)
    given.check_of(job, "before", path, record["of"])


_MAX_IMAGES = 1000  # enough to tell a model that was misread
_LOST = 0.05  # how much less than its file says a model may be right on other images


def _state_accuracy(job: Job, model: SavedModel, reading: Reading) -> None:
    """Say how accurate an imported model is, and what of it was assumed; warn if it was misread."""
    test, source = job.dataset.test, job.model.checkpoint
    if reading.assumed:
        job.progress.note(f"{source} {reading.assumed}")
    if not len(test):
        return
    some = np.unique(np.linspace(0, len(test) - 1, _MAX_IMAGES).astype(int))
    part = test.subset(some)
    share, claim = accuracy(model.classifier.predict, model.variables, part), reading.claim
    said = f"; the file says that {claim.name} is {100 * claim.share:.2f} %" if claim else ""
    told = f"{source} is right on {100 * share:.2f} % of {len(part):,} test images{said}"
    if claim is None or share >= _least(claim.share, len(part)):
        job.progress.note(told)
        return
    why = f" ({reading.assumed})" if reading.assumed else ""
    warnings.warn(
        f"{told}: the model was probably not read as it is{why}; check model.mean and model.std, "
        "the order of the classes and the range of the pixels, or give a model.builder",
        stacklevel=2,
    )


def _least(share: float, num_images: int) -> float:
    """Return the least accuracy on some images of a model that is said to have `share`."""
    return share - _LOST - 3 * np.sqrt(share * (1 - share) / num_images)


def load_original(workdir: Path) -> dict:
    """Return the record of the original model, {} if there is none."""
    return read_record(workdir / ORIGINAL, _Record)


def make_model(job: Job) -> SavedModel:
    """Return the model that is given, or a new one, before any training.

    Raises:
      InputError: the model cannot be read, or does not fit the data.
    """
    if job.model.checkpoint:
        return _import_model(job.model, job.dataset)
    return _new_model(job)


def training_images(job: Job) -> ImageDataset:
    """Return what the original model is trained on: poisoned if a backdoor is to be planted."""
    if job.backdoor is None:
        return job.dataset
    how = job.poisoning
    return backdoors.poison(
        job.dataset, job.backdoor, rate=how.rate, cover_rate=how.cover_rate, seed=how.seed
    )


def _import_model(options: ModelOptions, dataset: ImageDataset) -> SavedModel:
    """Return the model of `options.checkpoint`, checked against the data."""
    path = current_folder(Path(options.checkpoint).expanduser())
    num_classes = dataset.num_classes if options.fine_tune else None
    if path.is_dir():
        of_files = ("mean", "std", "builder", "trust", "weights")
        check_alone(path, {name: getattr(options, name) for name in of_files}, prefix="model.")
        classifier, variables = load_source(path, num_classes=num_classes)
    else:
        classifier, variables = load_source(
            path,
            arch=options.name,
            builder=options.builder,
            trust=options.trust,
            num_classes=num_classes,
            mean=tuple(options.mean) or None,
            std=tuple(options.std) or None,
            image_shape=dataset.image_shape,
            weights=options.weights,
        )
    spec = classifier.spec
    if spec.image_shape != dataset.image_shape or spec.num_classes != dataset.num_classes:
        raise InputError(
            f"{path} is a model of {spec.num_classes} classes and images {spec.image_shape}, but "
            f"{dataset.name} has {dataset.num_classes} classes and images {dataset.image_shape}"
            + _remedies(options, spec.num_classes, dataset)
        )
    if options.fine_tune or not spec.class_names:
        spec = dataclasses.replace(spec, class_names=dataset.class_names)
    else:
        _check_names(path, spec.class_names, dataset)
    outline = dataclasses.replace(models.outline(spec)[0], reading=classifier.reading)
    return SavedModel(outline, variables)


def _check_names(path: Path, theirs: tuple[str, ...], dataset: ImageDataset) -> None:
    """Refuse a model that has classes of the data in other places; warn of other names.

    Names that differ in capitals, spaces, hyphens or underscores are the same.
    """
    ours = dataset.class_names
    place, there = _places(ours), _places(theirs)
    same = place.keys() & there.keys()
    moved = [i for key, i in there.items() if key in same and place[key] != i]
    other = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if _key(a) != _key(b)]
    if not other:
        return
    unknown = [(key, i) for key, i in place.items() if key not in same]
    missing = [theirs[i] for key, i in there.items() if key not in same]
    i = min(moved, default=other[0])
    told = f"output {i} of {path} is {theirs[i]!r}, class {i} of {dataset.name} is {ours[i]!r}"
    order = "name the classes in the model's order with data.class_list"
    if moved and not unknown:
        raise InputError(f"{told}: the same classes in another order; {order}")
    names = (
        f"{listed([ours[i] for _, i in unknown])} of the data are not among the model's classes, "
        f"which have {listed(missing)} besides"
    )
    more = f", and {len(other) - 1} more differ" if len(other) > 1 else ""
    if moved:
        raise InputError(
            f"{told}: {len(moved)} classes are in another place. {names}; rename what has two "
            f"names, or {order}"
        )
    warnings.warn(
        f"{told}{more}: {names}; if these are not the same classes in the same order, {order}",
        stacklevel=2,
    )


def _places(names: tuple[str, ...]) -> dict[str, int]:
    """Return the place of each name that is there once."""
    keys = list(map(_key, names))
    counts = Counter(keys)
    return {key: i for i, key in enumerate(keys) if counts[key] == 1}


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", normal_name(name).casefold())


def _remedies(options: ModelOptions, num_classes: int, dataset: ImageDataset) -> str:
    """Return what a message says to do about a head of `num_classes`."""
    ways = []
    if num_classes > dataset.num_classes:
        ways.append("name all classes of the model (data.class_list), images of some will do")
    if num_classes != dataset.num_classes and not head_is_fixed(options.checkpoint, options.trust):
        ways.append(
            f"set model.fine_tune=True for a new head of {dataset.num_classes} classes and "
            "training with config.training"
        )
    return f"; {', or '.join(ways)}" if ways else ""


def _new_model(job: Job) -> SavedModel:
    options, dataset = job.model, job.dataset
    classifier, variables = models.create(
        _DEFAULT_ARCHITECTURE if options.name == AUTO else options.name,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        mean=tuple(options.mean) or dataset.mean,
        std=tuple(options.std) or dataset.std,
        class_names=dataset.class_names,
        seed=job.seed,
    )
    return SavedModel(classifier, variables)


def _train(job: Job, model: SavedModel, about: dict) -> tuple[Variables, float]:
    """Train, or go on training; return the variables and the seconds of all processes.

    `about` is what the run records of its inputs (`inputs.describe`).
    """
    dataset, options = training_images(job), job.training
    saved = RunCheckpoints(job.workdir / _CHECKPOINTS, _Progress, of={"run": job.identity})
    state, first_epoch, losses, earlier = None, 0, (), None
    latest = saved.latest()
    if latest is not None:
        arrays, metadata = latest
        inputs.check_unchanged(metadata["began"], job.model.checkpoint, job.dataset)
        tx = training.optimiser(options, len(dataset.train))
        saved.check_like(arrays, training.outline(model.variables, tx))
        state = training.train_state_from_arrays(arrays, tx)
        first_epoch, earlier = metadata["epoch"], metadata["spent"]
        losses = arrays.get("losses", ())
    job.metrics.rewind({"training": first_epoch})
    timer = Timer(job.checkpoint_seconds, earlier)
    saver = Saver(saved, timer)
    steps = training.steps_per_epoch(options, len(dataset.train))

    def on_step(epoch: int, state: training.TrainState, losses: tuple) -> None:
        def parts() -> tuple[dict, dict]:
            arrays = training.train_state_arrays(state)
            if losses:  # Orbax keeps no empty arrays
                arrays["losses"] = np.asarray(jax.device_get(losses))
            return arrays, {"epoch": epoch, "began": about}

        saver.offer(epoch * steps + len(losses), parts)

    def on_epoch(epoch: int, state: training.TrainState, figures: dict) -> None:
        job.metrics.write("training", epoch, **figures)
        on_step(epoch, state, ())

    with saver:
        variables = training.train(
            *model,
            dataset,
            options,
            start=None if state is None else training.Place(first_epoch, state, losses),
            on_step=on_step,
            on_epoch=on_epoch,
            progress=job.progress,
        )
    return variables, timer.spent()["seconds"]


def _do(job: Job, given: Models) -> None:
    original_model(job, given)


def _figures(job: Job, given: Models) -> dict:
    return {"training_seconds": load_original(job.workdir).get("training_seconds")}


PHASE = Phase(
    do=_do,
    with_report=True,  # which checks it
    figures=_figures,
    files=(MODEL_FOLDERS["before"], _CHECKPOINTS, ORIGINAL, inputs.IMAGES),
)
