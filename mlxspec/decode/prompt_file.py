"""A safetensors file of nested values and arrays that is checked before it is used.

mlx-lm's `save_prompt_cache` and `load_prompt_cache` are not used: they take only names that end in
.safetensors, look up classes by names in the file, do not know the caches that an architecture
defines for itself, and MLX trusts a false header.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import mlx.core as mx
import numpy as np

from mlxspec.files import replacing

MARK = "mlxspec prompt cache"
FORMAT = f"{MARK} 4"
_HEAD = 4096  # the first bytes, which hold the mark if the file has one

_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_WIDTHS |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}


class Unusable(Exception):
    """A file that cannot be used, and the reason."""

    ours = False


class Damaged(Unusable):
    """A file of ours, or an empty one, that may be replaced."""

    ours = True


def read(path: Path) -> dict[str, Any] | None:
    """The values that `write` was given, or None without a file. Tuples come back as lists.

    Raises:
        Unusable: it cannot be read, or is none of ours. Damaged: it may be replaced.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():  # opening a pipe would wait for a writer
            raise Unusable("is not a file")
        metadata = _metadata_of(path)
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from error
    if metadata["format"] != FORMAT:
        raise Damaged("is of another version of mlxspec")
    arrays = cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
    if _checksum(metadata["values"], arrays) != metadata["checksum"]:
        raise Damaged("is damaged: its checksum is another")
    values: dict[str, Any] = _unpacked(json.loads(metadata["values"]), arrays)
    return values


def write(path: Path, values: dict[str, Any]) -> None:
    """Replace a file whole, or leave it as it is.

    Args:
        values: nested dicts, lists and tuples of arrays, numbers, strings and None.

    Raises:
        OSError: it cannot be written.
    """
    arrays: dict[str, mx.array] = {}
    described = json.dumps(_packed(values, arrays))
    metadata = {
        "checksum": _checksum(described, arrays),
        "format": FORMAT,
        "values": described,
    }
    with replacing(path) as file:
        mx.save_safetensors(file, arrays, metadata)


def _packed(value: Any, arrays: dict[str, mx.array]) -> Any:
    """The value with each array moved to `arrays`, and its name in its place."""
    if isinstance(value, mx.array):
        name = f"array.{len(arrays)}"  # MLX sorts names, and `__metadata__` must come first
        arrays[name] = value
        return {"array": name}
    if isinstance(value, dict):
        return {key: _packed(one, arrays) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(one, arrays) for one in value]
    return value


def _unpacked(value: Any, arrays: dict[str, mx.array]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"array"}:
            return arrays[value["array"]]
        return {key: _unpacked(one, arrays) for key, one in value.items()}
    if isinstance(value, list):
        return [_unpacked(one, arrays) for one in value]
    return value


def _checksum(described: str, arrays: dict[str, mx.array]) -> str:
    """CRC-32 of the values' description and the arrays' names, shapes, dtypes and bytes."""
    total = crc32(described.encode())
    for name, array in sorted(arrays.items()):
        total = crc32(f"{name} {array.shape} {array.dtype}".encode(), total)
        total = crc32(np.asarray(array.reshape(-1).view(mx.uint8)).data, total)
    return f"{total:08x}"


def _metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file whose header agrees with its size.

    Raises:
        Unusable, Damaged: see `read`. OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise Damaged("is empty")
        head = file.read(_HEAD)
        if MARK.encode() not in head:
            raise Unusable("is not a prompt cache of mlxspec")
        length = int.from_bytes(head[:8], "little")
        if length > size - 8:
            raise Damaged("is damaged: it ends early")
        file.seek(8)
        header = file.read(length)
    try:
        return _checked(json.loads(header), size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged("is damaged: its header makes no sense") from error


def _checked(header: dict[str, Any], room: int) -> dict[str, str]:
    """The metadata of a header whose arrays all lie in `room` bytes.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the header makes no sense.
    """
    metadata = header.pop("__metadata__")
    if not all(isinstance(metadata[key], str) for key in ("checksum", "format", "values")):
        raise ValueError("metadata are strings")
    for entry in header.values():
        (start, end), shape = entry["data_offsets"], entry["shape"]
        if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
            raise ValueError("sizes are whole numbers")
        if not (end <= room and end - start == _WIDTHS[entry["dtype"]] * prod(shape)):
            raise ValueError("an array's size is another")
    return {key: metadata[key] for key in ("checksum", "format", "values")}
