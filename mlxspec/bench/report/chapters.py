"""The chapters of a report: for each question one sentence, a plot, and a table. No MLX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import starmap

from mlxspec.bench.cells import Cell, Question
from mlxspec.bench.judging import times
from mlxspec.bench.report import around, costs, tables
from mlxspec.bench.report.chapter import Chapter, measured
from mlxspec.bench.report.figures import gain, in_share, in_speed
from mlxspec.bench.report.plots import Forest, Lines, Point, Spot
from mlxspec.bench.results import Results
from mlxspec.bench.summing import speed_of

ROUNDS = 10  # that must have proposed a token at a position for it to be drawn


def chapters(results: Results) -> list[Chapter]:
    """What was measured, in the order in which it is told; nothing of what was not."""
    names = list(dict.fromkeys(cell.configuration.name for cell in results.cells))
    made = [
        _configurations(results, names),
        _compared(results, names, "prompts", "By prompt type"),
        _acceptance(results, names),
        costs.costs(results),
        costs.rounds(results),
        _compared(results, names, "system", "By system prompt"),
        _compared(results, names, "sampling", "By temperature"),
        _over(results, names, "context", "By length of the context"),
        _over(results, names, "rows", "With texts side by side"),
        *(costs.shape(one, place) for place, one in enumerate(results.shape)),
        around.others(results.peers),
        around.aims(results),
        around.steadiness(results),
    ]
    return [one for one in made if one is not None]


def _configurations(results: Results, names: Sequence[str]) -> Chapter | None:
    cells = measured(results, "configs")
    if not cells:
        return None
    gains = _gains(cells)
    if gains:
        best = gains[0]
        found = best.speedup
        assert found is not None
        name, speed = tables.called(best), in_speed(speed_of(best.samples))
        finding = f"The fastest is {name}: {times(found)} plain decoding, {speed} tokens/s."
    else:
        finding = _nothing(cells)
    rows = [(tables.called(cell), [_point(cell, names, expected=cell.predicted)]) for cell in gains]
    speeds = tables.of_cells("Medians over all prompts, with 95% intervals", cells)
    kept = tables.of_cells("Proposals, texts and memory", cells, tables.KEPT)
    plot = Forest(rows, names, has_legend=False) if rows else None
    return Chapter("configs", "Which setting is best", finding, (speeds, kept), plot)


def _compared(
    results: Results, names: Sequence[str], question: Question, title: str
) -> Chapter | None:
    """Speed-ups under several conditions, each with its best configuration first."""
    cells = measured(results, question)
    if not cells:
        return None
    best: dict[str, Cell] = {}
    for cell in _gains(cells):
        best.setdefault(cell.row, cell)
    order = list(best.values())
    finding = _nothing(cells)
    if order:
        finding = f"Speculation gains most with {_told(order[0])}"
        finding += f", and least with {_told(order[-1])}." if order[1:] else "."
    rows: dict[str, list[Point]] = {row: [] for row in best}
    for cell in cells:
        if cell.speedup is not None:
            rows[cell.row].append(_point(cell, names))
    if question == "sampling":  # numbers keep their order
        rows = {cell.row: rows[cell.row] for cell in cells if cell.row in rows}
    table = tables.of_cells(f"Medians by {tables.LABELS[question]}, with 95% intervals", cells)
    plot = Forest(list(rows.items()), names) if rows else None
    return Chapter(question, title, finding, (table,), plot)


def _nothing(cells: Sequence[Cell]) -> str:
    """Why there is no speed-up to tell."""
    if all(cell.configuration.is_baseline for cell in cells):
        return "Plain decoding alone was measured, so there is nothing to compare with it."
    return "Too few texts were written to tell a speed-up."


def _gains(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that are compared with the baseline, the largest speed-up first."""
    return sorted((cell for cell in cells if cell.speedup), key=lambda cell: -(gain(cell) or 0.0))


def _told(cell: Cell) -> str:
    found = cell.speedup
    assert found is not None
    row = cell.row
    if cell.question == "sampling":
        row = f"temperature {row}"
    elif cell.question == "system":
        row = "no system prompt" if row == "none" else f"the system prompt {row}"
    return f"{row} ({cell.configuration.name}: {times(found)})"


def _point(cell: Cell, names: Sequence[str], *, expected: float | None = None) -> Point:
    found = cell.speedup
    assert found is not None
    number = names.index(cell.configuration.name)
    return Point(number, found.median, found.low, found.high, expected)


def _acceptance(results: Results, names: Sequence[str]) -> Chapter | None:
    cells = [cell for cell in measured(results, "configs") if tables.positions(cell)]
    if not cells:
        return None
    series = [
        (names.index(cell.row), tables.called(cell), list(starmap(Spot, enumerate(shares, 1))))
        for cell in cells
        if (shares := tables.positions(cell, least=ROUNDS))
    ]
    finding, plot = f"No position was proposed in {ROUNDS} rounds, which is too few to tell.", None
    if series:
        _, name, spots = max(series, key=lambda one: len(one[2]))
        finding = f"With {name}, {in_share(spots[0].y)} of the first proposals are kept"
        finding += f", and {in_share(spots[-1].y)} at position {len(spots)}." if spots[1:] else "."
        ticks = [float(one) for one in range(1, max(2, len(spots)) + 1)]
        plot = Lines(series, "position in a proposal", "share kept", share=True, ticks=ticks)
    sources = tables.of_sources(cells)
    both = (tables.of_positions(cells), *(() if sources is None else (sources,)))
    return Chapter("acceptance", "Acceptance by position", finding, both, plot)


def _over(results: Results, names: Sequence[str], question: Question, title: str) -> Chapter | None:
    """Speeds over a number."""
    cells = measured(results, question)
    found: dict[tuple[int, str], list[Spot]] = {}
    for cell in cells:
        if (value := speed_of(cell.samples)) is not None:
            key = (names.index(cell.configuration.name), tables.called(cell))
            found.setdefault(key, []).append(Spot(float(cell.row), value))
    if not found:
        return None
    across = tables.LABELS[question]
    series = [(number, name, sorted(spots)) for (number, name), spots in found.items()]
    _, name, spots = max(series, key=lambda one: one[2][-1].y)
    finding = f"{name} writes {_told_of(spots[0], question)}"
    finding += f", and {_told_of(spots[-1], question)}." if spots[1:] else "."
    together = ", of all texts together" if question == "rows" else ""
    plot = Lines(series, across, f"tokens/s{together}", doubling=True)
    table = tables.of_cells(f"Medians by {across}, with 95% intervals", cells)
    return Chapter(question, title, finding, (table,), plot)


def _told_of(spot: Spot, question: Question) -> str:
    what = "text at a time" if question == "rows" else "token of context"
    if spot.x != 1:
        what = what.replace("text ", "texts ").replace("token ", "tokens ")
    return f"{in_speed(spot.y)} tokens/s with {spot.x:,.0f} {what}"
