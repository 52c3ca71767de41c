"""The MTP layer in a folder: alone, or beside the weights of the model that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxspec.drafters.heads.mtp import Mtp, Trunk
from mlxspec.drafters.heads.mtp_weights import head_of, is_of_layer, layer_weights
from mlxspec.errors import LoadError
from mlxspec.models.caches.original import Model
from mlxspec.pairs.contents import CONFIG, read_json, weight_files
from mlxspec.pairs.weights import Weights, format_of, names_in, readings

# Targets whose layer is known, by the module of mlx-lm.
TARGETS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
ALONE = ("qwen3_5_mtp", "qwen3_next_mtp")  # model types of a folder that has the layer alone
_BESIDE = "mtp*.safetensors"  # as some converters put it beside the files of a model


def is_alone(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a layer alone."""
    return config.get("model_type") in ALONE


def tensors_of(folder: Path) -> dict[str, Path]:
    """The tensors of a folder's layer, and the files that they are in; empty where it has none.

    Raises:
        LoadError: a file that counts is damaged.
    """
    held = dict(readings(folder)[0].tensors) if weight_files(folder) else {}
    beside = {name: path for path in sorted(folder.glob(_BESIDE)) for name in names_in(path)}
    if beside or is_alone(read_json(folder / CONFIG)):
        return beside or held
    return {name: path for name, path in held.items() if is_of_layer(name)}


def head_in(folder: Path, target: Model) -> Mtp:
    """The layer in a folder, as a head of `target`.

    Args:
        folder: of the layer alone, or of a checkpoint that has kept it.

    Raises:
        LoadError: there is none, or it is that of another model.
    """
    require_known(target)
    tensors = tensors_of(folder)
    if not tensors:
        raise LoadError(
            f"{folder} has no MTP layer: whoever converted it left out the tensors mtp.*.",
            hint="Give the original checkpoint, or a folder split from it (…-MTP), with --draft.",
        )
    weights = layer_weights(Weights(folder, tensors).read(), less_one=_is_less_one(tensors))
    return head_of(weights, Trunk(target), place=str(folder))


def require_known(target: Model) -> None:
    """Raise LoadError unless the target is of a kind whose layer is known."""
    kind = type(target).__module__.rpartition(".")[2]
    if kind not in TARGETS:
        raise LoadError(
            f"An MTP layer of {kind} is not known here: only those of {', '.join(TARGETS)} are.",
            hint="Choose another draft; --draft history needs no model.",
        )


def _is_less_one(tensors: Mapping[str, Path]) -> bool:
    """Whether the norms are stored minus one, as original files say, or the names in them."""
    formats = {format_of(path) for path in tensors.values()}
    if formats in ({"mlx"}, {"pt"}):
        return formats == {"pt"}
    return any(map(is_of_layer, tensors))
