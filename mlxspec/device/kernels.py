"""When compiling a round pays, and the kernels that MLX must build first.

On a GPU `mx.compile` is quick and always pays. On the CPU MLX builds every fused kernel with the
system's C++ compiler on its first use and keeps it in the temporary folder: seconds once, then
nothing. A kernel's name depends on operations and types, not on shapes, so a mark file beside the
kernels records each kind of round whose kernels are all built.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

COMPILER = "g++"
# The options of MLX's own calls: a precompiled header is passed over by calls with others.
_OPTIONS = ("-std=c++17", "-O3", "-Wall", "-fPIC")
_HEADER = "mlx/backend/cpu/compiled_preamble.h"  # every kernel's first line includes it


def on_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def can_compile() -> bool:
    """Whether MLX can compile here; on a CPU without a C++ compiler, rounds run uncompiled."""
    return not on_cpu() or shutil.which(COMPILER) is not None


def are_built(kind: str) -> bool:
    """Whether rounds of this kind compile without building kernels first."""
    return not on_cpu() or _mark(kind).exists()


def mark_built(kind: str) -> None:
    if on_cpu() and _folder().is_dir():
        _mark(kind).touch()


def count_built() -> int:
    return sum(1 for _ in _folder().glob("*.so")) if _folder().is_dir() else 0


@contextmanager
def quick_builds() -> Iterator[None]:
    """Build kernels in a quarter of the time within the block.

    Nearly all of it goes into one header, which g++ takes compiled once it lies, as such, beside
    the kernels. It has 50 MB, so it is removed again.
    """
    header = _folder() / f"{_HEADER}.gch"
    can = on_cpu() and can_compile() and sys.platform == "linux" and not header.exists()
    made = can and _precompiled(header)
    try:
        yield
    finally:
        if made:
            header.unlink(missing_ok=True)


def _precompiled(header: Path) -> bool:
    """Whether the header could be compiled; MLX builds kernels without it too."""
    include = Path(mx.__file__).parent / "include"
    # Another process must not meet half of it.
    part = header.with_suffix(f".{os.getpid()}")
    source = str(include / _HEADER)
    arguments = ["-I", str(include), "-x", "c++-header", source, "-o", str(part)]
    try:
        header.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([COMPILER, *_OPTIONS, *arguments], capture_output=True, check=True)
        part.replace(header)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


@cache
def _folder() -> Path:
    return Path(tempfile.gettempdir()) / "mlx" / version("mlx") / "cpu"


def _mark(kind: str) -> Path:
    return _folder() / f"mlxspec-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"
