"""The report's plots: bars of bytes, divergences and operators, lines of speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from markupsafe import Markup

from lobit.runtime.report_canvas import STYLE, WIDTH, Canvas, clipped, number, size
from lobit.runtime.report_results import Results, Speed

TINTS = (1.0, 0.62, 0.44, 0.3, 0.2, 0.12)
"""Opacity of each kind in `KINDS`."""
KINDS = ("mlp", "attention", "embedding", "head", "norms", "tables")
STAGES = {"fake_quant": "Quantization", "graph": "Exported graph", "artifact": "Runtime"}
PHASES = {"prefill": "Prefill", "decode": "Decode", "wrapped": "Decode, cache wrapped"}
MOST_OPERATORS = 8


@dataclass(frozen=True)
class Part:
    """A piece of a bar."""

    length: float
    colour: str
    opacity: float = 1
    text: str = ""
    """Text that is drawn in the piece where there is room, or explained by a legend."""


@dataclass(frozen=True)
class Row:
    """A labelled bar, or a heading where it has no parts."""

    label: str
    value: str = ""
    parts: Sequence[Part] = ()
    chip: str = ""
    """The colour of a square before the label."""
    mark: float | None = None
    """Where on the bar's scale a limit is marked."""
    dots: Sequence[float] = ()
    """Where on the bar's scale single measurements are marked."""

    @property
    def thickness(self) -> int:
        """Height of the bar in pixels: more where it has to hold text."""
        return 20 if any(part.text for part in self.parts) else 9 if self.parts else 0

    @property
    def height(self) -> int:
        """Height of the row in pixels, with the space below."""
        return 24 + self.thickness

    @property
    def longest(self) -> float:
        """The largest value that must fit into the plot."""
        return max(sum(_finite(part.length) for part in self.parts), *map(_finite, (self.mark or 0, *self.dots)))


def _finite(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0


def bars(label: str, rows: Sequence[Row], legend: Sequence[Part] = (), longest: float = 0) -> Markup:
    """Horizontal bars on one scale, each under its label and value; the legend above them.

    Args:
        label: what the plot shows.
        rows: from top to bottom.
        legend: pieces whose text is explained.
        longest: the largest value of another plot that is to have the same scale.
    """
    scale = WIDTH / (max([longest, *(row.longest for row in rows)]) or 1)
    top = 18.0 * math.ceil(len(legend) / 3) + (6 if legend else 0)
    canvas = Canvas(top + sum(row.height for row in rows))
    for i, part in enumerate(legend):
        x, y = (i % 3) * WIDTH / 3, 18 * (i // 3)
        canvas.box(x, y + 3, 9, 9, part.colour, part.opacity)
        canvas.text(x + 14, y + 12, clipped(part.text, 18), "quiet")
    for row in rows:
        _draw_row(canvas, row, top, scale)
        top += row.height
    return canvas.svg(label)


def _draw_row(canvas: Canvas, row: Row, top: float, scale: float) -> None:
    heading = not row.parts
    if row.chip:
        canvas.box(0, top + 3.5, 9, 9, row.chip)
    room = int((WIDTH - 7 * len(row.value) - 24) / (7.4 if heading else 6.7))
    canvas.text(14 if row.chip else 0, top + 12, clipped(row.label, max(room, 8)), bold=heading)
    canvas.text(WIDTH, top + 12, row.value, "quiet" if heading else "ink", "right")
    if heading:
        return
    canvas.box(0, top + 17, WIDTH, row.thickness, "line", 0.55)
    x = 0.0
    for part in row.parts:
        width = _finite(part.length) * scale
        _draw_part(canvas, part, x, top + 17, width, row.thickness)
        x += width
    for dot in row.dots:
        canvas.dot(_finite(dot) * scale, top + 21.5, "ink", 2, 0.45)
    if row.mark is not None:
        canvas.box(min(_finite(row.mark) * scale, WIDTH - 2), top + 14.5, 2, 14, "limit")


def _draw_part(canvas: Canvas, part: Part, x: float, y: float, width: float, height: float) -> None:
    if width and part.opacity:
        canvas.box(x, y, max(width - 1 if width > 3 and part.text else width, 0.75), height, part.colour, part.opacity)
    if part.text and width > 6.5 * len(part.text) + 8:
        canvas.text(x + 6, y + 14, part.text, "surface" if part.opacity > 0.9 else "ink", points=10)


def plots(bundles: Sequence[Results]) -> dict[str, Any]:
    """Every plot that the results have the figures for, by name; `delegation` holds one for each bundle."""
    with matplotlib.style.context(["default", STYLE]):
        described = [one for one in bundles if one.manifest]
        compared = [one for one in bundles if one.phases]
        blamed = [one for one in bundles if one.steps]
        held = [one for one in bundles if one.file_bytes or one.peak_bytes or one.cache_bytes]
        return {
            "sizes": sizes(described) if described else None,
            "against_float": against_float(described) if described else None,
            "blame": blame(blamed) if blamed else None,
            "phases": phases(compared) if compared else None,
            "prefill": speed(bundles, "prefill"),
            "decode": speed(bundles, "decode"),
            "sustained": sustained(bundles),
            "memory": memory(held) if held else None,
            "delegation": [delegation(one) for one in described],
        }


def _tint(kind: str) -> float:
    return TINTS[KINDS.index(kind)] if kind in KINDS else TINTS[-1]


def sizes(bundles: Sequence[Results]) -> Markup:
    """Bytes of each kind of tensor, stacked, one bar a bundle."""
    rows, kinds = [], set()
    for one in bundles:
        groups = sorted(one.manifest.weights, key=lambda group: -_tint(group.kind)) if one.manifest else []
        parts = [Part(group.bytes, one.colour, _tint(group.kind), group.kind) for group in groups]
        kinds |= {group.kind for group in groups}
        rows.append(Row(one.name, size(sum(part.length for part in parts)), parts, one.colour))
    colour = bundles[0].colour if len(bundles) == 1 else "ink"
    legend = [Part(0, colour, _tint(kind), kind) for kind in sorted(kinds, key=lambda kind: (-_tint(kind), kind))]
    return bars("Bytes of the weights by kind of tensor", rows, legend)


def against_float(bundles: Sequence[Results]) -> Markup:
    """Sizes of program files, compared with those of the same parameters in float32 and bfloat16."""
    rows = [Row(one.name, size(one.file_bytes), [Part(one.file_bytes, one.colour)], one.colour) for one in bundles if one.file_bytes]
    for parameters in sorted({one.manifest.model.parameters for one in bundles if one.manifest}):
        for name, width in (("bfloat16", 2), ("float32", 4)):
            label = f"{parameters:,} parameters in {name}"
            rows.append(Row(label, size(width * parameters), [Part(width * parameters, "quiet", 0.45)]))
    return bars("Program files beside the parameters in bfloat16 and float32", rows)


def blame(bundles: Sequence[Results]) -> Markup:
    """KL that each stage adds: each bar begins where the previous one ends."""
    rows: list[Row] = []
    for one in bundles:
        rows += _heading(one, bundles)
        before = 0.0
        for name, step in one.steps:
            rows.append(Row(STAGES.get(name, name), number(step), [Part(before, "line", 0), Part(step, one.colour)]))
            before += step
    return bars("KL that each stage adds, in nats a token", rows)


def phases(bundles: Sequence[Results]) -> Markup:
    """Mean KL of prefill, decode and the wrapped cache; the limit is drawn where it is near enough to leave the bars readable."""
    rows: list[Row] = []
    largest = max(_finite(phase["kl_mean"]) for one in bundles for _, phase in one.phases)
    for one in bundles:
        rows += _heading(one, bundles)
        limit = one.limit("kl_mean")
        far = limit is not None and limit > 4 * largest
        for name, phase in one.phases:
            value = f"{number(phase['kl_mean'])} · p99 {number(phase['kl_p99'])}"
            rows.append(Row(PHASES.get(name, name), value, [Part(phase["kl_mean"], one.colour)], mark=None if far else limit))
        rows += [Row("", f"the limit, {limit:g}, is beyond this scale")] if far else []
    return bars("Mean KL in each phase, in nats a token", rows)


def _heading(one: Results, bundles: Sequence[Results]) -> list[Row]:
    return [Row(one.name, chip=one.colour)] if len(bundles) > 1 else []


def memory(bundles: Sequence[Results]) -> Markup:
    """Program file, peak resident memory (faint: before the model was loaded) and key-value cache."""
    rows: list[Row] = []
    for one in bundles:
        rows += _heading(one, bundles)
        base = min(one.base_bytes or 0, one.peak_bytes or 0)
        for name, count in (("Program file", one.file_bytes), ("Peak resident", one.peak_bytes), ("Key-value cache", one.cache_bytes)):
            before = base if name == "Peak resident" else 0
            value = size(count or 0) + (f", {size(before)} before loading" if before else "")
            parts = [Part(before, one.colour, TINTS[2]), Part((count or 0) - before, one.colour)]
            rows += [Row(name, value, parts)] if count is not None else []
    return bars("Program file, peak resident memory and key-value cache", rows)


def delegation(one: Results) -> tuple[Results, Markup | None, Markup | None]:
    """A bundle, its most frequent operators outside of the delegate, and those on it, both plots on one scale."""
    assert one.manifest is not None
    kinds = one.manifest.delegation.left, one.manifest.delegation.delegated
    most = max((count for counts in kinds for count in counts.values()), default=0)
    left, on = (_operators(one, counts, most, "left" if i == 0 else one.colour) for i, counts in enumerate(kinds))
    return one, left, on


def _operators(one: Results, counts: dict[str, int], most: int, colour: str) -> Markup | None:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [Row(name, f"{count:,}", [Part(count, colour)]) for name, count in ranked[:MOST_OPERATORS]]
    rest = [Row("", f"and {len(ranked) - MOST_OPERATORS} more")] if len(ranked) > MOST_OPERATORS else []
    return bars(f"Operators of {one.name}", rows + rest, longest=most) if rows else None


def speed(bundles: Sequence[Results], phase: str) -> Markup | None:
    """Tokens a second of `prefill` or `decode`: lines over the depth where there are several depths, else bars."""
    rows = [(one, row) for one in bundles for row in one.speeds if row.phase == phase]
    if not rows:
        return None
    series: dict[tuple[str, str], list[tuple[Results, Speed]]] = {}
    for one, row in rows:
        series.setdefault((one.name, _setting(row, [row for _, row in rows])), []).append((one, row))
    label = f"Tokens a second in {phase}"
    if len({row.depth for _, row in rows}) > 1:
        return _against_depth(label, series)
    return bars(
        label,
        [
            Row(name + setting, number(row.mean), [Part(row.mean, one.colour, 0.8)], one.colour, dots=row.samples)
            for (name, setting), members in series.items()
            for one, row in members
        ],
    )


def _setting(row: Speed, rows: Sequence[Speed]) -> str:
    """Text that tells a row from the others of its plot, besides the bundle and the depth."""
    texts: list[tuple[Any, str]] = [(r.tokens, f"{r.tokens} tokens") for r in rows]
    parts = [f"{row.tokens} tokens"] if len({value for value, _ in texts}) > 1 else []
    parts += [f"{row.threads} threads"] if len({other.threads for other in rows}) > 1 else []
    parts += [row.device] if len({other.device for other in rows}) > 1 else []
    return "".join(f" · {part}" for part in parts)


def _against_depth(label: str, series: dict[tuple[str, str], list[tuple[Results, Speed]]]) -> Markup:
    """Lines of the means over faint dots of the samples."""
    drawn = [
        Line(name + setting, members[0][0].colour, sorted((row.depth, row.mean) for _, row in members), _samples(members))
        for (name, setting), members in series.items()
    ]
    return lines(label, "tokens already in the cache", drawn, sorted({row.depth for members in series.values() for _, row in members}))


def _samples(members: Sequence[tuple[Results, Speed]]) -> list[tuple[float, float]]:
    return [(row.depth, sample) for _, row in members for sample in row.samples]


def sustained(bundles: Sequence[Results]) -> Markup | None:
    """Tokens a second over the time of decoding without a pause: how far a phone's speed falls as it warms up."""
    runs = [(one, device, samples) for one in bundles for device, samples in one.sustained if samples]
    if not runs:
        return None
    several = len({device for _, device, _ in runs}) > 1
    drawn = [Line(one.name + (f" · {device}" if several else ""), one.colour, samples) for one, device, samples in runs]
    longest = max(_finite(x) for _, _, samples in runs for x, _ in samples)
    return lines("Tokens a second over time", "seconds of decoding without a pause", drawn, [longest * i / 4 for i in range(5)])


@dataclass(frozen=True)
class Line:
    """A line of a plot."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    """Each x with its mean."""
    samples: Sequence[tuple[float, float]] = ()
    """Single measurements, drawn as faint dots; where there are any, the points are dots too."""


def lines(label: str, below: str, drawn: Sequence[Line], ticks: Sequence[float]) -> Markup:
    """Lines over one scale from 0, each named above the plot.

    Args:
        label: what the plot shows.
        below: what the scale of x is.
        drawn: the lines; those of one colour differ in their dashes.
        ticks: where x is labelled, from the least to the largest.
    """
    widest = ticks[-1] or 1
    highest = _nice(max(_finite(y) for line in drawn for _, y in (*line.points, *line.samples)))
    top, left, height = 20.0 * len(drawn) + 14, 34, 150
    canvas = Canvas(top + height + 36)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (WIDTH - left) * x / widest, top + height * (1 - _finite(y) / highest)

    for i in range(5):
        _, y = place(0, highest * i / 4)
        canvas.line((left, WIDTH), (y, y), "line")
        canvas.text(left - 6, y + 3.5, f"{highest * i / 4:,.6g}", "quiet", "right", 10)
    for tick in ticks:
        canvas.text(place(tick, 0)[0], top + height + 15, f"{tick:,.0f}", "quiet", "right" if tick == ticks[-1] else "center", 10)
    canvas.text((WIDTH + left) / 2, top + height + 31, below, "quiet", "center", 10)
    for i, line in enumerate(drawn):
        dashes = ("-", "--", ":", "-.")[sum(other.colour == line.colour for other in drawn[:i]) % 4]
        places = [place(*point) for point in line.points]
        canvas.line([x for x, _ in places], [y for _, y in places], line.colour, 1.8, dashes)
        for x, y in places if line.samples else ():
            canvas.dot(x, y, line.colour, 3)
        for sample in line.samples:
            canvas.dot(*place(*sample), line.colour, 2, 0.35)
        canvas.line((0, 18), (20 * i + 8, 20 * i + 8), line.colour, 1.8, dashes)
        canvas.text(24, 20 * i + 12, clipped(line.label, 54))
    return canvas.svg(label)


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * factor for factor in (1, 2, 4, 6, 8, 10) if value <= power * factor or factor == 10)
