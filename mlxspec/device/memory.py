"""Telling that memory ran out from everything else that can go wrong.

What MLX can report, it reports as RuntimeError: a buffer that is larger than Metal's largest, or
that CUDA cannot allocate. A command buffer that Metal itself gives up for want of memory ends the
process, and so does an allocation that fails on the CPU: no program can go on from there.
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
    """Turn an allocation that fails in the block into OutOfMemory, and free what can be.

    Args:
        what: is being done, for the message.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not _SIGNS.search(str(error)):
            raise
        # A traceback keeps the frames of the block alive, and they their arrays.
        cause = error.with_traceback(None)
        mx.clear_cache()
        raise OutOfMemory(what) from cause
