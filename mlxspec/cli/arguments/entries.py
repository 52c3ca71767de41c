"""The lines of a batch: each a text to write, with options of its own, or an error of that line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxspec.cli.arguments.prompts import parsed, read_text
from mlxspec.cli.screen.streams import not_utf8
from mlxspec.conversations import begins_with_system
from mlxspec.errors import MlxspecError, PromptError, UsageError
from mlxspec.params import NAMES, SamplingParams, changed

# What a line may have, beside the names of the sampling parameters.
TEXTS = ("prompt", "messages", "tools", "system", "prediction")
OTHERS = ("id", "max_tokens", "stop", "seed", "logit_bias", "raw", "draft_tokens", "logprobs")
_AS_THEY_ARE = (*TEXTS, "max_tokens", "stop", "raw", "draft_tokens", "logprobs")
FIELDS = (*TEXTS, *OTHERS, *NAMES)
STDIN = Path("-")
SIZES = tuple(name for name in NAMES if name.endswith("size"))
WHOLE = ("max_tokens", "seed", "logprobs", "top_k", *SIZES)


@dataclass(frozen=True)
class Entry:
    """A line of a batch.

    index: of the line among those that are not blank, from 0. id: the caller's own, of any kind.
    values: what the line has; error: why it cannot be used, where it cannot.
    """

    index: int
    id: Any = None
    values: Mapping[str, Any] = field(default_factory=dict)
    error: MlxspecError | None = None

    @property
    def name(self) -> dict[str, Any]:
        """What tells its result from others: the index, and the caller's `id` if there is one."""
        return {"index": self.index} | ({} if self.id is None else {"id": self.id})

    def options(self, usual: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `Engine.request`, the prompt included; `usual` holds where it has none.

        Raises:
            MlxspecError: a value cannot be used.
        """
        if self.error is not None:
            raise self.error
        own = {name: value for name, value in self.values.items() if value is not None}
        _require_types(own)
        _require_prompt(own)
        options = dict(usual) | {name: own[name] for name in _AS_THEY_ARE if name in own}
        if "system" not in own and begins_with_system(own.get("messages")):
            options.pop("system", None)
        options["sampling"] = _sampling_of(own, options["sampling"])
        return options


def read_entries(path: Path) -> list[Entry]:
    """The lines of a file, or of stdin for `-`, that are not blank.

    Raises:
        PromptError: the file cannot be read, is not UTF-8, or has no line.
    """
    content = _stdin() if path == STDIN else read_text(path)
    lines = [line for line in content.replace("\r", "\n").split("\n") if line.strip()]
    if not lines:
        raise PromptError(
            f"There are no prompts in {'stdin' if path == STDIN else path}.",
            hint='Give a JSON object on each line: {"prompt": "Hello"}.',
        )
    return [_entry(index, line) for index, line in enumerate(lines)]


def written_in(path: Path) -> set[int]:
    """The indices of the texts that a file of results has whole.

    A last line that was cut short is taken off where this process writes to the same file.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UsageError(
            f"The results in {path} cannot be read: {error.strerror}.",
            hint="Check the path, or leave out --resume.",
        ) from error
    whole, _, cut = content.rpartition(b"\n")
    if cut and _is_stdout(path):
        os.truncate(path, len(content) - len(cut))
    results = [parsed(line) for line in whole.split(b"\n")]
    return {
        one["index"]
        for one in results
        if isinstance(one, dict) and isinstance(one.get("index"), int) and "error" not in one
    }


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8("stdin") from error


def _entry(index: int, line: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Entry(index, error=_unusable(f"it is no JSON ({error})"))
    if isinstance(value, str):
        return Entry(index, values={"prompt": value})
    if not isinstance(value, dict):
        return Entry(index, error=_unusable("it is neither a string nor an object"))
    entry = Entry(index, value.get("id"), value)
    if strange := [name for name in value if name not in FIELDS]:
        known = ", ".join(FIELDS)
        why = f"it has the unknown field {strange[0]!r}"
        return replace(entry, error=_unusable(why, f"Leave it out; a line may have {known}."))
    return entry


def _require_types(own: Mapping[str, Any]) -> None:
    """Raise PromptError where a value is of another type than its option."""

    def is_number(value: Any, *types: type) -> bool:
        return isinstance(value, types) and not isinstance(value, bool)

    for name, value in own.items():
        texts = value if name == "stop" and isinstance(value, list) else [value]
        if name in WHOLE and not is_number(value, int):
            raise _unusable(f"its {name} is no whole number")
        if name in NAMES and not is_number(value, int, float):
            raise _unusable(f"its {name} is no number")
        is_text = name in ("prompt", "system", "prediction", "stop")
        if is_text and not all(isinstance(text, str) for text in texts):
            raise _unusable(f"its {name} is no text")
        if name == "raw" and not isinstance(value, bool):
            raise _unusable("its raw is neither true nor false")


def _require_prompt(own: Mapping[str, Any]) -> None:
    """Raise PromptError where a line has no prompt, or two."""
    if ("prompt" in own) == ("messages" in own):
        raise _unusable("it has a prompt and messages" if "prompt" in own else "it has no prompt")


def _sampling_of(own: Mapping[str, Any], usual: SamplingParams) -> SamplingParams:
    """The sampling parameters of a line: its own values over the usual ones."""
    given = {name: own[name] for name in NAMES if name in own}
    try:
        biases = {int(token): float(bias) for token, bias in own.get("logit_bias", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise _unusable('its logit_bias is not like {"42": -5}') from error
    return changed(usual, given, seed=own.get("seed"), logit_bias=biases or None)


def _unusable(
    why: str, hint: str = "Correct the line; the others are written all the same."
) -> PromptError:
    return PromptError(f"This line cannot be used: {why}.", hint=hint)


def _is_stdout(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), path.stat())
    except (OSError, ValueError):
        return False
