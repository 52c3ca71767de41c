"""The prompt of a command: its argument, what is piped in, or both; and files of prompts."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from pathlib import Path
from threading import Timer
from typing import Any, BinaryIO

from mlxspec.cli.screen.streams import as_text, is_unicode, not_utf8
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
            never read. Beside an argument, a file that is read in part already is left to whoever
            reads it, such as the loop of a shell.
        default: the prompt where neither is given.
        tell: called once where stdin has not ended after a second.

    Raises:
        PromptError: there is none, it is blank, or it is not UTF-8.
    """
    is_piped = stdin is not None and _is_piped(stdin)
    if stdin is not None and is_piped and argument not in (None, "-") and _is_begun(stdin):
        tell("stdin is a file that something else has begun to read, and is left alone; - takes it")
        is_piped = False
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
    try:
        whole = json.loads(content)
    except RecursionError:
        whole = None
    except ValueError as error:
        whole = None
        _require_no_list(content, path, str(error))
    if isinstance(whole, list):
        places = ((f"entry {at}", entry) for at, entry in enumerate(whole, 1))
        return [_prompt_of(entry, place, path) for place, entry in places]
    if isinstance(whole, dict):
        return [_prompt_of(whole, "the object", path)]
    lines = enumerate(re.split(r"\r\n|\r|\n", content), 1)
    filled = [(at, line) for at, line in lines if line.strip()]
    if filled and isinstance(parsed(filled[0][1]), dict):
        return [_prompt_of(parsed(line), f"line {at}", path) for at, line in filled]
    return [line for _, line in filled]


def _require_no_list(content: str, path: Path, why: str) -> None:
    """Raise PromptError where a text that is no JSON was to be a list of it.

    A text on a line may begin with a bracket as well: `[INST]`, `[1]`, `[ ]`, or a whole list.
    """
    begins = re.match(r"\s*\[\s*([\"{]|$)", content)
    if begins and not why.startswith("Extra data"):
        raise PromptError(
            f"{path} begins as a JSON list and is none: {why[:1].lower()}{why[1:]}.",
            hint='Correct it there, or give a text on each line: ["one", "two"] is a list.',
        )


def parsed(content: str | bytes) -> Any:
    """JSON as a value; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _prompt_of(entry: Any, place: str, path: Path) -> str:
    """The prompt of a string or an object."""
    if isinstance(entry, dict):
        turns = entry.get("messages")
        if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
            entry = _text_of(turns[0].get("content")) if turns[0].get("role") == "user" else None
        else:
            texts = (entry.get(key) for key in ("prompt", "text"))
            entry = next((text for text in texts if text is not None), None)
    if not isinstance(entry, str):
        raise PromptError(
            f"{path} has no prompt where {place} should be one.",
            hint="Give a string, or an object with `prompt`, `text`, or one user's `messages`.",
        )
    if not is_unicode(entry):
        raise PromptError(
            f"{path} has half of a character in {place}: an escape such as \\ud800 on its own.",
            hint="Write the character itself, or both halves of it.",
        )
    return entry


def _text_of(content: Any) -> Any:
    """The text of a turn that may be a list of parts; parts of other kinds leave none."""
    if not isinstance(content, list):
        return content
    texts = [one.get("text") if isinstance(one, dict) else None for one in content]
    is_text = texts and all(isinstance(one, str) for one in texts)
    return "".join(map(str, texts)) if is_text else None


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


def _is_begun(stdin: BinaryIO) -> bool:
    """Whether a file was read in part by whoever had it before."""
    try:
        return os.lseek(stdin.fileno(), 0, os.SEEK_CUR) > 0
    except (OSError, ValueError):  # a pipe has no place
        return False


def _decoded(content: bytes, what: str = "The prompt") -> str:
    try:
        return content.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise not_utf8(what, "utf-16" if is_utf16 else "latin1") from error
