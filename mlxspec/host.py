"""The process that uses this package stays as it was.

Importing mlx-lm sets the limit of open files of the whole process, which may lower it, and which
fails where it may not be raised. It also sets a variable of the environment. Neither is this
package's to decide in somebody else's program, so both are kept while mlx-lm is imported.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_LIBRARY = "mlx_lm"
_VARIABLE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def guard() -> None:
    """Keep the process as it is when mlx-lm is imported, unless somebody did that before."""
    if _LIBRARY not in sys.modules and not any(isinstance(one, _Guard) for one in sys.meta_path):
        sys.meta_path.insert(0, _Guard())


def allow_open_files(count: int = 4096) -> None:
    """Raise the limit of open files, as far as that is allowed: a large model has many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(
            OSError, ValueError
        ):  # a system may have a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Guard:
    """Lets mlx-lm be imported, however it is found, with the process kept."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LIBRARY:
            return None
        others = (one for one in sys.meta_path if one is not self and hasattr(one, "find_spec"))
        found = (one.find_spec(name, path, target) for one in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader)
        return spec

    def _wrap(self, loader: Any) -> None:
        execute: Callable[[ModuleType], None] = loader.exec_module

        def kept(module: ModuleType) -> None:
            sys.meta_path[:] = [one for one in sys.meta_path if one is not self]
            with _kept():
                execute(module)

        loader.exec_module = kept


@contextmanager
def _kept() -> Iterator[None]:
    """Let this thread set no limit of open files, and put the variable back in the end."""
    variable, set_limit, thread = (
        os.environ.get(_VARIABLE),
        resource.setrlimit,
        threading.get_ident(),
    )

    def set_others(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE or threading.get_ident() != thread:
            set_limit(which, limits)

    resource.setrlimit = set_others
    try:
        yield
    finally:
        resource.setrlimit = set_limit
        if variable is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = variable
