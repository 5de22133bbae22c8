"""Tables of the experiments, with where they come from; ours beside the paper's."""

import csv
import importlib.metadata
import io
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from lab import COMMIT, OUT, SCALE, cell_commits, narrowed

from moth_jax.run.origin import command, processor
from moth_jax.storage.files import read_json

PACKAGES = ("jax", "flax", "optax")


class Column(NamedTuple):
    """A column of figures.

    Attributes:
      name: of the figure in a row.
      title: what the table calls it.
      show: format of one number.
      factor: what it is multiplied with before.
    """

    name: str
    title: str
    show: str = "{:.2f}"
    factor: float = 1.0


ACCURACY = Column("accuracy", "accuracy %", factor=100)
ROBUSTNESS = Column("robustness", "robustness %", factor=100)
DISTANCE = Column("distance", "distance")
INCREASE = Column("increase", "increase %", "{:+.1f}", 100)
FAILURES = Column("failures", "none found", "{:.0f}")
SECONDS = Column("seconds", "seconds", "{:.0f}")
CPU_SECONDS = Column("cpu_seconds", "CPU seconds", "{:.0f}")
SUCCESS = Column("attack_success", "attack success %", factor=100)


class Row(NamedTuple):
    """A row: what it is of, our figures of every seed, the published ones, and where from.

    Attributes:
      source: `provenance` of the call that computed it; this one's if empty.
    """

    keys: tuple[str, ...]
    figures: Sequence[dict]
    published: dict = {}  # noqa: RUF012, it is not changed
    source: dict = {}  # noqa: RUF012


def write(
    name: str,
    title: str,
    keys: Sequence[str],
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    num_seeds: int | None = None,
) -> Path:
    """Write --out/NAME/SCALE.md, .csv and .json, and return the first of them.

    A figure of several seeds is their mean and standard deviation (n - 1), with how many have it if
    not all; one that is missing is a dash. The paper's figures have columns of their own. Rows that
    the command line leaves out stay as they are, with the source that they had.

    Args:
      keys: what tells rows apart, the model among it.
      num_seeds: what the table says it is of; the rows' if not given.
    """
    folder = figures_folder(name)
    path = folder / f"{SCALE.value}.md"
    ours = provenance(rows) | ({"seeds": num_seeds} if num_seeds else {})
    rows = [row if row.source else row._replace(source=ours) for row in rows]
    if narrowed():
        rows = _merged(_read(path.with_suffix(".json")), rows)
    published = [c for c in columns if any(c.name in row.published for row in rows)]
    header = [*keys, *(c.title for c in columns), *(f"{c.title} (paper)" for c in published)]
    lines = [
        [
            *row.keys,
            *(_shown(c, [f.get(c.name) for f in row.figures]) for c in columns),
            *(_shown(c, [row.published.get(c.name)]) for c in published),
        ]
        for row in rows
    ]
    sources = _unique([row.source for row in rows])
    text = [f"# {title}", "", _markdown([header, *lines]), "", *_about(sources, rows), ""]
    path.write_text("\n".join(text))
    path.with_suffix(".csv").write_text(_csv([header, *lines]))
    values = [{**row._asdict(), "source": sources.index(row.source)} for row in rows]
    record = {"scale": SCALE.value, "sources": sources, "rows": _finite(values)}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return path


def _read(path: Path) -> list[Row]:
    """Return the rows of a table that was written before; none where it names no sources."""
    record = read_json(path)
    rows = record["rows"] if "sources" in record else []
    return [
        Row(
            tuple(row["keys"]),
            row["figures"],
            row["published"],
            record["sources"][row["source"]],
        )
        for row in rows
    ]


def _merged(kept: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Return `kept` with `rows` in the place of those of the same keys, or behind them."""
    ours = {row.keys: row for row in rows}
    theirs = {row.keys for row in kept}
    return [ours.get(row.keys, row) for row in kept] + [r for r in rows if r.keys not in theirs]


def _unique(values: Sequence[dict]) -> list[dict]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def figures_folder(name: str) -> Path:
    """Return the folder of an experiment's results."""
    folder = Path(OUT.value) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def provenance(rows: Sequence[Row]) -> dict:
    """Return where the figures of a call come from."""
    return {
        "command": command(),
        "commit": COMMIT,
        "commits_of_cells": cell_commits(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {processor()}",
        "seeds": max(len(row.figures) for row in rows),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _about(sources: Sequence[dict], rows: Sequence[Row]) -> list[str]:
    lines = []
    for source in sources:
        numbers = [i for i, row in enumerate(rows, 1) if row.source == source]
        packages = ", ".join(f"{name} {version}" for name, version in source["packages"].items())
        of = f"Rows {_ranges(numbers)}: " if len(sources) > 1 else ""
        lines += [
            f"    {source['command']}",
            "",
            f"{of}{source['seeds']} seed(s), {source['device']}, {packages}, "
            f"commit {_short(source['commit'])}, {source['date']}; cells begun at "
            f"{', '.join(map(_short, source['commits_of_cells'])) or 'this commit'}.",
            "",
        ]
    paper = any(row.published for row in rows)
    return [
        *lines,
        "`DIR` stands for a folder or file of the machine. Where there are several seeds: mean ± "
        "standard deviation." + paper * " Columns marked (paper) are the published figures.",
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Return 1-3, 5 for 1, 2, 3, 5."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _short(commit: str) -> str:
    """Return ten digits of a commit, with the + of changed files."""
    return commit[:10] + "+" * commit.endswith("+") or "unknown"


def _shown(column: Column, values: Sequence) -> str:
    numbers = [
        column.factor * value
        for value in values
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    if not numbers:
        return "-"
    shown = column.show.format(float(np.mean(numbers)))
    if len(numbers) > 1:
        spread = column.show.replace("+", "").format(float(np.std(numbers, ddof=1)))
        shown = f"{shown} ± {spread}"
    return shown if len(numbers) == len(values) else f"{shown} ({len(numbers)} of {len(values)})"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = lines
    rows = [header, ["---"] * len(header), *rest]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _finite(value):
    """Return `value` with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
