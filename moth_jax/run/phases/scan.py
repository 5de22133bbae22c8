"""The phase "scan": does the given model look poisoned?"""

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np

from moth_jax.data import ImageSplit
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.errors import InputError, require_choice
from moth_jax.models.checkpoint import SavedModel
from moth_jax.models.digest import weights_digest
from moth_jax.options import NOT_NEGATIVE, option
from moth_jax.parallel.processes import broadcast_from_main, load_if_exists, on_main
from moth_jax.run.binding import bond_of
from moth_jax.run.job import SPLITS, Job
from moth_jax.run.phases.base import Models, Phase
from moth_jax.run.phases.measure import MeasureOptions, load_distances
from moth_jax.run.preemption import saved_in
from moth_jax.scanning import SCANNERS, Scan, ScanOptions, scan, scan_distances
from moth_jax.scanning.base import check_classes_have_images
from moth_jax.storage.files import read_json, strict_json, write_json

_RESULT, _RECORD, _PARTS = "scan.npz", "scan.json", "scanning"


@dataclasses.dataclass(frozen=True)
class ScanPhaseOptions(ScanOptions):
    """How the model is scanned: `scanning.ScanOptions`, by which scanner, and on which images.

    Where the run has measured all directions, "pairs" takes those distances as they are.

    Attributes:
      method: one of `scanning.SCANNERS`.
      split: the part of the data whose images are used.
      threshold: of the scanner's statistic (`scanning.calibrate`); 0 for the scanner's own.
    """

    method: str = "neural_cleanse"
    split: str = "test"
    threshold: float = option(0.0, NOT_NEGATIVE)

    def __post_init__(self):
        super().__post_init__()
        require_choice("scan.method", self.method, SCANNERS)
        require_choice("scan.split", self.split, SPLITS)

    def of_scanner(self) -> ScanOptions:
        """Return the options of the scanner alone."""
        names = [field.name for field in dataclasses.fields(ScanOptions)]
        return ScanOptions(**{name: getattr(self, name) for name in names})

    def asked(self) -> dict:
        """Return what a result depends on."""
        own = {name: getattr(self, name) for name in ("method", "split", "threshold")}
        return {**own, **dataclasses.asdict(self.of_scanner())}


def scan_model(job: Job, model: SavedModel) -> Scan:
    """Scan the model, unless it was already scanned in the same way; write scan.npz and scan.json.

    If the run has measured the distances of all directions they are not measured again: "pairs" is
    then free, and its verdict rests on that measurement, whatever the options of the scan.
    """
    matrix, path = _measured(job), job.workdir / _RECORD
    bond = bond_of(job, weights_digest(model.variables)).to_json()
    asked = {**_asked(job, matrix), "of": bond}
    if read_json(path).get("asked") == asked:
        return broadcast_from_main(Scan.load, job.workdir / _RESULT)
    if matrix is None:
        found = _scan(job, model)
    else:
        options = job.options(ScanPhaseOptions)
        found = scan_distances(
            matrix,
            image_shape=job.dataset.image_shape,
            threshold=options.threshold or None,
            options=options.of_scanner(),
        )
    # A scan is done once its record is there, and no other may stand beside the result.
    on_main(functools.partial(path.unlink, missing_ok=True))
    on_main(found.save, job.workdir / _RESULT)
    write_json(path, {**found.to_json(), "asked": asked})
    on_main(shutil.rmtree, job.workdir / _PARTS, True)
    return found


def load_scan(workdir: Path) -> Scan | None:
    """Return the scan of a run, None if there is none."""
    if not read_json(workdir / _RECORD):
        return None
    return load_if_exists(Scan.load, workdir / _RESULT)


def _verify(job: Job, models: Models) -> None:
    """Raise `InputError` unless the scan is of this run's model, and both of its files agree."""
    path = job.workdir / _RECORD
    record, scan = read_json(path), load_scan(job.workdir)
    if not record and not broadcast_from_main(path.exists):
        return
    asked = record.pop("asked", None)
    if scan is None or record != strict_json(scan.to_json()):
        raise InputError(
            f"{path} and {_RESULT} are not of one scan; move both away, and a scan makes them again"
        )
    recorded = asked.get("of") if isinstance(asked, dict) else None
    models.check_of(job, "before", path, recorded)


def _measured(job: Job) -> DistanceMatrix | None:
    """Return the distances that "pairs" need not measure; None if there are none, or not all."""
    if job.options(ScanPhaseOptions).method != "pairs":
        return None
    matrix = load_distances(job.workdir, "before")
    if matrix is None:
        return None
    if matrix.is_whole:
        job.progress.note(
            "scanning the distances of this run, as config.distance had them measured"
        )
        return matrix
    job.progress.note(
        f"this run has the distances of {matrix.choice()}; a scan measures all of them"
    )
    return None


def _asked(job: Job, matrix: DistanceMatrix | None) -> dict:
    """Return what a scan depends on: its options, or those of the distances that it reads."""
    options = job.options(ScanPhaseOptions).asked()
    if matrix is not None:
        used = ("method", "threshold", "max_pair_size")
        measured = {"split": job.options(MeasureOptions).split, **matrix.details}
        options = {**{name: options[name] for name in used}, "distances": measured}
    return {**options, "classes": [job.dataset.class_names[k] for k in job.classes]}


def _scan(job: Job, model: SavedModel) -> Scan:
    options, split = job.options(ScanPhaseOptions), _split(job)
    per_class = options.num_images
    if options.method == "neural_cleanse":  # which takes a few images of each other class
        per_class = -(-per_class // (len(job.classes) - 1))
    # No other image is used, and all of them may be more than fit in memory.
    used = np.sort(np.concatenate([split.of_class(k, per_class) for k in job.classes]))
    with saved_in(job.workdir / _PARTS):
        return scan(
            model.classifier.predict,
            split.batch(used),
            split.labels[used],
            variables=model.variables,
            method=options.method,
            class_names=job.dataset.class_names,
            classes=job.classes,
            threshold=options.threshold or None,
            options=options.of_scanner(),
            check_order=job.check_order,
            resume_dir=job.workdir / _PARTS,
            progress=job.progress,
        )


def _split(job: Job) -> ImageSplit:
    name = job.options(ScanPhaseOptions).split
    split = getattr(job.dataset, name)
    if not len(split):
        raise InputError(f"there are no images in the split {name!r}; choose another")
    return split


def _do(job: Job, models: Models) -> None:
    scan_model(job, models["before"])


def _check(job: Job, model: SavedModel | None) -> None:
    """Raise `InputError` unless there are classes and images to scan with."""
    if model is None:
        names = tuple(job.dataset.class_names[k] for k in job.classes)
        check_classes_have_images(job.classes, names, _split(job).labels)


def _figures(job: Job, models: Models) -> dict:
    scan = load_scan(job.workdir)
    if scan is None:
        return {}
    fields = ("method", "poisoned", "statistic", "statistic_name", "threshold", "seconds")
    figures = {name: getattr(scan, name) for name in fields}
    return {"scan": {"verdict": scan.verdict(), **figures, "text": scan.describe()}}


PHASE = Phase(
    do=_do,
    requests=("scan",),
    check=_check,
    verify=_verify,
    figures=_figures,
    files=(_PARTS, _RESULT, _RECORD),
    options={"scan": ScanPhaseOptions},
)
