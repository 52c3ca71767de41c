"""A measurement as a program of its own, `python -m mlxspec.bench.NAME`: options, figures, ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError

PairOption = Annotated[str, typer.Option(help="A pair of the table.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]


def run(main: Callable[..., None]) -> None:
    """Call `main` with the options of the command line, and end as `mlxspec` ends."""
    try:
        typer.run(main)
    except MlxspecError as error:
        print(f"error: {error.message}\nhint:  {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def write(figures: Mapping[str, Any], file: Path | None) -> None:
    """Write figures as JSON where a file was named."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
