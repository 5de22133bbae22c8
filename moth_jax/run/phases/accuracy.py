"""The accuracy of a run's models on the test images. It is computed for every summary."""

import warnings

import numpy as np

from moth_jax.data import ImageDataset
from moth_jax.evaluation import predictions
from moth_jax.run.job import Job
from moth_jax.run.phases.base import MODEL_FOLDERS, Models, Phase

_FEWEST = 30  # test images that tell a guess from knowledge


def _figures(job: Job, models: Models) -> dict:
    """Return the test accuracy of each model that there is.

    Where a part of the classes is chosen, also their names, and the accuracy on their images and on
    those of the others.
    """
    labels = job.dataset.test.labels
    parts = {"accuracy": np.ones(len(labels), bool)}
    figures = {}
    if job.is_subset:
        is_chosen = np.isin(labels, job.classes)
        parts |= {"accuracy_chosen": is_chosen, "accuracy_others": ~is_chosen}
        figures["classes"] = [job.dataset.class_names[k] for k in job.classes]
    for when in MODEL_FOLDERS:
        model, right = models.get(when), None
        if model is not None:
            predict = model.classifier.predict
            right = predictions(predict, model.variables, job.dataset.test) == labels
        for name, part in parts.items():
            figures[f"{name}_{when}"] = None if right is None else float(np.mean(right[part]))
    _warn_of_chance(job.dataset, figures["accuracy_before"])
    return figures


def _warn_of_chance(dataset: ImageDataset, accuracy: float | None) -> None:
    """Warn of a model that guesses: its triggers say nothing."""
    labels = dataset.test.labels
    if accuracy is None or len(labels) < _FEWEST:
        return
    chance = np.bincount(labels).max() / len(labels)
    if accuracy <= chance + 3 * np.sqrt(chance * (1 - chance) / len(labels)):
        warnings.warn(
            f"the model is right on {100 * accuracy:.2f} % of the test images, no more than by "
            f"guessing ({100 * chance:.2f} %): its distances and a scan's verdict mean little; "
            "check model.mean and model.std, the range of the pixels and the order of the classes",
            stacklevel=2,
        )


PHASE = Phase(with_report=True, figures=_figures)
