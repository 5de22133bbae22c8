"""The result of a run: summary.json and report.html, from what the phases left."""

import importlib.metadata
import re
import warnings
from pathlib import Path

import jax
import ml_collections
import numpy as np

from moth_jax import backdoors
from moth_jax.data import ImageDataset
from moth_jax.distance.matrix import DistanceMatrix, increase_interval, relative_increase
from moth_jax.evaluation import predictions
from moth_jax.models import checkpoint
from moth_jax.parallel.devices import num_devices
from moth_jax.parallel.processes import broadcast_from_main, is_main, load_if_exists
from moth_jax.report import write_report
from moth_jax.report.backdoor import StampedExample
from moth_jax.run.job import chosen_backdoor, chosen_classes, is_subset
from moth_jax.run.metrics import read_metrics
from moth_jax.run.phases.robustness import load_robustness
from moth_jax.run.phases.scan import load_scan
from moth_jax.scanning import Scan
from moth_jax.storage.files import read_json, write_json

_MAX_STAMPED = 6
_FEWEST = 30  # test images that tell a guess from knowledge
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def summarise(config: ml_collections.ConfigDict, dataset: ImageDataset, workdir: Path) -> dict:
    """Write summary.json, and report.html if there is a model."""
    before, after = (
        load_if_exists(DistanceMatrix.load, workdir / f"distance_{when}.npz")
        for when in ("before", "after")
    )
    hardening = read_json(workdir / "hardening.json")
    classes, backdoor = chosen_classes(config, dataset), chosen_backdoor(config, dataset)
    models, scan = _models(workdir), load_scan(workdir)
    origin = read_json(workdir / "original.json")
    summary = {
        "data": dataset.name,
        "model": None,
        **_given(config, origin),
        "method": config.method if models["after"] else None,
        **_accuracies(dataset, classes, models),
        **load_robustness(workdir),
        **({} if backdoor is None else _attack_success(dataset, backdoor, models)),
        **({} if scan is None else {"scan": _scan_figures(scan)}),
        "distance_before": before and before.average(),
        "distance_after": after and after.average(),
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
        "harden_seconds": hardening.get("seconds"),
        "harden_cpu_seconds": hardening.get("cpu_seconds"),
        "harden_steps": hardening.get("steps"),
        "harden_stopped": hardening.get("stopped"),
        "training_seconds": origin.get("training_seconds"),
        "device": f"{num_devices()} x {jax.devices()[0].device_kind}",
        "seeds": {"run": config.seed, "distance": list(config.distance.seeds)},
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    _warn_of_chance(dataset, summary["accuracy_before"])
    write_json(workdir / "summary.json", summary)
    if summary["model"] is not None and is_main():
        records = read_metrics(workdir / "metrics.jsonl")
        write_report(
            workdir / "report.html",
            title=f"{summary['model']} on {dataset.name}",
            summary=summary,
            before=before,
            after=after,
            scan=scan,
            class_names=[dataset.class_names[k] for k in classes],
            training=[record for record in records if record["phase"] == "training"],
            history=[record for record in records if record["phase"] == "hardening"],
            selections=_selections(hardening),
            examples=dataset.test.batch([dataset.test.of_class(k, 1)[0] for k in classes]),
            stamped=() if backdoor is None else _stamped(dataset, backdoor),
        )
    return summary


def _given(config: ml_collections.ConfigDict, origin: dict) -> dict:
    """Return which file the model is of, if it was given."""
    if not config.model.checkpoint:
        return {}
    digest = origin.get("checkpoint_sha256")
    return {"checkpoint": config.model.checkpoint, "checkpoint_sha256": digest}


def _warn_of_chance(dataset: ImageDataset, accuracy: float | None) -> None:
    """Warn of a model that guesses: a trigger of one says nothing."""
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


def _scan_figures(scan: Scan) -> dict:
    fields = ("method", "poisoned", "statistic", "statistic_name", "threshold", "seconds")
    return {
        "verdict": scan.verdict(),
        **{name: getattr(scan, name) for name in fields},
        "text": scan.describe(),
    }


def _models(workdir: Path) -> dict[str, checkpoint.SavedModel | None]:
    folders = {"before": workdir / "original", "after": workdir / "hardened"}
    return {
        when: checkpoint.load_model(folder) if broadcast_from_main(folder.exists) else None
        for when, folder in folders.items()
    }


def _accuracies(dataset: ImageDataset, classes: tuple[int, ...], models: dict) -> dict:
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
    for when, model in models.items():
        right = None
        if model is not None:
            classifier, variables = model
            figures["model"] = classifier.spec.arch
            right = predictions(classifier.predict, variables, dataset.test) == labels
        for name, part in parts.items():
            figures[f"{name}_{when}"] = None if right is None else float(np.mean(right[part]))
    return figures


def _attack_success(dataset: ImageDataset, backdoor: backdoors.Backdoor, models: dict) -> dict:
    """Return what the backdoor is, and how often it works on each model that there is."""
    names = dataset.class_names
    victims = [names[k] for k in backdoor.victims] or "all"
    figures = {
        "backdoor": {"kind": backdoor.kind, "target": names[backdoor.target], "victims": victims}
    }
    for when, model in models.items():
        if model is None:
            continue
        classifier, variables = model
        success = backdoors.attack_success(classifier.predict, variables, dataset.test, backdoor)
        figures[f"attack_success_{when}"] = success.overall
        figures[f"attack_success_per_class_{when}"] = {
            names[k]: rate for k, rate in success.rates.items() if backdoor.is_victim(k)
        }
        if backdoor.label_specific:
            figures[f"attack_success_others_{when}"] = success.others
    return figures


def _stamped(dataset: ImageDataset, backdoor: backdoors.Backdoor) -> list[StampedExample]:
    """Return test images of the first victims, clean and stamped."""
    victims = [k for k in dataset.present if backdoor.is_victim(k)][:_MAX_STAMPED]
    images = dataset.test.batch([dataset.test.of_class(k, 1)[0] for k in victims])
    names = [dataset.class_names[k] for k in victims]
    return list(zip(names, images, backdoor.stamp(images), strict=True))


def _selections(hardening: dict) -> np.ndarray | None:
    """Return how often each pair was selected, if the method selected pairs."""
    counts = hardening.get("num_selected")
    return None if counts is None else np.asarray(counts)


_WHEN = ("before", "after")


def describe(summary: dict, workdir: Path) -> list[str]:
    """Return the result in a few lines."""

    def row(name: str, unit: str, before, after, show: str = "{:.2f}") -> str | None:
        values = [value for value in (before, after) if value is not None]
        shown = ["none found" if value != value else show.format(value) for value in values]
        if all(value != value for value in values):  # NaN, the mean of nothing, has no unit
            unit = ""
        return f"{name:16} {' -> '.join(shown)} {unit}".rstrip() if values else None

    def of_part(part: str) -> list[float | None]:
        return [_percent(summary.get(f"accuracy_{part}_{when}")) for when in _WHEN]

    def of_attack(part: str) -> list[float | None]:
        return [_percent(summary.get(f"attack_success{part}_{when}")) for when in _WHEN]

    before, after = summary["failures_before"], summary["failures_after"]
    lines = [
        row("test accuracy", "%", *(_percent(summary[f"accuracy_{w}"]) for w in _WHEN)),
        row("- chosen classes", "%", *of_part("chosen")),
        row("- other classes", "%", *of_part("others")),
        row("robustness", "%", *(_percent(summary.get(f"robustness_{w}")) for w in _WHEN)),
        row("attack success", "%", *of_attack("")),
        row("- other classes", "%", *of_attack("_others")),
        row("class distance", "pixels", *(summary[f"distance_{w}"] for w in _WHEN)),
        row(
            "- 95 % interval",
            "pixels",
            *(_interval(summary, f"distance_interval_{w}") for w in _WHEN),
            "{}",
        ),
        _chosen(summary),
        _increase(summary["increase"]),
        row("- 95 % interval", "%", None, _interval(summary, "increase_interval", 100), "{}"),
        row("none found in", "directions", before, after, "{}") if before or after else None,
    ]
    if summary["harden_stopped"] == "accuracy":
        lines.append(
            f"{'stopped early':16} validation accuracy fell by more than the bound; the model is "
            f"the one of step {summary['harden_steps']}"
            + (
                ""
                if summary["harden_steps"]
                else ", so it is unchanged: lower harden.learning_rate"
            )
        )
    if "scan" in summary:
        verdict, cost = summary["scan"]["text"].splitlines()
        lines += [f"{'scan':16} {verdict}", f"{'':16} {cost}"]
    if (workdir / "report.html").exists():
        lines.append(f"{'report':16} {workdir / 'report.html'}")
    return [line for line in lines if line is not None]


def _increase(share: float | None) -> str | None:
    if share is None:
        return None
    shown = "unknown: none found in the same direction before and after"
    return f"{'increase':16} {shown if share != share else f'{100 * share:+.2f} %'}"


def _interval(summary: dict, name: str, unit: float = 1) -> str | None:
    ends = summary.get(name)
    return None if ends is None else " to ".join(f"{unit * end:.2f}" for end in ends)


def _chosen(summary: dict) -> str | None:
    """Return which directions were measured, unless all were."""
    chosen = summary.get("directions")
    is_whole = not chosen or re.fullmatch(r"all [\d,]+ directions", chosen)
    return None if is_whole else f"{'- mean of':16} {chosen}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
