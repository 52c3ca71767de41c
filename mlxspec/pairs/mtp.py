"""The MTP layer in a folder: alone, or beside the weights of the model that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxspec.drafters.heads.mtp import Mtp
from mlxspec.drafters.heads.mtp_weights import head_of, is_of_layer, layer_weights
from mlxspec.drafters.heads.recognition import kind_of
from mlxspec.errors import LoadError
from mlxspec.models.caches.original import Model
from mlxspec.pairs.contents import CONFIG, INDEX, read_json, weight_files
from mlxspec.pairs.weights import Weights, format_of, names_in, readings

# Kinds of targets whose layer is known, and of folders that have it alone.
TARGETS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
_SUFFIX = "_mtp"
ABOUT = (CONFIG, INDEX)  # what tells whether a checkpoint has its layer, and where
_BESIDE = "mtp*.safetensors"  # as some converters put it beside the files of a model
_SAME = {
    "hidden_size": "hidden size",
    "num_hidden_layers": "number of layers",
    "vocab_size": "vocabulary",
}


def tensors_of(folder: Path) -> dict[str, Path]:
    """The tensors of a folder's layer, and the files that they are in; empty where it has none.

    Raises:
        LoadError: a file that counts is damaged.
    """
    held = dict(readings(folder)[0].tensors) if weight_files(folder) else {}
    beside = {name: path for path in sorted(folder.glob(_BESIDE)) for name in names_in(path)}
    if beside or kind_of(read_json(folder / CONFIG)) is not None:
        return beside or held
    return {name: path for name, path in held.items() if is_of_layer(name)}


def head_in(folder: Path, target: Model, bits: int | None = None) -> Mtp:
    """The layer in a folder, as a head of `target`.

    Args:
        folder: of the layer alone, or of a checkpoint that has kept it.
        bits: quantise it to that many, where it is not quantised yet.

    Raises:
        LoadError: there is none, or it is that of another model.
    """
    config = read_json(folder / CONFIG)
    require_known(type(target).__module__.rpartition(".")[2])
    require_known(kind_of_target(config))
    text: Any = getattr(target, "language_model", target)
    require_fit(config, vars(text.args), str(folder))
    tensors = tensors_of(folder)
    if not tensors:
        raise no_layer(str(folder))
    weights = layer_weights(Weights(folder, tensors).read(), less_one=_is_less_one(tensors))
    return head_of(weights, target, str(folder), bits)


def is_original_of(folder: Path, target: Path) -> bool:
    """Whether a folder has the model of another one, and its layer; its weights need not be here.

    As a draft model it would be no smaller than its target.
    """
    if not is_target(folder):
        return False
    mine, its = (text_of(read_json(one / CONFIG)) for one in (folder, target))
    same = all(mine.get(key) == its.get(key) for key in _SAME)
    return same and bool(files_of(folder) or tensors_of(folder))


def is_target(folder: Path) -> bool:
    """Whether a folder has a model of a kind whose layer is known."""
    file = folder / CONFIG
    return file.exists() and read_json(file).get("model_type") in TARGETS


def files_of(folder: Path) -> tuple[str, ...]:
    """The files of a checkpoint that have its layer, by the index alone; empty without one."""
    files = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).exists() else None
    if not isinstance(files, dict):
        return ()
    return tuple(sorted({str(file) for name, file in files.items() if is_of_layer(name)}))


def kind_of_target(config: Mapping[str, Any]) -> str:
    """The kind of the model that a configuration is of, or that a layer alone is made for."""
    return str(config.get("model_type")).removesuffix(_SUFFIX)


def no_layer(place: str) -> LoadError:
    return LoadError(
        f"{place} has no MTP layer: whoever converted it left out the tensors mtp.*.",
        hint="Give the original checkpoint, or a folder split from it (…-MTP), with --draft.",
    )


def require_of(config: Mapping[str, Any], target: Mapping[str, Any], place: str) -> None:
    """Raise LoadError where a configuration is not that of a layer of a target, by the target's."""
    for one in (target, config):
        require_known(kind_of_target(one))
    require_fit(config, text_of(target), place)


def require_known(kind: str) -> None:
    """Raise LoadError unless the layer of such targets is known."""
    if kind not in TARGETS:
        raise LoadError(
            f"The MTP layer of {kind} is not known here; those of {', '.join(TARGETS)} are.",
            hint="Choose another draft; --draft history needs no model.",
        )


def require_fit(config: Mapping[str, Any], target: Mapping[str, Any], place: str) -> None:
    """Raise LoadError unless a folder's configuration is that of one layer of such a target.

    Args:
        config: the content of the folder's config.json. target: the same of the target's text.
    """
    text = text_of(config)
    for key, words in _SAME.items():
        if key in text and text[key] != target.get(key):
            raise LoadError(
                f"The MTP layer in {place} is for another target: its {words} is {text[key]}, "
                f"and this target's {target.get(key)}.",
                hint="Give the layer of the same model, in any quantisation.",
            )
    count = text.get("mtp_num_hidden_layers", 1)
    if isinstance(count, int) and count > 1:
        raise LoadError(
            f"{place} has {count} MTP layers, and one is known here.",
            hint="Choose another draft; --draft history needs no model.",
        )


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about text."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _is_less_one(tensors: Mapping[str, Path]) -> bool:
    """Whether the norms are stored minus one, as original files say, or the names in them."""
    formats = {format_of(path) for path in tensors.values()}
    if formats in ({"mlx"}, {"pt"}):
        return formats == {"pt"}
    return any(map(is_of_layer, tensors))
