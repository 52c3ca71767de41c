"""How a model's authors want it to be sampled: the `generation_config.json` beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxspec.errors import LoadError, UsageError
from mlxspec.pairs.contents import read_json
from mlxspec.params import WHOLE, sampling_params

FILE = "generation_config.json"
_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def recommended(folder: Path) -> dict[str, float]:
    """The sampling that a model folder recommends, by `params.NAMES`; empty where it says nothing.

    A value that is no parameter, or out of its range, says nothing. `do_sample: false` is greedy;
    `do_sample: true` without a temperature is temperature 1, as in transformers.
    """
    content: Mapping[str, Any] = {}
    with suppress(LoadError):  # mlx-lm goes without a file that cannot be read, too
        content = read_json(folder / FILE)
    samples = content.get("do_sample")
    if samples is False:
        return {"temperature": 0.0}
    found = {name: value for name in _TAKEN if (value := _valid(name, content.get(name)))}
    if "temperature" in found:
        return found
    return {"temperature": 1.0, **found} if samples is True else {}


def _valid(name: str, value: Any) -> float | None:
    """A number that may be used; None for any other, and for one that changes nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(UsageError, ValueError, OverflowError):  # not numbers, and whole ones without end
        number = int(value) if name in WHOLE else float(value)
        sampling_params({name: number})
        return number
    return None
