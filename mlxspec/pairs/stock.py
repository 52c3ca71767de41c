"""What of a pair is on this machine, and how much memory it needs, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import (
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
)

from mlxspec.defaults import MODEL, MTP
from mlxspec.device.memory import limit
from mlxspec.drafters.heads.footprint import head_footprint
from mlxspec.drafters.heads.recognition import Kind
from mlxspec.errors import LoadError, MlxspecError
from mlxspec.models.footprint import Footprint, footprint
from mlxspec.pairs import mtp
from mlxspec.pairs.contents import CONFIG, read_json, require_complete, weight_files
from mlxspec.pairs.folders import located, named
from mlxspec.pairs.heads import kind_in
from mlxspec.pairs.hub import Repository, snapshot
from mlxspec.pairs.memory import USUAL_CONTEXT, MemorySum, memory_sum
from mlxspec.pairs.pull import cached_size
from mlxspec.pairs.recommended import recommended
from mlxspec.pairs.table import Pair
from mlxspec.pairs.weights import bytes_of, missing_file, readings

TARGET, DRAFT = "target", "draft"
State = Literal["here", "in part", "absent"]


@dataclass(frozen=True)
class Held:
    """A model of a pair on this machine.

    role: "target", "draft", or the name of one of several drafts. repository: None for a folder.
    folder: None where nothing of it is here. size: bytes on disk. head: the kind of a trained
    head, as far as that is known from what is here.
    """

    role: str
    location: str
    repository: Repository | None
    folder: Path | None
    state: State
    size: int
    head: Kind | None = None

    def config(self) -> dict[str, Any]:
        """Its configuration; raises LoadError where it is not here."""
        return read_json((self.folder or Path(self.location)) / CONFIG)


def stock(pair: Pair, *, speculation: bool = True) -> list[Held]:
    """The models of a pair as they are on this machine. The hub is not asked.

    Raises:
        LoadError: a location is no folder and no repository.
    """
    target = held(TARGET, pair.target, pair.revision)
    drafts = named(pair) if speculation else {}
    found = [
        _as_head(held(DRAFT if name == MODEL else name, at), target) for name, at in drafts.items()
    ]
    if speculation and MTP in pair.drafts:
        found.append(replace(target, role=MTP, size=0, head="mtp"))
    return [target, *found]


def _as_head(one: Held, target: Held) -> Held:
    """A draft, known for a head if its folder has one; and here, if all of that is here."""
    with suppress(LoadError):
        if one.folder is not None and target.folder is not None:
            kind = kind_in(one.folder, target.folder)
            whole = kind == "mtp" and bool(mtp.tensors_of(one.folder))
            return replace(one, head=kind, state="here" if whole else one.state)
    return one


def held(role: str, location: str, revision: str | None = None) -> Held:
    """A model as it is on this machine."""
    at = located(location, revision)
    if isinstance(at, Path):
        state: State = "here" if _is_whole(at) else "in part" if at.is_dir() else "absent"
        size = sum(path.stat().st_size for path in at.glob("*") if path.is_file())
        return Held(role, location, None, at, state, size)
    folder = None
    with suppress(IncompleteSnapshotError, LocalEntryNotFoundError, HFValidationError):
        folder = snapshot(at, here=True)
    size = cached_size(at)
    if folder is not None and _is_whole(folder):
        return Held(role, location, at, folder, "here", size)
    return Held(role, location, at, folder, "in part" if size else "absent", size)


def recommended_of(pair: Pair) -> dict[str, float]:
    """The sampling that the authors of a pair's target recommend; empty where it is not here."""
    folder = held(TARGET, pair.target, pair.revision).folder
    return {} if folder is None else recommended(folder)


def _is_whole(folder: Path) -> bool:
    """Whether a folder has all the files of a model, each as long as it says."""
    try:
        require_complete(folder)
        if missing_file(folder) is not None:
            return False
        readings(folder)
    except MlxspecError:
        return False
    return True


def weights_of(folder: Path) -> int:
    """Bytes of the weights of a folder: of those that count, where it holds several sets."""
    with suppress(LoadError):
        names = readings(folder)[0].files
        return sum((folder / name).stat().st_size for name in names)
    return sum(path.stat().st_size for path in weight_files(folder))


def weights_in(one: Held) -> int:
    """Bytes of the weights of a model or a head, as far as they are here."""
    if one.folder is None:
        return 0
    if one.head == "mtp":
        return bytes_of(mtp.tensors_of(one.folder))
    # A target leaves its MTP layer out.
    left_out = bytes_of(mtp.tensors_of(one.folder)) if one.role == TARGET else 0
    return weights_of(one.folder) - left_out


def footprint_of(one: Held, weights: int) -> Footprint:
    """The footprint of a model or of a trained head with so many bytes of weights.

    Raises:
        LoadError: it is not known beforehand.
    """
    config = one.config()
    if one.head is not None:
        return head_footprint(one.head, config, weights)
    return footprint(config, weights)


def memory_of(
    pair: Pair,
    held_models: list[Held],
    *,
    weights: Mapping[str, int] | None = None,
    context: int | None = None,
) -> MemorySum:
    """The memory that a pair needs for a text, by what is here of it.

    Args:
        weights: bytes by role, of models whose weights are not here.
        context: tokens of the text; None takes the pair's own, or a usual one.

    Raises:
        LoadError: a configuration is not here, or is not one of mlx-lm's.
    """
    prints: dict[str, Footprint] = {}
    for one in held_models:
        known = (weights or {}).get(one.role)
        if known is None:
            known = weights_in(one)
        prints[one.role] = footprint_of(one, known)
    target = prints.pop(TARGET)
    wanted = context or pair.context or USUAL_CONTEXT
    count = pair.draft_tokens
    return memory_sum(
        target,
        prints,
        limit(),
        context=min(wanted, target.context or wanted),
        **({"draft_tokens": count} if isinstance(count, int) else {}),
    )
