"""A measurement as a program of its own: `python -m mlxspec.bench.NAME`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError


def run(main: Callable[..., None]) -> None:
    """Call `main` with the options of the command line, and end as `mlxspec` ends."""
    try:
        typer.run(main)
    except MlxspecError as error:
        print(f"error: {error.message}\nhint:  {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
