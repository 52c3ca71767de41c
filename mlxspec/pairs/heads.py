"""From a folder to a trained head on a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxspec.drafters.heads.kinds import MAKERS, TrainedHead
from mlxspec.drafters.heads.recognition import Kind, kind_of
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.errors import LoadError, UsageError
from mlxspec.models.caches.original import Model
from mlxspec.models.footprint import Footprint, footprint_of_head
from mlxspec.pairs import mtp
from mlxspec.pairs.contents import CONFIG, read_json, weight_files
from mlxspec.pairs.weights import bytes_of, index_error, missing_file, readings

BITS = (4, 8)


def kind_in(folder: Path, target: Path) -> Kind | None:
    """The kind of the head that a folder holds; None where it holds a model.

    Args:
        target: the target's folder.
    """
    kind = kind_of(read_json(folder / CONFIG))
    return "mtp" if kind is None and mtp.is_original_of(folder, target) else kind


def weights_in(kind: Kind, folder: Path) -> int:
    """Bytes of the weights of a head, of which the files may hold more."""
    if kind == "mtp":
        return bytes_of(mtp.tensors_of(folder))
    return sum(path.stat().st_size for path in weight_files(folder))


def footprint_in(kind: Kind, config: Mapping[str, Any], weights: int) -> Footprint:
    """The memory of a head, by its configuration and the bytes of its weights."""
    layers = 1 if kind == "mtp" else int(config.get("num_hidden_layers", 1))
    return footprint_of_head(mtp.text_of(config), weights, layers=layers)


def misfit(kind: Kind, config: Mapping[str, Any], target: Mapping[str, Any], place: str) -> None:
    """Raise LoadError where a head's configuration tells that it is made for another target.

    Args:
        target: the content of the target's config.json.
    """
    text = mtp.text_of(target)
    if kind == "mtp":
        mtp.require_known(mtp.kind_of_target(target))
        mtp.require_known(mtp.kind_of_target(config))
        mtp.require_fit(config, text, place)
    elif (own := config.get("hidden_size")) != (hidden := text.get("hidden_size")):
        raise LoadError(
            f"The head in {place} has a hidden size of {own}, and the target one of {hidden}.",
            hint="Use a head that was made for this target.",
        )


def load_head(kind: Kind, folder: Path, target: Model, bits: int | None = None) -> TrainedHead:
    """Load a head from a folder that holds one.

    Args:
        kind: of the head; see `kind_in`.
        bits: quantise it to that many, where it is not quantised yet; None leaves it as it is.

    Raises:
        LoadError: it is damaged, or does not fit the target. UsageError: no such bits.
    """
    if bits is not None and bits not in BITS:
        raise UsageError(f"A head cannot be quantised to {bits} bits.", hint="Use 4 or 8.")
    if kind == "mtp":
        return mtp.head_in(folder, target, bits)
    config, trunk = read_json(folder / CONFIG), Trunk(target)
    first: LoadError | None = None
    for weights in readings(folder):
        try:
            return MAKERS[kind](config, weights.read(), trunk, str(folder), bits)
        except LoadError as error:
            first = first or error
    assert first is not None
    raise missing_file(folder) or index_error(folder) or first
