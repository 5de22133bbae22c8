"""The result of a run: summary.json, report.html and a few lines, from what the phases left."""

import dataclasses
import importlib.metadata
import re
from pathlib import Path

import jax
import numpy as np

from moth_jax.errors import printable
from moth_jax.parallel.devices import num_devices
from moth_jax.parallel.processes import is_main
from moth_jax.report import Report, write_report
from moth_jax.run import workdir as folder
from moth_jax.run.job import Job
from moth_jax.run.metrics import read_metrics
from moth_jax.run.phases import PHASES, Models
from moth_jax.run.phases.backdoor import stamped_examples
from moth_jax.run.phases.harden import load_hardening
from moth_jax.run.phases.measure import MeasureOptions, load_distances
from moth_jax.run.phases.original import load_original
from moth_jax.run.phases.scan import load_scan
from moth_jax.storage.files import write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_WHEN = ("before", "after")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
      figures: the entries of summary.json; accuracies and the increase are shares of 1, and None is
        what is not known. Where there are models before and after hardening a figure has two
        entries, whose names end in "_before" and "_after".
      report: where the report is; None if there is none.
    """

    figures: dict
    report: Path | None = None

    def pair(self, name: str) -> tuple:
        """Return a figure before and after hardening."""
        before, after = (self.figures.get(f"{name}_{when}") for when in _WHEN)
        return before, after

    def describe(self) -> list[str]:
        """Return the result in a few lines."""
        scan = self.figures.get("scan")
        increase_ends = _interval(self.figures.get("increase_interval"), 100)
        lines = [
            self._shares("test accuracy", "accuracy"),
            self._shares("- chosen classes", "accuracy_chosen"),
            self._shares("- other classes", "accuracy_others"),
            self._shares("robustness", "robustness"),
            self._shares("attack success", "attack_success"),
            self._shares("- other classes", "attack_success_others"),
            _row("class distance", "pixels", *self.pair("distance")),
            _row(
                "- 95 % interval",
                "pixels",
                *map(_interval, self.pair("distance_interval")),
                show="{}",
            ),
            _row("- proven lower", "pixels", *self.pair("distance_lower")),
            self._directions(),
            _increase(self.figures["increase"]),
            _row("- 95 % interval", "%", None, increase_ends, show="{}"),
            self._failures(),
            self._stopped(),
            *([] if scan is None else _scan(scan["text"])),
            None if self.report is None else f"{'report':16} {self.report}",
        ]
        return [printable(line) for line in lines if line is not None]

    def _shares(self, title: str, name: str) -> str | None:
        values = (None if share is None else 100 * share for share in self.pair(name))
        return _row(title, "%", *values)

    def _directions(self) -> str | None:
        """Return which directions were measured, unless all were."""
        chosen = self.figures.get("directions")
        is_whole = not chosen or re.fullmatch(r"all [\d,]+ directions", chosen)
        return None if is_whole else f"{'- mean of':16} {chosen}"

    def _failures(self) -> str | None:
        counts = self.pair("failures")
        return _row("none found in", "directions", *counts, show="{}") if any(counts) else None

    def _stopped(self) -> str | None:
        if self.figures["harden_stopped"] != "accuracy":
            return None
        step = self.figures["harden_steps"]
        unchanged = "" if step else ", so it is unchanged: lower harden.learning_rate"
        return (
            f"{'stopped early':16} validation accuracy fell by more than the bound; the model is "
            f"the one of step {step}{unchanged}"
        )


def summarise(job: Job, models: Models) -> Summary:
    """Write summary.json, and report.html if there is a model."""
    figures, report = _figures(job, models), job.workdir / folder.REPORT
    write_json(job.workdir / folder.SUMMARY, figures)
    if figures["model"] is not None:
        _write_report(job, figures, report)
    return Summary(figures, report if report.exists() else None)


def _figures(job: Job, models: Models) -> dict:
    """Return what was done, the figures of the phases, the last one's first, and by what means."""
    source, hardened = job.model.checkpoint, models.get("after")
    model = hardened or models.get("before")
    given = {
        "checkpoint": source,
        "checkpoint_sha256": load_original(job.workdir).get("checkpoint_sha256"),
    }
    figures = {
        "data": job.dataset.name,
        "model": model and model.classifier.spec.arch,
        **(given if source else {}),
        "method": hardened and job.method,
    }
    for phase in reversed(PHASES.values()):
        figures |= phase.figures(job, models)
    return figures | {
        "device": f"{num_devices()} x {jax.devices()[0].device_kind}",
        "seeds": {"run": job.seed, "distance": list(job.options(MeasureOptions).seeds)},
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _write_report(job: Job, figures: dict, path: Path) -> None:
    """Write report.html, in the main process."""
    # Every process loads these, because the main one tells them all what it reads.
    before, after = (load_distances(job.workdir, when) for when in _WHEN)
    counts, scan = load_hardening(job.workdir).get("num_selected"), load_scan(job.workdir)
    if not is_main():
        return
    records, test = read_metrics(job.workdir / folder.METRICS, job.identity), job.dataset.test
    report = Report(
        title=f"{figures['model']} on {job.dataset.name}",
        summary=figures,
        before=before,
        after=after,
        scan=scan,
        class_names=[job.dataset.class_names[k] for k in job.classes],
        training=[record for record in records if record["phase"] == "training"],
        history=[record for record in records if record["phase"] == "hardening"],
        selections=None if counts is None else np.asarray(counts),
        examples=test.batch([test.of_class(k, 1)[0] for k in job.classes]),
        stamped=stamped_examples(job),
    )
    write_report(path, report)


def _row(title: str, unit: str, before, after, *, show: str = "{:.2f}") -> str | None:
    """Return a line with the values that are known, None if none is."""
    values = [value for value in (before, after) if value is not None]
    shown = ["none found" if value != value else show.format(value) for value in values]
    if all(value != value for value in values):  # NaN, the mean of nothing, has no unit
        unit = ""
    return f"{title:16} {' -> '.join(shown)} {unit}".rstrip() if values else None


def _increase(share: float | None) -> str | None:
    if share is None:
        return None
    shown = "unknown: none found in the same direction before and after"
    return f"{'increase':16} {shown if share != share else f'{100 * share:+.2f} %'}"


def _interval(ends: tuple[float, float] | None, unit: float = 1) -> str | None:
    return None if ends is None else " to ".join(f"{unit * end:.2f}" for end in ends)


def _scan(text: str) -> list[str]:
    verdict, _, cost = text.rpartition("\n")  # names may have line ends of their own
    return [f"{'scan':16} {verdict}", f"{'':16} {cost}"]
