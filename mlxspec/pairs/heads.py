"""From a folder to a trained head on a target."""

from __future__ import annotations

from pathlib import Path

from mlxspec.drafters.heads.kinds import MAKERS, TrainedHead
from mlxspec.drafters.heads.recognition import Kind, kind_of
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.errors import UsageError
from mlxspec.models.caches.original import Model
from mlxspec.models.layout import lay_out
from mlxspec.pairs import mtp
from mlxspec.pairs.contents import CONFIG, read_json
from mlxspec.pairs.weights import first_usable

BITS = (4, 8)


def kind_in(folder: Path, target: Path) -> Kind | None:
    """The kind of the head that a folder holds; None where it holds a model.

    Args:
        target: the target's folder.
    """
    kind = kind_of(read_json(folder / CONFIG))
    return "mtp" if kind is None and mtp.is_original_of(folder, target) else kind


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
    head = mtp.head_in(folder, target, bits) if kind == "mtp" else _made(kind, folder, target, bits)
    lay_out(head.module)
    return head


def _made(kind: Kind, folder: Path, target: Model, bits: int | None) -> TrainedHead:
    """A head of a folder's configuration, with its weights by either of their names."""
    config, trunk = read_json(folder / CONFIG), Trunk(target)
    maker = MAKERS[kind]
    return first_usable(folder, lambda one: maker(config, one.read(), trunk, str(folder), bits))
