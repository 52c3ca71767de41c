"""The commands that show the table of pairs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec import require_backend
from mlxspec.cli.arguments import options
from mlxspec.cli.arguments.help import BESIDE, Command, Group
from mlxspec.cli.screen.output import Output
from mlxspec.control import records
from mlxspec.control.estimates import Knowledge
from mlxspec.control.records import Record
from mlxspec.defaults import HISTORY
from mlxspec.errors import BackendMissing, LoadError, UsageError
from mlxspec.pairs.table import Pair, default_pair, find_pair, load_pairs

if TYPE_CHECKING:
    from rich.table import Table

    from mlxspec.pairs.memory import MemorySum
    from mlxspec.pairs.overview import Overview
    from mlxspec.pairs.stock import Held

_COLUMNS = 58  # that the table of what was learned needs
_ROOMY = 72  # from which tables have wider gaps

pairs_app = typer.Typer(
    cls=Group, help="The table of model pairs: find, check, download.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(help="Its name in the table.")]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        min=1,
        help="Sum up memory for a text of this length: 8192, or the pair's own, by default.",
        show_default=False,
    ),
]


@pairs_app.command("list", cls=Command)
def list_pairs(
    fits: Annotated[bool, typer.Option("--fits", help="Only pairs that fit this machine.")] = False,
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TAG", help="Only pairs with this tag, such as code or 16gb; repeatable."
        ),
    ] = None,
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show the pairs of the table: their size, whether they fit, and what is on disk."""
    out = Output(as_json)
    wanted, table = set(tag or ()), load_pairs(models).values()
    known_tags = sorted({one for pair in table for one in pair.tags})
    for name in sorted(wanted.difference(known_tags)):
        raise UsageError(f"No pair has the tag {name!r}.", hint=f"Tags: {', '.join(known_tags)}.")
    pairs = [pair for pair in table if wanted <= set(pair.tags)]
    try:
        require_backend()
    except BackendMissing as error:  # the table can be read all the same
        if fits or as_json:
            raise
        out.show(_grid((pair.name, pair.note) for pair in pairs))
        out.tell(f"no sizes: {error.message}")
        return
    from mlxspec.pairs.overview import overview

    known = records.load_all(out.tell)
    found = [overview(pair, known) for pair in pairs]
    found = [one for one in found if one.fits or not fits]
    if as_json:
        out.object([one.as_dict() for one in found])
        return
    if not found:
        out.line("no pair of the table is like that")
        return
    columns = shutil.get_terminal_size().columns
    if columns < BESIDE:
        out.show(_grid((one.pair.name, _in_words(one)) for one in found))
    else:
        out.show(_listed(found, default_pair(models), gap=2 if columns >= _ROOMY else 1))
    out.show("`mlxspec pairs show NAME` says more of one; ~ is a guess until it is on disk")


def _in_words(one: Overview) -> str:
    """A pair of the list where lines are short."""
    from mlxspec.pairs.overview import in_word
    from mlxspec.pairs.pull import gigabytes

    memory = "" if one.memory is None else f" {'' if one.sure else '~'}{gigabytes(one.memory)}"
    return f"memory{memory}, fits: {in_word(one.fits)}, on disk: {one.state}"


def _listed(found: list[Overview], default: str, *, gap: int) -> Table:
    """The list as a table of about 58 columns and five gaps."""
    from rich.table import Table
    from rich.text import Text

    from mlxspec.pairs.overview import in_word
    from mlxspec.pairs.pull import gigabytes

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
    for title in ("pair", "disk", "memory", "fits", "on disk", "here"):
        table.add_column(title, justify="right" if title in ("disk", "memory") else "left")
    for one in found:
        guess = "" if one.sure or one.memory is None else "~"
        name = Text(one.pair.name, "bold" if one.state == "here" else "")
        table.add_row(
            name + (" *" if one.pair.name == default else ""),
            "?" if one.disk is None else gigabytes(one.disk),
            "?" if one.memory is None else guess + gigabytes(one.memory),
            in_word(one.fits),
            {"here": "yes", "in part": "in part", "absent": "no"}[one.state],
            "" if one.speed_up is None else f"{one.speed_up:.2f} x",
        )
    return table


@pairs_app.command("show", cls=Command)
def show_pair(
    name: NameArgument,
    context: ContextOption = None,
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show all of one pair: its entry, the memory that it needs, and what was learned here."""
    out, pair = Output(as_json), find_pair(name, models)
    require_backend()
    from mlxspec.pairs.overview import is_of
    from mlxspec.pairs.stock import memory_of, stock

    kept = [record for record in records.load_all(out.tell) if is_of(record, pair)]
    held, memory, why = stock(pair), None, ""
    try:
        memory = memory_of(pair, held, context=context)
    except LoadError:
        why = f"known once its configuration is here: `mlxspec pairs check {pair.name}`"
    if memory is not None and any(one.state != "here" for one in held):
        memory, why = None, f"known once it is on disk: `mlxspec pairs check {pair.name}`"
    if as_json:
        found = {
            "models": [_held_as_dict(one) for one in held],
            "memory": None if memory is None else memory.as_dict(),
            "learned": [records.as_dict(record) for record in kept],
        }
        out.object(pair.as_dict() | found)
        return
    out.show(_grid([*_rows(pair), *_on_disk(held)]))
    out.show("")
    if memory is None:
        out.show(f"memory: {why}")
    else:
        show_memory(memory, out)
    for record in kept:
        if not record.recommendation and not _has_measured(record):
            continue  # its texts were too short to time a round
        out.show("", _setting(record))
        console = out.console(least=_COLUMNS)
        console.print(_learned(record, roomy=console.width >= _ROOMY))
        if record.recommendation is not None:
            out.show(str(record.recommendation), style="bold")


def show_memory(memory: MemorySum, out: Output) -> None:
    """The sum of a pair's memory, part by part, and whether it fits."""
    from rich.table import Table

    from mlxspec.pairs.pull import gigabytes

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for what, size in memory.rows():
        table.add_row(what, gigabytes(size))
    table.add_row("together", gigabytes(memory.total), style="bold")
    table.add_row("this machine", gigabytes(memory.limit))
    out.show(f"memory for a text of {memory.context:,} tokens", table)
    out.show("it fits" if memory.fits else "it does not fit", style="bold")


def _held_as_dict(one: Held) -> dict[str, object]:
    return {
        "role": one.role,
        "model": one.location,
        "on_disk": one.state,
        "folder": None if one.folder is None else str(one.folder),
        "bytes": one.size,
    }


def _on_disk(held: list[Held]) -> list[tuple[str, str]]:
    from mlxspec.pairs.pull import gigabytes

    rows = []
    for one in held:
        size = f", {gigabytes(one.size)}" if one.size else ""
        rows.append((f"{one.role} on disk", {"here": "yes"}.get(one.state, one.state) + size))
    return rows


def _rows(pair: Pair) -> list[tuple[str, str]]:
    """The entry of the table, one line for each key."""
    sampling = ", ".join(f"{key} {value:g}" for key, value in pair.sampling.items())
    arguments = ", ".join(f"{key}={value}" for key, value in pair.template_args.items())
    values = {
        "name": pair.name,
        "target": pair.target,
        "draft": drafts_of(pair),
        "adapter": pair.adapter or "",
        "revision": pair.revision or "",
        "draft tokens": str(pair.draft_tokens),
        "draft bits": str(pair.draft_bits or ""),
        "sampling": sampling or "as the model's authors recommend",
        "system": pair.system or "",
        "template": arguments,
        "prompt": pair.prompt or "",
        "context": f"{pair.context:,} tokens at most" if pair.context else "",
        "tags": ", ".join(pair.tags),
        "note": pair.note,
        "speed": pair.source,
        "code": "runs code that its models bring" if pair.trust_remote_code else "",
    }
    return [(key, value) for key, value in values.items() if value]


def _setting(record: Record) -> str:
    setting = record.setting
    return (
        f"learned on {setting.chip}, {setting.backend}, mlx {setting.mlx}, "
        f"mlx-lm {setting.mlx_lm}; weights: {setting.quantisation}"
    )


def _learned(record: Record, *, roomy: bool) -> Table:
    """The measurements of a record: a row for each number of draft tokens that was tried."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        "texts",
        "drafter",
        "draft tokens",
        "takes",
        "last accepted",
        box=SIMPLE_HEAD if roomy else None,
        padding=(0, 1) if roomy else (0, 1, 0, 0),
        pad_edge=roomy,
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


def _has_measured(record: Record) -> bool:
    """Whether anything is known that a table would show."""
    return any(
        _measured(one)
        for learned in (record.learned, *record.learned.beside.values())
        for drafters in learned.by_length.values()
        for one in drafters.values()
    )


def _measured(one: Knowledge) -> list[tuple[str, str, str]]:
    """K, its round over a plain one, and the acceptance of its last position, where measured."""
    rows = []
    for count, cost in enumerate(one.costs):
        if count and cost is not None and one.costs[0] is not None:
            reached = count <= len(one.acceptance)
            accepted = f"{one.acceptance[count - 1]:.0%}" if reached else ""
            rows.append((str(count), f"{cost / one.costs[0]:.2f} rounds", accepted))
    return rows


def drafts_of(pair: Pair) -> str:
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
