"""mlxspec: exact speculative decoding for MLX, as one fused graph per round."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxspec._version import __version__
from mlxspec.errors import BackendMissing, MlxspecError

if TYPE_CHECKING:
    from mlxspec.decode.engine import Engine
    from mlxspec.metrics import Event, Generation
    from mlxspec.pairs.loading import load
    from mlxspec.pairs.table import Pair
    from mlxspec.params import SamplingParams

__all__ = [
    "BackendMissing",
    "Engine",
    "Event",
    "Generation",
    "MlxspecError",
    "Pair",
    "SamplingParams",
    "__version__",
    "load",
]

_HOMES = {
    "Engine": "mlxspec.decode.engine",
    "Event": "mlxspec.metrics",
    "Generation": "mlxspec.metrics",
    "Pair": "mlxspec.pairs.table",
    "SamplingParams": "mlxspec.params",
    "load": "mlxspec.pairs.loading",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a command that needs no model must not wait for MLX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError:
        require_backend()
        raise


def require_backend() -> None:
    """Raise BackendMissing where MLX is installed without the part that computes."""
    try:
        import_module("mlx.core")
    except ImportError as error:
        raise BackendMissing from error
