"""LoRA weights for a target."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters

from mlxspec.errors import LoadError
from mlxspec.models.caches.original import Model
from mlxspec.pairs.contents import ADAPTER_CONFIG, ADAPTERS, in_one_line, require_adapter

_LEAVES = {"lora_a", "lora_b", "m"}


def applied(model: Model, folder: Path) -> Model:
    """`model` with an adapter in mlx-lm's layout.

    Raises:
        LoadError: the folder has no such adapter, or it is one of another model.
    """
    require_adapter(folder)
    try:
        model = load_adapters(model, str(folder))
        model.eval()
        mx.eval(model.parameters())
        given = mx.load(str(folder / ADAPTERS))
    except KeyError as error:
        raise LoadError(
            f"{folder / ADAPTER_CONFIG} has no {error}.", hint="Train or download it again."
        ) from error
    except Exception as error:  # whatever mlx-lm comes across in the configuration and the weights
        raise LoadError(
            f"The adapter in {folder} cannot be applied: {in_one_line(error)}.",
            hint="It must have been trained on this target with mlx-lm.",
        ) from error
    # mlx-lm leaves what an adapter lacks at random numbers.
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name in parameters:
        if name.rpartition(".")[2] in _LEAVES and name not in given:
            raise LoadError(
                f"The adapter in {folder} lacks {name}.",
                hint="It must have been trained on this target with mlx-lm.",
            )
    return model


def note_beside(folder: Path, adapter: Path | None) -> tuple[str, ...]:
    """A line for people where an adapter lies beside a model's weights, and none is applied."""
    if adapter is not None or not (folder / ADAPTERS).exists():
        return ()
    return (
        f"the adapter beside the weights is not applied: --adapter {folder}, or adapter= in "
        "Python, applies it",
    )
