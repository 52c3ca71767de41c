"""`mlxspec bench compare`: what changed between two results, for people and for scripts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec.cli.arguments.options import JsonOption
from mlxspec.cli.bench import results as bench_results
from mlxspec.cli.bench.options import share
from mlxspec.cli.bench.results import RESULTS
from mlxspec.cli.screen.output import Output
from mlxspec.errors import UsageError
from mlxspec.metrics import counted

if TYPE_CHECKING:
    from mlxspec.bench.compare import Compared, Comparison


def compare_results(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help=RESULTS)],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help=RESULTS)],
    threshold: Annotated[
        str, typer.Option(metavar="PERCENT", help="The largest slowdown that passes.")
    ] = "5%",
    every: Annotated[bool, typer.Option("--all", help="Show what did not change, too.")] = False,
    anyway: bench_results.AnywayOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what changed between two results beyond noise; exit code 1 on a regression."""
    from mlxspec.bench.compare import compare, differences

    allowed, out = share("--threshold", threshold), Output(as_json)
    earlier, later = bench_results.read(before), bench_results.read(after)
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
        out.console(least=100).print(_changes(shown))
    for line in found.beside:
        out.show(f"{line}.")
    if found.unsteady > 0.02:
        out.show(
            f"A machine drifted by {found.unsteady:.0%} during a run, so only what changed by more "
            "is called."
        )
    counts = ", ".join(f"{found.count(one)} {one}" for one in Verdict if found.count(one))
    out.show(f"{counted(len(found.compared), 'comparison')} of the same prompts: {counts}.")
    words = f"Nothing is slower beyond noise by more than {allowed:.0%}."
    if slower:
        worst = min(slower, key=lambda one: one.change.ratio.median)
        words = (
            f"{counted(len(slower), 'regression')} of more than {allowed:.0%}; "
            f"the worst: {worst.cell.configuration.name}, {worst.what}, {_where(worst)}: "
            f"{worst.percent}."
        )
    out.show(words, style="bold")


def _changes(shown: Iterable[Compared]) -> object:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mlxspec.bench.report.figures import in_speed, in_time

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("configuration", "where", "what", "before", "after", "speed", "interval", ""):
        figure = name in ("before", "after", "speed", "interval")
        table.add_column(name, justify="right" if figure else "left", no_wrap=figure)
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
            one.percent,
            limits,
            str(one.change.verdict),
        )
    return table


def _where(one: Compared) -> str:
    cell = one.cell
    return {
        "configs": "all prompts",
        "prompts": cell.row,
        "system": f"system prompt {cell.row}",
        "sampling": f"temperature {cell.row}",
        "context": f"{cell.context:,} tokens of context",
        "rows": f"{cell.rows} texts at a time",
    }[cell.question]
