"""How much memory there is, and distinguishing a lack of it from other errors.

MLX raises RuntimeError where it can report the failure: for a buffer that exceeds Metal's limit,
or that CUDA cannot allocate. Where Metal itself gives up a command buffer for lack of memory, or
an allocation on the CPU fails, the process ends, and no program can recover.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


# --- how much there is ------------------------------------------------------------------

_SPARE_WIRED = 2 * 2**30  # bytes beside the weights: for the past, and for a pass
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def limit() -> int:
    """Bytes that MLX's arrays should stay within on this machine.

    On Metal what the system recommends, on CUDA the memory of the card, and elsewhere the memory of
    the system, or of the control group that this process is in.
    """
    info = mx.device_info() if mx.default_device() == mx.Device(mx.gpu) else {}
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if isinstance(size := info.get(name), int) and size > 0:
            return size
    return min([system_memory(), *_of_control_group()])


def can_wire() -> bool:
    """Whether memory can be wired here: only Metal knows it."""
    return mx.metal.is_available()


def wire(needed: int) -> None:
    """Keep as much memory wired as models need, and a little more, until this process ends.

    Wired memory cannot be paged out, so that a machine that runs short of the rest may stop; so
    nothing is wired that nobody asked for.
    """
    if not can_wire():
        return
    before = mx.set_wired_limit(min(needed + _SPARE_WIRED, limit()))
    atexit.register(mx.set_wired_limit, before)


def system_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_control_group() -> list[int]:
    """The limit of the control group; none where there is none."""
    found = []
    for name in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max" is no limit
            found.append(int((_CGROUP / name).read_text()))
    return found
