"""From the options of a command to an engine that is ready: loaded, taught, and compiled."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from mlxspec.cli.arguments.options import ModelOptions
from mlxspec.cli.disk import require_here, require_mlx
from mlxspec.control import records
from mlxspec.control.records import Record
from mlxspec.pairs.table import Pair

if TYPE_CHECKING:
    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.decode.request import Request


def load_engine(
    pair: Pair, models: ModelOptions, display: Display, notes: list[str], *, quiet: bool
) -> Engine:
    """Load the models, and add to `notes` why a draft is not among them, or why they are slow."""

    def tell(note: str) -> None:
        display.note(note)
        notes.append(note)

    with display.status("starting", aloud=False):
        loading = _loading(progress_bars=sys.stderr.isatty() and not quiet)
        from mlxspec.pairs.folders import fetch
    require_here(pair, quiet=quiet, speculation=models.speculates)
    hears = tell if models.falls_back else None
    folders = fetch(pair, speculation=models.speculates, tell=hears)
    with display.status(f"loading {pair.name}") as doing:
        engine: Engine = loading.load(
            pair,
            folders=folders,
            speculation=models.speculates,
            compiled=models.compiled,
            kv=models.kv(),
            wired=models.wired,
            trust_remote_code=models.trust_remote_code,
            tell=hears,
            doing=doing,
        )
    if models.draft_bits is not None and models.speculates and not engine.heads:
        tell(f"--draft-bits {models.draft_bits} changes nothing: no trained head drafts here")
    from mlxspec.device.memory import can_wire
    from mlxspec.models.scales import why_slow

    if models.wired and not can_wire():
        tell("--wired changes nothing: it is for Metal, which this machine lacks")

    if why := why_slow([engine.target, *engine.drafts.values()]):
        tell(why)
    return engine


def recall(pair: Pair, engine: Engine, display: Display) -> Record:
    """Let an engine begin with what earlier runs of its pair have learned on this machine."""
    from mlxspec.pairs import loading

    record = records.recall(loading.setting_of(pair, engine), display.note)
    engine.learned = record.learned
    return record


def build_kernels(
    engine: Engine, request: Request, display: Display, *, beside: bool = False
) -> None:
    """Build the kernels that a request's rounds lack, and say how long it takes.

    Args:
        beside: also those of rounds of several texts.
    """
    rounds = engine.rounds
    if not rounds.kernels_missing(request, beside=beside):
        return
    what = "building CPU kernels for these rounds; --no-compile skips it"
    with display.status(what, timed=True, aloud=True):
        built = rounds.build_kernels(request, beside=beside)
    if built.kernels:
        display.note(f"built {built.kernels} CPU kernels in {built.seconds:.1f} s; they are kept")


def _loading(*, progress_bars: bool) -> ModuleType:
    """Import the part that needs MLX, which takes a second or two."""
    require_mlx(progress_bars=progress_bars)
    from mlxspec.pairs import loading

    return loading
