"""The commands: parse, call, render. What is slow to import is imported where it is needed."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec._version import __version__
from mlxspec.cli import options
from mlxspec.cli.options import (
    ModelOptions,
    OutputOptions,
    SamplingOptions,
    TextOptions,
    grouped,
)
from mlxspec.cli.pairs import pairs_app
from mlxspec.control import records
from mlxspec.control.records import Record
from mlxspec.defaults import AUTO, DraftTokens
from mlxspec.errors import MlxspecError
from mlxspec.pairs.table import Pair
from mlxspec.params import SamplingParams

if TYPE_CHECKING:
    from mlxspec.cli.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.decode.run import Run
    from mlxspec.measure.audit import Audit

INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="mlxspec",
    help="Exact speculative decoding for MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pairs_app, name="pairs")


def main() -> None:
    """Run the command line; every error of our own is one line, a hint, and an exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115, it stays open
    try:
        app()
    except MlxspecError as error:
        _explain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:  # a full disk; typer itself sees to a pipe that nobody reads
        # Keep the interpreter from trying again, and complaining, at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = error.filename or "The output"
        _explain(MlxspecError(f"{what}: {error.strerror}.", hint="Free it or choose another."))
        sys.exit(MlxspecError.exit_code)


def _explain(error: MlxspecError) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    console.print(Text.assemble(("hint:  ", "dim"), error.hint))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"mlxspec {__version__}")
        raise typer.Exit


# --- generate and audit -----------------------------------------------------------------


@app.command()
@grouped
def generate(
    prompt: options.PromptArgument = None,
    *,
    text: TextOptions,
    models: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    audit: options.AuditOption = False,
) -> None:
    """Write text after a prompt, several tokens per pass of the target."""
    _write(prompt, text, models, sampling.params(), output, audited=audit, shown=True)


@app.command("audit")
@grouped
def audit_text(
    prompt: options.PromptArgument = None,
    *,
    text: TextOptions,
    models: ModelOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Write a text and prove it: hold every token against plain decoding.

    When sampling, with the coupled rule, whose text depends on the seed alone. Exits with 1 where
    a difference is more than rounding.
    """
    _write(prompt, text, models, sampling.params(), output, audited=True, shown=False)


def _write(
    prompt: str | None,
    text: TextOptions,
    models: ModelOptions,
    sampling: SamplingParams,
    output: OutputOptions,
    *,
    audited: bool,
    shown: bool,
) -> None:
    """Generate, show what is to be shown, and audit."""
    from mlxspec.cli.display import open_display
    from mlxspec.cli.prompts import read_prompt, read_text

    pair = models.chosen()
    text.require_free()
    prediction = read_text(text.prediction) if text.prediction is not None else None
    cache = text.cache_file()
    if audited:
        sampling = sampling.auditable()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # exactly the text, in any locale
    words = read_prompt(prompt, sys.stdin.buffer)
    silent, quiet = output.as_json or not shown, output.quiet
    with open_display(stdout=sys.stdout, stderr=sys.stderr, quiet=quiet, json=silent) as display:
        left_out: list[str] = []
        engine = _engine(pair, models, display, left_out, quiet=quiet)
        request = engine.request(
            words,
            max_tokens=text.max_tokens,
            draft_tokens=models.draft_tokens,
            sampling=sampling,
            stop=text.stop or (),
            system=text.system,
            raw=text.raw,
            prediction=prediction if models.speculates else None,
            cache=cache,
        )
        record = _recall(pair, engine, display) if request.auto else None
        _build_kernels(engine, sampling, models.draft_tokens, display)
        run = engine.run(request)
        run.generation.notes += left_out
        interrupted = _show(run, display, with_split=shown and not quiet)
        if record is not None:
            records.remember(replace(record, learned=engine.learned), display.note)
        report = None
        if audited and not interrupted:
            from mlxspec.measure.audit import audit

            with display.status("auditing"):
                report = audit(engine, run)
    if output.as_json:
        typer.echo(_as_json(pair, engine, run, report))
    elif report is not None and not (shown and quiet):
        tokenizer = engine.tokenizer
        described = report.described(lambda token: str(tokenizer and tokenizer.decode([token])))
        typer.echo(described, err=shown)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if report is not None and report.outcome == "defect":
        raise typer.Exit(MlxspecError.exit_code)


def _engine(
    pair: Pair, models: ModelOptions, display: Display, left_out: list[str], *, quiet: bool
) -> Engine:
    """Load the models, and add to `left_out` why a draft is not among them."""

    def tell(why: str) -> None:
        display.note(why)
        left_out.append(why)

    with display.status("starting"):
        loading = _loading(progress_bars=sys.stderr.isatty() and not quiet)
        from mlxspec.pairs.folders import fetch
    hears = tell if models.falls_back else None
    folders = fetch(pair, speculation=models.speculates, tell=hears)
    with display.status(f"loading {pair.name}"):
        engine: Engine = loading.load(
            pair,
            folders=folders,
            speculation=models.speculates,
            compiled=models.compiled,
            kv=models.kv(),
            trust_remote_code=models.trust_remote_code,
            tell=hears,
        )
    return engine


def _recall(pair: Pair, engine: Engine, display: Display) -> Record:
    """Let an engine begin with what earlier runs of its pair have learned on this machine."""
    from mlxspec.pairs import loading

    record = records.recall(loading.setting_of(pair, engine), display.note)
    engine.learned = record.learned
    return record


def _loading(*, progress_bars: bool) -> ModuleType:
    """Import what needs MLX, which takes a second or two."""
    from mlxspec import require_backend

    require_backend()
    # Their advice is for programs that use them, not for people who use a program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not progress_bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from mlxspec.pairs import loading

    return loading


def _build_kernels(
    engine: Engine, sampling: SamplingParams, draft_tokens: DraftTokens | None, display: Display
) -> None:
    if engine.kernels_missing(sampling, draft_tokens):
        display.note("building CPU kernels, once: some ten seconds; --no-compile skips it")
        with display.status("building CPU kernels"):
            engine.build_kernels(sampling, draft_tokens)


def _show(run: Run, display: Display, *, with_split: bool) -> bool:
    """Show a run to its end; True when a person ended it."""
    from mlxspec.measure.timing import measure_split

    generation = run.generation
    interrupted = False
    with closing(run) as events:
        try:
            for event in events:
                display.show(event, generation, generation.timing.decode_s)
        except KeyboardInterrupt:
            interrupted = True
    split = None
    if run.session is not None and not interrupted and with_split:
        rounds = generation.speculation.rounds
        split = measure_split(run.session, generation.timing.decode_s / rounds)
    display.finish(generation, split)
    return interrupted


def _as_json(pair: Pair, engine: Engine, run: Run, report: Audit | None) -> str:
    speculates = run.generation.speculation.enabled
    names = {
        "pair": pair.name,
        "target": pair.target,
        "draft": pair.drafting if speculates and engine.drafts else None,
    }
    result = names | run.generation.as_dict()
    if report is not None:
        result["audit"] = report.as_dict()
    return json.dumps(result, ensure_ascii=False)


# --- probe and tune ---------------------------------------------------------------------


@app.command("probe")
@grouped
def probe_pair(
    *, models: ModelOptions, prompts: options.PromptsOption = None, output: OutputOptions
) -> None:
    """Measure what speculation would bring with a pair on this machine, and try it."""
    _probe(models, prompts, output, tunes=False)


@app.command("tune")
@grouped
def tune_pair(
    *, models: ModelOptions, prompts: options.PromptsOption = None, output: OutputOptions
) -> None:
    """Probe, try the best numbers of draft tokens on real prompts, and remember what came out."""
    _probe(models, prompts, output, tunes=True)


def _probe(
    models: ModelOptions, prompts: Path | None, output: OutputOptions, *, tunes: bool
) -> None:
    from rich.console import Console

    from mlxspec.cli.display import open_display
    from mlxspec.cli.prompts import read_prompts

    pair = models.chosen()
    own = read_prompts(prompts) if prompts is not None else None
    quiet = output.quiet
    with open_display(stdout=sys.stdout, stderr=sys.stderr, quiet=quiet, json=True) as display:
        engine = _engine(pair, models, display, [], quiet=quiet)
        from mlxspec.cli import report
        from mlxspec.measure import probe
        from mlxspec.measure.forecast import verdict_of

        probe.require_drafter(engine)
        texts = own or probe.PROMPTS
        _build_kernels(engine, SamplingParams(), AUTO, display)
        with display.status("measuring"):
            found = probe.probe(engine, texts)
            contenders = found.contenders(probe.CANDIDATES if tunes else 1)
            measured = probe.speeds(engine, texts, contenders)
        named = {report.described(one): speed for one, speed in measured.items()}
        result = found.as_dict() | {"measured_tokens_per_second": named}
        if tunes:
            record = _recall(pair, engine, display)
            verdict = verdict_of(measured)
            result |= {"verdict": vars(verdict), "remembered": not found.is_noisy}
            if not found.is_noisy:
                engine.learned.learn(0, found.knowledge())
                learned = replace(record, learned=engine.learned, verdict=verdict)
                records.remember(learned, display.note)
    if output.as_json:
        typer.echo(json.dumps({"pair": pair.name, **result}))
        return
    console = Console(highlight=False)
    report.show_probe(found, console)
    report.show_trial(found, measured, console)
    if tunes:
        what = "not remembered" if found.is_noisy else f"remembered: {verdict}"
        console.print(what, style="bold")
