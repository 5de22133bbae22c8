"""The figures of `benchmark.py` as text, and as one picture."""

from pathlib import Path

TITLES = {
    "matrix": "Distance matrix, 90 directions",
    "harden": "Hardening, 2 epochs of 50,000 images",
    "first_step": "From the start of a process to the end of its first step",
    "directions": "One direction of the published schedule, by how many run together",
    "classes": "One step of hardening a small CNN, by the number of classes",
    "devices": "One direction of the published schedule, by the number of devices",
}
_COLUMNS = ("seconds", "CPU s", "x PyTorch", "x in CPU s", "first call", "host MB", "device MB")


def text(part: str, rows: dict) -> str:
    """Return a part's table."""
    if part == "classes":
        return _classes(rows)
    lines = [TITLES[part], f"{'':34}" + "".join(f"{name:>12}" for name in _COLUMNS)]
    for name, row in rows.items():
        cells = "".join(f"{cell:>12}" for cell in _cells(row))
        lines.append(f"{name!s:34}{cells}  {_measured(row)}")
        if "outside_seconds" in row:
            spent = (_short(row[f"outside_{unit}"]) for unit in ("seconds", "cpu_seconds"))
            lines.append(f"{'  outside the inversions':34}" + "".join(f"{v:>12}" for v in spent))
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    memory = row["peak_memory"]
    values = (
        row["seconds"],
        row["cpu_seconds"],
        row.get("times_faster_seconds"),
        row.get("times_faster_cpu_seconds"),
        row.get("first_call_seconds"),
        memory["host_mb"],
        memory.get("device_mb"),
    )
    return ["-" if value is None else _short(value) for value in values]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _measured(row: dict) -> str:
    """Say where a figure comes from."""
    steps = row.get("timed_steps")
    if steps is None:
        return ""
    if steps == "all":
        return "measured whole"
    of = f"{row['directions']} directions" if "directions" in row else "each inversion"
    return f"extrapolated from {steps} steps of {of}"


def _classes(rows: dict) -> str:
    lines = [TITLES["classes"], f"{'':34}{'ms a step':>12}{'ms on host':>12}"]
    for count, row in rows.items():
        lines.append(f"{count!s:34}{1e3 * row['step_seconds']:>12.1f}{_host(row):>12.1f}")
    return "\n".join(lines)


def _host(row: dict) -> float:
    return 1e3 * row["host_seconds"]


def draw(result: dict, path: Path) -> None:
    """Write the picture of the parts that there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in TITLES if part in result]
    columns = min(2, len(parts))
    rows = -(-len(parts) // 2)
    size = 1.0 + 5.0 * columns, 0.4 + 2.8 * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for part, axis in zip(parts, axes.flat, strict=False):
        axis.set_title(TITLES[part], fontsize=9)
        axis.tick_params(labelsize=8)
        draw_part = _curve if part in ("directions", "classes", "devices") else _bars
        draw_part(axis, part, result[part])
    for axis in axes.flat[len(parts) :]:
        axis.set_axis_off()
    where = result["machine"]
    load = result["load_at_start"]
    figure.suptitle(
        f"{where['devices']} x {where['kind']}; PyTorch: {where['pytorch']}\n"
        f"{result['processor']}, {result['cores']} cores, load {load:.1f} at the start",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axis, part: str, rows: dict) -> None:
    names, seconds = list(rows), [row["seconds"] for row in rows.values()]
    colours = ["0.6" if name.startswith("PyTorch") else "C0" for name in names]
    bars = axis.barh(names, seconds, color=colours)
    axis.bar_label(bars, [f" {_short(value)} s" for value in seconds], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    if max(seconds) > 10 * min(seconds):  # else a bar that begins at 0 says more
        axis.set_xscale("log")
    axis.set_xlabel("seconds", fontsize=8)


def _curve(axis, part: str, rows: dict) -> None:
    counts = [int(count) for count in rows]
    name = "step_seconds" if part == "classes" else "seconds"
    values = [row[name] for row in rows.values()]
    axis.plot(counts, values, "o-")
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_ylim(0, 1.1 * max(values))
    axis.set_xlabel(part, fontsize=8)
    axis.set_ylabel("seconds", fontsize=8)
