"""A matplotlib figure as inline SVG that takes its colours and font from the page's style sheet.

matplotlib only knows fixed colours, so figures are drawn in stand-in colours (`Ink`) and each
stand-in becomes a CSS variable afterwards: one drawing serves light and dark. Text stays text.
Each chart is drawn twice, wide and narrow; the style sheet shows the one that fits.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDE_PX: Final = 1000
NARROW_PX: Final = 352  # a 400 px window less its margins
FONT_PX: Final = 12.5
_PX_PER_INCH: Final = 72  # matplotlib's SVG unit is the point; here one unit is one CSS pixel


class Ink:
    """Stand-in colours and the CSS variable that each one becomes."""

    TEXT = "#010001"
    MUTED = "#010002"
    GRID = "#010003"
    PAPER = "#010004"
    LOSS = "#010005"
    ARMS = ("#010010", "#010011", "#010012", "#010013", "#010014")  # the baseline first


_VARIABLES: Final = {
    Ink.TEXT: "--text",
    Ink.MUTED: "--muted",
    Ink.GRID: "--grid",
    Ink.PAPER: "--paper",
    Ink.LOSS: "--loss-wash",
    **{colour: f"--arm-{index}" for index, colour in enumerate(Ink.ARMS)},
}

_STYLE: Final = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in an arm's name is a dollar sign
    "font.size": FONT_PX,
    "axes.titlesize": FONT_PX,
    "axes.labelsize": FONT_PX,
    "xtick.labelsize": FONT_PX,
    "ytick.labelsize": FONT_PX,
    "axes.edgecolor": Ink.GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": Ink.MUTED,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlelocation": "left",
    "grid.color": Ink.GRID,
    "grid.linewidth": 1,
    "xtick.color": Ink.GRID,
    "ytick.color": Ink.GRID,
    "xtick.labelcolor": Ink.MUTED,
    "ytick.labelcolor": Ink.MUTED,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "ytick.major.size": 0,
    "xtick.major.size": 4,
    "text.color": Ink.TEXT,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "butt",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart in both widths: SVG elements ready for the page, and its text alternative."""

    name: str
    title: str
    summary: str
    wide: Markup
    narrow: Markup


def draw_chart(
    name: str, title: str, summary: str, draw: Callable[[int], Figure], *, predicted: bool
) -> Chart:
    """Call ``draw(width in px)`` once for each width and inline what it returns.

    ``name`` must be unique on the page: every id of the SVG starts with it. ``predicted`` marks
    the title, so that a chart copied out of the page still says that nothing was measured.
    """
    marked = f"{title} (predicted)" if predicted else title
    variants = {}
    for variant, width, widest in (("wide", WIDE_PX, WIDE_PX), ("narrow", NARROW_PX, 500)):
        style: Any = {**_STYLE, "svg.hashsalt": f"{name}-{variant}"}
        with mpl.rc_context(style):
            figure = draw(width)
            FigureCanvasSVG(figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        variants[variant] = _inline(
            buffer.getvalue(),
            prefix=f"{name}-{variant}",
            variant=variant,
            widest=widest,
            title=marked,
            summary=summary,
        )
    return Chart(name, marked, summary, variants["wide"], variants["narrow"])


def panels(
    count: int,
    *,
    width: int,
    columns: int,
    height: int,
    left: int = 44,
    right: int = 14,
    top: int = 30,
    bottom: int = 46,
    gap: int = 34,
) -> tuple[Figure, list[Axes]]:
    """A grid of ``count`` axes, each with ``height`` px of plot, placed to the pixel.

    ``left``, ``top`` and ``bottom`` are the margins of each panel (tick labels, title, axis
    label); ``gap`` is the extra room between two columns.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    cell_height = top + height + bottom
    total_height = rows * cell_height
    plot_width = (width - columns * left - right - (columns - 1) * gap) / columns
    figure = Figure(figsize=(width / _PX_PER_INCH, total_height / _PX_PER_INCH), dpi=_PX_PER_INCH)
    axes = []
    for index in range(count):
        row, column = divmod(index, columns)
        x = left + column * (plot_width + left + gap)
        y = total_height - row * cell_height - top - height
        axes.append(
            figure.add_axes(
                (x / width, y / total_height, plot_width / width, height / total_height)
            )
        )
    return figure, axes


def _inline(
    svg: str, *, prefix: str, variant: str, widest: int, title: str, summary: str
) -> Markup:
    """The bare ``<svg>`` element: unique ids, CSS colours, the page's font, a title and a label."""
    match = re.search(r'viewBox="([^"]+)"', svg)
    if match is None:  # pragma: no cover - matplotlib always writes one
        raise AssertionError("matplotlib wrote no viewBox")
    body = svg[svg.index(">", match.start()) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # matplotlib's own style sheet would apply to the whole page
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _round_coordinates, body)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', body))
    body = re.sub(
        r'\sid="([^"]+)"',
        lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "",
        body,
    )
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r'; font-family: [^;"]+|font-family: [^;"]+;? ?', "", body)
    body = re.sub(r'font: (?:[a-z]+ )*(\d+ )?([\d.]+px) [^;"]+', _without_family, body)
    body = re.sub(r"\s*\n\s*", " ", body)
    return Markup(  # noqa: S704 (matplotlib escapes what it draws; title and summary below)
        f'<svg class="chart {variant}" viewBox="{match[1]}" style="max-width:{widest}px" '
        f'role="img" aria-label="{html.escape(title)}. {html.escape(summary)}">'
        f"<title>{html.escape(title)}</title>{body}</svg>"
    )


def _round_coordinates(attribute: re.Match[str]) -> str:
    """Coordinates to a tenth of a pixel: a third of the size, and nothing that an eye can see."""
    return re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}", attribute[0])


def _without_family(shorthand: re.Match[str]) -> str:
    """The ``font`` shorthand of older matplotlib as size and weight, without the family."""
    weight = f"font-weight: {shorthand[1].strip()}; " if shorthand[1] else ""
    return f"{weight}font-size: {shorthand[2]}"
