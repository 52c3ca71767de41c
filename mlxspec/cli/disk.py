"""`mlxspec pairs pull` and `pairs rm`, and asking before a command downloads gigabytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxspec import require_backend
from mlxspec.cli.arguments import options
from mlxspec.cli.screen.output import Output
from mlxspec.errors import LoadError, UsageError
from mlxspec.pairs.table import Pair, find_pair, load_pairs

if TYPE_CHECKING:
    from mlxspec.pairs.hub import Repository
    from mlxspec.pairs.pull import File, Plan

PairOrRepo = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A pair of the table, or a repository such as org/name."),
]


def pull_pair(
    name: PairOrRepo,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is missing, and download no weights.")
    ] = False,
    models: options.ModelsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Download what a pair lacks on this machine; a download that was ended goes on."""
    quietly()
    from mlxspec.pairs.pull import gigabytes, require_space

    out = Output(as_json)
    plans = _plans(_pair_of(name, models))
    needed, free = require_space(plans)
    out.tell(
        f"{gigabytes(needed)} to download, {gigabytes(free)} free"
        if needed
        else "everything is on this machine"
    )
    if not dry_run:
        pull_all(plans, out)
    if as_json:
        out.object(
            {
                "name": name,
                "bytes": sum(one.size for one in plans),
                "missing_bytes": needed,
                "free_bytes": free,
                "models": [_plan_as_dict(one) for one in plans],
            }
        )
    elif dry_run:
        for one in plans:
            for file in one.files:
                state = "here" if file.done == file.size else f"{gigabytes(file.size - file.done)}"
                out.line(f"{one.repository.name}  {file.path}  {state}")


def pull_all(plans: list[Plan], out: Output) -> None:
    """Download what plans lack, with a bar for the whole that names the file at hand."""
    from mlxspec.pairs.pull import pull

    with _bar(sum(one.size for one in plans), out) as advance:
        for one in plans:
            pull(one, advance)


@contextmanager
def _bar(total: int, out: Output) -> Iterator[Callable[[File, int], None]]:
    """A bar on a terminal, and a line for each file elsewhere."""
    done: dict[str, int] = {}
    if out.quiet or not sys.stderr.isatty():

        def told(file: File, count: int) -> None:
            from mlxspec.pairs.pull import gigabytes

            key = str(file.blob)
            if count == file.size and done.get(key) not in (None, file.size):
                out.tell(f"{file.path}: {gigabytes(file.size)}")
            done[key] = count

        yield told
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        whole = bars.add_task("all", total=total)
        parts: dict[str, object] = {}

        def drawn(file: File, count: int) -> None:
            key = str(file.blob)
            if key not in parts and count < file.size:
                name = file.path if len(file.path) <= 24 else f"…{file.path[-23:]}"
                parts[key] = bars.add_task(name, total=file.size)
            if key in parts:
                at: Any = parts[key]
                bars.update(at, completed=count, visible=count < file.size)
            done[key] = count
            bars.update(whole, completed=sum(done.values()))

        yield drawn


def remove_models(
    name: PairOrRepo,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models: options.ModelsOption = None,
) -> None:
    """Delete a pair's models from this machine, but for those that other pairs need."""
    from mlxspec.pairs.pull import cached_size, gigabytes, remove

    out, pair = Output(), _pair_of(name, models)
    mine = [one for one in _repositories(pair) if cached_size(one)]
    others = {
        one.name: other.name
        for other in load_pairs(models).values()
        if other.name != pair.name and _is_here(other)
        for one in _repositories(other)
    }
    for one in mine:
        if one.name in others:
            out.line(f"{one.name} stays: {others[one.name]} needs it")
    gone = [one for one in mine if one.name not in others]
    if not gone:
        out.line("nothing to delete")
        return
    for one in gone:
        out.line(f"{one.name} goes: {gigabytes(cached_size(one))}")
    if not yes and not _agreed(f"Delete {gigabytes(sum(map(cached_size, gone)))}?", default=False):
        if not _can_ask():
            raise UsageError("Nothing was deleted.", hint=f"`mlxspec pairs rm {name} --yes` does.")
        return
    out.line(f"{gigabytes(sum(map(remove, gone)))} freed")


# --- before a model is loaded -----------------------------------------------------------


def require_here(pair: Pair, *, quiet: bool = False, speculation: bool = True) -> None:
    """Download a pair that is not on this machine, if a person on a terminal agrees.

    Args:
        quiet: asks nobody. speculation: False looks at the target alone.

    Raises:
        LoadError: it is not here, and nobody can be asked, or somebody said no.
    """
    quietly()
    from huggingface_hub import constants

    from mlxspec.pairs.stock import stock

    absent = [
        one
        for one in stock(pair, speculation=speculation)
        if one.repository is not None and one.state != "here"
    ]
    if not absent or constants.HF_HUB_OFFLINE:
        return  # what is in part here may be all that matters: loading will tell
    names = " and ".join(str(one.repository and one.repository.name) for one in absent)
    verb = "is" if len(absent) == 1 else "are"
    missing = LoadError(
        f"{names} (of the pair {pair.name}) {verb} not on this machine.",
        hint=_commands(pair),
    )
    if quiet or not _can_ask():
        raise missing
    from mlxspec.pairs.pull import gigabytes, require_space

    plans = _plans(pair, speculation=speculation)
    needed, _ = require_space(plans)
    fits = {True: ", fits", False: ", does not fit this machine's memory", None: ""}[_fits(pair)]
    if not _agreed(f"{names}: {gigabytes(needed)}{fits}: download?", default=True):
        raise missing
    pull_all(plans, Output())


def _commands(pair: Pair) -> str:
    """What downloads a pair, which may be one of a table or of a command line."""
    try:
        known = pair.name in load_pairs()
    except Exception:  # a table that cannot be read is not what went wrong here
        known = False
    if known:
        return f"`mlxspec pairs pull {pair.name}` downloads what is missing."
    repositories = " and ".join(f"`mlxspec pairs pull {one.name}`" for one in _repositories(pair))
    return f"Run {repositories}."


def _fits(pair: Pair) -> bool | None:
    from mlxspec.pairs.overview import overview

    return overview(pair, ()).fits


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _agreed(question: str, *, default: bool) -> bool:
    """Whether a person says yes; False where nobody can be asked."""
    if not _can_ask():
        return False
    return typer.confirm(question, default=default, err=True)


def require_mlx(*, progress_bars: bool = False) -> None:
    """Raise BackendMissing where MLX cannot run; libraries are quiet from here on."""
    require_backend()
    quietly(progress_bars=progress_bars)


def quietly(*, progress_bars: bool = False) -> None:
    """Keep libraries from giving advice, which is for programs, and from drawing bars."""
    if not progress_bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _pair_of(name: str, models: Any) -> Pair:
    """A pair of the table, or one of a repository alone."""
    from mlxspec.pairs.hub import repository_of

    if "/" in name and repository_of(name) is not None:
        return Pair(name=name, target=name)
    return find_pair(name, models)


def _repositories(pair: Pair) -> list[Repository]:
    from mlxspec.pairs.folders import located
    from mlxspec.pairs.hub import Repository

    places = [located(pair.target, pair.revision), *map(located, pair.models)]
    return [place for place in places if isinstance(place, Repository)]


def _is_here(pair: Pair) -> bool:
    from mlxspec.pairs.stock import stock

    return all(one.state == "here" for one in stock(pair))


def _plans(pair: Pair, *, speculation: bool = True) -> list[Plan]:
    """What the hub has of a pair's repositories, its adapter included."""
    from mlxspec.pairs.folders import wanted
    from mlxspec.pairs.pull import plan

    repositories = wanted(pair, speculation=speculation)
    return [plan(one, pair.name, patterns) for one, patterns in repositories]


def _plan_as_dict(one: Plan) -> dict[str, object]:
    return {
        "model": one.repository.name,
        "commit": one.commit,
        "bytes": one.size,
        "missing_bytes": one.missing,
        "files": [{"path": file.path, "bytes": file.size} for file in one.files],
    }
