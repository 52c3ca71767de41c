"""Records of what was learned on this machine, kept in the platform's state folder.

One JSON file holds a record for each setting: the pair, its quantisation, the chip, the backend and
the versions of MLX and mlx-lm. A record of another setting is never used, so that an update or
another machine cannot make it wrong. Writing takes a lock, reads the file again and replaces it
whole; a damaged file is set aside.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from platformdirs import user_state_path

from mlxspec.control.estimates import LENGTH_CLASSES, Knowledge, Learned
from mlxspec.defaults import AUTO, DraftTokens
from mlxspec.files import replacing
from mlxspec.metrics import Tell

FORMAT = 2  # 1 has nothing of rounds of several texts


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The conditions of a record. Measurements of another setting say nothing about this one."""

    target: str
    draft: str | None
    quantisation: str
    chip: str
    backend: str
    mlx: str
    mlx_lm: str


@dataclass(frozen=True)
class Recommendation:
    """The fastest K, or "auto", with its speed-up over plain decoding.

    `drafter` names the draft, where there may be several. `note` is the reason, where there is
    more to say than that it was measured.
    """

    draft_tokens: DraftTokens
    speed_up: float
    drafter: str = ""
    note: str = ""

    def __str__(self) -> str:
        if self.draft_tokens == 0:
            return f"do not speculate: {self.note or 'plain decoding is the fastest'}"
        plural = "" if self.draft_tokens == 1 else "s"
        what = f"{self.draft_tokens} draft token{plural}"
        if self.draft_tokens == AUTO:
            what = f"--draft-tokens {AUTO}"
        of = f" of {self.drafter}" if self.drafter else ""
        note = f" ({self.note})" if self.note else ""
        return f"use {what}{of}: {self.speed_up:.2f} x plain decoding{note}"


@dataclass(frozen=True)
class Record:
    setting: Setting
    learned: Learned = field(default_factory=Learned)
    recommendation: Recommendation | None = None


def file() -> Path:
    return user_state_path("mlxspec") / "tuning.json"


def recall(setting: Setting, tell: Tell) -> Record:
    """The record of a setting; an empty one where the setting was never tried.

    `tell` gets a line where the file could not be read.
    """
    return next((one for one in load_all(tell) if one.setting == setting), Record(setting))


def load_all(tell: Tell) -> list[Record]:
    """All records. `tell` gets a line where the file could not be read."""
    try:
        return _read(file())
    except _Unreadable as error:
        tell(str(error))
        return []


def remember(record: Record, tell: Tell) -> None:
    """Keep a record in place of the one for its setting. Never raises: `tell` gets a line.

    An earlier recommendation stays where the new record has none. A record that could not be read
    again is not kept: it would take all others with it.
    """
    try:
        _record(as_dict(record))
    except ValueError as error:
        tell(f"what was learned is not kept: {error}")
        return
    try:
        with _locked():
            kept = _kept(tell)
            before = next((one for one in kept if one.setting == record.setting), record)
            merged = Record(
                record.setting, record.learned, record.recommendation or before.recommendation
            )
            others = [one for one in kept if one.setting != record.setting]
            _write([*others, merged])
    except (OSError, _Unreadable) as error:
        tell(f"what was learned could not be kept in {file()}: {error}")


class _Unreadable(Exception):
    """A file that must be neither used nor replaced."""


class _Damaged(_Unreadable):
    """A file whose content is damaged."""


def _kept(tell: Tell) -> list[Record]:
    try:
        return _read(file())
    except _Damaged as error:
        aside = file().with_suffix(f".damaged-{os.getpid()}.json")
        file().rename(aside)
        tell(f"{error}; it is kept as {aside.name}, and a new one begun")
        return []


def _read(path: Path) -> list[Record]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _Unreadable(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _Damaged(f"{path} is damaged") from error
    if isinstance(content, dict) and isinstance(content.get("format"), int):
        if content["format"] > FORMAT:
            raise _Unreadable(f"{path} is of a newer mlxspec, and left alone")
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            return [_record(entry) for entry in content["records"]]
    raise _Damaged(f"{path} is damaged")


def described_length(there: int) -> str:
    """The texts that `Learned.by_length[there]` is about, in words."""
    if there < len(LENGTH_CLASSES):
        return f"texts up to {LENGTH_CLASSES[there]:,} tokens"
    return "longer texts"


def _record(entry: dict[str, Any]) -> Record:
    beside = {
        int(rows): Learned(_by_length(learned)) for rows, learned in entry.get("beside", {}).items()
    }
    learned = Learned(_by_length(entry["learned"]), beside)
    verdict = Recommendation(**entry["verdict"]) if entry["verdict"] else None
    return Record(Setting(**entry["setting"]), learned, verdict)


def _by_length(learned: dict[str, Any]) -> dict[int, dict[str, Knowledge]]:
    return {
        int(there): {
            str(name): Knowledge(_costs(one["costs"]), _numbers(one["acceptance"]))
            for name, one in drafters.items()
        }
        for there, drafters in learned.items()
    }


def _costs(values: list[Any]) -> tuple[float | None, ...]:
    measured = iter(_numbers([value for value in values if value is not None]))
    return tuple(None if value is None else next(measured) for value in values)


def _numbers(values: list[Any]) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if not all(isfinite(number) and number > 0 for number in numbers):
        raise ValueError("costs and rates are numbers above 0")
    return numbers


def _write(kept: list[Record]) -> None:
    content = {"format": FORMAT, "records": [as_dict(record) for record in kept]}
    with replacing(file(), private=True) as new:
        new.write(json.dumps(content, indent=1).encode())


def as_dict(record: Record) -> dict[str, Any]:
    beside = {str(rows): _lengths(one) for rows, one in record.learned.beside.items()}
    return {
        "setting": asdict(record.setting),
        "learned": _lengths(record.learned),
        "beside": beside,
        "verdict": asdict(record.recommendation) if record.recommendation else None,
    }


def _lengths(learned: Learned) -> dict[str, Any]:
    return {
        str(there): {name: asdict(one) for name, one in drafters.items()}
        for there, drafters in learned.by_length.items()
    }


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock that lets one process write at a time."""
    file().parent.mkdir(parents=True, exist_ok=True)
    with file().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
