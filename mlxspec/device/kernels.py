"""When compiling a round pays, and the kernels that MLX must build first.

On a GPU `mx.compile` is quick and always pays. On the CPU MLX builds every fused kernel with the
system's C++ compiler on its first use and keeps it in the temporary folder: seconds once, then
nothing. A kernel's name depends on operations and types, not on shapes, so a mark file beside the
kernels records each kind of round whose kernels are all built.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

COMPILER = "g++"


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


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / "mlx" / version("mlx") / "cpu"


def _mark(kind: str) -> Path:
    return _folder() / f"mlxspec-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"
