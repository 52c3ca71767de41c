"""The help of a command, in plain lines that no width and no encoding breaks.

Names are never cut: where a line has no room for a name and what it means, the latter goes below.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from textwrap import wrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mlxspec.cli.screen.streams import has_colours

_WIDEST, _NARROWEST = 100, 16
BESIDE = 60  # columns from which meanings stand beside names
_NAMES = 34  # columns of the names at most
_KEPT = "\xa0"  # a space at which no line breaks
_LAST = "Options"  # such as --help

Row = tuple[str, str]


class Command(TyperCommand):
    """A command whose help is this module's."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_page(self, ctx))


class Group(TyperGroup):
    """A group of commands whose help is this module's."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_page(self, ctx))


def _page(command: Any, ctx: Any) -> str:
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    usage = " ".join(["Usage:", ctx.command_path, *command.collect_usage_pieces(ctx)])
    lines = [*_wrapped(usage, width, hanging=4), ""]
    lines += _wrapped(" ".join(inspect.cleandoc(command.help or "").split()), width)
    for title, rows in _sections(command, ctx):
        lines += ["", _bold(f"{title}:"), *_rows(rows, width)]
    if command.epilog:
        lines += ["", *inspect.cleandoc(command.epilog).splitlines()]
    return "\n".join(lines) + "\n"


def _sections(command: Any, ctx: Any) -> Iterator[tuple[str, list[Row]]]:
    """Titles with their rows, those of a call first."""
    sections: dict[str, list[Row]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            kind = "Arguments" if parameter.param_type_name == "argument" else _LAST
            title = getattr(parameter, "rich_help_panel", None) or kind
            sections.setdefault(title, []).append(record)
    last = sections.pop(_LAST, [])
    yield from sections.items()
    commands = [
        (name, inspect.cleandoc(one.help or "").partition("\n\n")[0])
        for name in getattr(command, "commands", {})
        if not (one := command.commands[name]).hidden
    ]
    if commands:
        yield "Commands", commands
    yield _LAST, last


def _rows(rows: Iterable[Row], width: int) -> Iterator[str]:
    rows = list(rows)
    column = min(max(len(name) for name, _ in rows), _NAMES) + 4
    for name, meaning in rows:
        first = f"  {_bold(name)}"
        indent = column if width >= BESIDE else 6
        lines = _wrapped(" ".join(meaning.split()), width - indent)
        if width >= BESIDE and len(name) + 4 <= column and lines:
            first += " " * (column - 2 - len(name)) + lines.pop(0)
        yield first
        yield from (" " * indent + line for line in lines)


def _wrapped(text: str, width: int, hanging: int = 0) -> list[str]:
    """Lines that break between words, but not inside of brackets."""
    lines = wrap(
        re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", _KEPT), text),
        width,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_KEPT, " ") for line in lines]


def _bold(text: str) -> str:
    return typer.style(text, bold=True) if sys.stdout.isatty() and has_colours() else text
