"""The plots of a report: medians with intervals, lines, and sums of parts. No MLX.

A plot is drawn for a width, once for a wide page and once for a narrow one, so that its letters
keep their size. Series differ by shape, dash or pattern, and by colour beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from mlxspec.bench.report import svg
from mlxspec.bench.report.svg import Scale, line, marker, tag, words

WIDE, NARROW = 880, 340
BESIDE = 500  # the width from which labels stand beside what they name


class Drawing(NamedTuple):
    height: float
    markup: str


class Plot(Protocol):
    def draw(self, width: float, name: str) -> Drawing:
        """The plot for a width; `name` is unique on the page, for what the drawing refers to."""
        ...


class Point(NamedTuple):
    """A value of a series (its number says how it looks), with its interval where it has one."""

    series: int
    value: float
    low: float | None = None
    high: float | None = None
    expected: float | None = None


@dataclass(frozen=True)
class Forest:
    """Medians with intervals, one below the other, beside a line at 1: the baseline.

    Args:
        rows: labels, with a point for each series that was measured.
        series: names by number. Where there is one, or the label is the name, there is no legend.
        unit: below the axis.
    """

    rows: Sequence[tuple[str, Sequence[Point]]]
    series: Sequence[str]
    unit: str = "x plain decoding"
    reference: str = "plain decoding"
    has_legend: bool = True

    def draw(self, width: float, name: str) -> Drawing:
        left, beside = _left(width, [label for label, _ in self.rows])
        whole = width >= BESIDE
        right = 130 if whole else 52
        head, top = self._legend(width)
        top += 26
        scale = Scale.linear(self._ticks(6 if whole else 4), left, width - right)
        body, y = "", top
        for label, points in self.rows:
            if not beside:
                body += words(0, y + 14, label, class_="label")
                y += 18
            tall = 20 * max(len(points), 1) + 8
            middle = y + tall / 2
            if beside:
                body += words(left - 14, middle + 4, label, class_="label", text_anchor="end")
            for place, point in enumerate(points):
                at = y + 14 + 20 * place
                body += _interval(point, scale, at) + _said(point, width, at, whole)
            y += tall
            body += line(0, y, width, y, class_="row")
        axis = _bottom(scale, y, top, self.unit)
        one = scale.place(1)
        mark = line(one, top - 6, one, y, class_="one")
        half = svg.width_of(self.reference) / 2
        at = min(max(one, half), width - half)
        mark += words(at, top - 10, self.reference, class_="tick", text_anchor="middle")
        return Drawing(y + 42, head + axis + mark + body)

    def _legend(self, width: float) -> tuple[str, float]:
        used = sorted({point.series for _, points in self.rows for point in points})
        items: list[svg.Item] = [
            (partial(marker, one), self.series[one]) for one in used if self.has_legend
        ]
        if any(point.expected is not None for _, points in self.rows for point in points):
            items.append((_expected, "predicted from its parts"))
        rows = svg.legend(items, width)
        return _lines(rows), 20.0 * len(rows)

    def _ticks(self, most: int) -> list[float]:
        """From below the least to above the greatest value; a very wide interval is cut off."""
        points = [point for _, points in self.rows for point in points]
        values = [1.0] + [v for p in points for v in (p.value, p.expected) if v is not None]
        least, greatest = min(values), max(values)
        reach = max(greatest - least, 0.2)
        lows = [point.low for point in points if point.low is not None]
        highs = [point.high for point in points if point.high is not None]
        low = max(min([least, *lows]), least - reach, 0)
        high = min(max([greatest, *highs]), greatest + reach)
        return svg.steps(low, high, most)


def _left(width: float, labels: Sequence[str]) -> tuple[float, bool]:
    """The room for labels, and whether they stand beside what they name, or above it."""
    needed = svg.longest(labels) + 18
    beside = needed < width / 4
    return (needed if beside else 12.0), beside


def _lines(rows: Sequence[str]) -> str:
    """The lines of a legend, one below the other."""
    return "".join(
        tag("g", row, transform=f"translate(0 {14 + 20 * at})") for at, row in enumerate(rows)
    )


def _interval(point: Point, scale: Scale, y: float) -> str:
    """The interval as a line that ends in caps, or at the edge without one, and the median."""
    first, last = scale.ticks[0], scale.ticks[-1]
    made = ""
    if point.low is not None and point.high is not None:
        colour = f"s{point.series % svg.COLOURS}"
        low, high = max(point.low, first), min(point.high, last)
        made += line(scale.place(low), y, scale.place(high), y, class_=f"stroke {colour}")
        for end, value in ((low, point.low), (high, point.high)):
            if end == value:
                x = scale.place(end)
                made += line(x, y - 4, x, y + 4, class_=f"stroke {colour}")
    if point.expected is not None:
        made += _expected(scale.place(point.expected), y)
    return made + marker(point.series, scale.place(point.value), y)


def _expected(x: float, y: float) -> str:
    return tag("rect", x=x - 2, y=y - 7, width=4, height=14, class_="expected")


def _said(point: Point, width: float, y: float, whole: bool) -> str:
    said = f"{point.value:.2f}"
    made = words(width - (92 if whole else 8), y + 4, said, class_="value", text_anchor="end")
    if whole and point.low is not None and point.high is not None:
        interval = f"{point.low:.2f}–{point.high:.2f}"
        made += words(width - 2, y + 4, interval, class_="tick", text_anchor="end")
    return made


def _bottom(scale: Scale, y: float, top: float, unit: str) -> str:
    made = "".join(
        line(x, top, x, y, class_="grid")
        + words(x, y + 16, f"{tick:g}", class_="tick", text_anchor="middle")
        for tick, x in ((tick, scale.place(tick)) for tick in scale.ticks)
    )
    middle = (scale.place(scale.ticks[0]) + scale.place(scale.ticks[-1])) / 2
    return made + words(middle, y + 34, unit, class_="tick", text_anchor="middle")


class Spot(NamedTuple):
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Lines:
    """Series over a number.

    Args:
        series: a number that says how it looks, a name, and the points from left to right.
        across, up: what the axes show. doubling: the horizontal axis is logarithmic.
        share: the vertical axis is one of percents, up to 100%.
        ticks: of the horizontal axis; round numbers where there are none.
    """

    series: Sequence[tuple[int, str, Sequence[Spot]]]
    across: str
    up: str
    doubling: bool = False
    share: bool = False
    ticks: Sequence[float] | None = None

    def draw(self, width: float, name: str) -> Drawing:
        tall = 230.0 if width >= BESIDE else 190.0
        head, above, beside = self._legend(width)
        left, top = 46.0, 30.0 + above
        right = width - beside
        xs = [spot.x for _, _, spots in self.series for spot in spots]
        across = self._across(xs, left + 8, right - 8, 10 if width >= BESIDE else 5)
        up = Scale.linear(self._up(), top + tall, top)
        made = head + words(0, 14 + above, self.up, class_="tick")
        for tick in up.ticks:
            y = up.place(tick)
            said = f"{tick:.0%}" if self.share else f"{tick:,g}"
            made += line(left, y, right, y, class_="grid")
            made += words(left - 8, y + 4, said, class_="tick", text_anchor="end")
        for x, tick in _with_room([(across.place(tick), tick) for tick in across.ticks]):
            said = f"{tick:,g}"
            made += line(x, top + tall, x, top + tall + 4, class_="axis")
            made += words(x, top + tall + 19, said, class_="tick", text_anchor="middle")
        made += words(
            (left + right) / 2, top + tall + 37, self.across, class_="tick", text_anchor="middle"
        )
        for number, _, spots in self.series:
            made += _path(number, spots, across, up)
        if not head:
            made += self._names(right, up, top, top + tall)
        return Drawing(top + tall + 46, made)

    def _legend(self, width: float) -> tuple[str, float, float]:
        """Names above the lines where those end at different places, and the room they take.

        Else there is no markup, and the names stand beside the ends.
        """
        if len({spots[-1].x for _, _, spots in self.series}) == 1:
            return "", 0.0, svg.longest(name for _, name, _ in self.series) + 30
        rows = svg.legend([(partial(marker, one), name) for one, name, _ in self.series], width)
        return _lines(rows), 20.0 * len(rows) + 8, 12.0

    def _across(self, xs: Sequence[float], start: float, end: float, most: int) -> Scale:
        if self.doubling:
            return Scale.logarithmic(xs, start, end)
        ticks = self.ticks
        if ticks is None:
            ticks = svg.steps(min(xs), max(xs), most)
        return Scale.linear(ticks, start, end)

    def _up(self) -> list[float]:
        if self.share:
            return [0, 0.25, 0.5, 0.75, 1]
        values = [spot.y for _, _, spots in self.series for spot in spots]
        highs = [spot.high for _, _, spots in self.series for spot in spots if spot.high]
        return svg.steps(0, min(max(values + highs), 1.5 * max(values)), 5)

    def _names(self, right: float, up: Scale, top: float, bottom: float) -> str:
        """The names beside the ends of the lines, with their marks."""
        ends = [up.place(spots[-1].y) for _, _, spots in self.series]
        places = svg.apart(ends, 17, top, bottom)
        return "".join(
            marker(number, right + 12, y) + words(right + 22, y + 4, name, class_="name")
            for (number, name, _), y in zip(self.series, places, strict=True)
        )


def _with_room(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The ticks whose numbers do not touch, from the last one back."""
    kept: list[tuple[float, float]] = []
    for x, tick in sorted(places, reverse=True):
        if not kept or kept[-1][0] - x > svg.width_of(f"{tick:,g}") + 8:
            kept.append((x, tick))
    return kept


def _path(number: int, spots: Sequence[Spot], across: Scale, up: Scale) -> str:
    colour = f"s{number % svg.COLOURS}"
    made = ""
    for spot in spots:
        if spot.low is not None and spot.high is not None:
            x = across.place(spot.x)
            ends = [up.place(min(max(v, up.ticks[0]), up.ticks[-1])) for v in (spot.low, spot.high)]
            made += line(x, ends[0], x, ends[1], class_=f"thin {colour}")
    points = " ".join(f"{across.place(spot.x):.1f},{up.place(spot.y):.1f}" for spot in spots)
    made += tag(
        "polyline",
        points=points,
        class_=f"stroke {colour}",
        stroke_dasharray=svg.dash(number),
    )
    return made + "".join(marker(number, across.place(s.x), up.place(s.y)) for s in spots)


@dataclass(frozen=True)
class Stacks:
    """Sums of parts as bars; each part has a pattern.

    Args:
        rows: labels, with a value for each part. parts: their names.
    """

    rows: Sequence[tuple[str, Sequence[float]]]
    parts: Sequence[str]
    unit: str

    def draw(self, width: float, name: str) -> Drawing:
        left, beside = _left(width, [label for label, _ in self.rows])
        right = 60.0
        fills = [f"{name}-{part}" for part in range(len(self.parts))]
        items: list[svg.Item] = [
            (partial(_sample, one, fill), part)
            for one, (fill, part) in enumerate(zip(fills, self.parts, strict=True))
        ]
        heads = svg.legend(items, width)
        made = tag("defs", *map(_pattern, range(len(fills)), fills))
        made += _lines(heads)
        y = top = 20.0 * len(heads) + 10
        greatest = max(sum(max(one, 0) for one in values) for _, values in self.rows)
        scale = Scale.linear(
            svg.steps(0, greatest, 6 if width >= BESIDE else 4), left, width - right
        )
        bars = ""
        for label, values in self.rows:
            if beside:
                bars += words(left - 14, y + 18, label, class_="label", text_anchor="end")
            else:
                bars += words(0, y + 14, label, class_="label")
                y += 14
            at = 0.0
            for one, value in enumerate(values):
                x, end = scale.place(at), scale.place(at + max(value, 0))
                bars += _bar(one, fills[one], x, y + 6, end - x, 17)
                at += max(value, 0)
            bars += words(scale.place(at) + 8, y + 18, f"{sum(values):.3g}", class_="value")
            y += 30
        return Drawing(y + 42, made + _bottom(scale, y, top, self.unit) + bars)


def _sample(part: int, fill: str, x: float, y: float) -> str:
    return _bar(part, fill, x - 6, y - 5, 12, 10)


def _bar(part: int, fill: str, x: float, y: float, width: float, height: float) -> str:
    return tag(
        "rect",
        x=x,
        y=y,
        width=width,
        height=height,
        fill=f"url(#{fill})",
        class_=f"bar s{1 + part}",
    )


def _pattern(part: int, name: str) -> str:
    """Filled, striped, dotted and crossed, in the colour of the part."""
    colour = f"s{1 + part}"
    inner = (
        tag("rect", width=8, height=8, class_=f"mark {colour}"),
        tag("path", d="M-2 10L10 -2M-2 2L2 -2M6 10L10 6", class_=f"stroke {colour}"),
        tag("circle", cx=4, cy=4, r=1.7, class_=f"mark {colour}"),
        tag("path", d="M0 4H8M4 0V8", class_=f"thin {colour}"),
    )[part % 4]
    return tag("pattern", inner, id=name, width=8, height=8, patternUnits="userSpaceOnUse")
