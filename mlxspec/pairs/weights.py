"""Which files a model's tensors are read from, and reading them.

mlx-lm reads every file that is named model*.safetensors, in the order in which the directory lists
them, and of a tensor that is in several files it keeps the last. Here the index decides. Without an
index each set of files that may be a whole model is tried, in an order that the names alone decide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlxspec.errors import LoadError
from mlxspec.pairs.contents import (
    INDEX,
    damaged,
    incomplete,
    named_in_utf8,
    read_json,
    weight_files,
)

T = TypeVar("T")

_SERIES = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_SINGLE = "model.safetensors"
_MX_DTYPES = frozenset(
    ["BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64"]
    + ["F16", "BF16", "F32", "C64", "F8_E4M3", "F8_E8M0"]
)


@dataclass(frozen=True)
class Weights:
    """Where each tensor of a model is, as one reading of the folder has it.

    by_index: whether the folder's index says so.
    """

    folder: Path
    tensors: Mapping[str, Path]
    by_index: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(sorted({path.name for path in self.tensors.values()}))

    def read(self) -> dict[str, mx.array]:
        """Every tensor by its name, not computed yet.

        Raises:
            LoadError: a file is damaged, or has numbers that MLX does not have.
        """
        found: dict[str, mx.array] = {}
        for path in sorted(set(self.tensors.values())):
            arrays = _load(path)
            found |= {name: arrays[name] for name, at in self.tensors.items() if at == path}
        return found


def bytes_of(tensors: Mapping[str, Path]) -> int:
    """Bytes of some tensors, by the headers of their files."""
    ends = {
        name: entry["data_offsets"]
        for path in set(tensors.values())
        for name, entry in _header(path).items()
        if tensors.get(name) == path
    }
    return sum(stop - start for start, stop in ends.values())


def readings(folder: Path) -> list[Weights]:
    """The ways to read a folder's weights, the likeliest first; there is one at least.

    Raises:
        LoadError: a file that counts is damaged.
    """
    index, missing = _index(folder)
    decided = set(index.values()) if index and not missing else None
    # A damaged file that the index leaves out is none of the model's.
    names = {
        path: list(_header(path)) if decided is None or path.name in decided else names_in(path)
        for path in weight_files(folder)
    }
    found: list[Weights] = []
    if decided is not None:
        indexed = {path: inside for path, inside in names.items() if path.name in decided}
        found.append(Weights(folder, _merged(indexed, index), by_index=True))
    found += [
        Weights(folder, _merged({path: names[path] for path in group}, index))
        for group in (*_groups(list(names)), list(names))
    ]
    return [one for i, one in enumerate(found) if all(one.tensors != x.tensors for x in found[:i])]


def first_usable(folder: Path, use: Callable[[Weights], T]) -> T:
    """What `use` makes of the first reading of a folder that it can use.

    Raises:
        LoadError: it can use none; the error is that of the likeliest cause.
    """
    first: LoadError | None = None
    for weights in readings(folder):
        try:
            return use(weights)
        except LoadError as error:
            first = first or error
    assert first is not None
    raise missing_file(folder) or index_error(folder) or first


def missing_file(folder: Path) -> LoadError | None:
    """An error that names a file of weights that ought to be in the folder; None where all are."""
    try:
        _, missing = _index(folder)
    except LoadError as error:
        return error
    for path in weight_files(folder) if not missing else ():
        if match := _SERIES.fullmatch(path.name):
            prefix, number, total = match.groups()
            names = (f"{prefix}-{i:0{len(number)}}-of-{total}.safetensors" for i in _count(total))
            missing = [name for name in names if not (folder / name).exists()]
    return incomplete(folder / missing[0]) if missing else None


def index_error(folder: Path) -> LoadError | None:
    """Why the folder's index cannot be used; None where it can, or where there is none."""
    try:
        _read_index(folder)
    except LoadError as error:
        return error
    return None


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        return {}
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(one, str) for one in files.values()):
        raise damaged(path, ValueError("it has no weight_map"))
    return files


def _index(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The file of each tensor by the index, and the files that it names and that are not there."""
    if index_error(folder) is not None:
        return {}, []
    index = _read_index(folder)
    here = {path.name for path in weight_files(folder)}
    return index, sorted(set(index.values()) - here)


def _groups(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Sets of files that may each be a whole model: one file, each whole series, and the others."""
    if any(path.name == _SINGLE for path in files):
        yield [path for path in files if path.name == _SINGLE]
    series: dict[tuple[str, str], list[Path]] = {}
    for path in files:
        if match := _SERIES.fullmatch(path.name):
            series.setdefault((match[1], match[3]), []).append(path)
    for (_, total), members in sorted(series.items()):
        if len(members) == int(total):
            yield members
    others = [path for path in files if path.name != _SINGLE and not _SERIES.fullmatch(path.name)]
    if others:
        yield others


def _merged(names: Mapping[Path, Sequence[str]], index: Mapping[str, str]) -> dict[str, Path]:
    """The file of each tensor: the one that the index names, else the last by its name."""
    found: dict[str, Path] = {}
    for path, inside in sorted(names.items()):
        found |= {name: path for name in inside if index.get(name, path.name) == path.name}
    for path, inside in sorted(names.items()):  # the index may be wrong about where a tensor is
        found |= {name: path for name in inside if name not in found}
    return found


def _count(total: str) -> range:
    return range(1, min(int(total), 9999) + 1)


# --- files ------------------------------------------------------------------------------


def format_of(path: Path) -> str | None:
    """Who wrote a file, by its header: "pt" or "mlx"; None where it does not say.

    Raises:
        LoadError: it cannot be read.
    """
    noted = _whole_header(path).get("__metadata__")
    return noted.get("format") if isinstance(noted, dict) else None


def _header(path: Path) -> dict[str, Any]:
    """The tensors of a file, by its header.

    Raises:
        LoadError: it cannot be read.
    """
    header = _whole_header(path)
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _whole_header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for entry in entries]
        whole = 8 + length + max(ends, default=0) == size
    except OSError as error:
        raise LoadError(
            f"{path} cannot be read: {error.strerror}.", hint="It must be a file of your own."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, ValueError("it has no header of safetensors")) from error
    if not whole:
        raise damaged(path, ValueError("its header does not fit its size"))
    found: dict[str, Any] = header
    return found


def names_in(path: Path) -> list[str]:
    """The tensors of a file; none where it is damaged."""
    try:
        return list(_header(path))
    except LoadError:
        return []


def _load(path: Path) -> dict[str, mx.array]:
    try:
        with named_in_utf8(path) as there:
            return dict(cast(Any, mx.load(str(there), format="safetensors")))
    except RuntimeError as error:
        header = _header(path)
        for name, entry in header.items():
            if entry.get("dtype") not in _MX_DTYPES:
                raise LoadError(
                    f"{path} has numbers that MLX does not have: {name} is {entry.get('dtype')}.",
                    hint="Take the model in BF16, F16 or F32, or in MLX's own quantisation.",
                ) from error
        raise damaged(path, error) from error
