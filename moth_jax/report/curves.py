"""What happened during hardening, as curves over the steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moth_jax.report.svg import PAGE, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_VECTOR_POINTS = 2000


def history_svg(history: Sequence[dict], *, name: str) -> str | None:
    """Return trigger sizes and validation accuracy over the steps as inline SVG.

    Args:
      history: records with `step` and, where known, `sizes` (of the triggers of the selected pair,
        there and back; inf if none was found) and `validation_accuracy` in [0, 1].
      name: unique on the page: prefix of the ids.

    Returns:
      The figure, or None when the records hold neither sizes nor accuracies.
    """
    from matplotlib.figure import Figure

    sizes = _series(history, "sizes")
    accuracy = _series(history, "validation_accuracy")
    panels = [(_draw_sizes, sizes, 3.0), (_draw_accuracy, accuracy, 1.7)]
    panels = [panel for panel in panels if len(panel[1])]
    if not panels:
        return None
    heights = [height for _, _, height in panels]
    figure = Figure(figsize=(11.5, sum(heights)), dpi=96, layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (draw, series, _) in zip(axes, panels, strict=True):
        _clean(ax)
        draw(ax, series)
    axes[-1].set_xlabel("hardening step", color=PAGE.muted)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    alt = f"Curves over {len(history)} records of hardening: {_described(sizes, accuracy)}"
    return to_svg(figure, name=name, alt=alt)


def _series(history: Sequence[dict], figure: str) -> np.ndarray:
    """[n, 2] of step and value of the records that have this figure, or a list of it."""
    points = []
    for record in history:
        values = record.get(figure)
        for value in values if isinstance(values, list | tuple) else [values]:
            if value is not None and not np.isnan(value):
                points.append((record["step"], value))
    return np.asarray(points, float).reshape(-1, 2)


def _draw_sizes(ax: "Axes", sizes: np.ndarray) -> None:
    found = np.isfinite(sizes[:, 1])
    rasterized = len(sizes) > _MAX_VECTOR_POINTS
    points = {"linestyle": "", "rasterized": rasterized}
    ax.plot(*sizes[found].T, ".", color=PAGE.muted, markersize=3.5, alpha=0.55, **points)
    if found.any():
        ax.plot(*_running_mean(sizes[found]), color=PAGE.accent, linewidth=2, label="running mean")
    if not found.all():
        # At the top edge, above every number.
        ax.plot(
            sizes[~found, 0],
            np.full((~found).sum(), 0.97),
            "x",
            transform=ax.get_xaxis_transform(),
            color=PAGE.ink,
            markersize=4,
            label="no trigger found",
            **points,
        )
    ax.set_ylim(bottom=0)
    ax.margins(y=0.15)
    ax.set_ylabel("trigger size of the\nselected pair", color=PAGE.muted)
    ax.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        labelcolor=PAGE.ink,
        fontsize=9,
    )


def _draw_accuracy(ax: "Axes", accuracy: np.ndarray) -> None:
    style = "-" if len(accuracy) > 60 else ".-"
    ax.plot(accuracy[:, 0], 100 * accuracy[:, 1], style, color=PAGE.accent, linewidth=2)
    ax.set_ylabel("validation\naccuracy (%)", color=PAGE.muted)


def _clean(ax: "Axes") -> None:
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(PAGE.line)
    ax.tick_params(colors=PAGE.muted, length=0)
    ax.grid(axis="y", color=PAGE.line, linewidth=0.8)
    ax.set_axisbelow(True)


def _running_mean(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and at each the mean of the values in a window around it of a tenth of all steps."""
    steps, inverse = np.unique(points[:, 0], return_inverse=True)
    count = np.bincount(inverse)
    total = np.bincount(inverse, weights=points[:, 1])
    half = max(1, len(steps) // 20)
    edges = np.arange(len(steps))
    low, high = np.maximum(edges - half, 0), np.minimum(edges + half + 1, len(steps))
    count, total = (np.concatenate([[0], np.cumsum(v)]) for v in (count, total))
    return steps, (total[high] - total[low]) / (count[high] - count[low])


def _described(sizes: np.ndarray, accuracy: np.ndarray) -> str:
    found = sizes[np.isfinite(sizes[:, 1])]
    parts = []
    if len(found):
        _, mean = _running_mean(found)
        parts.append(
            f"the running mean of the trigger sizes goes from {mean[0]:.1f} to {mean[-1]:.1f}"
        )
    if len(accuracy):
        first, last = 100 * accuracy[[0, -1], 1]
        parts.append(f"validation accuracy goes from {first:.1f} % to {last:.1f} %")
    return "; ".join(parts) or "no trigger was found"
