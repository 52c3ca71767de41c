"""`mlxspec doctor`: what a machine has, and what keeps mlxspec from working well on it."""

from __future__ import annotations

import typer

from mlxspec.cli import options
from mlxspec.cli.checking import marked
from mlxspec.cli.disk import quietly
from mlxspec.cli.output import Output
from mlxspec.errors import MlxspecError


def diagnose(as_json: options.JsonOption = False) -> None:
    """Look over this machine, its software, disk, tables and servers. Exits with 1 on ✗."""
    from mlxspec import require_backend

    require_backend()
    quietly()
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
