"""The commands about the table of pairs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mlxspec.cli import options
from mlxspec.control import records
from mlxspec.control.records import Record
from mlxspec.defaults import AUTO, HISTORY
from mlxspec.pairs.table import Pair, find_pair, load_pairs

pairs_app = typer.Typer(help="The table of model pairs.", no_args_is_help=True)


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
    """Show one pair, and what was learned of it on this machine."""
    pair = find_pair(name, models)
    kept = [
        record
        for record in records.load_all(_warn)
        if (record.setting.target, record.setting.draft) == (pair.target_name, pair.drafting)
    ]
    if as_json:
        known = [records.as_dict(record) for record in kept]
        typer.echo(json.dumps(pair.as_dict() | {"learned": known}, ensure_ascii=False))
        return
    values = pair.as_dict() | {"draft": _drafts_of(pair)}
    rows = [(key.replace("_", " "), str(value)) for key, value in values.items()]
    _print_table(rows + [("learned", _in_words(record)) for record in kept])


def _in_words(record: Record) -> str:
    """A setting, and what is known under it."""
    setting, verdict = record.setting, record.verdict
    lines = [f"{setting.chip}, {setting.backend}, mlx {setting.mlx}, mlx-lm {setting.mlx_lm}"]
    lines.append(f"weights: {setting.quantisation}")
    if verdict is not None:
        lines.append(str(verdict))
    for length, drafters in sorted(record.learned.by_length.items()):
        for name, one in drafters.items():
            rates = " ".join(f"{100 * rate:.0f}" for rate in one.acceptance)
            costs = " ".join(f"{cost / one.costs[0]:.2f}" for cost in one.costs)
            accepted = f" is accepted {rates}% and" if rates else ""
            lines.append(f"{records.described_length(length)}: {name}{accepted}")
            lines.append(f"  costs {costs} plain rounds, with 0, 1, 2, … proposals")
    return "\n".join(lines)


def _warn(line: str) -> None:
    typer.echo(line, err=True)


def _in_three_lines(pair: Pair) -> str:
    chosen = "" if pair.draft_tokens == AUTO else f" ({pair.draft_tokens} tokens)"
    return f"{pair.target}\n  draft: {_drafts_of(pair)}{chosen}\n  {pair.note}".rstrip()


def _drafts_of(pair: Pair) -> str:
    return ", ".join(pair.drafts) or HISTORY


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
