"""`mlxspec pairs add`, `remove` and `default`: a person's own table of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlxspec.cli.arguments.options import draft_tokens_of
from mlxspec.cli.checking import show_check
from mlxspec.cli.pairs import NameArgument
from mlxspec.cli.screen.output import Output
from mlxspec.defaults import HISTORY, MTP
from mlxspec.errors import UsageError
from mlxspec.pairs.table import Pair, default_pair, user_table


def add_pair(
    name: NameArgument,
    target: Annotated[
        str, typer.Option(metavar="PATH_OR_REPO", help="Its target.", show_default=False)
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH_OR_REPO|mtp|history", help="A draft of it; repeatable."),
    ] = None,
    draft_tokens: Annotated[
        Any,
        typer.Option(
            metavar="auto|0-64",
            parser=draft_tokens_of,
            help="Tokens proposed in a round; auto by default.",
        ),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag; repeatable.")] = None,
    note: Annotated[str | None, typer.Option(help="A line about it.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Check first that the models fit together.")
    ] = True,
) -> None:
    """Add a pair to your own table, or change one, once a check finds that it can be used."""
    from mlxspec.pairs import editing

    out = Output()
    drafts = list(dict.fromkeys(map(_location, draft or ())))
    entry: dict[str, Any] = {"target": _location(target)}
    entry |= {"draft": drafts[0] if len(drafts) == 1 else drafts} if drafts else {}
    entry |= {} if draft_tokens is None else {"draft_tokens": draft_tokens}
    entry |= {"tags": tag} if tag else {}
    entry |= {} if note is None else {"note": note}
    if check:
        from mlxspec.pairs.check import check as checked

        pair = Pair(name, entry["target"], tuple(drafts) or None)
        found = checked(pair)
        if not found.is_usable:
            show_check(found, out)
            raise UsageError(
                f"{name} was not added: {found.verdict}.",
                hint="Choose another draft (`mlxspec pairs suggest TARGET`), or add --no-check.",
            )
    editing.add(name, entry)
    out.line(f"{name} is in {user_table()}")


def remove_pair(name: NameArgument) -> None:
    """Take a pair out of your own table. Its models stay on this machine."""
    from mlxspec.pairs import editing

    shipped = editing.remove(name)
    rest = "; the shipped pair of that name holds again" if shipped else ""
    Output().line(f"{name} is no longer in {user_table()}{rest}")


def choose_pair(
    name: Annotated[
        str | None, typer.Argument(help="Its name in the table; without one, say which it is.")
    ] = None,
) -> None:
    """Make a pair the one that runs where no --pair and no --target is given."""
    from mlxspec.pairs import editing

    if name is not None:
        editing.choose(name)
    Output().line(f"{default_pair()} runs where no pair is named")


def _location(given: str) -> str:
    """A folder as the whole path to it, which holds from wherever it is read; else as it is."""
    path = Path(given).expanduser()
    return str(path.resolve()) if given and path.is_dir() and given not in (HISTORY, MTP) else given
