"""`mlxspec bench report`, `compare`, `history` and `apply`: what is done with results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec.cli.options import JsonOption
from mlxspec.cli.output import Output
from mlxspec.errors import UsageError
from mlxspec.files import expanded

if TYPE_CHECKING:
    from mlxspec.bench.compare import Compared, Comparison
    from mlxspec.bench.history import Line
    from mlxspec.bench.results import Results
    from mlxspec.bench.targets import Target

ResultArgument = Annotated[
    Path, typer.Argument(metavar="RESULTS", help="A results.json, or the folder of a report.")
]
AnywayOption = Annotated[bool, typer.Option("--anyway", help="Do it all the same.")]


def write_report_of(
    results: ResultArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the report goes.")],
) -> None:
    """Write the report of results: results.json, report.md and report.html."""
    from mlxspec.bench.report.writing import write_report

    for path in write_report(read(results), expanded(folder)):
        Output().line(str(path))


def compare_results(
    before: ResultArgument,
    after: ResultArgument,
    threshold: Annotated[
        str, typer.Option(metavar="PERCENT", help="The largest slowdown that passes.")
    ] = "5%",
    every: Annotated[bool, typer.Option("--all", help="Show what did not change, too.")] = False,
    anyway: AnywayOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what changed between two results beyond noise; exit code 1 on a regression."""
    from mlxspec.bench.compare import compare, differences
    from mlxspec.cli.bench_options import share

    allowed, out = share("--threshold", threshold), Output(as_json)
    earlier, later = read(before), read(after)
    reasons = differences(earlier, later)
    if reasons and not anyway:
        raise UsageError(
            f"The two cannot be compared: {'; '.join(reasons)}.",
            hint="Measure the same on the same machine, or compare them --anyway.",
        )
    found = compare(earlier, later)
    if not found.compared:
        raise UsageError(
            "The two have nothing in common.", hint="Measure the same configurations and prompts."
        )
    slower = found.regressions(allowed)
    if as_json:
        out.object(
            {
                "compared": [one.as_dict() for one in found.compared],
                "regressions": [one.as_dict() for one in slower],
                "threshold": allowed,
                "differences": reasons,
                "versions": list(found.versions),
                "beside": list(found.beside),
            }
        )
    else:
        _show_comparison(found, slower, allowed, reasons, out, every=every)
    if slower:
        raise typer.Exit(1)


def _show_comparison(
    found: Comparison,
    slower: tuple[Compared, ...],
    allowed: float,
    reasons: Iterable[str],
    out: Output,
    *,
    every: bool,
) -> None:
    from mlxspec.bench.statistics import Verdict

    for line in reasons:
        out.show(f"not the same: {line}")
    for line in found.versions:
        out.show(f"version: {line}")
    shown = [one for one in found.compared if every or one.is_called]
    if shown:
        out.console(least=90).print(_changes(shown))
    for line in found.beside:
        out.show(f"{line}.")
    if found.unsteady > 0.02:
        out.show(
            f"A machine drifted by {found.unsteady:.0%} during a run, so only what changed by more "
            "is called."
        )
    counts = ", ".join(f"{found.count(one)} {one}" for one in Verdict if found.count(one))
    plural = "" if len(found.compared) == 1 else "s"
    out.show(f"{len(found.compared)} comparison{plural} of the same prompts: {counts}.")
    words = f"Nothing is slower beyond noise by more than {allowed:.0%}."
    if slower:
        worst = min(slower, key=lambda one: one.change.ratio.median)
        words = (
            f"{len(slower)} regression{'s' if slower[1:] else ''} of more than {allowed:.0%}; "
            f"the worst: {worst.cell.configuration.name}, {worst.what} {_where(worst)}, "
            f"{_percent(worst)}."
        )
    out.show(words, style="bold")


def _changes(shown: Iterable[Compared]) -> object:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mlxspec.bench.report.figures import in_speed, in_time

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("configuration", "where", "what"):
        table.add_column(name)
    for name in ("before", "after", "speed", "interval"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in shown:
        write = in_speed if one.what == "tokens/s" else in_time
        ratio = one.change.ratio
        limits = f"{ratio.low - 1:+.1%} to {ratio.high - 1:+.1%}" if ratio.precision < 1 else "?"
        table.add_row(
            one.cell.configuration.name,
            _where(one),
            one.what,
            write(one.before),
            write(one.after),
            _percent(one),
            limits,
            str(one.change.verdict),
        )
    return table


def _where(one: Compared) -> str:
    cell = one.cell
    return {
        "configs": "over all prompts",
        "prompts": f"with {cell.row}",
        "system": f"with system prompt {cell.row}",
        "sampling": f"at temperature {cell.row}",
        "context": f"at {cell.row} tokens",
        "rows": f"with {cell.row} at a time",
    }[cell.question]


def _percent(one: Compared) -> str:
    return f"{one.change.ratio.median - 1:+.1%}"


def show_history(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with results.")],
) -> None:
    """Show the results below a folder over time, those of the same work and machine together."""
    from mlxspec.bench.history import lines

    out = Output()
    for place, line in enumerate(lines(expanded(folder), out.tell)):
        if place:
            out.show("")
        _show_line(line, out)


def _show_line(line: Line, out: Output) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mlxspec.bench.history import sparkline
    from mlxspec.bench.report import about
    from mlxspec.bench.report.figures import in_speed

    facts = dict(about.facts(line.latest))
    prompts = line.latest.prompts_hash[:8]
    title = f"{about.title(line.latest)} on {facts.get('machine', '?')}, prompts {prompts}"
    out.show(title, style="bold")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("date", "mlxspec", "mlx", "recommended"):
        table.add_column(name)
    for name in ("tokens/s", "x plain", "accepted", "since the run before"):
        table.add_column(name, justify="right")
    earlier = None
    for _, one in line.runs:
        table.add_row(*_run(one, earlier))
        earlier = one
    out.console(least=100).print(table)
    for name, speeds in _speeds(line).items():
        known = [in_speed(one) for one in speeds if one is not None]
        out.show(f"{name:>12}  {sparkline(speeds)}  {known[0]} to {known[-1]} tokens/s")


def _run(one: Results, earlier: Results | None) -> tuple[str, ...]:
    from mlxspec.bench.compare import compare
    from mlxspec.bench.judging import times
    from mlxspec.bench.report import about
    from mlxspec.bench.report.figures import in_share, in_speed, rate
    from mlxspec.bench.summing import speed_of
    from mlxspec.bench.targets import chosen

    cell, since = chosen(one), ""
    if cell is not None and earlier is not None:
        key = (cell.question, cell.configuration.name, "tokens/s")
        for found in compare(earlier, one).compared:
            if (found.cell.question, found.cell.configuration.name, found.what) == key:
                since = f"{_percent(found)} {found.change.verdict}"
    return (
        about.date(one.created),
        str(one.machine.get("mlxspec", "")),
        str(one.machine.get("mlx", "")),
        "" if one.recommendation is None else one.recommendation.configuration.name,
        in_speed(speed_of(cell.samples)) if cell else "",
        times(cell.speedup) if cell and cell.speedup else "",
        in_share(rate(cell)) if cell else "",
        since,
    )


def _speeds(line: Line) -> dict[str, list[float | None]]:
    """Tokens per second over all prompts, by configuration, a value for each run."""
    from mlxspec.bench.summing import speed_of

    found: dict[str, list[float | None]] = {}
    for place, (_, results) in enumerate(line.runs):
        for cell in results.of("configs"):
            speeds = found.setdefault(cell.configuration.name, [None] * len(line.runs))
            speeds[place] = speed_of(cell.samples)
    return {name: speeds for name, speeds in found.items() if any(speeds)}


def apply_results(
    results: ResultArgument,
    pair: Annotated[
        str | None,
        typer.Option(help="The pair that gets it; the one that was measured by default."),
    ] = None,
    anyway: AnywayOption = False,
) -> None:
    """Store the recommended configuration for its pair, so that `generate` and `serve` use it."""
    from mlxspec import require_backend

    require_backend()
    from mlxspec.bench.applying import elsewhere, keys
    from mlxspec.device import machine
    from mlxspec.pairs import editing
    from mlxspec.pairs.table import find_pair, user_table

    found, out = read(results), Output()
    chosen = find_pair(pair or str(found.pair.get("name")))
    values = keys(found, chosen)
    if (others := elsewhere(found, machine.about())) and not anyway:
        raise UsageError(
            f"The results are of another machine: {'; '.join(others)}.",
            hint="Measure on this one, or apply them --anyway.",
        )
    editing.amend(chosen.name, values)
    what = ", ".join(f"{key} = {value}" for key, value in values.items())
    out.line(f"{chosen.name} has {what} in {user_table()}")
    assert found.recommendation is not None
    out.tell(found.recommendation.words)


def show_targets(found: Iterable[Target], out: Output) -> bool:
    """The aims of speculation as a table; whether all are met."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = list(found)
    table = Table("target", "wanted", "measured", "", box=SIMPLE_HEAD, padding=(0, 1))
    for one in rows:
        table.add_row(one.name, one.wanted, one.measured, one.verdict)
    out.show(table)
    return all(one.is_met for one in rows)


def read(path: Path) -> Results:
    """The results in a file, or in the folder of a report.

    Raises:
        UsageError: they cannot be used.
    """
    from mlxspec.bench import results

    path = expanded(path)
    return results.read(path / "results.json" if path.is_dir() else path)
