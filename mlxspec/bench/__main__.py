"""`python -m mlxspec.bench NAME` runs a measurement beside `mlxspec bench`; no NAME lists them."""

from __future__ import annotations

import sys
from importlib import import_module

import typer
from rich.console import Console

from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError, UsageError, nearest

PROGRAM = "python -m mlxspec.bench"
QUESTIONS = {
    "acceptance": "How many proposals of each drafter are kept, by kind of text?",
    "caches": "How much does taking proposals back cost, for each kind of cache?",
    "compiling": "How much does compiling a round gain, and how long does it take?",
    "following": "How much longer is a plain round beside a head that proposes nothing?",
    "heads": "How long is a round with a trained head, beside its bare forwards and a model's?",
    "joining": "How much of the time do texts take to join a batch and to leave it?",
    "load": "What becomes of a server's answers when many clients come, leave, and read slowly?",
    "long": "How much longer is a token, or a round, behind a long text?",
    "loops": "How many texts of a pair repeat themselves, and do its functions parse?",
    "scales": "How long is a token with quantised weights, by the type of their scales?",
    "serve": "How fast is `mlxspec serve`, beside `mlx_lm.server` on the same weights?",
    "turns": "How long does a chat wait for the first token of an answer, turn by turn?",
}


def main(arguments: list[str]) -> None:
    """Run a measurement with the options behind its name, and end as `mlxspec` ends."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            _list()
        else:
            _measure(*arguments)
    except MlxspecError as error:
        typer.echo(f"error: {error.message}\nhint:  {error.hint}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _list() -> None:
    console = Console(highlight=False)
    console.print("mlxspec bench", style="bold")
    console.print(
        "    Which setting is fastest here, for which kind of text, and how sure is that?"
    )
    for name, question in QUESTIONS.items():
        console.print(f"{PROGRAM} {name}", style="bold")
        console.print(f"    {question}")


def _measure(name: str, *options: str) -> None:
    if name not in QUESTIONS:
        near = nearest(name, QUESTIONS)
        raise UsageError(
            f"There is no measurement {name!r}.",
            hint=f"Did you mean {near}?" if near else f"`{PROGRAM}` lists all of them.",
        )
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(import_module(f"mlxspec.bench.questions.{name}").main)
    app(list(options), prog_name=f"{PROGRAM} {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
