"""`mlxspec bench report`, `history` and `apply`: what is done with results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec import require_backend
from mlxspec.cli.screen.output import Output
from mlxspec.errors import UsageError
from mlxspec.files import expanded
from mlxspec.pairs.table import find_pair, user_table

if TYPE_CHECKING:
    from mlxspec.bench.history import Line
    from mlxspec.bench.results import Results
    from mlxspec.bench.targets import Target

RESULTS = "A results.json, or the folder of a report."
ResultArgument = Annotated[Path, typer.Argument(metavar="RESULTS", help=RESULTS)]
AnywayOption = Annotated[bool, typer.Option("--anyway", help="Do it all the same.")]


def write_report_of(
    results: ResultArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the report goes; - prints its Markdown.")
    ],
) -> None:
    """Write the report of results: results.json, report.md and report.html."""
    from mlxspec.bench.report.markdown import markdown
    from mlxspec.bench.report.writing import write_report

    if str(folder) == "-":
        Output().line(markdown(read(results)).rstrip("\n"))
        return
    for path in write_report(read(results), expanded(folder)):
        Output().line(str(path))


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
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("date", "mlxspec", "mlx", "use"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "x plain", "accepted", "since the last"):
        table.add_column(name, justify="right", no_wrap=True)
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
    from mlxspec.bench.report.figures import in_share, in_speed, rate
    from mlxspec.bench.summing import speed_of
    from mlxspec.bench.targets import chosen
    from mlxspec.cli.bench.tables import times

    cell, since = chosen(one), ""
    if cell is not None and earlier is not None:
        key = (cell.question, cell.configuration.name, "tokens/s")
        for found in compare(earlier, one).compared:
            if (found.cell.question, found.cell.configuration.name, found.what) == key:
                since = f"{found.percent} {found.change.verdict}"
    return (
        one.created[:16].replace("T", " "),
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
    require_backend()
    from mlxspec.bench.applying import elsewhere, keys
    from mlxspec.device import machine
    from mlxspec.pairs import editing

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


def show_targets(found: Iterable[Target], out: Output) -> None:
    """The aims of speculation, and whether they are met, as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        "target",
        "wanted",
        "measured",
        "",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    for one in found:
        table.add_row(one.name, one.wanted, one.measured, one.verdict)
    out.show(table)


def read(path: Path) -> Results:
    """The results in a file, or in the folder of a report.

    Raises:
        UsageError: they cannot be used.
    """
    from mlxspec.bench import results

    path = expanded(path)
    return results.read(path / "results.json" if path.is_dir() else path)
