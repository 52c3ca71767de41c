"""The prompt of a command: its argument, what is piped in, or both."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from mlxspec.errors import PromptError


def read_prompt(argument: str | None, stdin: BinaryIO) -> str:
    """The argument; or stdin; or the argument, a blank line and stdin. `-` is stdin alone.

    Args:
        stdin: read where it is a pipe or a file, never where a person would have to type.

    Raises:
        PromptError: there is none, it is blank, or it is not UTF-8.
    """
    piped = _decoded(stdin.read()) if argument == "-" or _is_piped(stdin) else ""
    parts = [argument if argument not in (None, "-") else "", piped]
    prompt = "\n\n".join(part for part in parts if part)
    if argument is None and not piped:
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


def _is_piped(stdin: BinaryIO) -> bool:
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8() from error


def _not_utf8() -> PromptError:
    return PromptError(
        "The prompt is not valid UTF-8.", hint="Convert it: iconv -f latin1 -t utf-8 FILE."
    )
