"""Heat maps of a matrix over classes as inline SVG."""

from collections.abc import Sequence

import numpy as np

from moth_jax.distance.heat_map import (
    Scale,
    draw_heat_map,
    extend,
    layout,
    mappable,
    written,
)
from moth_jax.errors import printable
from moth_jax.report.svg import PAGE, to_svg


def heat_map_svg(
    values: np.ndarray,
    class_names: Sequence[str],
    scale: Scale,
    *,
    name: str,
    alt: str,
    lower: np.ndarray | None = None,
    axis_labels: tuple[str, str] = ("target", "victim"),
) -> str:
    """Return `values` [K, K] as inline SVG; NaN is not measured, infinite is not found.

    Args:
      values: the numbers.
      class_names: K names, of columns and rows.
      scale: colours.
      name: unique on the page: prefix of the ids.
      alt: what the figure shows, for those who cannot see it.
      lower: proven lower ends of distances, drawn below them; none if None.
      axis_labels: of the columns and the rows.
    """
    from matplotlib.figure import Figure

    class_names = [printable(name) for name in class_names]
    size = layout(class_names)
    figure = Figure(figsize=(size.width, size.height))
    ax = figure.add_axes(size.axes)
    draw_heat_map(ax, values, class_names, scale, PAGE, lower)
    ax.set_xlabel(axis_labels[0], color=PAGE.muted)
    ax.set_ylabel(axis_labels[1], color=PAGE.muted)
    bar = figure.colorbar(
        mappable(scale), cax=figure.add_axes(size.bar), extend=extend(values, scale)
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(color=PAGE.line, labelcolor=PAGE.muted, labelsize=8, width=0.5)
    if "%" in scale.number:
        bar.ax.yaxis.set_major_formatter(lambda value, _: written(value, scale) if value else "0")
    whole = scale.number == "{:.0f}"
    bar.ax.yaxis.get_major_locator().set_params(integer=whole)  # pyright: ignore[reportCallIssue]
    return to_svg(figure, name=name, alt=alt)
