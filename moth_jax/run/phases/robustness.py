"""The robustness of a run's models: test accuracy under PGD (Section V-A)."""

import dataclasses
from pathlib import Path

import numpy as np

from moth_jax.data import ImageDataset, ImageSplit
from moth_jax.evaluation import Adversary, pgd_accuracy
from moth_jax.models.digest import weights_digest
from moth_jax.options import AT_LEAST_1, POSITIVE, SHARE, option
from moth_jax.run.binding import Bond, bond_of
from moth_jax.run.job import Job
from moth_jax.run.phases.base import MODEL_FOLDERS, Models, Phase
from moth_jax.storage.files import read_record, write_record

_RECORD = "robustness.json"
_SEED = 0  # not the run's: runs are compared on the same images and random starts


@dataclasses.dataclass(frozen=True)
class RobustnessOptions:
    """The attack under which accuracy is measured as well (`evaluation.pgd_accuracy`).

    Published: 8/255 and 20 steps of 2/255 for CIFAR-10, 0.03 and 100 of 0.001 for SVHN and GTSRB,
    0.1 and 100 of 0.01 for LISA.

    Attributes:
      epsilon: bound of the perturbation in units of [0, 1]; 0 for no attack.
      step_size: in units of [0, 1].
      num_steps: of PGD.
      num_images: how many test images are attacked (`attacked_images`).
    """

    epsilon: float = option(0.0, SHARE)
    step_size: float = option(2 / 255, POSITIVE)
    num_steps: int = option(20, AT_LEAST_1)
    num_images: int = option(1000, AT_LEAST_1)


@dataclasses.dataclass(frozen=True)
class _Record:
    """The fields of robustness.json: what was asked for, a `Bond` for each model, accuracies."""

    asked: dict[str, float]
    of: dict[str, Bond]
    before: float | None = None
    after: float | None = None


def measure_robustness(job: Job, models: Models) -> None:
    """Attack each model that was not attacked in the same way before; write robustness.json."""
    options = job.options(RobustnessOptions)
    if options.epsilon == 0:
        return
    num_images = min(options.num_images, len(job.dataset.test))
    asked = {**dataclasses.asdict(options), "num_images": num_images}
    path = job.workdir / _RECORD
    done = read_record(path, _Record)
    figures: dict = done if done.get("asked") == asked else {"asked": asked, "of": {}}
    for when in MODEL_FOLDERS:
        model = models.get(when)
        if when in figures or model is None:
            continue
        figures[when] = pgd_accuracy(
            model.classifier.predict,
            model.variables,
            attacked_images(job.dataset, num_images),
            adversary=Adversary(options.epsilon, options.step_size, options.num_steps),
            seed=_SEED,
            label=f"robustness {when}",
            progress=job.progress,
        )
        bond = bond_of(job, weights_digest(model.variables)).to_json()
        figures["of"] = {**figures["of"], when: bond}
        write_record(path, figures)


def _verify(job: Job, models: Models) -> None:
    """Raise `InputError` unless the models that were attacked are those of this run."""
    path = job.workdir / _RECORD
    for when, recorded in read_record(path, _Record).get("of", {}).items():
        models.check_of(job, when, path, recorded)


def load_robustness(workdir: Path) -> dict:
    """Return the summary's figures of the last attack on a run's models, {} if there was none."""
    record = read_record(workdir / _RECORD, _Record)
    if not record:
        return {}
    accuracies = {f"robustness_{when}": record[when] for when in MODEL_FOLDERS if when in record}
    return {"robustness": record["asked"], **accuracies}


def attacked_images(dataset: ImageDataset, num_images: int) -> ImageSplit:
    """Return `num_images` test images (all, if there are fewer), drawn by a fixed seed.

    Not the first ones: the test sets of some data are sorted by class.
    """
    test = dataset.test
    if num_images >= len(test):
        return test
    chosen = np.random.default_rng(_SEED).choice(len(test), num_images, replace=False)
    return test.subset(np.sort(chosen))


def _figures(job: Job, models: Models) -> dict:
    return load_robustness(job.workdir)


PHASE = Phase(
    do=measure_robustness,
    with_report=True,
    verify=_verify,
    figures=_figures,
    files=(_RECORD,),
    options={"robustness": RobustnessOptions},
)
