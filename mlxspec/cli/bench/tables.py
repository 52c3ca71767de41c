"""The results of `mlxspec bench` on a terminal: a table for each question, and a conclusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxspec.bench.cells import BASELINE, Cell, Question, Sample
from mlxspec.bench.report.figures import (
    MISSING,
    brought,
    first_token_s,
    in_interval,
    in_ratio,
    in_share,
    in_speed,
    in_time,
    rate,
    typical,
)
from mlxspec.bench.report.tables import of_ours, titled
from mlxspec.bench.results import Peer, Results
from mlxspec.bench.statistics import Interval
from mlxspec.bench.summing import speed_of
from mlxspec.metrics import counted

_ROOMY = 1000  # columns that no table needs
_TITLES: dict[Question, tuple[str, str]] = {
    "system": ("system prompt", "What a system prompt changes"),
    "sampling": ("temperature", "What sampling changes"),
    "context": ("context", "What a long prompt changes"),
    "rows": ("rows", "What texts side by side change; tokens/s of all together, reading included"),
}


def show(results: Results, console: Console) -> None:
    """Everything that a person should see of a run."""
    _say(console, _head(results))
    width = console.width
    for table in _tables(results):
        # A narrow terminal breaks lines: what is cut could not be read.
        roomy = console.options.update(max_width=_ROOMY)
        console.width = max(width, console.measure(table, options=roomy).maximum)
        console.print(table)
    console.width = width
    _conclude(results, console)


def _tables(results: Results) -> Iterator[Table]:
    if configs := results.of("configs"):
        yield _configurations(configs)
        if any(one.round or one.acceptance for one in configs):
            yield _rounds(configs)
    if prompts := results.of("prompts"):
        yield _types(prompts)
    for question in _TITLES:
        if cells := results.of(question):
            yield _conditions(question, cells)
    if results.peers:
        yield _peers(results.peers)
        if (ours := of_ours(results.peers)) is not None:
            table = _table(ours.caption, *ours.header)
            for row in ours.rows:
                table.add_row(*row)
            yield table


def _head(results: Results) -> str:
    machine, settings = results.machine, results.settings
    turns = {(one.prompt, one.turn) for cell in results.cells for one in cell.samples}
    parts = [
        f"{results.pair.get('name', '')}: {results.pair.get('target', '')}",
        f"{machine.get('processor')}, {machine.get('device')}, mlx {machine.get('mlx')}",
        f"{counted(len(turns), 'turn')} in {results.seconds:.0f} s, "
        f"{settings.get('max_tokens')} tokens each",
    ]
    return "; ".join(parts) + ". Medians; in brackets 95% intervals."


def _table(title: str, *columns: str) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        title=Text(title, "bold"),
        title_justify="left",
    )
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    return table


def _configurations(cells: Sequence[Cell]) -> Table:
    table = _table(
        "Which setting is fastest",
        *("setting", "tokens/s", "x plain", "first\ntoken", "whole\ntext"),
        *("between tokens\np50, p95", "memory\nx plain", "same\ntext"),
    )
    for one in cells:
        table.add_row(
            one.configuration.name,
            in_speed(speed_of(one.samples)),
            "" if one.configuration.is_baseline else times(one.speedup),
            in_time(first_token_s(one)),
            in_time(typical(one.samples, lambda sample: sample.total_s)),
            _gaps(one.samples),
            in_ratio(one.memory_ratio),
            in_share(one.identical),
        )
    return table


def _rounds(cells: Sequence[Cell]) -> Table:
    table = _table(
        "Where a round's time goes, in ms, and which proposals are kept, in %",
        *("setting", "round", "draft", "verify", "host", "accepted", "tokens\na round"),
        *("accepted at\nplace 1, 2, …", "by drafter"),
    )
    table.columns[-1].no_wrap = False
    for one in cells:
        parts, kept = one.round, one.acceptance
        if parts is None and kept is None:
            continue
        seconds = (parts.round_s, parts.draft_s, parts.verify_s, parts.host_s) if parts else ()
        sources = kept.by_source.items() if kept else ()
        table.add_row(
            one.configuration.name,
            *([f"{1e3 * value:.1f}" for value in seconds] or [""] * 4),
            in_share(rate(one)),
            in_ratio(brought(one)),
            _places(one),
            ", ".join(
                f"{name} {100 * source.accepted / source.drafted:.0f}"
                for name, source in sources
                if source.drafted
            ),
        )
    return table


def _places(cell: Cell) -> str:
    kept = cell.acceptance
    if kept is None:
        return ""
    pairs = zip(kept.accepted_by_position, kept.drafted_by_position, strict=False)
    rates = [f"{100 * accepted / drafted:.0f}" for accepted, drafted in pairs if drafted]
    return " ".join(rates[:7]) + (" …" if len(rates) > 7 else "")


def _types(cells: Sequence[Cell]) -> Table:
    """The speed-ups of every configuration, by the type of prompt; the best of each is bold."""
    names = list(dict.fromkeys(one.configuration.name for one in cells))
    heads = ["plain\ntokens/s" if name == BASELINE else name for name in names]
    table = _table("For which kind of text", "prompts", *heads)
    for kind in dict.fromkeys(one.prompt_type for one in cells):
        row = {one.configuration.name: one for one in cells if one.prompt_type == kind}
        known = [one.speedup.median for one in row.values() if one.speedup]
        best = max(known, default=None)
        shown = [Text(kind)]
        for name in names:
            one = row[name]
            words = in_speed(speed_of(one.samples)) if name == BASELINE else times(one.speedup)
            is_best = one.speedup is not None and one.speedup.median == best
            shown.append(Text(words, "bold" if is_best else ""))
        table.add_row(*shown)
    return table


def _conditions(question: Question, cells: Sequence[Cell]) -> Table:
    """Every configuration, row by row."""
    label, title = _TITLES[question]
    table = _table(
        title,
        *(label, "setting", "tokens/s", "x plain", "first\ntoken", "accepted"),
        *("tokens\na round", "tokens\nwritten", "memory\nx plain", "same\ntext"),
    )
    for one in sorted(cells, key=lambda one: [cell.row for cell in cells].index(one.row)):
        table.add_row(
            one.row,
            one.configuration.name,
            in_speed(speed_of(one.samples)),
            "" if one.configuration.is_baseline else times(one.speedup),
            in_time(first_token_s(one)),
            in_share(rate(one)),
            in_ratio(brought(one)),
            f"{typical(one.samples, lambda sample: sample.tokens) or 0:.0f}",
            in_ratio(one.memory_ratio),
            in_share(one.identical),
        )
    return table


def _peers(peers: Sequence[Peer]) -> Table:
    table = _table(
        "The same prompts elsewhere",
        *("program", "tokens/s", "first\ntoken", "accepted", "tokens\na round"),
        *("x our plain", "ours over it", "remark"),
    )
    for one in peers:
        table.add_row(
            titled(one),
            in_speed(speed_of(one.samples)),
            in_time(typical(one.samples, lambda sample: sample.ttft_s)),
            in_share(rate(one)),
            in_ratio(brought(one)),
            times(one.over) if one.over else "",
            times(one.ours_over) if one.ours_over else "",
            one.words or one.status,
        )
    table.columns[-1].no_wrap = False
    return table


def _conclude(results: Results, console: Console) -> None:
    for remark in results.warnings:
        _say(console, f"! {remark.words}")
    if results.drift.words and not results.drift.noisy:
        _say(console, f"This machine: {results.drift.words}")
    if not results.finished:
        _say(console, "The measurement was ended before it was complete.")
    best = results.recommendation
    if best is None:
        if results.of("configs") or not results.cells:
            _say(console, "No configuration had enough turns beside plain decoding to tell.")
        return
    if best.best and best.worst:
        _say(console, f"Best use: {best.best}. Worst use: {best.worst}.")
    _say(console, best.words, "bold")


def _say(console: Console, words: str, style: str = "") -> None:
    """A line: a terminal breaks it between words, and a file has it whole."""
    console.print(Text(words, style), soft_wrap=not console.is_terminal)


def times(found: Interval | None) -> str:
    """A speed-up and its interval, unless that says nothing."""
    if found is None:
        return "…"
    limits = in_interval(found)
    return f"{in_ratio(found.median)} ({'?' if limits == MISSING else limits})"


def _gaps(samples: Sequence[Sample]) -> str:
    halves = (
        typical(samples, lambda one: one.gap_p50_s),
        typical(samples, lambda one: one.gap_p95_s),
    )
    return " / ".join(map(in_time, halves))
