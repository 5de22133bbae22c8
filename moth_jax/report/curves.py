"""What happened during training and hardening, as curves over epochs and steps."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moth_jax.report import formatting as fmt
from moth_jax.report.svg import PAGE, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_VECTOR_POINTS = 2000
_MAX_DOTS = 60


def training_section(training: Sequence[dict]) -> str:
    """Return the section on a training, "" if its records hold nothing to draw."""
    text = "Loss on the training images and accuracy on the validation images, after each epoch."
    return _section("Training", text, training_svg(training, name="training"))


def history_section(history: Sequence[dict]) -> str:
    """Return the section on a hardening, headed by what was recorded; "" if there is nothing."""
    if any("sizes" in record for record in history):
        heading = "Distances along hardening"
        text = "The triggers that were inverted against the model while it was hardened."
    elif any("size" in record for record in history):
        heading = "Triggers along hardening"
        text = (
            "The universal triggers that were inverted against the model while it was hardened; "
            "each makes images of all other classes pass as one target."
        )
    else:
        heading = "Hardening"
        text = (
            "Loss on the training batches and accuracy on the validation images while the model "
            "was hardened."
        )
    return _section(heading, text, history_svg(history, name="history"))


def _section(heading: str, text: str, svg: str | None) -> str:
    if svg is None:
        return ""
    return fmt.section(heading, f"<p>{text}</p>", f'<div class="scroll">{svg}</div>')


def history_svg(history: Sequence[dict], *, name: str) -> str | None:
    """Return what is known of a hardening over its steps as inline SVG.

    Args:
      history: records with `step` and, where known, `sizes` (of the triggers of the selected pair,
        there and back; inf if none was found) or `size` (of a target's universal trigger),
        `validation_accuracy` in [0, 1], and `loss`, which is drawn where there are no sizes.
      name: unique on the page: prefix of the ids.

    Returns:
      The figure, or None when the records hold none of these.
    """
    sizes, label = _series(history, "sizes"), "trigger size of the\nselected pair"
    if not len(sizes):
        sizes, label = _series(history, "size"), "size of the\nuniversal trigger"
    accuracy = _series(history, "validation_accuracy")
    loss = _series(history, "loss")
    first = (_draw_loss, loss, 2.2)
    if len(sizes):
        first = (functools.partial(_draw_sizes, label=label), sizes, 3.0)
    alt = f"Curves over {len(history)} records of hardening: {_described(sizes, loss, accuracy)}"
    panels = [first, (_draw_accuracy, accuracy, 1.7)]
    return _panels_svg(panels, "hardening step", name=name, alt=alt)


def training_svg(history: Sequence[dict], *, name: str) -> str | None:
    """Return `loss` and `validation_accuracy` over the epochs (`step`), as `history_svg` does."""
    loss, accuracy = _series(history, "loss"), _series(history, "validation_accuracy")
    alt = f"Curves over {len(history)} epochs of training: {_described(loss[:0], loss, accuracy)}"
    panels = [(_draw_loss, loss, 2.0), (_draw_accuracy, accuracy, 2.0)]
    return _panels_svg(panels, "epoch", name=name, alt=alt)


def _panels_svg(panels: Sequence[tuple], unit: str, *, name: str, alt: str) -> str | None:
    """Draw those `panels` (how, points [n, 2], height in inches) that have points."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [panel for panel in panels if len(panel[1])]
    if not panels:
        return None
    heights = [height for _, _, height in panels]
    layout = ConstrainedLayoutEngine(hspace=0.1)
    figure = Figure(figsize=(11.5, sum(heights)), dpi=96, layout=layout)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (draw, series, _) in zip(axes, panels, strict=True):
        _clean(ax)
        draw(ax, series)
    axes[-1].set_xlabel(unit, color=PAGE.muted)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
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


def _draw_sizes(ax: "Axes", sizes: np.ndarray, *, label: str) -> None:
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
    ax.set_ylabel(label, color=PAGE.muted)
    ax.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        labelcolor=PAGE.ink,
        fontsize=9,
    )


def _draw_loss(ax: "Axes", loss: np.ndarray) -> None:
    loss = loss[np.isfinite(loss[:, 1])]
    if len(loss) > _MAX_DOTS:  # of single batches, which scatter
        rasterized = len(loss) > _MAX_VECTOR_POINTS
        style = {"linestyle": "", "markersize": 3.5, "alpha": 0.55, "rasterized": rasterized}
        ax.plot(*loss.T, ".", color=PAGE.muted, **style)
        ax.plot(*_running_mean(loss), color=PAGE.accent, linewidth=2)
    else:
        ax.plot(*loss.T, ".-", color=PAGE.accent, linewidth=2)
    ax.set_ylim(bottom=0)
    ax.margins(y=0.15)
    ax.set_ylabel("training\nloss", color=PAGE.muted)


def _draw_accuracy(ax: "Axes", accuracy: np.ndarray) -> None:
    style = "-" if len(accuracy) > _MAX_DOTS else ".-"
    values = 100 * accuracy[:, 1]
    low, high = values.min(), values.max()
    margin = max(1.0, 0.1 * (high - low))  # also for an accuracy that never changes
    ax.plot(accuracy[:, 0], values, style, color=PAGE.accent, linewidth=2, clip_on=False)
    ax.set_ylim(max(0.0, low - margin), min(100.0, high + margin))
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


def _described(sizes: np.ndarray, loss: np.ndarray, accuracy: np.ndarray) -> str:
    found = sizes[np.isfinite(sizes[:, 1])]
    parts = []
    if len(found):
        _, mean = _running_mean(found)
        parts.append(
            f"the running mean of the trigger sizes goes from {mean[0]:.1f} to {mean[-1]:.1f}"
        )
    if len(loss) and not len(sizes):
        parts.append(f"the loss goes from {loss[0, 1]:.3g} to {loss[-1, 1]:.3g}")
    if len(accuracy):
        first, last = 100 * accuracy[[0, -1], 1]
        parts.append(f"validation accuracy goes from {first:.1f} % to {last:.1f} %")
    return "; ".join(parts) or "no trigger was found"
