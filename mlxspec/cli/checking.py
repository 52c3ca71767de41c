"""`mlxspec pairs check`, `pairs suggest` and `doctor`: what can be used together, and here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec.cli.arguments import options
from mlxspec.cli.arguments.options import ModelOptions
from mlxspec.cli.disk import require_mlx
from mlxspec.cli.pairs import ContextOption, show_memory
from mlxspec.cli.probe import probe_models
from mlxspec.cli.screen.output import Output
from mlxspec.control import records
from mlxspec.defaults import BUDGET_S, HISTORY
from mlxspec.errors import MlxspecError, UsageError
from mlxspec.pairs.table import Pair, find_pair, load_pairs

if TYPE_CHECKING:
    from rich.table import Table

    from mlxspec.pairs.check import Check
    from mlxspec.pairs.suggest import Suggestion

_PROBED = 3  # drafts that are measured beside one another
_STYLES = {"✓": "green", "!": "yellow", "✗": "bold red"}


def check_pair(
    name: Annotated[str | None, typer.Argument(help="A pair of the table.")] = None,
    target: Annotated[
        str | None, typer.Option(metavar="PATH_OR_REPO", help="A target in place of a pair's.")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH_OR_REPO", help="A draft in place of the pair's; repeatable."),
    ] = None,
    context: ContextOption = None,
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Check that models belong together and fit, before their weights are downloaded.

    Fetches their configurations and tokenizers alone. Exits with 1 where they cannot be used.
    """
    if (name is None) == (target is None):
        raise UsageError(
            "Nothing to check." if name is None else "A name and --target both name a target.",
            hint="Give the name of a pair, or --target and --draft.",
        )
    pair = find_pair(name, models) if name is not None else Pair(str(target), str(target))
    if draft:
        pair = Pair(pair.name, pair.target, tuple(draft), revision=pair.revision)
    require_mlx()
    from mlxspec.pairs.check import check

    out = Output(as_json)
    found = check(pair, context=context)
    if as_json:
        out.object(found.as_dict())
    else:
        show_check(found, out)
        if found.memory is not None:
            out.show("")
            show_memory(found.memory, out)
        out.show("", found.verdict, style="bold")
    if not found.is_usable:
        raise typer.Exit(MlxspecError.exit_code)


def show_check(found: Check, out: Output) -> None:
    """The findings, a line each."""
    out.show(marked((one.mark, one.what, one.words) for one in found.findings))


def marked(rows: object) -> Table:
    """Marks, what they are about, and words."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(style="bold", max_width=20, overflow="fold")
    table.add_column(overflow="fold")
    for mark, what, words in rows:  # type: ignore[attr-defined]
        table.add_row(Text(mark, _STYLES[mark]), Text(what), Text(words))
    return table


def suggest_drafts(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A repository, a folder, or a pair's name.")
    ],
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure the best of those that are on disk.")
    ] = False,
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Suggest drafts for a target: of its family, from the table and from this machine."""
    out, pairs = Output(as_json), load_pairs(models)
    location = pairs[target].target if target in pairs else target
    require_mlx()
    from mlxspec.pairs.suggest import suggest

    found = suggest(location, pairs.values(), records.load_all(out.tell))
    if as_json and not probe:
        out.object({"target": location, "drafts": [one.as_dict() for one in found]})
        return
    if not as_json:
        out.show(_suggested(found), "")
        out.line(_entry(location, found))
    if probe:
        _measure(location, found, out)


def _suggested(found: list[Suggestion]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for one in found:
        measured = "" if one.accepted is None else f", {one.accepted:.0%} accepted here"
        table.add_row(Text(one.draft, "bold"), Text(one.why + measured))
    return table


def _entry(target: str, found: list[Suggestion]) -> str:
    """The lines of a table for the best suggestion."""
    best = found[0].draft
    name = target.rpartition("/")[2].lower()
    return f'["{name}"]\ntarget = "{target}"\ndraft = "{best}"'


def _measure(target: str, found: list[Suggestion], out: Output) -> None:
    """Probe a target with the best of the drafts that are on disk."""
    here = [one.draft for one in found if one.here and one.draft != HISTORY][:_PROBED]
    chosen = ModelOptions(target=target, draft=[*here, HISTORY])
    probe_models(chosen, None, BUDGET_S, out, tunes=False)


def diagnose(as_json: options.JsonOption = False) -> None:
    """Look over this machine, its software, disk, tables and servers. Exits with 1 on ✗."""
    require_mlx()
    from mlxspec.pairs.diagnosis import diagnosis, sound

    out, lines = Output(as_json), diagnosis()
    if as_json:
        out.object({"sound": sound(lines), "lines": [line.as_dict() for line in lines]})
    else:
        out.show(
            marked(
                (line.mark, line.what, line.words + (f"\n{line.hint}" if line.hint else ""))
                for line in lines
            )
        )
    if not sound(lines):
        raise typer.Exit(MlxspecError.exit_code)
