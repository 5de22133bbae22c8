"""Heat maps of a matrix over classes, drawn from plain arrays.

Matplotlib is imported where it is used, and pyplot only to make a figure for a notebook.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MAX_CLASSES_WITH_NUMBERS = 15
_MAX_CLASSES_WITH_MARKS = 50
_MAX_CLASSES_WITH_NAMES = 250  # of more the names cannot be read, and take minutes to draw
_MAX_NAME = 22
_POINT = 1 / 72  # inches
_DIAGONAL = (0.5, 0.5, 0.5, 0.12)
_NOT_FOUND = (0.5, 0.5, 0.5, 0.5)


class Theme(NamedTuple):
    """Colours that depend on the ground a figure is drawn on."""

    ink: str
    muted: str
    line: str
    paper: str
    accent: str


NOTEBOOK = Theme(ink="#222222", muted="#666666", line="#dddddd", paper="#ffffff", accent="#2563b8")


class Scale(NamedTuple):
    """How numbers become colours: a colour map's name, its limits, and how a number is written."""

    colours: str
    low: float
    high: float
    number: str
    label: str


def distance_scale(*matrices: np.ndarray, unit: str = "aggregated pixels") -> Scale:
    """One scale from 0 for all `matrices` of distances; a few outliers do not set its end."""
    low, high = 0.0, _upper_limit(matrices)
    label = f"class distance ({unit})" if unit == "aggregated pixels" else unit
    return Scale("viridis", low, high, "{:.1f}", label)


def increase_scale(change: np.ndarray) -> Scale:
    """A diverging scale around no change, for `change` = (after - before) / before."""
    limit = _upper_limit([np.abs(change)])
    return Scale("RdBu", -limit, limit, "{:+.0%}", "increase: (after − before) / before")


def _upper_limit(matrices: Sequence[np.ndarray]) -> float:
    values = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    if values.size == 0 or values.max() <= 0:
        return 1.0
    common = float(np.quantile(values, 0.98))
    return float(values.max()) if values.max() <= 1.5 * common else common


def plot_heat_map(
    values: np.ndarray,
    class_names: Sequence[str],
    *,
    lower: np.ndarray | None = None,
    ax: "Axes | None" = None,
    title: str = "",
    unit: str = "aggregated pixels",
) -> "Axes":
    """Draw class distances [K, K] as a heat map, with numbers up to 15 classes; return the axes.

    Empty cells were not measured. Grey crossed cells were, and no trigger was found. A proven lower
    end is the small number below a distance.

    Args:
      values: row victim, column target; NaN where nothing was measured, inf where none was found.
      class_names: K names.
      lower: [K, K], proven lower ends; none if None.
      ax: where to draw; a new figure if None.
      title: of the axes.
      unit: what the values count.
    """
    if ax is None:
        from matplotlib import pyplot

        size = layout(class_names)
        figsize = (size.width + 0.4, size.height + 0.4)
        _, ax = pyplot.subplots(figsize=figsize, layout="constrained")
    scale = distance_scale(values, unit=unit)
    draw_heat_map(ax, values, class_names, scale, NOTEBOOK, lower)
    ax.set_xlabel("target")
    ax.set_ylabel("victim")
    ax.set_title(title, parse_math=False)
    colours = mappable(scale)
    ax.figure.colorbar(
        colours, ax=ax, label=scale.label, extend=extend(values, scale), fraction=0.046
    )
    return ax


class Layout(NamedTuple):
    """Inches of a heat map's figure, and its parts (left, bottom, width, height) in [0, 1]."""

    width: float
    height: float
    axes: tuple[float, float, float, float]
    bar: tuple[float, float, float, float]


def layout(class_names: Sequence[str]) -> Layout:
    """Cells of one size for all maps of K classes, and the room that the names need."""
    k = len(class_names)
    side = k * _cell_inches(k)
    longest = max(len(_short(name)) for name in class_names) if k <= _MAX_CLASSES_WITH_NAMES else 0
    room = 0.4 + 0.62 * longest * _name_points(k) * _POINT
    width, height = room + side + 0.75, side + room + 0.1
    parts = (room / width, room / height, side / width, side / height)
    bar = ((room + side + 0.12) / width, room / height, 0.12 / width, side / height)
    return Layout(width, height, parts, bar)


def _cell_inches(num_classes: int) -> float:
    if num_classes <= MAX_CLASSES_WITH_NUMBERS:
        return max(0.42, 2.1 / num_classes)
    if num_classes <= _MAX_CLASSES_WITH_NAMES:
        return max(0.145, 10.0 / num_classes)
    return 0.145 * _MAX_CLASSES_WITH_NAMES / num_classes


def _name_points(num_classes: int) -> float:
    return min(9.0, 0.74 * _cell_inches(num_classes) / _POINT)


def draw_heat_map(
    ax: "Axes",
    values: np.ndarray,
    class_names: Sequence[str],
    scale: Scale,
    theme: Theme,
    lower: np.ndarray | None = None,
) -> None:
    """Draw the cells, marks, numbers and names of `values` [K, K] on `ax`, and `lower` ends."""
    k = len(class_names)
    ax.imshow(_colours(values, scale), interpolation="none")
    names = [_short(name) for name in class_names]
    style = {"fontsize": _name_points(k), "color": theme.ink, "parse_math": False}
    # Upright where the longest name fits into its column.
    fits = 0.62 * max(map(len, names)) * _name_points(k) * _POINT < 0.9 * _cell_inches(k)
    shown = k <= _MAX_CLASSES_WITH_NAMES
    ax.set_xticks(range(k * shown), names * shown, rotation=0 if fits else 90, **style)
    ax.set_yticks(range(k * shown), names * shown, **style)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if k <= _MAX_CLASSES_WITH_MARKS:
        edges = np.arange(k + 1) - 0.5
        ax.hlines(edges, -0.5, k - 0.5, color=theme.paper, linewidth=0.8)
        ax.vlines(edges, -0.5, k - 0.5, color=theme.paper, linewidth=0.8)
        _draw_marks(ax, values, theme)
    if k <= MAX_CLASSES_WITH_NUMBERS:
        _draw_numbers(ax, values, scale, theme, lower)
    ax.set_xlim(-0.5, k - 0.5)
    ax.set_ylim(k - 0.5, -0.5)


def _colours(values: np.ndarray, scale: Scale) -> np.ndarray:
    """[K, K, 4]; transparent where nothing was measured, half-transparent grey where not found."""
    colours = mappable(scale).to_rgba(np.where(np.isfinite(values), values, 0.0))
    colours[np.isnan(values)] = 0.0
    colours[np.isinf(values)] = _NOT_FOUND
    colours[np.eye(len(values), dtype=bool) & np.isnan(values)] = _DIAGONAL
    return colours


def _draw_marks(ax: "Axes", values: np.ndarray, theme: Theme) -> None:
    size = 0.3 * _cell_inches(len(values)) / _POINT
    rows, columns = np.nonzero(np.isinf(values))
    ax.plot(columns, rows, "x", color=theme.ink, markersize=min(size, 7), markeredgewidth=1)
    rows, columns = np.nonzero(np.isnan(values) & ~np.eye(len(values), dtype=bool))
    ax.plot(columns, rows, ".", color=theme.muted, markersize=min(size, 3))


def _draw_numbers(
    ax: "Axes", values: np.ndarray, scale: Scale, theme: Theme, lower: np.ndarray | None
) -> None:
    colours = _colours(values, scale)
    for row, column in np.argwhere(np.isfinite(values)):
        red, green, blue, alpha = colours[row, column]
        dark_ground = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        colour = theme.ink if alpha < 0.6 else "#ffffff" if dark_ground else "#101010"
        text = written(float(values[row, column]), scale)
        points = 8 if len(text) < 5 else 7
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        end = np.nan if lower is None else float(lower[row, column])
        if np.isnan(end):
            ax.text(column, row, text, fontsize=points, **style)
        else:
            ax.text(column, row - 0.14, text, fontsize=points, **style)
            ax.text(column, row + 0.22, f"≥ {_rounded_down(end, scale)}", fontsize=5, **style)


def written(value: float, scale: Scale) -> str:
    """Three digits of a distance; the form that the scale says for the rest."""
    form = "{:.0f}" if scale.number == "{:.1f}" and abs(value) >= 100 else scale.number
    return form.format(value).replace("-", "−")


def _rounded_down(end: float, scale: Scale) -> str:
    """A proven lower end, which must not be rounded up."""
    if not np.isfinite(end):
        return "∞"
    steps = 1 if end >= 100 else 10
    return written(np.floor(end * steps) / steps, scale)


def mappable(scale: Scale):
    """Return the colours of a scale, as Matplotlib takes them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    if scale.colours in colormaps:
        colours = colormaps[scale.colours]
    else:  # one colour, from transparent to opaque: suits a light and a dark ground
        colours = LinearSegmentedColormap.from_list("one", [scale.colours + "08", scale.colours])
    return ScalarMappable(Normalize(scale.low, scale.high), colours)


def extend(values: np.ndarray, scale: Scale) -> str:
    """Return at which ends of the colour bar `values` go past the scale."""
    finite = values[np.isfinite(values)]
    above, below = (finite > scale.high * (1 + 1e-6)).any(), (finite < scale.low * (1 + 1e-6)).any()
    ends = {(0, 0): "neither", (1, 0): "max", (0, 1): "min", (1, 1): "both"}
    return ends[int(above), int(below)]


def _short(name: str) -> str:
    name = " ".join(str(name).split())
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1].rstrip() + "…"
