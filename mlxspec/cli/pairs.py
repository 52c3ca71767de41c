"""The commands about the table of pairs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec.cli import options
from mlxspec.cli.help import BESIDE, Command, Group
from mlxspec.cli.output import Output
from mlxspec.control import records
from mlxspec.control.estimates import Knowledge
from mlxspec.control.records import Record
from mlxspec.defaults import AUTO, HISTORY
from mlxspec.pairs.table import Pair, find_pair, load_pairs

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = 72  # that the table of what was learned needs

pairs_app = typer.Typer(cls=Group, help="The table of model pairs.", no_args_is_help=True)


@pairs_app.command("list", cls=Command)
def list_pairs(models: options.ModelsOption = None, as_json: options.JsonOption = False) -> None:
    """Show every pair of the table."""
    out, pairs = Output(as_json), load_pairs(models)
    if as_json:
        out.object([pair.as_dict() for pair in pairs.values()])
        return
    out.show(_grid((pair.name, _in_three_lines(pair)) for pair in pairs.values()))


@pairs_app.command("show", cls=Command)
def show_pair(
    name: Annotated[str, typer.Argument(help="Its name in the table.")],
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show one pair, and the measurements of its runs on this machine."""
    out, pair = Output(as_json), find_pair(name, models)
    kept = [
        record
        for record in records.load_all(out.tell)
        if (record.setting.target, record.setting.draft) == (pair.target_name, pair.draft_name)
    ]
    if as_json:
        out.object(pair.as_dict() | {"learned": [records.as_dict(record) for record in kept]})
        return
    out.show(_grid(_rows(pair)))
    for record in kept:
        out.show("", _setting(record))
        out.console(least=_COLUMNS).print(_learned(record))
        if record.recommendation is not None:
            out.show(str(record.recommendation), style="bold")


def _rows(pair: Pair) -> list[tuple[str, str]]:
    """The entry of the table, one line for each key."""
    sampling = ", ".join(f"{key} {value:g}" for key, value in pair.sampling.items())
    values = {
        "name": pair.name,
        "target": pair.target,
        "draft": _drafts_of(pair),
        "adapter": pair.adapter or "",
        "revision": pair.revision or "",
        "draft tokens": str(pair.draft_tokens),
        "sampling": sampling or "greedy",
        "prompt": pair.prompt or "",
        "note": pair.note,
    }
    return [(key, value) for key, value in values.items() if value]


def _setting(record: Record) -> str:
    setting = record.setting
    return (
        f"learned on {setting.chip}, {setting.backend}, mlx {setting.mlx}, "
        f"mlx-lm {setting.mlx_lm}; weights: {setting.quantisation}"
    )


def _learned(record: Record) -> Table:
    """The measurements of a record: a row for each number of draft tokens that was tried."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        "texts",
        "drafter",
        "draft tokens",
        "takes",
        "last accepted",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for rows, learned in sorted({1: record.learned, **record.learned.beside}.items()):
        together = f", {rows} at a time" if rows > 1 else ""
        for length, drafters in sorted(learned.by_length.items()):
            texts = records.described_length(length).removeprefix("texts ") + together
            for name, one in sorted(drafters.items()):
                for row in _measured(one):
                    table.add_row(texts, name, *row)
                    texts = name = ""
    return table


def _measured(one: Knowledge) -> list[tuple[str, str, str]]:
    """K, its round over a plain one, and the acceptance of its last position, where measured."""
    rows = []
    for count, cost in enumerate(one.costs):
        if count and cost is not None and one.costs[0] is not None:
            reached = count <= len(one.acceptance)
            accepted = f"{one.acceptance[count - 1]:.0%}" if reached else ""
            rows.append((str(count), f"{cost / one.costs[0]:.2f} rounds", accepted))
    return rows


def _in_three_lines(pair: Pair) -> str:
    chosen = "" if pair.draft_tokens == AUTO else f" ({pair.draft_tokens} tokens)"
    return f"{pair.target}\n  draft: {_drafts_of(pair)}{chosen}\n  {pair.note}".rstrip()


def _drafts_of(pair: Pair) -> str:
    return ", ".join(pair.drafts) or HISTORY


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Names beside what belongs to them, or above it where lines are short."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    beside = shutil.get_terminal_size().columns >= BESIDE
    table.add_column(style="bold", no_wrap=True) if beside else None
    table.add_column(overflow="fold")
    for name, value in rows:
        if beside:
            table.add_row(Text(name), Text(value))  # not strings, in which brackets are markup
        else:
            table.add_row(Text(name, "bold"))
            table.add_row(Padding(Text(value), (0, 0, 0, 2)))
    return table
