"""Which folders hold a trained head, by its config.json. No MLX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["dflash", "dspark", "mtp"]


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """The kind of a head; None where a configuration is that of a model.

    A head of DFlash has a `dflash_config` (z-lab) or says so (speculators). One of DSpark has a
    Markov head besides, in whichever of both forms, or is of one of DeepSpec's classes. An MTP
    layer that was split off its model has a model type of its own.
    """
    if str(config.get("model_type")).endswith("_mtp"):
        return "mtp"
    own = config.get("dflash_config")
    own = own if isinstance(own, Mapping) else {}
    named = " ".join(
        str(one)
        for one in (
            config.get("speculators_model_type", ""),
            own.get("projector_type", ""),
            *_listed(config.get("architectures")),
        )
    ).lower()
    taps = {"target_layer_ids", "aux_hidden_state_layer_ids"} & {*config, *own}
    has_markov = bool(taps) and bool(config.get("markov_rank") or own.get("markov_rank"))
    if "dspark" in named or has_markov:
        # A whole model with a head inside has its own taps under other names.
        return "dspark" if taps else None
    return "dflash" if own or "dflash" in named else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
