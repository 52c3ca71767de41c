"""Drafts for a target: from the table's families and from what is on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from mlxspec.control.records import Record
from mlxspec.defaults import DEFAULT_PAIR, HISTORY, MTP
from mlxspec.drafters.vocabulary import ENOUGH
from mlxspec.errors import MlxspecError
from mlxspec.pairs import mtp
from mlxspec.pairs.check import PREVIEW
from mlxspec.pairs.hub import Repository, download
from mlxspec.pairs.loading import shared_of
from mlxspec.pairs.stock import Held, held, weights_of
from mlxspec.pairs.table import Pair
from mlxspec.pairs.tokenizer_files import load_folder_tokenizer

_LARGEST = 0.5  # of the target's bytes
# A family by the beginning of a model's name, as its makers write it.
_FAMILY = re.compile(r"(?:meta-)?([a-z]+-?\d+(?:\.\d+)?|[a-z]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Suggestion:
    """A draft for a target.

    listed: a pair of the table has the two together. shared: the fraction of the target's tokens,
    None where the draft's tokenizer is not here. ratio: of bytes, None where one is not known.
    accepted: the rate of its first proposal that was measured here. why: in words.
    """

    draft: str
    listed: bool
    here: bool
    shared: float | None
    ratio: float | None
    accepted: float | None
    why: str

    @property
    def rank(self) -> tuple[Any, ...]:
        """The best first: what was measured, the table's own, shared tokens, and a small size."""
        return (
            -(self.accepted or 0.0),
            not self.listed,
            -(self.shared or 0.0),
            not self.here,
            self.ratio or 1.0,
            self.draft,
        )

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def suggest(target: str, pairs: Iterable[Pair], records: Iterable[Record]) -> list[Suggestion]:
    """Drafts for a target, the best first; HISTORY, which needs no model, is the last of them.

    Raises:
        LoadError: the target's configuration and tokenizer are not to be had.
    """
    mine = held("target", target)
    if isinstance(mine.repository, Repository) and mine.state != "here":
        download(mine.repository, target, PREVIEW)
        mine = held("target", target)
    # The embedded pair is too small to suit anything else.
    known = [one for one in pairs if one.name != DEFAULT_PAIR or one.target == target]
    rates = _rates(target, records)
    found = [
        one
        for draft, listed in _candidates(mine, known).items()
        if (one := _judged(mine, draft, listed, rates.get(draft))) is not None
    ]
    found.sort(key=lambda one: one.rank)
    if mine.folder is not None and mtp.is_target(mine.folder) and mtp.tensors_of(mine.folder):
        own = "the layer that the target was trained with, among its own weights"
        found.insert(0, Suggestion(MTP, False, True, 1.0, 0.0, rates.get(MTP), own))
    words = "needs no model; pays where text is quoted, edited or listed"
    return [*found, Suggestion(HISTORY, False, True, 1.0, 0.0, rates.get(HISTORY), words)]


def _candidates(target: Held, pairs: Iterable[Pair]) -> dict[str, bool]:
    """Drafts that may suit, each with whether the table has it with this very target."""
    found: dict[str, bool] = {}
    for pair in pairs:
        same = pair.target == target.location
        for draft in pair.models:
            if same or family(pair.target) == family(target.location):
                found[draft] = found.get(draft, False) or same
    for name in _cached():
        found.setdefault(name, False)
    found.pop(target.location, None)
    return found


def _cached() -> list[str]:
    """Repositories of models in the hub's cache."""
    with suppress(CacheNotFound):
        return sorted(one.repo_id for one in scan_cache_dir().repos if one.repo_type == "model")
    return []


def family(location: str) -> str:
    """The family of a model by its name, such as qwen3, llama-3 or gemma-3."""
    found = _FAMILY.match(location.rpartition("/")[2])
    return found[1].lower().replace("-", "") if found else ""


def _judged(target: Held, draft: str, listed: bool, accepted: float | None) -> Suggestion | None:
    """What is known of a draft; None where it cannot be one."""
    try:
        one = held("draft", draft)
    except MlxspecError:
        return None
    shared, ratio = _shared(target, one), _ratio(target, one)
    same = family(draft) == family(target.location)
    if (shared is not None and shared < ENOUGH) or (ratio is not None and ratio > _LARGEST):
        return None
    if shared is None and not (same or listed):
        return None
    words = ["the table pairs them"] if listed else ["of the same family"] if same else []
    if shared is not None:
        words.append("the same tokens" if shared == 1.0 else f"{shared:.0%} of the tokens")
    if ratio is not None:
        words.append(f"{ratio:.0%} of the size")
    words.append("on disk" if one.state == "here" else "not on disk")
    return Suggestion(draft, listed, one.state == "here", shared, ratio, accepted, ", ".join(words))


def _shared(target: Held, draft: Held) -> float | None:
    if target.folder is None or draft.folder is None:
        return None
    try:
        draft.config()  # what has none is no model
        tokenizer = load_folder_tokenizer(target.folder)
        shared = shared_of(tokenizer, target.folder, draft.folder, False)
    except MlxspecError:
        return None
    return 1.0 if shared is None else shared.overlap


def _ratio(target: Held, draft: Held) -> float | None:
    folders = (draft.folder, target.folder)
    if any(one is None for one in folders) or {draft.state, target.state} != {"here"}:
        return None
    sizes = [weights_of(folder) for folder in folders if folder is not None]
    return sizes[0] / sizes[1] if sizes[1] else None


def _rates(target: str, records: Iterable[Record]) -> dict[str, float]:
    """The acceptance of a first proposal that was measured here, by draft."""
    found: dict[str, float] = {}
    for record in records:
        if record.setting.target != target:
            continue
        for drafters in record.learned.by_length.values():
            for name, one in drafters.items():
                if one.acceptance:
                    draft = HISTORY if name == HISTORY else record.setting.draft or name
                    found[draft] = max(found.get(draft, 0.0), one.acceptance[0])
    return found
