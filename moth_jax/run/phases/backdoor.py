"""How often the backdoor of a run works on its models. It is computed for every summary."""

from collections.abc import Iterable

import numpy as np

from moth_jax import backdoors
from moth_jax.report.backdoor import StampedExample
from moth_jax.run.job import Job
from moth_jax.run.phases.base import MODEL_FOLDERS, Models, Phase

_MAX_STAMPED = 6


def _figures(job: Job, models: Models) -> dict:
    """Return what the backdoor is, and how often it works on each model that there is."""
    backdoor, dataset = job.backdoor, job.dataset
    if backdoor is None:
        return {}
    names = dataset.class_names
    victims = [names[k] for k in backdoor.victims] or "all"
    figures: dict = {
        "backdoor": {"kind": backdoor.kind, "target": names[backdoor.target], "victims": victims}
    }
    for when in MODEL_FOLDERS:
        model = models.get(when)
        if model is None:
            continue
        success = backdoors.attack_success(
            model.classifier.predict, model.variables, dataset.test, backdoor
        )
        figures[f"attack_success_{when}"] = success.overall
        figures[f"attack_success_per_class_{when}"] = {
            names[k]: success.rates[k] for k in _victims(backdoor, success.rates)
        }
        if backdoor.label_specific:
            figures[f"attack_success_others_{when}"] = success.others
    return figures


def _victims(backdoor: backdoors.Backdoor, labels: Iterable[int]) -> list[int]:
    """Return those labels whose images are to be misclassified."""
    labels = np.array(list(labels))
    return labels[backdoor.is_victim(labels)].tolist()


def stamped_examples(job: Job) -> list[StampedExample]:
    """Return test images of the first victims, clean and stamped; none without a backdoor."""
    backdoor, dataset = job.backdoor, job.dataset
    if backdoor is None:
        return []
    victims = _victims(backdoor, dataset.present)[:_MAX_STAMPED]
    images = dataset.test.batch([dataset.test.of_class(k, 1)[0] for k in victims])
    names = [dataset.class_names[k] for k in victims]
    return list(zip(names, images, backdoor.stamp(images), strict=True))


PHASE = Phase(with_report=True, figures=_figures)
