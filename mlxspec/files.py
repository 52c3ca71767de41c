"""Writing files whole, telling files from folders, and the style of pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from stat import S_IMODE
from typing import BinaryIO

from mlxspec.errors import UsageError


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Open a new file for bytes that takes the place of `path` once the block ends.

    Where the block raises, or the machine stops, the old file stays as it was. Where `path` is a
    link, the link stays and its target is replaced. An old file's permissions stay.

    Args:
        private: whether a file that was not there is for its owner alone.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    new = path.with_name(f"mlxspec-{token_hex(8)}")
    descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600 if private else 0o666)
    with os.fdopen(descriptor, "w+b") as file:
        try:
            with suppress(FileNotFoundError):
                new.chmod(S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a text as `replacing` does: all of it, or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


def expanded(path: Path) -> Path:
    """A path with a home in place of `~`; as it is where there is no home of that name."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def page_style(own: Path) -> str:
    """What every page of mlxspec begins with, and then a page's own style."""
    base = Path(__file__).with_name("page.css")
    return "\n".join(file.read_text(encoding="utf-8") for file in (base, own))


def require_no_folder(cache: Path) -> None:
    """Raise UsageError where the file of a prompt cache is a folder."""
    with suppress(OSError):  # of a place that nobody may look at: reading the file will tell
        if cache.is_dir():
            raise UsageError(
                f"The prompt cache {cache} is a folder.",
                hint="Name a file in it, such as prompt.safetensors.",
            )
