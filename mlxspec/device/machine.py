"""A description of this machine, for benchmark figures and tuning records."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxspec._version import __version__
from mlxspec.device.kernels import on_cpu


def chip() -> str:
    """The name of the processor that MLX computes on."""
    if on_cpu():
        return _processor()
    return str(mx.device_info().get("device_name", _processor()))


def backend() -> str:
    """MLX's backend: cpu, metal or cuda."""
    if on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def about() -> dict[str, Any]:
    """All that a measured figure depends on besides the models, as plain values."""
    preloaded = os.environ.get("LD_PRELOAD")  # such as another BLAS library
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": chip(),
        "device": str(mx.default_device()),
        "python": platform.python_version(),
        "mlxspec": __version__,
        **{name: version(name) for name in ("mlx", "mlx-lm")},
        **({"preloaded": Path(preloaded).name} if preloaded else {}),
    }


def described(about: dict[str, Any]) -> str:
    """The result of `about` as the beginning of a line."""
    line = f"{about['processor']}, {about['device']}, mlx {about['mlx']}, mlx-lm {about['mlx-lm']}"
    return f"{line}, {about['preloaded']}" if "preloaded" in about else line


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "") or (
        platform.processor()
    )
