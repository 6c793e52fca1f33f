"""Draws the report's plots as SVG that takes its colours and font from the page, and writes figures as people read them."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence

from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from lobit.runtime.report_results import COLOURS

WIDTH = 380
"""Width of every plot in pixels: that of a phone, so that text stays readable there."""
TOKENS = (*(f"bundle-{i}" for i in range(COLOURS)), "ink", "quiet", "line", "surface", "left", "limit")
"""Custom properties of the page's style sheet that plots are drawn in."""
STAND_INS = {token: f"#0a0b{i:02x}" for i, token in enumerate(TOKENS)}
"""Colours that plots are drawn in, each of which is then replaced by its custom property."""
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lobit", "font.family": "sans-serif", "text.parse_math": False}


def number(value: float) -> str:
    """A number with three significant digits: `0.0213`, `41.7`, `12,300`, `4.2×10⁻⁷`."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    sign, value = "−" if value < 0 else "", abs(value)
    rounded = float(f"{value:.3g}")
    if rounded and rounded < 1e-3:
        mantissa, exponent = f"{rounded:.2e}".split("e")
        return f"{sign}{float(mantissa):g}×10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    digits = 0 if rounded >= 100 or not rounded else 2 - math.floor(math.log10(rounded))
    return f"{sign}{rounded:,.{digits}f}"


def size(count: float) -> str:
    """A number of bytes in decimal units: `71.2 MB` is 71.2 × 10⁶ bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{number(count)} {unit}"
        count /= 1000
    raise AssertionError("the loop returns at GB")


def percent(share: float) -> str:
    """A share as `96.3 %`; it is never rounded up to 100 % or down to 0 %."""
    if not math.isfinite(share):
        return number(share)
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if 0.9999 < share < 1 or 0 < share < 0.0001:
        return "> 99.99 %" if share > 0.5 else "< 0.01 %"
    return f"{math.floor(share * 10000) / 100:.2f} %" if 0.99 < share < 1 else f"{share * 100:.3g} %"


def seconds(value: float) -> str:
    """A duration as `412 ms`, `12.3 s`, `4 min 12 s`, `1 h 03 min`."""
    if not math.isfinite(value) or value < 1:
        return f"{number(value * 1000)} ms"
    if value < 99.95:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def clipped(text: str, most: int) -> str:
    """Text as one line of at most `most` characters, without its middle where it is longer, and without unprintable characters."""
    line = "".join(" " if c.isspace() else c for c in text if c.isprintable() or c.isspace())
    return line if len(line) <= most else f"{line[: (most - 1) // 2]}…{line[-(most // 2) :]}"


class Canvas:
    """A plot in pixels, y downwards."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self.figure.patch.set_visible(False)

    def box(self, x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> None:
        """A filled rectangle."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=STAND_INS[colour], alpha=opacity, linewidth=0, clip_on=False))

    def dot(self, x: float, y: float, colour: str, radius: float = 2.5, opacity: float = 1) -> None:
        """A filled circle."""
        self.axes.add_patch(Circle((x, y), radius, facecolor=STAND_INS[colour], alpha=opacity, linewidth=0, clip_on=False))

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, width: float = 1, dashes: str = "-") -> None:
        """A line through points."""
        self.axes.plot(xs, ys, dashes, color=STAND_INS[colour], linewidth=width, clip_on=False)

    def text(self, x: float, y: float, text: str, colour: str = "ink", side: str = "left", points: float = 11, bold: bool = False) -> None:
        """Text on the base line y, which starts (`left`) or ends (`right`) at x, or is centred on it (`center`)."""
        weight = "bold" if bold else "normal"
        self.axes.text(x, y, clipped(text, 80), color=STAND_INS[colour], ha=side, fontsize=points, fontweight=weight)

    def svg(self, label: str) -> Markup:
        """The plot as SVG to put into a page; `label` describes it to those who cannot see it."""
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that Matplotlib's font lacks is drawn by the browser
            FigureCanvasSVG(self.figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> Markup:
    """Matplotlib's SVG without its header and fonts; only tags are changed, never text."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<[^<>]*>", lambda tag: _retouched(tag[0]), body)
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {box[0]}>') + Markup(re.sub(r"\s*\n\s*", " ", body).strip())


def _retouched(tag: str) -> str:
    """A tag without its id, font and empty rotation, and with the page's colours."""
    tag = re.sub(r' id="[^"]*"| transform="rotate\(-0 [^"]*"|font-family:[^;"]*;? ?', "", tag)
    return re.sub(r"#0a0b[0-9a-f]{2}", lambda colour: f"var(--{TOKENS[int(colour[0][-2:], 16)]})", tag)
