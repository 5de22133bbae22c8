"""The report of a run: one HTML page that needs nothing else, neither network nor scripts."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from string import Template

import numpy as np

from moth_jax.distance.heat_map import (
    MAX_CLASSES_WITH_NUMBERS,
    Scale,
    distance_scale,
    increase_scale,
)
from moth_jax.distance.matrix import DistanceMatrix, increase_per_direction
from moth_jax.errors import listed
from moth_jax.report import formatting as fmt
from moth_jax.report.backdoor import StampedExample, backdoor_section
from moth_jax.report.curves import history_section, training_section
from moth_jax.report.figures import heat_map_svg
from moth_jax.report.gallery import gallery
from moth_jax.report.headline import average, changed_pixels, explanation, tiles, verdict
from moth_jax.report.scan import scan_section, verdict_sentence
from moth_jax.scanning import Scan
from moth_jax.storage.files import strict_json, write_atomically

_MAX_PAIRS = 12
_MAX_LEAST = 10
_NOT_LISTED = ("selection", "seconds", "of")  # details of distances
_NUM_SMALLEST = 6  # directions whose triggers are shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows of a run.

    Attributes:
      title: what was hardened.
      summary: the figures of summary.json; accuracies and the increase are shares of 1. Every entry
        that no section shows is listed at the end; the known ones also at the top.
      before: the distances of the given model; None if they were not measured.
      after: those of the hardened one; None if there is none.
      scan: of the given model; None if there is none.
      training: records of the training, one for each epoch (`curves.training_section`).
      history: records of the hardening, with `step`, `sizes`, `validation_accuracy`
        (`curves.history_section`).
      selections: [K, K] symmetric, how often each pair was selected.
      examples: [K, h, w, c] in [0, 1], one image of each class.
      class_names: K names; needed for the pictures of a scan, and for the selected pairs where
        there are no distances.
      stamped: images of a backdoor's victims.
    """

    title: str
    summary: Mapping
    before: DistanceMatrix | None = None
    after: DistanceMatrix | None = None
    scan: Scan | None = None
    training: Sequence[dict] = ()
    history: Sequence[dict] = ()
    selections: np.ndarray | None = None
    examples: np.ndarray | None = None
    class_names: Sequence[str] = ()
    stamped: Sequence[StampedExample] = ()


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write the report of a run as one HTML file, whole or not at all.

    Raises:
      InputError: the file cannot be written, or the matrices are of different classes.
    """
    summary, before, after = strict_json(report.summary), report.before, report.after
    text = (resources.files("moth_jax.report") / "template.html").read_text(encoding="utf-8")
    page = Template(text).substitute(
        title=fmt.escape(report.title),
        verdict=fmt.escape(_verdict(summary, before, after, report.scan)),
        tiles=tiles(summary, before, after),
        explanation="" if before is None else f"<p>{explanation(before, report.examples)}</p>",
        scan=scan_section(report.scan, _by_name(report.class_names, report.examples)),
        distances="" if before is None else _distances(before, after),
        backdoor=backdoor_section(summary, report.stamped),
        training=training_section(report.training),
        history=history_section(report.history),
        selections=_selections(report.selections, report.class_names, before, after),
        triggers="" if before is None else _triggers(before, after, report.examples),
        details=_details(summary, before),
    )
    write_atomically(path, page.encode())


def _by_name(class_names: Sequence[str], examples: np.ndarray | None) -> dict[str, np.ndarray]:
    """The image of each class, as far as both are known."""
    return {} if examples is None else dict(zip(class_names, examples, strict=False))


def _verdict(summary: Mapping, before, after, scan) -> str:
    """What was measured, and what the scan says."""
    if scan is None:
        return verdict(summary, before, after)
    measured = [] if before is None else [verdict(summary, before, after)]
    return " ".join([*measured, verdict_sentence(scan)])


def _distances(before: DistanceMatrix, after: DistanceMatrix | None) -> str:
    names = before.class_names
    hardened = {} if after is None else {"After hardening": after}
    matrices = {"Before hardening" if hardened else "Class distances": before, **hardened}
    scale = distance_scale(*(matrix.values for matrix in matrices.values()))
    figures = []
    for heading, matrix in matrices.items():
        alt = f"Heat map of class distances, {heading.lower()}: {_described(matrix)}"
        name, lower = f"map{len(figures)}", matrix.lower
        svg = heat_map_svg(matrix.values, names, scale, name=name, alt=alt, lower=lower)
        pixels = changed_pixels(matrix)
        note = f"average {average(matrix)}" + (f", {pixels} pixels changed" if pixels else "")
        figures.append(_figure(svg, heading, note))
    if after is not None:
        figures += _increase(before, after)
    return fmt.section("Distances", _legend(matrices), _side_by_side(figures, names))


def _increase(before: DistanceMatrix, after: DistanceMatrix) -> list[str]:
    """The heat map of the increase and the directions that gained least; [] if nothing is known."""
    change = increase_per_direction(before, after)
    if not np.isfinite(change).any():
        return []
    both = ~np.isnan(before.values) & ~np.isnan(after.values)
    shown = np.where(both & np.isnan(change), np.inf, change)
    alt = f"Heat map of the relative increase of {int(np.isfinite(change).sum())} distances"
    scale = increase_scale(change)
    svg = heat_map_svg(shown, before.class_names, scale, name="increase", alt=alt)
    figure = _figure(svg, "Increase", "red where the distance became smaller")
    return [figure, _least_increased(before, after, change)]


def _least_increased(before: DistanceMatrix, after: DistanceMatrix, change: np.ndarray) -> str:
    order = np.argsort(np.where(np.isfinite(change), change, np.inf), axis=None, kind="stable")
    rows = []
    for i in order[: min(_MAX_LEAST, np.isfinite(change).sum())]:
        a, b = divmod(int(i), len(change))
        sizes = (fmt.size(float(matrix.values[a, b])) for matrix in (before, after))
        cells = [*sizes, fmt.percent(float(change[a, b]), 0, sign=True)]
        name = fmt.arrow(before.class_names[a], before.class_names[b])
        rows.append(fmt.row(name, [fmt.escape(cell) for cell in cells]))
    headers = ["Direction", "Before", "After", "Increase"]
    return fmt.table("The directions that gained least", headers, rows, css="pairs")


def _described(matrix: DistanceMatrix) -> str:
    if not matrix.found.any():
        return f"no trigger found in {matrix.num_failures()} directions"
    (a, b), *_ = matrix.smallest(1)
    return (
        f"average {fmt.size(matrix.average())}, smallest {fmt.size(float(matrix.values[a, b]))} "
        f"from {matrix.class_names[a]} to {matrix.class_names[b]}"
    )


def _legend(named: Mapping[str, DistanceMatrix]) -> str:
    matrices = named.values()
    parts = ["Rows are victims, columns are targets."]
    if any(matrix.num_failures() for matrix in matrices):
        parts.append("Grey cells (with a cross): no trigger was found.")
    if any(matrix.num_measured() < matrix.values.size - len(matrix.values) for matrix in matrices):
        parts.append("Empty cells: not measured.")
    if any(matrix.lower is not None for matrix in matrices):
        parts.append("After ≥, the proven lower end: no trigger is smaller.")
    there = [_those_there(heading, matrix) for heading, matrix in named.items()]
    parts = [" ".join(parts), *map(fmt.escape, filter(None, there))]
    return "".join(f"<p>{part}</p>" for part in parts)


def _those_there(heading: str, matrix: DistanceMatrix) -> str:
    """Which victims need no trigger, as the model takes them for the target; "" if none."""
    names = matrix.class_names
    there = [f"{names[a]} as {names[b]}" for a, b in np.argwhere(matrix.is_there())]
    if not there:
        return ""
    return (
        f"{heading}: images of {listed(there, str)} are predicted without a trigger. The distance "
        "is 0 there because the model is wrong (or the labels are), which is no sign of a backdoor."
    )


def _figure(svg: str, heading: str, note: str) -> str:
    caption = f"<strong>{fmt.escape(heading)}</strong> {fmt.escape(note)}"
    return f'<figure><figcaption>{caption}</figcaption><div class="scroll">{svg}</div></figure>'


def _side_by_side(parts: Sequence[str], class_names: Sequence[str]) -> str:
    """`parts` in a row while they fit; the maps of few classes also fit on paper."""
    css = "figures small" if len(class_names) <= MAX_CLASSES_WITH_NUMBERS else "figures"
    return f'<div class="{css}">{"".join(parts)}</div>'


def _selections(
    selections: np.ndarray | None,
    class_names: Sequence[str],
    before: DistanceMatrix | None,
    after: DistanceMatrix | None,
) -> str:
    names = class_names if before is None else before.class_names
    if selections is None or not len(names):
        return ""
    counts = np.triu(np.asarray(selections), 1)
    order = np.argsort(-counts, axis=None, kind="stable")[:_MAX_PAIRS]
    pairs = [divmod(int(i), len(counts)) for i in order if counts.flat[i] > 0]
    if not pairs:
        return ""
    measured = [matrix for matrix in (before, after) if matrix is not None]
    rows = [_pair_row(a, b, counts, names, measured) for a, b in pairs]
    headers = ["Pair", "Selected", "Distances before", "Distances after"][: 2 + len(measured)]
    caption = f"The pairs selected most often ({len(pairs)} of {np.count_nonzero(counts)})"
    shown = np.where(np.eye(len(counts), dtype=bool), np.nan, np.asarray(selections, float))
    scale = Scale("#3f7bd6", 0.0, float(counts.max()), "{:.0f}", "times selected")
    most = " and ".join(names[k] for k in pairs[0])
    alt = f"Heat map of how often each pair was selected; most often {most}"
    svg = heat_map_svg(shown, names, scale, name="selections", alt=alt, axis_labels=("", ""))
    total = f"{int(counts.sum())} selections"
    parts = [fmt.table(caption, headers, rows, css="pairs"), _figure(svg, "All pairs", total)]
    return fmt.section("Selected pairs", _side_by_side(parts, names))


def _pair_row(a: int, b: int, counts, names: Sequence[str], measured) -> str:
    count = int(counts[a, b])
    width = 100 * count / counts.max()
    cells = [f'<div class="bar"><span style="width: {width:.1f}%"></span>{count}</div>']
    for matrix in measured:
        sizes = " / ".join(fmt.size(float(v)) for v in (matrix.values[a, b], matrix.values[b, a]))
        cells.append(fmt.escape(sizes))
    return fmt.row(fmt.escape(f"{names[a]} ↔ {names[b]}"), cells)


def _triggers(before, after, examples) -> str:
    text = (
        "<p>The trigger on neutral grey, an image of the victim class, the same image stamped, and "
        "an image of the target class.</p>"
    )
    parts = []
    for when, matrix in (("before", before), ("after", after)):
        directions = matrix.smallest(_NUM_SMALLEST) if matrix is not None else []
        if directions:
            caption = f"The {len(directions)} smallest distances"
            caption += f" {when} hardening" if after is not None else ""
            parts.append(gallery(caption, directions, before, after, examples))
    if not parts:
        return fmt.section("Smallest distances", "<p>No trigger was found in any direction.</p>")
    return fmt.section("Smallest distances", text, *parts)


def _details(summary: Mapping, before: DistanceMatrix | None) -> str:
    measured = {} if before is None else strict_json(before.details)
    entries = {
        **{name: value for name, value in summary.items() if not _is_in_a_section(name)},
        **{
            f"distance {k}": v
            for k, v in measured.items()
            if k not in ("selection", "seconds", "of")
        },
    }
    rows = [
        fmt.row(fmt.escape(key.replace("_", " ")), [fmt.escape(text)])
        for key, value in entries.items()
        if (text := _recorded(key, value)) != fmt.MISSING  # a phase that was not asked for
    ]
    return fmt.section("The run", fmt.table("What was recorded", [], rows, css="details"))


def _is_in_a_section(name: str) -> bool:
    """Whether a section shows an entry of the summary, in more than one line of text."""
    return name == "scan" or name.startswith("attack_success_per_class")


_SHARES = re.compile("(accuracy|attack_success|robustness)_.*|increase.*")


def _recorded(name: str, value) -> str:
    """An entry of the summary in a line."""
    if name.endswith("seconds"):
        show = fmt.duration
    elif _SHARES.fullmatch(name):
        show = partial(fmt.percent, digits=2, sign=name.startswith("increase"))
    else:
        show = fmt.plain
    if isinstance(value, Mapping):
        parts = (f"{key.replace('_', ' ')} {show(part)}" for key, part in value.items())
        return ", ".join(parts) or fmt.MISSING
    if "interval" in name and value is not None:
        return " to ".join(map(show, value))
    return show(value)
