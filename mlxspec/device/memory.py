"""Distinguishing a lack of memory from other errors.

MLX raises RuntimeError where it can report the failure: for a buffer that exceeds Metal's limit,
or that CUDA cannot allocate. Where Metal itself gives up a command buffer for lack of memory, or
an allocation on the CPU fails, the process ends, and no program can recover.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlxspec.errors import OutOfMemory

_SIGNS = re.compile(r"malloc|unable to allocate|out of memory|insufficient memory", re.IGNORECASE)


@contextmanager
def watched(what: str) -> Iterator[None]:
    """Turn a failed allocation in the block into OutOfMemory, and clear MLX's cache.

    Args:
        what: the work in progress, for the message, such as "reading the prompt".

    Raises:
        OutOfMemory: an allocation in the block failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not _SIGNS.search(str(error)):
            raise
        # A traceback keeps the block's frames alive, and with them their arrays.
        cause = error.with_traceback(None)
        mx.clear_cache()
        raise OutOfMemory(what) from cause
