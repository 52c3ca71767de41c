"""Writing files whole, and telling files from folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from mlxspec.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for bytes that takes the place of `path` once the block ends.

    Where the block raises, or the machine stops, the old file stays as it was. Where `path` is a
    link, the link stays and its target is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="mlxspec-", delete=False) as new:
        try:
            yield cast(BinaryIO, new)
            new.flush()
            os.fsync(new.fileno())
            Path(new.name).replace(path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def expanded(path: Path) -> Path:
    """A path with a home in place of `~`; as it is where there is no home of that name."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def require_no_folder(cache: Path) -> None:
    """Raise UsageError where the file of a prompt cache is a folder."""
    with suppress(OSError):  # of a place that nobody may look at: reading the file will tell
        if cache.is_dir():
            raise UsageError(
                f"The prompt cache {cache} is a folder.",
                hint="Name a file in it, such as prompt.safetensors.",
            )
