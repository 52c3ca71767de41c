"""The commands: parse, call, render. What is slow to import is imported where it is needed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec._version import __version__
from mlxspec.errors import MlxspecError
from mlxspec.pairs import DEFAULT_MAX_TOKENS, DEFAULT_PAIR, Pair, find_pair, load_pairs
from mlxspec.params import SamplingParams

if TYPE_CHECKING:
    from mlxspec.display import Display
    from mlxspec.engine import Engine
    from mlxspec.run import Run

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE

app = typer.Typer(
    name="mlxspec",
    help="Exact speculative decoding for MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pairs_app = typer.Typer(help="The table of model pairs.", no_args_is_help=True)
app.add_typer(pairs_app, name="pairs")

ModelsOption = Annotated[
    Path | None,
    typer.Option("--models", metavar="FILE", help="A table of pairs laid over the shipped one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """Run the command line; every error of our own is one line, a hint, and an exit code."""
    try:
        app()
    except MlxspecError as error:
        _explain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from complaining at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


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
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; piped text is added to it. `-` takes stdin alone."),
    ] = None,
    pair: Annotated[str, typer.Option(help="A pair of the table.")] = DEFAULT_PAIR,
    target: Annotated[
        str | None, typer.Option(metavar="PATH_OR_REPO", help="A target in place of the pair's.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="PATH_OR_REPO", help="A draft in place of the pair's.")
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(min=0, max=64, help="Tokens proposed in every round.")
    ] = None,
    no_speculation: Annotated[
        bool, typer.Option("--no-speculation", help="Decode plainly, without the draft.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = DEFAULT_MAX_TOKENS,
    temp: Annotated[float, typer.Option(min=0, help="Temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Most likely tokens kept; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Least share of the best.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the random numbers.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile rounds. By default where it pays; on a CPU the first run builds kernels.",
            show_default=False,
        ),
    ] = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")
    ] = False,
) -> None:
    """Write text after a prompt, several tokens per pass of the target."""
    from mlxspec.display import open_display
    from mlxspec.prompts import read_prompt

    sampling = SamplingParams(temp, top_p, top_k, min_p, seed)
    chosen = _choose_pair(pair, target, draft, models)
    text = read_prompt(prompt, sys.stdin.buffer)
    with open_display(stdout=sys.stdout, stderr=sys.stderr, quiet=quiet, json=as_json) as display:
        with display.status(f"loading {chosen.name}"):
            speculation = not no_speculation and draft_tokens != 0
            engine = _load(chosen, speculation=speculation, compiled=compiled)
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


def _load(pair: Pair, *, speculation: bool, compiled: bool | None) -> Engine:
    from mlxspec import require_backend

    require_backend()
    # Its advice is for programs that use it, not for people who use a program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from mlxspec.loading import load

    return load(pair, speculation=speculation, compiled=compiled)


def _build_kernels(
    engine: Engine, sampling: SamplingParams, draft_tokens: int | None, display: Display
) -> None:
    if engine.kernels_missing(sampling.method, draft_tokens):
        with display.status("building CPU kernels, once (some ten seconds; --no-compile skips it)"):
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
def list_pairs(models: ModelsOption = None, as_json: JsonOption = False) -> None:
    """Show every pair of the table."""
    pairs = load_pairs(models)
    if as_json:
        typer.echo(json.dumps([pair.as_dict() for pair in pairs.values()], ensure_ascii=False))
        return
    _print_table([(pair.name, _in_three_lines(pair)) for pair in pairs.values()])


@pairs_app.command("show")
def show_pair(
    name: Annotated[str, typer.Argument(help="Its name in the table.")],
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one pair."""
    pair = find_pair(name, models)
    if as_json:
        typer.echo(json.dumps(pair.as_dict(), ensure_ascii=False))
        return
    _print_table([(key.replace("_", " "), str(value)) for key, value in pair.as_dict().items()])


def _in_three_lines(pair: Pair) -> str:
    drafting = f"{pair.draft} ({pair.draft_tokens} tokens)" if pair.draft else "none"
    return f"{pair.target}\n  draft: {drafting}\n  {pair.note}".rstrip()


def _print_table(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
