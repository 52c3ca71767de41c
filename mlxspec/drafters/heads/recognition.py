"""Which folders hold a trained head, by its config.json. No MLX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["dflash", "dspark", "mtp"]
_OTHERS = {"eagle3": "EAGLE-3", "eagle": "EAGLE", "medusa": "Medusa", "hydra": "Hydra"}


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
    named = f"{_names_in(config)} {own.get('projector_type', '')}".lower()
    taps = {"target_layer_ids", "aux_hidden_state_layer_ids"} & {*config, *own}
    has_markov = bool(taps) and bool(config.get("markov_rank") or own.get("markov_rank"))
    if "dspark" in named or has_markov:
        # A whole model with a head inside has its own taps under other names.
        return "dspark" if taps else None
    return "dflash" if own or "dflash" in named else None


def other_head(config: Mapping[str, Any]) -> str | None:
    """The name of a head of a kind that cannot be made; None where a configuration is of none."""
    named = _names_in(config).lower()
    return next((words for name, words in _OTHERS.items() if name in named), None)


def _names_in(config: Mapping[str, Any]) -> str:
    """The names by which a configuration tells what it is of."""
    classes = config.get("architectures")
    names = [config.get("speculators_model_type", "")]
    return " ".join(map(str, names + (classes if isinstance(classes, list) else [])))
