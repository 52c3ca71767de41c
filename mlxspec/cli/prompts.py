"""The prompt of a command: its argument, what is piped in, or both; and files of prompts."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

from mlxspec.errors import PromptError


def read_prompt(argument: str | None, stdin: BinaryIO, *, default: str | None = None) -> str:
    """The argument; or stdin; or the argument, a blank line and stdin. `-` is stdin alone.

    Args:
        stdin: read where it is a pipe or a file, never where a person would have to type.
        default: the prompt where neither is given.

    Raises:
        PromptError: there is none, it is blank, or it is not UTF-8.
    """
    piped = _decoded(stdin.read()) if argument == "-" or _is_piped(stdin) else ""
    parts = [argument if argument not in (None, "-") else "", piped]
    prompt = "\n\n".join(part for part in parts if part)
    if argument is None and not piped:
        if default is not None and not _is_piped(stdin):
            return default
        raise PromptError(
            "There is no prompt.",
            hint="Give a text: mlxspec generate 'def fibonacci(n):', or pipe one in.",
        )
    if not prompt.strip():
        raise PromptError("The prompt is empty.", hint="Give a text as argument or on stdin.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _not_utf8() from error
    return prompt


def read_prompts(path: Path) -> list[str]:
    """The texts in a file: a JSON list of strings, or of objects with a `text`, or line by line.

    Raises:
        PromptError: it cannot be read, or there is no text in it.
    """
    content = read_text(path)
    texts = _listed(content) if content.lstrip().startswith("[") else content.splitlines()
    found = [text for text in texts if text.strip()]
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
        return _decoded(path.expanduser().read_bytes(), str(path))
    except OSError as error:
        raise PromptError(
            f"The file {path} cannot be read: {error.strerror}.", hint="Check the path."
        ) from error


def _listed(content: str) -> list[str]:
    try:
        entries = json.loads(content)
        texts = [entry["text"] if isinstance(entry, dict) else entry for entry in entries]
    except (ValueError, KeyError):
        return []
    return texts if all(isinstance(text, str) for text in texts) else []


def _is_piped(stdin: BinaryIO) -> bool:
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _decoded(content: bytes, what: str = "The prompt") -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(what) from error


def _not_utf8(what: str = "The prompt") -> PromptError:
    return PromptError(
        f"{what} is not valid UTF-8.", hint="Convert it: iconv -f latin1 -t utf-8 FILE."
    )
