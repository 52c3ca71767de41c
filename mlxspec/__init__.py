"""mlxspec: exact speculative decoding for MLX, as one fused graph per round."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxspec import host
from mlxspec._version import __version__
from mlxspec.errors import (
    BackendMissing,
    BrokenOutput,
    LoadError,
    MlxspecError,
    OutOfMemory,
    PromptError,
    TableError,
    UnknownPair,
    UnsupportedModel,
    UsageError,
    VocabularyMismatch,
)

if TYPE_CHECKING:
    from mlxspec.conversations import ToolCall
    from mlxspec.decode.batch import Batch, Row
    from mlxspec.decode.engine import Engine
    from mlxspec.decode.prefixes import PrefixCache
    from mlxspec.decode.request import Request
    from mlxspec.decode.run import Run
    from mlxspec.decode.session import Session
    from mlxspec.decode.track import Committed
    from mlxspec.drafters.heads.head import Head
    from mlxspec.drafters.history import History, Prediction
    from mlxspec.drafters.picks import Picks
    from mlxspec.drafters.proposals import Proposal, TextDrafter
    from mlxspec.measure.audit import Audit, audit
    from mlxspec.metrics import Event, Generation, Logprob, Piece, SpeculationStats
    from mlxspec.pairs.folders import fetch
    from mlxspec.pairs.loading import load
    from mlxspec.pairs.table import Pair, find_pair, load_pairs
    from mlxspec.params import KVQuantization, Penalties, SamplingParams
    from mlxspec.spelling import Spelling

__all__ = [
    "Audit",
    "BackendMissing",
    "Batch",
    "BrokenOutput",
    "Committed",
    "Engine",
    "Event",
    "Generation",
    "Head",
    "History",
    "KVQuantization",
    "LoadError",
    "Logprob",
    "MlxspecError",
    "OutOfMemory",
    "Pair",
    "Penalties",
    "Picks",
    "Piece",
    "Prediction",
    "PrefixCache",
    "PromptError",
    "Proposal",
    "Request",
    "Row",
    "Run",
    "SamplingParams",
    "Session",
    "SpeculationStats",
    "Spelling",
    "TableError",
    "TextDrafter",
    "ToolCall",
    "UnknownPair",
    "UnsupportedModel",
    "UsageError",
    "VocabularyMismatch",
    "__version__",
    "audit",
    "fetch",
    "find_pair",
    "load",
    "load_pairs",
]

host.guard()

_HOMES = {
    "conversations": ("ToolCall",),
    "decode.batch": ("Batch", "Row"),
    "decode.engine": ("Engine",),
    "decode.prefixes": ("PrefixCache",),
    "decode.request": ("Request",),
    "decode.run": ("Run",),
    "decode.session": ("Session",),
    "decode.track": ("Committed",),
    "drafters.heads.head": ("Head",),
    "drafters.picks": ("Picks",),
    "drafters.history": ("History", "Prediction"),
    "drafters.proposals": ("Proposal", "TextDrafter"),
    "measure.audit": ("Audit", "audit"),
    "metrics": ("Event", "Generation", "Logprob", "Piece", "SpeculationStats"),
    "pairs.folders": ("fetch",),
    "pairs.loading": ("load",),
    "pairs.table": ("Pair", "find_pair", "load_pairs"),
    "params": ("KVQuantization", "Penalties", "SamplingParams"),
    "spelling": ("Spelling",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import on first use: a command that needs no model must not wait for MLX."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"mlxspec.{_HOME_OF[name]}"), name)
    except ImportError:
        require_backend()
        raise


def require_backend() -> None:
    """Raise BackendMissing where MLX is installed without the part that computes."""
    try:
        import_module("mlx.core")
    except ImportError as error:
        raise BackendMissing from error
