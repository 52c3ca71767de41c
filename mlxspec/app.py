"""The commands: parse, call, render. What is slow to import is imported where it is needed."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec import options
from mlxspec._version import __version__
from mlxspec.errors import MlxspecError
from mlxspec.pairs import DEFAULT_MAX_TOKENS, DEFAULT_PAIR, Pair, find_pair, load_pairs
from mlxspec.params import SamplingParams

if TYPE_CHECKING:
    from mlxspec.display import Display
    from mlxspec.engine import Engine
    from mlxspec.run import Run

INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="mlxspec",
    help="Exact speculative decoding for MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pairs_app = typer.Typer(help="The table of model pairs.", no_args_is_help=True)
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


# --- generate ---------------------------------------------------------------------------


@app.command()
def generate(
    prompt: options.PromptArgument = None,
    *,
    pair: options.PairOption = DEFAULT_PAIR,
    target: options.TargetOption = None,
    draft: options.DraftOption = None,
    draft_tokens: options.DraftTokensOption = None,
    no_speculation: options.NoSpeculationOption = False,
    max_tokens: options.MaxTokensOption = DEFAULT_MAX_TOKENS,
    temperature: options.TemperatureOption = 0.0,
    top_p: options.TopPOption = 1.0,
    top_k: options.TopKOption = 0,
    min_p: options.MinPOption = 0.0,
    seed: options.SeedOption = None,
    system: options.SystemOption = None,
    stop: options.StopOption = None,
    raw: options.RawOption = False,
    compiled: options.CompileOption = None,
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Write text after a prompt, several tokens per pass of the target."""
    from mlxspec.display import open_display
    from mlxspec.prompts import read_prompt

    sampling = SamplingParams(temperature, top_p, top_k, min_p, seed)
    chosen = _choose_pair(pair, target, draft, models)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # exactly the text, in any locale
    text = read_prompt(prompt, sys.stdin.buffer)
    with open_display(stdout=sys.stdout, stderr=sys.stderr, quiet=quiet, json=as_json) as display:
        speculation = not no_speculation and draft_tokens != 0
        with display.status("starting"):
            loading = _loading(progress_bars=sys.stderr.isatty() and not quiet)
        loading.download(chosen, speculation=speculation)
        with display.status(f"loading {chosen.name}"):
            engine = loading.load(chosen, speculation=speculation, compiled=compiled)
        run = engine.run(
            text,
            max_tokens=max_tokens,
            draft_tokens=draft_tokens,
            sampling=sampling,
            stop=stop or (),
            system=system,
            raw=raw,
            on_prefill=display.prefill,
        )
        _build_kernels(engine, sampling, draft_tokens, display)
        interrupted = _show(run, display, with_split=not quiet)
    if as_json:
        typer.echo(_as_json(chosen, engine, run))
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _choose_pair(name: str, target: str | None, draft: str | None, models: Path | None) -> Pair:
    """The table's pair, or what the options make of it."""
    if target is not None:
        return Pair(name=target, target=target, draft=draft)
    pair = find_pair(name, models)
    return pair if draft is None else Pair(name=name, target=pair.target, draft=draft)


def _loading(*, progress_bars: bool) -> ModuleType:
    """Import what needs MLX, which takes a second or two."""
    from mlxspec import require_backend

    require_backend()
    # Their advice is for programs that use them, not for people who use a program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not progress_bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from mlxspec import loading

    return loading


def _build_kernels(
    engine: Engine, sampling: SamplingParams, draft_tokens: int | None, display: Display
) -> None:
    if engine.kernels_missing(sampling.method, draft_tokens):
        display.note("building CPU kernels, once: some ten seconds; --no-compile skips it")
        with display.status("building CPU kernels"):
            engine.build_kernels(sampling.method, draft_tokens)


def _show(run: Run, display: Display, *, with_split: bool) -> bool:
    """Show a run to its end; True when a person ended it."""
    from mlxspec.timing import measure_split

    generation = run.generation
    interrupted = False
    try:
        for event in run:
            display.show(event, generation, generation.timing.decode_s)
    except KeyboardInterrupt:
        interrupted = True
    split = None
    if run.session is not None and not interrupted and with_split:
        rounds = generation.speculation.rounds
        split = measure_split(run.session, generation.timing.decode_s / rounds)
    display.finish(generation, split)
    return interrupted


def _as_json(pair: Pair, engine: Engine, run: Run) -> str:
    speculates = run.generation.speculation.enabled
    names = {
        "pair": pair.name,
        "target": pair.target,
        "draft": pair.draft if speculates else None,
    }
    return json.dumps(names | run.generation.as_dict(), ensure_ascii=False)


# --- pairs ------------------------------------------------------------------------------


@pairs_app.command("list")
def list_pairs(models: options.ModelsOption = None, as_json: options.JsonOption = False) -> None:
    """Show every pair of the table."""
    pairs = load_pairs(models)
    if as_json:
        typer.echo(json.dumps([pair.as_dict() for pair in pairs.values()], ensure_ascii=False))
        return
    _print_table([(pair.name, _in_three_lines(pair)) for pair in pairs.values()])


@pairs_app.command("show")
def show_pair(
    name: Annotated[str, typer.Argument(help="Its name in the table.")],
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show one pair."""
    pair = find_pair(name, models)
    if as_json:
        typer.echo(json.dumps(pair.as_dict(), ensure_ascii=False))
        return
    values = pair.as_dict() | {"draft": pair.draft or "none"}
    _print_table([(key.replace("_", " "), str(value)) for key, value in values.items()])


def _in_three_lines(pair: Pair) -> str:
    drafting = f"{pair.draft} ({pair.draft_tokens} tokens)" if pair.draft else "none"
    return f"{pair.target}\n  draft: {drafting}\n  {pair.note}".rstrip()


def _print_table(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # not strings, in which brackets are markup
    Console(highlight=False).print(table)
