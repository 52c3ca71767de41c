"""Changing a person's own table of pairs: comments and order stay, and it is written whole."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import tomlkit
from tomlkit import TOMLDocument
from tomlkit.exceptions import TOMLKitError

from mlxspec.errors import UnknownPair, UsageError
from mlxspec.files import write_whole
from mlxspec.pairs.table import Pair, load_pairs, merged, shipped_table, user_table
from mlxspec.pairs.table_file import DEFAULT, TableFile, line_of


def add(name: str, entry: Mapping[str, Any]) -> Pair:
    """Write an entry into the user's table, in place of one of that name; the pair that it makes.

    Raises:
        TableError: the table, or the entry, cannot be used. Nothing was changed then.
    """

    def change(table: TOMLDocument) -> str:
        for key in [key for key in table.get(name, ()) if key not in entry]:
            del table[name][key]
        return _amended(table, name, entry)

    _edit(change)
    return load_pairs()[name]


def amend(name: str, values: Mapping[str, Any]) -> Pair:
    """Lay some keys over a pair, in the user's table; the pair that it makes.

    Its other keys stay as they are, in whichever table.

    Raises:
        TableError: the table, or a value, cannot be used. Nothing was changed then.
    """
    _edit(lambda table: _amended(table, name, values))
    return load_pairs()[name]


def _amended(table: TOMLDocument, name: str, values: Mapping[str, Any]) -> str:
    if name not in table:
        if table.as_string().strip():
            table.add(tomlkit.nl())
        table[name] = tomlkit.table()
    for key, value in values.items():
        table[name][key] = value
    return table.as_string()


def remove(name: str) -> bool:
    """Take an entry out of the user's table; whether a shipped pair of that name is left.

    Raises:
        UsageError: the user's table has no such entry.
    """
    shipped = TableFile.read(shipped_table()).sections

    def change(table: TOMLDocument) -> str:
        if name not in table or name == DEFAULT:
            if name in shipped:
                raise UsageError(
                    f"{name} is a pair that is shipped, and stays.",
                    hint=f"`mlxspec pairs rm {name}` deletes its models from this machine.",
                )
            raise UnknownPair(name, [one for one in table if one != DEFAULT] or load_pairs())
        if table.get(DEFAULT) == name and name not in shipped:
            del table[DEFAULT]
        return _without(table, name)

    _edit(change)
    return name in shipped


def _without(table: TOMLDocument, name: str) -> str:
    """The text of a table without a section, but with the comment above the section behind it."""
    text = table.as_string()
    lines = text.splitlines(keepends=True)
    start = line_of(text, [name]) - 1
    later = (line_of(text, [one]) - 1 for one in table if one != name)
    end = min((line for line in later if line > start), default=len(lines))
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    left = "".join(lines[:start] + lines[end:])
    with suppress(TOMLKitError):
        if name not in tomlkit.parse(left):
            return left
    del table[name]  # its parts stand in several places
    return table.as_string()


def choose(name: str) -> None:
    """Make a pair the one that runs where none is named.

    Raises:
        UnknownPair: no table has it.
    """
    known = load_pairs()
    if name not in known:
        raise UnknownPair(name, known)

    def change(table: TOMLDocument) -> str:
        if DEFAULT in table:
            table[DEFAULT] = name
            return table.as_string()
        # A key behind a section would be one of that section.
        line = tomlkit.document()
        line[DEFAULT] = name
        gap = "\n" if table.as_string().strip() else ""
        return line.as_string() + gap + table.as_string()

    _edit(change)


def _edit(change: Callable[[TOMLDocument], str]) -> None:
    """Write what `change` makes of the user's table, unless that could not be used."""
    path = user_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = TableFile.read(path).text if path.exists() else ""
        text = change(tomlkit.parse(before))
        merged([TableFile.read(shipped_table()), TableFile.parsed(path, text)])
        write_whole(path, text)
