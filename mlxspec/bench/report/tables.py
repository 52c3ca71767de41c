"""The tables of a report: one for each question, and what else was measured. No MLX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from mlxspec.bench.cells import BASELINE, Cell, Question, Round
from mlxspec.bench.report import figures
from mlxspec.bench.report.figures import (
    in_bytes,
    in_interval,
    in_ratio,
    in_share,
    in_speed,
    in_time,
)
from mlxspec.bench.results import Cost, Peer, Results, Shape
from mlxspec.bench.statistics import Interval
from mlxspec.bench.summing import speed_of

NEVER = "never"


@dataclass(frozen=True)
class Table:
    """Words in rows. The first `labels` cells of a row name it; the others are figures."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1


Column = tuple[str, Callable[[Cell], str]]

SPEED: Column = ("tokens/s", lambda cell: in_speed(speed_of(cell.samples)))
SPEEDUP: Column = ("x plain", lambda cell: in_ratio(figures.gain(cell)))
INTERVAL: Column = ("interval", lambda cell: in_interval(cell.speedup))
PREDICTED: Column = ("predicted", lambda cell: in_ratio(cell.predicted))
FIRST: Column = ("first token", lambda cell: in_time(figures.first_token_s(cell)))
TOTAL: Column = (
    "whole text",
    lambda cell: in_time(figures.typical(cell.samples, lambda one: one.total_s)),
)
LATE: Column = (
    "gap, p95",
    lambda cell: in_time(figures.typical(cell.samples, lambda one: one.gap_p95_s)),
)
ACCEPTED: Column = ("accepted", lambda cell: in_share(figures.rate(cell)))
BROUGHT: Column = (
    "tokens/round",
    lambda cell: in_ratio(figures.brought(cell)),
)
MEMORY: Column = (
    "peak memory",
    lambda cell: in_bytes(max((s.peak_bytes for s in cell.samples if s.peak_bytes), default=None)),
)
TIMES_TARGET: Column = ("x target alone", lambda cell: in_ratio(cell.memory_ratio))
SAME: Column = ("same text", lambda cell: in_share(cell.identical))
LENGTH: Column = (
    "tokens written",
    lambda cell: _whole(figures.typical(cell.samples, lambda one: one.tokens)),
)
TURNS: Column = ("texts", lambda cell: str(len(cell.samples)))

COLUMNS: dict[Question, tuple[Column, ...]] = {
    "configs": (SPEED, SPEEDUP, INTERVAL, PREDICTED, FIRST, TOTAL, LATE, TURNS),
    "prompts": (SPEED, SPEEDUP, INTERVAL, ACCEPTED, BROUGHT, SAME, TURNS),
    "system": (SPEED, SPEEDUP, INTERVAL, ACCEPTED, BROUGHT, LENGTH, SAME, TURNS),
    "sampling": (SPEED, SPEEDUP, INTERVAL, ACCEPTED, BROUGHT, SAME, TURNS),
    "context": (SPEED, SPEEDUP, INTERVAL, FIRST, ACCEPTED, MEMORY, TURNS),
    "rows": (SPEED, SPEEDUP, INTERVAL, LATE, ACCEPTED, MEMORY, TURNS),
}
KEPT = (ACCEPTED, BROUGHT, SAME, MEMORY, TIMES_TARGET)
LABELS: dict[Question, str] = {
    "configs": "configuration",
    "prompts": "prompt type",
    "system": "system prompt",
    "sampling": "temperature",
    "context": "tokens of context",
    "rows": "texts side by side",
}


def of_cells(caption: str, cells: Sequence[Cell], columns: Sequence[Column] = ()) -> Table:
    """The cells of one question; columns in which nothing was measured are left out.

    Args:
        columns: in place of those of the question.
    """
    question = cells[0].question
    is_first = question == "configs"
    places = list(dict.fromkeys(cell.row for cell in cells))
    ordered = sorted(cells, key=lambda cell: 0 if is_first else places.index(cell.row))
    labels = [("configuration", [called(cell) for cell in ordered])]
    if not is_first:
        labels.insert(0, (LABELS[question], [label(cell) for cell in ordered]))
    written = [
        (name, said)
        for name, write in columns or COLUMNS[question]
        if set(said := [write(cell) for cell in ordered]) != {figures.MISSING}
    ]
    header, values = zip(*labels, *written, strict=True)
    return Table(caption, header, tuple(zip(*values, strict=True)), len(labels))


def called(cell: Cell) -> str:
    """A configuration by name; the baseline is plain decoding."""
    return "plain" if cell.configuration.is_baseline else cell.configuration.name


def label(cell: Cell) -> str:
    """The condition that a cell of its question stands for, in words."""
    if cell.question == "configs":
        return called(cell)
    return f"{int(cell.row):,}" if cell.question in ("context", "rows") else cell.row


def of_positions(cells: Sequence[Cell]) -> Table:
    """Shares that were kept, a column for each position."""
    shares = {called(cell): positions(cell) for cell in cells}
    most = max(map(len, shares.values()))
    rows = tuple(
        (name, *(in_share(some[place] if place < len(some) else None) for place in range(most)))
        for name, some in shares.items()
    )
    header = ("configuration", *(str(place + 1) for place in range(most)))
    return Table(
        "By position, the share of the rounds proposing a token there that kept it", header, rows
    )


def positions(cell: Cell, *, least: int = 1) -> list[float]:
    """Of the rounds that proposed a token at a position, the share that kept it.

    Args:
        least: rounds of a position; the first with fewer ends the list.
    """
    found = cell.acceptance
    if found is None:
        return []
    both = zip(found.accepted_by_position, found.drafted_by_position, strict=False)
    enough = takewhile(lambda one: one[1] >= least, both)
    return [kept / proposed for kept, proposed in enough]


def of_sources(cells: Sequence[Cell]) -> Table | None:
    """Who proposed, where several drafters did."""
    found = [(cell, one) for cell in cells if (one := cell.acceptance) is not None]
    if all(len(one.by_source) < 2 for _, one in found):
        return None
    rows = tuple(
        (
            called(cell),
            name,
            f"{source.rounds:,}",
            f"{source.drafted:,}",
            f"{source.accepted:,}",
            in_share(source.accepted / source.drafted if source.drafted else None),
        )
        for cell, one in found
        for name, source in one.by_source.items()
    )
    header = ("configuration", "drafter", "rounds", "proposed", "kept", "accepted")
    return Table("Proposals by drafter", header, rows, 2)


def of_rounds(rounds: Sequence[tuple[str, Round]]) -> Table:
    """Where the time of a round goes, by configuration."""
    rows = tuple(
        (name, *map(in_time, (one.round_s, one.draft_s, one.verify_s, one.host_s)))
        for name, one in rounds
    )
    header = ("configuration", "a round", "drafting", "verifying", "host")
    return Table("Mean times of a round", header, rows)


def of_shape(shape: Shape) -> Table:
    theirs = any(one.mlx_lm_s is not None for one in shape.costs)
    rows = tuple((*_cost(one), *([in_time(one.mlx_lm_s)] if theirs else [])) for one in shape.costs)
    header = (
        "draft tokens",
        "verifying",
        "x one row",
        "drafting",
        "host",
        "a round",
        "expected",
        "x plain",
        "pays above",
        "from the text",
        *(["mlx-lm's round"] if theirs else []),
    )
    return Table("Passes and rounds, with random weights of that shape", header, rows)


def _cost(one: Cost) -> tuple[str, ...]:
    drafted = bool(one.draft_tokens)
    return (
        str(one.draft_tokens),
        in_time(one.verify_s),
        in_ratio(one.over_plain),
        in_time(one.draft_s),
        in_time(one.host_s),
        in_time(one.round_s),
        in_time(one.expected_s),
        in_ratio(one.round_over_plain),
        _pays(one.pays_above, drafted and one.round_s is not None),
        _pays(one.text_pays_above, drafted),
    )


def _pays(rate: float | None, measured: bool) -> str:
    return NEVER if rate is None and measured else in_share(rate)


def of_peers(peers: Sequence[Peer]) -> Table:
    rows = tuple(
        (
            titled(peer),
            peer.status,
            in_speed(speed_of(peer.samples)),
            in_time(figures.typical(peer.samples, lambda one: one.ttft_s)),
            in_share(figures.rate(peer)),
            in_ratio(figures.brought(peer)),
            _ratio(peer.over),
            _ratio(peer.ours_over),
            in_interval(peer.ours_over),
            peer.words or figures.MISSING,
        )
        for peer in peers
    )
    header = (
        "program",
        "status",
        "tokens/s",
        "first token",
        "accepted",
        "tokens/round",
        "x our plain decoding",
        "ours, x as fast",
        "interval",
        "remark",
    )
    return Table("The same prompts with other programs", header, rows)


def of_ours(peers: Sequence[Peer]) -> Table | None:
    """Our configurations over each program; None where there is one beside plain decoding."""
    names = list(dict.fromkeys(name for peer in peers for name in peer.ours))
    if len(names) < 3:
        return None
    rows = tuple(
        (titled(peer), *(_with_interval(peer.ours.get(name)) for name in names))
        for peer in peers
        if peer.ours
    )
    header = ("program", *("plain" if name == BASELINE else name for name in names))
    return Table("Our tokens/s over theirs, by configuration", header, rows)


def titled(peer: Peer) -> str:
    """A program, how it decodes where that is known, and under which conditions."""
    how = {"": "", BASELINE: ", plain"}.get(peer.configuration, f", {peer.configuration}")
    how += " draft tokens" if peer.configuration.isdecimal() else ""
    if peer.question == "configs":
        return peer.name + how
    if peer.question == "rows":
        return f"{peer.name}{how}; {peer.row} side by side"
    return f"{peer.name}{how}; {LABELS[peer.question]} {peer.row}"


def of_drift(results: Results) -> Table:
    """The baseline over the time of the run; a long run is shown in twelve parts."""
    drift = results.drift
    pairs = list(zip(drift.at_s, drift.tokens_per_second, strict=False))
    every = max(1, -(-len(pairs) // 12))
    rows = tuple((figures.duration(at), in_speed(value)) for at, value in pairs[::every])
    return Table("Plain decoding of the same text during the run", ("after", "tokens/s"), rows)


def _whole(value: float | None) -> str:
    return figures.MISSING if value is None else f"{value:,.0f}"


def _with_interval(found: Interval | None) -> str:
    return figures.MISSING if found is None else f"{in_ratio(found.median)} ({in_interval(found)})"


def _ratio(found: Interval | None) -> str:
    return figures.MISSING if found is None else in_ratio(found.median)
