"""A folder in which the pasts of prompts outlast the server."""

from __future__ import annotations

from pathlib import Path

from mlxspec.decode.engine import Engine
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Tell


class Store:
    """Fills a prefix cache from a folder, and writes it there; for the worker's thread.

    Args:
        folder: need not exist. It takes no more bytes than the cache may have.
        tell: called with a line where something cannot be read or written.
    """

    def __init__(self, folder: Path, tell: Tell) -> None:
        self._folder = folder
        self._tell = tell
        self._engine: Engine | None = None
        self._prefixes: PrefixCache | None = None
        self._saved = 0  # texts that had been read when it was written

    def open(self, engine: Engine, prefixes: PrefixCache) -> None:
        """Take what the folder has, unless that was done; `save` writes what is in `prefixes`."""
        if prefixes is not self._prefixes:
            prefixes.load(self._folder, engine, self._tell)
        self._engine, self._prefixes = engine, prefixes

    def save(self) -> None:
        """Write the pasts, if texts were read since that was done last."""
        if self._engine is None or self._prefixes is None:
            return
        texts = self._prefixes.stats.texts
        if texts == self._saved:
            return
        self._saved = texts
        try:
            self._prefixes.save(self._folder, self._engine)
        except MlxspecError as error:
            self._tell(f"{error.message} {error.hint}")
