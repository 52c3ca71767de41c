"""`mlxspec probe` and `mlxspec tune`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlxspec.cli import engines
from mlxspec.cli.arguments import options
from mlxspec.cli.arguments.grouping import grouped
from mlxspec.cli.arguments.options import ModelOptions, OutputOptions
from mlxspec.cli.costs import ShapeOption, probe_shape
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.screen.output import Output
from mlxspec.control import records
from mlxspec.defaults import AUTO, BUDGET_S, INTERRUPTED
from mlxspec.errors import NothingDrafts, UsageError
from mlxspec.pairs.table import Pair

if TYPE_CHECKING:
    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.measure.findings import Findings


@grouped
def probe_pair(
    *,
    models: ModelOptions,
    prompts: options.PromptsOption = None,
    shape: ShapeOption = None,
    budget: options.BudgetOption = BUDGET_S,
    output: OutputOptions,
) -> None:
    """Measure the gain of speculation with a pair on this machine, and try it.

    With --shape, what rounds cost with random weights of that shape: nothing is downloaded.
    """
    if shape is not None:
        if prompts is not None:
            raise UsageError(
                "--shape measures what does not depend on a text, so --prompts has no place.",
                hint="Leave one of them out.",
            )
        probe_shape(shape, models, budget, Output(output.as_json, output.quiet))
        return
    probe_models(models, prompts, budget, Output(output.as_json, output.quiet), tunes=False)


@grouped
def tune_pair(
    *,
    models: ModelOptions,
    prompts: options.PromptsOption = None,
    budget: options.BudgetOption = BUDGET_S,
    output: OutputOptions,
) -> None:
    """Probe, try the best numbers of draft tokens on real prompts, and remember the result."""
    probe_models(models, prompts, budget, Output(output.as_json, output.quiet), tunes=True)


def probe_models(
    models: ModelOptions, prompts: Path | None, budget_s: float, out: Output, *, tunes: bool
) -> None:
    from mlxspec.cli.arguments.prompts import read_prompts

    pair = models.chosen()
    if not models.speculates:
        raise NothingDrafts
    own = read_prompts(prompts) if prompts is not None else None
    notes: list[str] = []
    with out.display(text=False) as display:
        engine = engines.load_engine(pair, models, display, notes, quiet=out.quiet)
        from mlxspec.measure import probe

        engines.build_kernels(engine, engine.request([0], draft_tokens=AUTO), display)
        measuring = probe.Probe(
            engine,
            own or probe.PROMPTS,
            budget_s=budget_s,
            candidates=probe.CANDIDATES if tunes else 1,
        )

        def end() -> None:
            """Keep and print what is found; also from a thread, where MLX keeps this one."""
            findings = measuring.findings
            remembered = _remember(pair, engine, findings, display) if tunes else None
            display.close()
            _print(pair, findings, out, notes, remembered)

        with leaving(end):
            interrupted = display.follow(measuring)
        end()
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _remember(pair: Pair, engine: Engine, findings: Findings, display: Display) -> bool:
    """Keep what was measured, and the verdict if there is one; False if there is none."""
    found, best = findings.forecast, findings.verdict().recommendation
    if found is None or found.is_noisy:
        return False
    record = engines.recall(pair, engine, display)
    engine.learned.learn(0, found.knowledge())
    learned = replace(record, learned=engine.learned, recommendation=best)
    records.remember(learned, display.note)
    return best is not None


def _print(
    pair: Pair, findings: Findings, out: Output, notes: list[str], remembered: bool | None
) -> None:
    """Print the findings, and the one verdict last.

    Args:
        remembered: whether the verdict was stored; None where nobody asked for that.
    """
    if out.as_json:
        stored = {} if remembered is None else {"remembered": remembered}
        out.object({"pair": pair.name, **findings.as_dict(), "notes": notes, **stored})
        return
    from mlxspec.cli.screen import report

    console = out.console(least=report.COLUMNS)
    report.show(findings, console)
    words = findings.verdict().words
    if remembered is not None:
        words = f"{'' if remembered else 'not '}remembered: {words}"
    console.print(words, style="bold", soft_wrap=True)
