"""The prompt of a command: its argument, what is piped in, or both; and files of prompts."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from threading import Timer
from typing import Any, BinaryIO

from mlxspec.cli.streams import as_text, not_utf8
from mlxspec.errors import PromptError
from mlxspec.files import expanded
from mlxspec.metrics import Tell, silent

PATIENCE_S = 1.0  # of waiting for stdin without a word


def read_prompt(
    argument: str | None,
    stdin: BinaryIO | None,
    *,
    default: str | None = None,
    tell: Tell = silent,
) -> str:
    """The argument; or stdin; or the argument, a blank line and stdin. `-` is stdin alone.

    Args:
        stdin: read where it is a pipe or a file, never where a person would have to type; None is
            never read.
        default: the prompt where neither is given.
        tell: called once where stdin has not ended after a second.

    Raises:
        PromptError: there is none, it is blank, or it is not UTF-8.
    """
    is_piped = stdin is not None and _is_piped(stdin)
    reads = stdin is not None and (argument == "-" or is_piped)
    piped = _decoded(_read(stdin, argument, tell)) if stdin is not None and reads else ""
    parts = ["" if argument in (None, "-") else as_text(argument, "The prompt"), piped]
    prompt = "\n\n".join(part for part in parts if part)
    if argument is None and not piped:
        if default is not None and not is_piped:
            return default
        raise PromptError(
            "There is no prompt.",
            hint="Give a text: mlxspec generate 'def fibonacci(n):', or pipe one in.",
        )
    if not prompt.strip():
        raise PromptError("The prompt is empty.", hint="Give a text as argument or on stdin.")
    return prompt


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: a JSON list, a JSON object on each line, or a text on each line.

    An object has its prompt as `prompt`, `text`, or `messages` with one turn of a user. Only line
    feeds and carriage returns end a line.

    Raises:
        PromptError: it cannot be read, an entry is no prompt, or there is none.
    """
    content = read_text(path)
    found = [text for text in _prompts_in(content, path) if text.strip()]
    if not found:
        raise PromptError(
            f"There are no prompts in {path}.",
            hint='Give a text on each line, or a JSON list: ["one", "two"].',
        )
    return found


def read_text(path: Path) -> str:
    """The text in a file.

    Raises:
        PromptError: it cannot be read, or is not UTF-8.
    """
    try:
        return _decoded(expanded(path).read_bytes(), str(path))
    except OSError as error:
        raise PromptError(
            f"The file {path} cannot be read: {error.strerror}.", hint="Check the path."
        ) from error


def _prompts_in(content: str, path: Path) -> list[str]:
    lines = [line for line in re.split(r"\r\n|\r|\n", content) if line.strip()]
    if re.match(r"\s*\[\s*([\"{\]\d-]|$)", content):  # a list, and no text such as [INST]
        return _listed(content, path)
    if lines and isinstance(_parsed(lines[0]), dict):
        return [_prompt_of(_parsed(line), f"line {at}", path) for at, line in enumerate(lines, 1)]
    return lines


def _listed(content: str, path: Path) -> list[str]:
    entries = _parsed(content)
    if not isinstance(entries, list):
        return []
    return [_prompt_of(entry, f"entry {at}", path) for at, entry in enumerate(entries, 1)]


def _parsed(content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _prompt_of(entry: Any, place: str, path: Path) -> str:
    """The prompt of a string or an object."""
    if isinstance(entry, dict):
        turns = entry.get("messages")
        if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
            entry = turns[0].get("content") if turns[0].get("role") == "user" else None
        else:
            entry = entry.get("prompt", entry.get("text"))
    if not isinstance(entry, str):
        raise PromptError(
            f"There are no prompts in {path}: {place} is none.",
            hint="Give a string, or an object with `prompt`, `text`, or one user's `messages`.",
        )
    return entry


def _read(stdin: BinaryIO, argument: str | None, tell: Tell) -> bytes:
    """All of stdin, with a word where that takes long."""
    then = "" if argument in (None, "-") else "; --no-stdin takes the argument alone"
    timer = Timer(PATIENCE_S, tell, [f"waiting for stdin to end{then}"])
    timer.daemon = True
    timer.start()
    try:
        return stdin.read()
    finally:
        timer.cancel()


def _is_piped(stdin: BinaryIO) -> bool:
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _decoded(content: bytes, what: str = "The prompt") -> str:
    try:
        return content.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise not_utf8(what) from error
