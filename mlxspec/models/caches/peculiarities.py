"""Facts about single architectures of mlx-lm: the one place that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxspec.models.caches.recurrences import Bound, Scan, Window

# Architectures that look exact on a text as short as a trial, and are not on a longer one.
COUNTS_ENTRIES = {
    "minimax_m3_vl": "it takes the rows of a pass for the last entries that are attended",
}


def obstacle_of(model: Any) -> str:
    """The reason, not shown by any trial, why a model cannot be fused; empty without one."""
    names = {type(module).__module__.rpartition(".")[2] for module in model.modules()}
    return next((why for name, why in COUNTS_ENTRIES.items() if name in names), "")


def _joined(state: str, new: str, axis: int = 1) -> Callable[[Bound], mx.array]:
    return lambda given: mx.concatenate([given[state], given[new]], axis=axis)


RECURRENCES: tuple[Scan | Window, ...] = (
    Scan("mlx_lm.models.gated_delta", "gated_delta_update", "state", ("q", "k", "v", "a", "b")),
    Scan("mlx_lm.models.ssm", "ssm_update", "state", ("hidden_states", "B", "C", "dt")),
    Scan("mlx_lm.models.mamba", "MambaBlock.ssm_step", "state"),
    Scan("mlx_lm.models.jamba", "JambaMambaMixer.ssm_step", "state", ("x",)),
    Scan("mlx_lm.models.rwkv7", "Rwkv7TimeMixing._wkv7", "state", ("r", "w", "k", "v", "a", "b")),
    Scan("mlx_lm.models.recurrent_gemma", "rnn_scan", "h0", ("x", "a")),
    Scan("mlx_lm.models.bailing_moe_linear", "recurrent_gla", "h", ("q", "k", "v"), axis=2),
    Scan("mlx_lm.models.bailing_hybrid", "recurrent_gla", "h", ("q", "k", "v"), axis=2),
    Window("mlx.nn.layers.convolution", "Conv1d.__call__", lambda given: given["x"]),
    Window("mlx_lm.models.rwkv7", "TokenShift.__call__", _joined("state", "x")),
    Window("mlx_lm.models.recurrent_gemma", "Conv1d.__call__", _joined("cache", "x")),
    Window(
        "mlx_lm.models.baichuan_m1",
        "Attention._custom_convolution",
        _joined("state", "u", axis=2),
        axis=2,
    ),
)
