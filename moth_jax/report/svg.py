"""A matplotlib figure as inline SVG that takes its colours and fonts from the page."""

import io
import re
import warnings
from typing import TYPE_CHECKING

from moth_jax.distance.heat_map import Theme
from moth_jax.report.formatting import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PIXELS_PER_INCH = 92


# Stand-ins that become CSS variables in the SVG, so that one figure suits light and dark pages.
PAGE = Theme(ink="#010101", muted="#020202", line="#030303", paper="#040404", accent="#050505")


def to_svg(figure: "Figure", *, name: str, alt: str) -> str:
    """Return `figure` as an `<svg>` element; `name` begins its ids, `alt` is its alternative text.

    Text stays text, in the font of the page.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    for part in (figure, *figure.axes):
        part.patch.set_visible(False)  # the ground is the page's
    buffer = io.StringIO()
    # The same figure gives the same bytes: no date, and ids from a fixed salt.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "moth_jax"}),
        warnings.catch_warnings(),
    ):
        # Names in other scripts: the browser has a font, matplotlib only measures without one.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for pattern in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>"):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable, stand_in in PAGE._asdict().items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    svg = re.sub(r"\n\s*", "\n", svg)
    # Kept at its own size on a wide page; a narrow one scrolls instead of shrinking the text away.
    width = figure.get_figwidth() * _PIXELS_PER_INCH
    style = f'style="width: {width:.0f}px; min-width: {min(width, max(330, 0.75 * width)):.0f}px"'
    box = svg[svg.index("viewBox=") :].split('"')[1]
    opening = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box}" {style}>'
    return opening + svg[svg.index(">") + 1 :].replace("xlink:href", "href")
