"""One run: its phases, each of which leaves its result in the working folder and is not done twice.

    original/             the model before, a checkpoint of this package
    distance_before.npz   its class distances
    hardened/             the model after
    distance_after.npz    its class distances
    summary.json, report.html, metrics.jsonl, tensorboard/

A phase that was interrupted goes on from its last checkpoint (`training/`, `hardening/`) or its
last finished chunk of directions (`distances/`), and gives the numbers it would have given.
"""

import importlib.metadata
import json
import shutil
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moth_jax import checkpoints, configuration, data, distance, models, moth, training
from moth_jax.data import ImageDataset
from moth_jax.errors import InputError
from moth_jax.evaluation import accuracy
from moth_jax.inversion import INVERSIONS
from moth_jax.matrix import DistanceMatrix, relative_increase
from moth_jax.metrics import MetricWriter, read_metrics
from moth_jax.models import Classifier, Variables
from moth_jax.progress import Progress
from moth_jax.report import write_report, write_summary

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_RESULT_FILES = (
    "original.json",
    "hardening.json",
    "distance_before.npz",
    "distance_after.npz",
    "metrics.jsonl",
    "summary.json",
    "report.html",
)
_RESULT_FOLDERS = ("original", "hardened", "training", "hardening", "distances", "tensorboard")
# Fields that are no property of the results: the same run may go on with others.
_FREE_FIELDS = ("phase", "checkpoint_seconds")


def run(
    config: ml_collections.ConfigDict, workdir: Path, *, overwrite: bool, progress: Progress
) -> dict:
    """Do the phases that `config.phase` asks for and are not done yet; return the summary."""
    configuration.check(config)
    dataset = data.load(config.data.name, **configuration.data_options(config))
    _directions(config, dataset)  # a wrong class name is found now, not after the training
    phase = config.phase
    if phase == "report" and not (workdir / "original").exists():
        raise InputError(f"there is no run in {workdir} to report on; do another phase first")
    claim(workdir, config, overwrite=overwrite)
    if phase == "report":
        return summarise(config, dataset, workdir)
    with MetricWriter(workdir) as metrics:
        classifier, variables = original_model(config, dataset, workdir, metrics, progress)
        if phase in ("all", "measure"):
            measure(config, dataset, workdir, "before", classifier, variables, progress)
        if phase in ("all", "harden"):
            hardened = harden(config, dataset, workdir, classifier, variables, metrics, progress)
        if phase == "all":
            measure(config, dataset, workdir, "after", classifier, hardened, progress)
    return summarise(config, dataset, workdir)


def claim(workdir: Path, config: ml_collections.ConfigDict, *, overwrite: bool) -> None:
    """Make `workdir` this run's, or find that it is.

    A run without any result (a path was mistyped, say) gives way to another configuration.

    Raises:
      InputError: it holds another run and `overwrite` is not set, or files of the same names that
        are of no run, or it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {workdir} as --workdir: {error.strerror}") from error
    path = workdir / "config.json"
    ours = json.loads(config.to_json_best_effort())
    results = _results(workdir)
    if results and not path.exists():
        raise InputError(
            f"{workdir} holds {', '.join(item.name for item in results)}, but not the config.json "
            "of a run; choose another --workdir, or move them away"
        )
    if results and not overwrite:
        changed = _changed_fields(_read_json(path), ours)
        if changed:
            raise InputError(
                f"{workdir} holds a run with another configuration (different: "
                f"{', '.join(changed)}); choose another --workdir, or --overwrite to start afresh"
            )
        return
    for item in results:
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
    # Last: whatever is left of an interrupted removal still belongs to the run it names.
    write_summary(path, ours)


def _results(workdir: Path) -> list[Path]:
    """Return what a run has left in `workdir`; an empty record of figures is nothing."""
    folders = [path for name in _RESULT_FOLDERS if (path := workdir / name).exists()]
    files = [path for name in _RESULT_FILES if (path := workdir / name).exists()]
    return folders + [path for path in files if not path.is_file() or path.stat().st_size]


def _changed_fields(theirs: dict, ours: dict) -> list[str]:
    theirs, ours = (
        {name: value for name, value in _flat(fields).items() if name not in _FREE_FIELDS}
        for fields in (theirs, ours)
    )
    missing = object()
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name, missing) != theirs.get(name, missing)
    )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def original_model(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    metrics: MetricWriter,
    progress: Progress,
) -> tuple[Classifier, Variables]:
    """Return the model to measure and harden: imported, or trained here."""
    folder = workdir / "original"
    if not folder.exists():
        source = config.model.checkpoint
        classifier, variables = (
            import_model(config, dataset) if source else new_model(config, dataset)
        )
        started = time.perf_counter()
        seconds = 0.0
        if not source:
            variables, seconds = _train(
                config, dataset, workdir, classifier, variables, metrics, progress
            )
        _write_json(
            workdir / "original.json",
            {"training_seconds": seconds + time.perf_counter() - started if not source else None},
        )
        checkpoints.save_model(folder, classifier, variables)
    checkpoints.RunCheckpoints(workdir / "training").clear()
    saved = checkpoints.load_model(folder)
    return saved.classifier, saved.variables


def import_model(
    config: ml_collections.ConfigDict, dataset: ImageDataset
) -> tuple[Classifier, Variables]:
    """Return the model of `config.model.checkpoint`, checked against the data."""
    from moth_jax.models import importing

    path = Path(config.model.checkpoint).expanduser()
    if path.is_dir():
        classifier, variables, _ = checkpoints.load_model(path)
    else:
        classifier, variables = importing.load(
            path,
            arch=config.model.name,
            num_classes=dataset.num_classes,
            class_names=dataset.class_names,
            image_shape=dataset.image_shape,
            mean=tuple(config.model.mean) or None,
            std=tuple(config.model.std) or None,
        )
    spec = classifier.spec
    if spec.image_shape != dataset.image_shape or spec.num_classes != dataset.num_classes:
        raise InputError(
            f"{path} is a model of {spec.num_classes} classes and images {spec.image_shape}, but "
            f"{dataset.name} has {dataset.num_classes} classes and images {dataset.image_shape}"
        )
    return classifier, variables


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
    split = getattr(dataset, options.pop("split"))
    del options["victims"], options["num_directions"]
    inversion = INVERSIONS[options.pop("inversion")](
        patience=options.pop("patience"), success_bound=options.pop("success_bound")
    )
    matrix = distance.distance_matrix(
        classifier.predict,
        split.batch(np.arange(len(split))),
        split.labels,
        variables=variables,
        class_names=dataset.class_names,
        directions=_directions(config, dataset),
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


def _directions(config: ml_collections.ConfigDict, dataset: ImageDataset) -> list[tuple[int, int]]:
    """Return the directions to measure: the same before and after."""
    victims, count = config.distance.victims, config.distance.num_directions
    numbers = _class_numbers([str(name) for name in victims], dataset)
    directions = [(a, b) for a in numbers for b in range(dataset.num_classes) if a != b]
    if not 0 <= count <= len(directions):
        raise InputError(f"distance.num_directions must be in 0..{len(directions)}, got {count}")
    if count == 0:
        return directions
    chosen = np.random.default_rng(config.seed).choice(len(directions), count, replace=False)
    return [directions[i] for i in sorted(chosen)]


def _class_numbers(names: list[str], dataset: ImageDataset) -> list[int]:
    unknown = sorted(set(names) - set(dataset.class_names))
    if unknown:
        raise InputError(
            f"unknown classes in distance.victims: {', '.join(unknown)}; the classes are: "
            f"{', '.join(dataset.class_names)}"
        )
    return [i for i, name in enumerate(dataset.class_names) if not names or name in names]


def harden(
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: Path,
    classifier: Classifier,
    variables: Variables,
    metrics: MetricWriter,
    progress: Progress,
) -> Variables:
    """Harden, or go on hardening; return the hardened variables."""
    folder = workdir / "hardened"
    saved = checkpoints.RunCheckpoints(workdir / "hardening")
    if folder.exists():
        saved.clear()
        return checkpoints.load_model(folder).variables
    options = configuration.moth_config(config)
    latest, state, earlier = saved.latest(), None, 0.0
    if latest is not None:
        arrays, metadata = latest
        earlier = metadata.pop("seconds")
        tx = moth.optimiser(options, dataset)
        state = checkpoints.moth_state_from_arrays(arrays, metadata, tx)
    metrics.rewind(
        {
            "warm-up": -1 if state is None else state.warmed_up - 1,
            "hardening": -1 if state is None else state.step - 1,
        }
    )
    save = _Pacer(config.checkpoint_seconds, earlier)

    def on_round(state: moth.MothState, records: list[dict]) -> None:
        for record in records:
            figures = dict(record)
            metrics.write(figures.pop("phase"), figures.pop("step"), **figures)
        if save.due():
            arrays, metadata = checkpoints.moth_state_arrays(state)
            saved.save(
                state.warmed_up + state.step, arrays, {**metadata, "seconds": save.seconds()}
            )

    state = moth.harden(
        classifier, variables, dataset, options, state=state, on_round=on_round, progress=progress
    )
    _write_json(
        workdir / "hardening.json",
        {
            "seconds": save.seconds(),
            "steps": state.kept_step,
            "stopped": state.stopped,
            "validation_accuracy_before": state.initial_accuracy,
            "validation_accuracy_at_stop": state.accuracy,
            "num_selected": state.scheduler.num_selected,
        },
    )
    checkpoints.save_model(folder, classifier, state.kept)
    saved.clear()
    return state.kept


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


def summarise(config: ml_collections.ConfigDict, dataset: ImageDataset, workdir: Path) -> dict:
    """Write summary.json, and report.html if anything was measured, from what the phases left."""
    before, after = (_matrix(workdir / f"distance_{when}.npz") for when in ("before", "after"))
    hardening = _read_json(workdir / "hardening.json")
    summary = {
        "data": dataset.name,
        "model": None,
        "method": config.method,
        **_accuracies(dataset, workdir),
        "distance_before": before and before.average(),
        "distance_after": after and after.average(),
        "increase": relative_increase(before, after) if before and after else None,
        "failures_before": before and before.num_failures(),
        "failures_after": after and after.num_failures(),
        "distance_seconds": {
            when: matrix.details["seconds"]
            for when, matrix in (("before", before), ("after", after))
            if matrix
        },
        "harden_seconds": hardening.get("seconds"),
        "harden_steps": hardening.get("steps"),
        "harden_stopped": hardening.get("stopped"),
        "training_seconds": _read_json(workdir / "original.json").get("training_seconds"),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seeds": {"run": config.seed, "distance": list(config.distance.seeds)},
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    write_summary(workdir / "summary.json", summary)
    if before is not None:
        records = read_metrics(workdir / "metrics.jsonl")
        write_report(
            workdir / "report.html",
            title=f"{summary['model']} on {dataset.name}",
            summary=summary,
            before=before,
            after=after,
            history=[record for record in records if record["phase"] == "hardening"],
            selections=np.asarray(hardening["num_selected"]) if hardening else None,
            examples=dataset.test.batch(
                [dataset.test.of_class(k, 1)[0] for k in range(dataset.num_classes)]
            ),
        )
    return summary


def _accuracies(dataset: ImageDataset, workdir: Path) -> dict:
    """Return the model's name and the test accuracy of each model that there is."""
    figures = {}
    for when, folder in (("before", workdir / "original"), ("after", workdir / "hardened")):
        found = None
        if folder.exists():
            classifier, variables, _ = checkpoints.load_model(folder)
            figures["model"] = classifier.spec.arch
            found = accuracy(classifier.predict, variables, dataset.test)
        figures[f"accuracy_{when}"] = found
    return figures


def _matrix(path: Path) -> DistanceMatrix | None:
    return DistanceMatrix.load(path) if path.exists() else None


def _write_json(path: Path, fields: dict) -> None:
    write_summary(path, fields)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
