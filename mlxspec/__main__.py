"""`python -m mlxspec`, and the installed command."""

import os
import sys
from contextlib import suppress

from mlxspec.defaults import INTERRUPTED


def main() -> None:
    """Run the command line; a person may interrupt it even while it is imported."""
    try:
        from mlxspec.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    try:
        run()
    except SystemExit as end:
        _leave(end.code)
        raise
    _leave(0)


def _leave(code: object) -> None:
    """Let MLX come to rest: the interpreter must not take away what a round still computes.

    Somebody who has interrupted the command does not wait for that.
    """
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(INTERRUPTED)
    if (mx := sys.modules.get("mlx.core")) is not None:
        with suppress(RuntimeError):
            mx.synchronize()


if __name__ == "__main__":
    main()
