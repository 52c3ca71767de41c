"""SVG as text: elements, the marks that tell series apart without colour, and axes. No MLX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LETTER = 6.7  # the width of a letter of 12 px, on average; texts are laid out before they are seen
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "down")
COLOURS = 6
RADIUS = 4.5  # of a mark
DASHES = ("", "6 3", "2 3", "8 3 2 3")


def tag(name: str, *inner: str, **attributes: object) -> str:
    """An element. `inner` is markup; attributes are escaped: `class_` is class, `x_y` is x-y."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{''.join(inner)}</{name}>" if inner else f"<{name}{given}/>"


def words(x: float, y: float, text: str, **attributes: object) -> str:
    return tag("text", escape(text), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def marker(series: int, x: float, y: float) -> str:
    """The mark of a series: a shape and a colour of its own."""
    r = RADIUS
    shape, colour = SHAPES[series % len(SHAPES)], f"s{series % COLOURS}"
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=r, class_=f"mark {colour}")
    if shape == "square":
        return tag("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, class_=f"mark {colour}")
    if shape == "cross":
        path = f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
        return tag("path", d=path, class_=f"stroke {colour}")
    tall = r * 1.25
    corners = {
        "triangle": [(0, -tall), (tall, r), (-tall, r)],
        "down": [(0, tall), (tall, -r), (-tall, -r)],
        "diamond": [(0, -tall), (tall, 0), (0, tall), (-tall, 0)],
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return tag("polygon", points=points, class_=f"mark {colour}")


def dash(series: int) -> str | None:
    return DASHES[series % len(DASHES)] or None


def width_of(text: str) -> float:
    return LETTER * len(text)


def longest(texts: Iterable[str]) -> float:
    return max(map(width_of, texts), default=0.0)


def steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers that span low … high, `most` steps or fewer."""
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 10) for place in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Scale:
    """Values to places on the page, with the values that get a tick."""

    place: Callable[[float], float]
    ticks: Sequence[float]

    @classmethod
    def linear(cls, ticks: Sequence[float], start: float, end: float) -> Scale:
        low, high = ticks[0], ticks[-1]
        return cls(lambda value: start + (end - start) * (value - low) / (high - low), ticks)

    @classmethod
    def logarithmic(cls, values: Sequence[float], start: float, end: float) -> Scale:
        """A scale on which a doubling is always as wide; every value gets a tick."""
        ticks = sorted(set(values))
        low, high = math.log(ticks[0]), math.log(ticks[-1])
        if low == high:
            return cls(lambda value: (start + end) / 2, ticks)
        return cls(
            lambda value: start + (end - start) * (math.log(value) - low) / (high - low), ticks
        )


Item = tuple[Callable[[float, float], str], str]  # draws a mark at a place; its name


def legend(names: Sequence[Item], width: float) -> list[str]:
    """Marks with their names, in as many lines of 20 px as they take; each line is markup."""
    lines, row, x = [], "", 0.0
    for draw, name in names:
        needed = 20 + width_of(name)
        if row and x + needed > width:
            lines.append(row)
            row, x = "", 0.0
        row += draw(x + 6, -4) + words(x + 17, 0, name, class_="name")
        x += needed + 16
    return [*lines, row] if row else lines


def apart(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places moved as little as it takes for each two to be `least` apart, within low … high."""
    order = sorted(range(len(places)), key=lambda one: places[one])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    over = max((moved[one] for one in order), default=high) - high
    if over > 0:
        moved[order[-1]] -= over
        for after, before in pairwise(order[::-1]):
            moved[before] = min(moved[before], moved[after] - least)
    return [max(one, low) for one in moved]
