"""From a folder to mlx-lm's model, with every parameter from a file that is known."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from mlxspec.drafters.heads.mtp_weights import is_of_layer
from mlxspec.errors import LoadError, MlxspecError
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.pairs.contents import CONFIG, in_one_line, read_json, weight_files
from mlxspec.pairs.weights import Weights, first_usable

# Small files beside the configuration that mlx-lm reads.
_BESIDE = ("generation_config.json", "hf_quant_config.json")
_KNOWN_PACKINGS = [
    "bitnet",
    "mxfp4",
    "mxfp8",
    "fp8",
    "compressed-tensors",
    "modelopt",
    "awq",
    "gptq",
]


@dataclass(frozen=True)
class Loaded:
    """A model with its configuration, completed by generation_config.json.

    notes: what a person should know of how it was loaded.
    """

    model: Model
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


class Unfit(ValueError):
    """Weights that are not the model's parameters."""


def load_folder(folder: Path, *, trust_remote_code: bool = False) -> Loaded:
    """Load a complete folder.

    Raises:
        LoadError: mlx-lm has no such model, or the weights are not those of the configuration.
    """
    config = read_json(folder / CONFIG)
    _require_trusted(folder, config, trust_remote_code)
    return first_usable(folder, lambda weights: _loaded(weights, config))


def _require_trusted(folder: Path, config: Mapping[str, Any], trust: bool) -> None:
    file = config.get("model_file")
    if file is None:
        return
    if not isinstance(file, str):
        raise LoadError(f"{folder / CONFIG} has no usable model_file.", hint="Remove it.")
    if not trust:
        raise LoadError(
            f"{folder} needs code of its own, {file}, which is not run.",
            hint="Read the code; trust_remote_code=True, or --trust-remote-code, runs it.",
        )


def _notes(weights: Weights) -> tuple[str, ...]:
    others = sorted({path.name for path in weight_files(weights.folder)} - set(weights.files))
    if weights.by_index or not others:
        return ()
    return (
        f"{weights.folder} holds more than one set of weights, and no index tells which to use: "
        f"{_listed(weights.files)} is read, {_listed(others)} is not",
    )


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _loaded(weights: Weights, config: dict[str, Any]) -> Loaded:
    """mlx-lm's model of `config` with these weights.

    mlx-lm is given a folder without weights, and takes them where a model would sanitize its own.
    """
    folder = weights.folder
    # Handed over once: whoever keeps an array that is transformed keeps it in memory twice.
    handed = [weights.read()]
    classes: Any = partial(_classes, folder=folder, handed=handed, own=config.get("model_file"))
    try:
        with tempfile.TemporaryDirectory() as place:
            _write_configuration(folder, Path(place), config)
            model, completed = load_model(
                Path(place),
                strict=False,
                model_config={"model_file": None} if "model_file" in config else None,
                get_model_classes=classes,
            )
        # Numbers of a configuration that fit nothing show in the first pass, not in loading.
        model(mx.zeros((1, 1), mx.int32), cache=fresh_cache(model, None))
    except MlxspecError:
        raise
    except KeyError as error:
        raise _lacks(folder, str(error.args[0] if error.args else error), config) from error
    except Exception as error:
        # A model type, a configuration or weights that mlx-lm cannot use: its models raise whatever
        # they come across.
        raise LoadError(
            f"mlx-lm cannot load {folder}: {in_one_line(error)}.", hint=_hint(config)
        ) from error
    for name in ("sanitize", "load_weights"):
        vars(model).pop(name, None)
    return Loaded(model, completed, _notes(weights))


def _classes(
    config: dict[str, Any], *, folder: Path, handed: list[dict[str, mx.array]], own: str | None
) -> tuple[Callable[[Any], Model], Any]:
    model_class, arguments = _own_classes(folder, own) if own else _get_classes(config)

    def made(args: Any) -> Model:
        model = model_class(args)
        sanitize = getattr(model, "sanitize", dict)
        model.sanitize = lambda _: sanitize(handed.pop())
        model.load_weights = partial(_take, model)
        return model

    return made, arguments


def _own_classes(folder: Path, file: str) -> tuple[Any, Any]:
    """The classes of a model that brings its own code, which a person trusts."""
    spec = importlib.util.spec_from_file_location("custom_model", folder / file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model, module.ModelArgs


def _take(model: nn.Module, pairs: list[tuple[str, mx.array]], strict: bool = True) -> None:
    """Load weights that are the model's parameters, all of them and no others.

    An MTP layer beside them is no part of the model, and left out.
    """
    expected: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    pairs = [(name, one) for name, one in pairs if name in expected or not is_of_layer(name)]
    found = dict(pairs)
    missing, others = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing:
        raise Unfit(f"its weights lack {len(missing)} parameters, such as {missing[0]}")
    if others:
        raise Unfit(f"its weights have {len(others)} parameters too many, such as {others[0]}")
    for name, array in expected.items():
        is_packed = array.dtype == mx.uint32
        if found[name].shape != array.shape:
            raise Unfit(f"the shape of {name} is {found[name].shape}, and not {array.shape}")
        if is_packed != (found[name].dtype == mx.uint32) or (
            mx.issubdtype(array.dtype, mx.floating)
            and not mx.issubdtype(found[name].dtype, mx.floating)
        ):
            raise Unfit(f"{name} has numbers of another packing, {found[name].dtype}")
    nn.Module.load_weights(model, pairs, strict=True)


def _write_configuration(folder: Path, place: Path, config: dict[str, Any]) -> None:
    """The configuration in ASCII, which reads the same in every locale."""
    (place / CONFIG).write_text(json.dumps(config))
    for name in _BESIDE:
        if (folder / name).exists():
            try:
                (place / name).write_text(json.dumps(read_json(folder / name)))
            except LoadError:
                if name == "hf_quant_config.json":  # mlx-lm goes without the other, too
                    raise


def _lacks(folder: Path, key: str, config: Mapping[str, Any]) -> LoadError:
    if "." in key:  # a tensor, and not a key of the configuration
        return LoadError(f"The weights in {folder} have no tensor {key}.", hint=_hint(config))
    return LoadError(f"{folder / CONFIG} has no {key!r}.", hint="Use a model that mlx-lm can run.")


def _hint(config: Mapping[str, Any]) -> str:
    packing = config.get("quantization_config")
    method = packing.get("quant_method") if isinstance(packing, dict) else None
    if method is None:
        return "Check config.json and the weights, or use a model that mlx-lm can run."
    known = "as mlx-lm reads it" if method in _KNOWN_PACKINGS else "which mlx-lm does not read"
    return f"The weights are packed by {method}, {known}; take the model in MLX's own quantisation."
