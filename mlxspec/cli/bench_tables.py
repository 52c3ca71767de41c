"""The results of `mlxspec bench` on a terminal: a table for each question, and a conclusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxspec.bench.cells import BASELINE, Cell, Question, Sample, Speedup
from mlxspec.bench.results import Peer, Results
from mlxspec.bench.summing import speed_of
from mlxspec.metrics import speed

COLUMNS = 100  # that the tables need
_TITLES: dict[Question, tuple[str, str]] = {
    "system": ("system prompt", "What a system prompt changes"),
    "sampling": ("temperature", "What sampling changes"),
    "context": ("context", "What a long prompt changes"),
    "rows": ("rows", "What texts side by side change; tokens/s of all together, reading included"),
}


def show(results: Results, console: Console) -> None:
    """Everything that a person should see of a run."""
    _say(console, _head(results))
    if configs := results.of("configs"):
        console.print(_configurations(configs))
        if any(one.round or one.acceptance for one in configs):
            console.print(_rounds(configs))
    if prompts := results.of("prompts"):
        console.print(_types(prompts))
    for question in _TITLES:
        if cells := results.of(question):
            console.print(_conditions(question, cells))
    if results.peers:
        console.print(_peers(results.peers))
    _conclude(results, console)


def _head(results: Results) -> str:
    machine, settings = results.machine, results.settings
    turns = {(one.prompt, one.turn) for cell in results.cells for one in cell.samples}
    parts = [
        f"{results.pair.get('name', '')}: {results.pair.get('target', '')}",
        f"{machine.get('processor')}, {machine.get('device')}, mlx {machine.get('mlx')}",
        f"{len(turns)} turn{'' if len(turns) == 1 else 's'} in {results.seconds:.0f} s, "
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
            _speed(one.samples),
            "" if one.configuration.is_baseline else times(one.speedup),
            _ms(_median(one.samples, lambda sample: sample.ttft_s)),
            _ms(_median(one.samples, lambda sample: sample.total_s)),
            _gaps(one.samples),
            f"{one.memory_ratio:.2f}" if one.memory_ratio else "",
            _percent(one.identical),
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
            _percent(kept.rate if kept else None),
            f"{kept.tokens_per_round:.2f}" if kept and kept.tokens_per_round else "",
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
            words = _speed(one.samples) if name == BASELINE else times(one.speedup)
            is_best = one.speedup is not None and one.speedup.median == best
            shown.append(Text(words, "bold" if is_best else ""))
        table.add_row(*shown)
    return table


def _conditions(question: Question, cells: Sequence[Cell]) -> Table:
    """Plain decoding and one configuration, row by row."""
    name = next(
        (one.configuration.name for one in cells if not one.configuration.is_baseline), BASELINE
    )
    label, title = _TITLES[question]
    table = _table(
        title,
        *(label, "plain\ntokens/s", f"{name}\ntokens/s", "x plain", "first\ntoken", "accepted"),
        *("tokens\na round", "tokens\nwritten", "memory\nx plain", "same\ntext"),
    )
    for row in dict.fromkeys(one.row for one in cells):
        some = {one.configuration.name: one for one in cells if one.row == row}
        plain, one = some[BASELINE], some[name]
        kept = one.acceptance
        table.add_row(
            row,
            _speed(plain.samples),
            _speed(one.samples) if one is not plain else "",
            times(one.speedup) if one is not plain else "",
            _ms(_median(one.samples, lambda sample: sample.ttft_s)),
            _percent(kept.rate if kept else None),
            f"{kept.tokens_per_round:.2f}" if kept and kept.tokens_per_round else "",
            f"{fmean(sample.tokens for sample in one.samples):.0f}" if one.samples else "",
            f"{one.memory_ratio:.2f}" if one.memory_ratio else "",
            _percent(one.identical),
        )
    return table


def _peers(peers: Sequence[Peer]) -> Table:
    table = _table(
        "The same prompts elsewhere",
        *(
            "program",
            "tokens/s",
            "first token",
            "x our plain",
            "ours over it",
            "remark",
        ),
    )
    for one in peers:
        named = f"{one.name} {one.configuration}".strip()
        table.add_row(
            named,
            _speed(one.samples),
            _ms(_median(one.samples, lambda sample: sample.ttft_s)),
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
        _say(console, "No configuration had enough turns beside plain decoding to tell.")
        return
    if best.best and best.worst:
        _say(console, f"Best use: {best.best}. Worst use: {best.worst}.")
    _say(console, best.words, "bold")


def _say(console: Console, words: str, style: str = "") -> None:
    """A line: a terminal breaks it between words, and a file has it whole."""
    console.print(Text(words, style), soft_wrap=not console.is_terminal)


def times(found: Speedup | None) -> str:
    """A speed-up and its interval, unless that says nothing."""
    if found is None:
        return "…"
    if found.half_width > 1:
        return f"{found.median:.2f} (?)"
    return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"


def _speed(samples: Sequence[Sample]) -> str:
    found = speed_of(samples)
    return "" if found is None else speed(found)


def _median(samples: Iterable[Sample], value: Callable[[Sample], float | None]) -> float | None:
    known = [one for one in map(value, samples) if one is not None]
    return median(known) if known else None


def _gaps(samples: Sequence[Sample]) -> str:
    halves = (
        _median(samples, lambda one: one.gap_p50_s),
        _median(samples, lambda one: one.gap_p95_s),
    )
    return " / ".join(_ms(one) for one in halves) if None not in halves else ""


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{0 if seconds > 0.1 else 1}f} ms"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
