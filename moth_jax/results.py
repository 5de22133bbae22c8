"""The result of a run: summary.json and report.html, from what the phases left."""

import importlib.metadata
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moth_jax import checkpoints
from moth_jax.data import ImageDataset
from moth_jax.evaluation import predictions
from moth_jax.matrix import DistanceMatrix, relative_increase
from moth_jax.metrics import read_metrics
from moth_jax.report import write_report, write_summary
from moth_jax.selection import chosen_classes, is_subset
from moth_jax.workdir import read_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def summarise(config: ml_collections.ConfigDict, dataset: ImageDataset, workdir: Path) -> dict:
    """Write summary.json, and report.html if anything was measured, from what the phases left."""
    before, after = (_matrix(workdir / f"distance_{when}.npz") for when in ("before", "after"))
    hardening = read_json(workdir / "hardening.json")
    classes = chosen_classes(config, dataset)
    summary = {
        "data": dataset.name,
        "model": None,
        "method": config.method,
        **_accuracies(dataset, classes, workdir),
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
        "training_seconds": read_json(workdir / "original.json").get("training_seconds"),
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
            examples=dataset.test.batch([dataset.test.of_class(k, 1)[0] for k in classes]),
        )
    return summary


def _accuracies(dataset: ImageDataset, classes: tuple[int, ...], workdir: Path) -> dict:
    """Return the model's name and the test accuracy of each model that there is.

    Where a part of the classes is chosen, also their names, and the accuracy on their images and on
    those of the others.
    """
    labels = dataset.test.labels
    parts = {"accuracy": np.ones(len(labels), bool)}
    figures = {}
    if is_subset(classes, dataset):
        is_chosen = np.isin(labels, classes)
        parts |= {"accuracy_chosen": is_chosen, "accuracy_others": ~is_chosen}
        figures["classes"] = [dataset.class_names[k] for k in classes]
    for when, folder in (("before", workdir / "original"), ("after", workdir / "hardened")):
        right = None
        if folder.exists():
            classifier, variables, _ = checkpoints.load_model(folder)
            figures["model"] = classifier.spec.arch
            right = predictions(classifier.predict, variables, dataset.test) == labels
        for name, part in parts.items():
            figures[f"{name}_{when}"] = None if right is None else float(np.mean(right[part]))
    return figures


def _matrix(path: Path) -> DistanceMatrix | None:
    return DistanceMatrix.load(path) if path.exists() else None
