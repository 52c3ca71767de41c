"""The folders in which servers keep the pasts of prompts, so that they can be found again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_state_path

from mlxspec.files import replacing
from mlxspec.metrics import Tell

_MOST = 32  # folders that are remembered, the latest ones


@dataclass(frozen=True)
class Place:
    """A folder, and the most bytes that it may hold."""

    folder: Path
    max_bytes: int

    @property
    def files(self) -> list[Path]:
        """What it holds at present; nothing where it is gone."""
        return [path for path in self.folder.glob("*/*") if path.is_file()]


def file() -> Path:
    """Where they are noted."""
    return user_state_path("mlxspec") / "prefix_folders.json"


def known() -> list[Place]:
    """The folders that are noted and still there, by name; damage counts as nothing."""
    places = (Place(Path(name), size) for name, size in _read().items())
    return sorted((one for one in places if one.folder.is_dir()), key=lambda one: str(one.folder))


def note(place: Place, tell: Tell) -> None:
    """Note a folder that is used from now on.

    Args:
        tell: called with a line where that is not possible.
    """
    noted = _read()
    name = str(place.folder.absolute())
    noted.pop(name, None)
    latest = dict([*noted.items(), (name, place.max_bytes)][-_MOST:])
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        with replacing(file(), private=True) as new:
            new.write(json.dumps(latest).encode())
    except OSError as error:
        tell(f"{file()} cannot be written: {error.strerror}; `mlxspec doctor` will not show it")


def _read() -> dict[str, int]:
    try:
        content: Any = json.loads(file().read_bytes())
    except (OSError, ValueError):
        return {}
    found = content.items() if isinstance(content, dict) else ()
    return {name: size for name, size in found if type(size) is int}
