"""The phases that measure class distances, before and after hardening."""

import dataclasses
import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moth_jax.data import ImageSplit
from moth_jax.distance.certified import certifiable, certified_distances
from moth_jax.distance.directions import DirectionChoice
from moth_jax.distance.matrix import DistanceMatrix, increase_interval, relative_increase
from moth_jax.distance.measure import budget_of, distance_matrix
from moth_jax.distance.nearest import nearest_directions
from moth_jax.errors import InputError, listed, require_choice
from moth_jax.inversion import DEFAULT, Search, create_search
from moth_jax.models.checkpoint import SavedModel
from moth_jax.models.digest import weights_digest
from moth_jax.options import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SEED,
    check_options,
    option,
)
from moth_jax.parallel.processes import load_if_exists, on_main
from moth_jax.run.binding import bond_of
from moth_jax.run.job import SPLITS, Job
from moth_jax.run.phases.base import Models, Phase
from moth_jax.run.preemption import saved_in

_PARTS = "distances"  # folder of finished chunks


@dataclasses.dataclass(frozen=True)
class MeasureOptions:
    """How class distances are measured: `distance.distance_matrix`, and in which directions.

    Attributes:
      split: the part of the data whose images are used.
      victims, targets: names of classes to measure from and to; () for all.
      num_directions: how many of these directions, drawn at random by the run's seed; 0 for all.
      nearest: measure this many of them, the nearest as universal triggers of the given model find
        them (`distance.nearest_directions`); 0 for all.
      num_images, num_steps, minibatch_size, mask_weight, seeds: as in `distance_matrix`; None for
        what the inversion was made for.
      inversion: "standard", or the name of one of `inversion.INVERSIONS`.
      precision, patience, success_bound: its options; None for its own default.
      directions_per_chunk: directions in one compiled call; 0 for as many as suit the device.
      certify: prove a lower end of each distance, too (`distance.certified_distances`).
    """

    split: str = "test"
    victims: tuple[str | int, ...] = ()
    targets: tuple[str | int, ...] = ()
    num_directions: int = option(0, NOT_NEGATIVE)
    nearest: int = option(0, NOT_NEGATIVE)
    num_images: int = option(100, AT_LEAST_1)
    num_steps: int | None = option(None, AT_LEAST_1)
    minibatch_size: int | None = option(None, AT_LEAST_1)
    mask_weight: float | None = option(None, POSITIVE)
    seeds: tuple[int, ...] = option((0,), SEED)
    inversion: str = DEFAULT
    precision: str = "float32"
    patience: int | None = option(None, AT_LEAST_1)
    success_bound: float = option(0.9, POSITIVE_SHARE)
    directions_per_chunk: int = option(0, NOT_NEGATIVE)
    certify: bool = False

    def __post_init__(self):
        require_choice("split", self.split, SPLITS)
        check_options(self, prefix="distance.")
        budget_of(self.method(), self.num_steps, self.minibatch_size, self.mask_weight)

    def method(self) -> Search:
        """Return the search by which distances are measured.

        Raises:
          InputError: there is no such search, or it has no such option or value.
        """
        return create_search(
            self.inversion,
            precision=None if self.precision == "float32" else self.precision,
            patience=self.patience,
            success_bound=self.success_bound,
        )


def measure(job: Job, when: str, model: SavedModel) -> DistanceMatrix:
    """Return the class distances of a model, measured unless `when` they were measured before.

    `when` is "before" or "after": of the given model or of the hardened one.
    """
    measured = load_distances(job.workdir, when)
    if measured is not None:
        return measured
    options = job.options(MeasureOptions)
    split = getattr(job.dataset, options.split)
    with saved_in(job.workdir / _PARTS):
        chosen = _nearest(job, model, split) if options.nearest else job.directions
        victims = {victim for victim, _ in chosen.directions}
        images, labels = _first_images(split, victims, options.num_images)
        inputs = model.classifier.predict, images, labels
        of_both: dict[str, Any] = {
            "variables": model.variables,
            "class_names": job.dataset.class_names,
            "classes": job.classes,
            "directions": chosen,
            "num_images": options.num_images,
            "check_order": job.check_order,
            "progress": job.progress,
        }
        matrix = distance_matrix(
            *inputs,
            **of_both,
            num_steps=options.num_steps,
            minibatch_size=options.minibatch_size,
            mask_weight=options.mask_weight,
            seeds=options.seeds,
            inversion=options.method(),
            directions_per_chunk=options.directions_per_chunk or None,
            resume_dir=job.workdir / _PARTS,
            label=f"distances {when}",
        )
        if options.certify:
            lower = certified_distances(
                *inputs,
                **of_both,
                success_bound=options.success_bound,
                resume_dir=job.workdir / _PARTS / "certified",
                label=f"lower ends {when}",
            )
            matrix = dataclasses.replace(matrix, lower=lower)
    bond = bond_of(job, weights_digest(model.variables)).to_json()
    matrix = dataclasses.replace(matrix, details={**matrix.details, "of": bond})
    on_main(matrix.save, _file(job.workdir, when))
    on_main(shutil.rmtree, job.workdir / _PARTS)
    return matrix


def load_distances(workdir: Path, when: str) -> DistanceMatrix | None:
    """Return the class distances "before" or "after", None if they are not measured."""
    return load_if_exists(DistanceMatrix.load, _file(workdir, when))


def _file(workdir: Path, when: str) -> Path:
    return workdir / f"distance_{when}.npz"


def _first_images(
    split: ImageSplit, labels: Iterable[int], num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first images of each label, and their labels, in the order of the split.

    No other image is used, and all of them may be more than fit in memory.
    """
    used = np.sort(np.concatenate([split.of_class(k, num_images) for k in labels]))
    return split.batch(used), split.labels[used]


def _nearest(job: Job, model: SavedModel, split: ImageSplit) -> DirectionChoice:
    """Return the nearest of the job's directions: those of the given model, after hardening too."""
    before = load_distances(job.workdir, "before")
    if before is not None:
        pairs = np.asarray(job.classes)[np.argwhere(~np.isnan(before.values))]
        return DirectionChoice(list(map(tuple, pairs.tolist())), before.details["selection"])
    options, details = job.options(MeasureOptions), job.directions.details
    return nearest_directions(
        model.classifier.predict,
        *_first_images(split, job.classes, options.num_images),
        options.nearest,
        variables=model.variables,
        classes=job.classes,
        victims=details.get("victims", ()),
        targets=details.get("targets", ()),
        num_images=options.num_images,
        success_bound=options.success_bound,
        seed=job.seed,
        check_order=job.check_order,
        resume_dir=job.workdir / _PARTS / "universal",
        progress=job.progress,
    )


def _check(job: Job, model: SavedModel | None) -> None:
    """Raise `InputError` if lower ends are asked for of a model with a layer that is not known."""
    if model is not None and job.options(MeasureOptions).certify:
        classifier = model.classifier
        certifiable(classifier.predict, model.variables, classifier.spec.image_shape)


def _figures(job: Job, models: Models) -> dict:
    """Return the mean distances before and after, and what lies between them."""
    before, after = (load_distances(job.workdir, when) for when in ("before", "after"))
    return {
        "distance_before": before and before.average(),
        "distance_after": after and after.average(),
        "distance_lower_before": before and before.average_lower(),
        "distance_lower_after": after and after.average_lower(),
        "directions": before and before.choice(),
        "distance_interval_before": before and before.interval(),
        "distance_interval_after": after and after.interval(),
        "increase": relative_increase(before, after) if before and after else None,
        "increase_interval": increase_interval(before, after) if before and after else None,
        "failures_before": before and before.num_failures(),
        "failures_after": after and after.num_failures(),
        "distance_seconds": {
            when: matrix.details["seconds"]
            for when, matrix in (("before", before), ("after", after))
            if matrix
        },
    }


def _do(job: Job, models: Models, *, when: str) -> None:
    measure(job, when, models[when])


def _verify(job: Job, models: Models, *, when: str) -> None:
    """Raise `InputError` unless the distances are of this run's model, among its classes."""
    matrix, path = load_distances(job.workdir, when), _file(job.workdir, when)
    if matrix is not None:
        models.check_of(job, when, path, matrix.details.get("of"))
        names = tuple(job.dataset.class_names[k] for k in job.classes)
        if matrix.class_names != names:
            raise InputError(
                f"{path} is of the classes {listed(matrix.class_names)}, and this run has "
                f"{listed(names)}; bring back the file as it was, or move it away, and the same "
                "command makes it again"
            )


BEFORE = Phase(
    do=functools.partial(_do, when="before"),
    requests=("all", "measure"),
    check=_check,
    verify=functools.partial(_verify, when="before"),
    files=("distance_before.npz", _PARTS),
    options={"distance": MeasureOptions},
)
AFTER = Phase(
    do=functools.partial(_do, when="after"),
    requests=("all",),
    check=_check,
    verify=functools.partial(_verify, when="after"),
    figures=_figures,  # of both
    files=("distance_after.npz", _PARTS),
)
