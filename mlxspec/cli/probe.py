"""`mlxspec probe` and `mlxspec tune`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from mlxspec.cli import engines, options
from mlxspec.cli.grouping import grouped
from mlxspec.cli.options import ModelOptions, OutputOptions
from mlxspec.cli.output import Output
from mlxspec.control import records
from mlxspec.defaults import AUTO


@grouped
def probe_pair(
    *, models: ModelOptions, prompts: options.PromptsOption = None, output: OutputOptions
) -> None:
    """Measure the gain of speculation with a pair on this machine, and try it."""
    _probe(models, prompts, Output(output.as_json, output.quiet), tunes=False)


@grouped
def tune_pair(
    *, models: ModelOptions, prompts: options.PromptsOption = None, output: OutputOptions
) -> None:
    """Probe, try the best numbers of draft tokens on real prompts, and remember the result."""
    _probe(models, prompts, Output(output.as_json, output.quiet), tunes=True)


def _probe(models: ModelOptions, prompts: Path | None, out: Output, *, tunes: bool) -> None:
    from mlxspec.cli.prompts import read_prompts

    pair = models.chosen()
    own = read_prompts(prompts) if prompts is not None else None
    with out.display(text=False) as display:
        engine = engines.load_engine(pair, models, display, [], quiet=out.quiet)
        from mlxspec.cli import report
        from mlxspec.measure import probe
        from mlxspec.measure.forecast import recommended

        probe.require_drafter(engine)
        texts = own or probe.PROMPTS
        engines.build_kernels(engine, engine.request([0], draft_tokens=AUTO), display)
        with display.status("measuring"):
            found = probe.probe(engine, texts)
            contenders = found.contenders(probe.CANDIDATES if tunes else 1)
            measured = probe.speeds(engine, texts, contenders)
        named = {report.described(one): speed for one, speed in measured.items()}
        result = found.as_dict() | {"measured_tokens_per_second": named}
        best = recommended(measured)
        if tunes:
            record = engines.recall(pair, engine, display)
            result |= {"verdict": asdict(best), "remembered": not found.is_noisy}
            if not found.is_noisy:
                engine.learned.learn(0, found.knowledge())
                learned = replace(record, learned=engine.learned, recommendation=best)
                records.remember(learned, display.note)
    if out.as_json:
        out.object({"pair": pair.name, **result})
        return
    console = out.console(least=report.COLUMNS)
    report.show_probe(found, console)
    report.show_trial(found, measured, console)
    if tunes:
        what = "not remembered" if found.is_noisy else f"remembered: {best}"
        console.print(what, style="bold")
