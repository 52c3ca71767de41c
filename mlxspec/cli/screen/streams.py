"""The three streams of a process: whatever they are, and whatever letters they know."""

from __future__ import annotations

import codecs
import os
import sys
from io import TextIOWrapper
from pathlib import Path

from mlxspec.errors import PromptError

ERRORS = "mlxspec.plain"  # the handler of letters that an encoding lacks
# In place of letters that a stream's encoding lacks, which are few in what this program says.
_PLAIN = {
    "…": "...",
    "·": "-",
    "×": "x",
    "✓": "+",
    "✗": "x",
    "–": "-",
    "—": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}


def prepare() -> None:
    """Open what whoever started this has closed, and let no letter end the program."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115, it stays open
    codecs.register_error(ERRORS, _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def exactly() -> None:
    """Let a stdout that is no terminal have UTF-8 and line feeds in any locale."""
    if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", newline="\n", errors=ERRORS)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it, which bytes of a command line that are none prevent."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def as_text(argument: str, what: str) -> str:
    """An argument of the command line as UTF-8, where the locale could not read it so.

    Args:
        what: it is, for the error.

    Raises:
        PromptError: it is no UTF-8.
    """
    if is_unicode(argument):
        return argument
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError as error:
        raise not_utf8(what) from error


def not_utf8(what: str, seems: str = "latin1") -> PromptError:
    """The error of a text that is no UTF-8, but perhaps in another encoding."""
    return PromptError(
        f"{what} is not valid UTF-8.", hint=f"Convert it: iconv -f {seems} -t utf-8 FILE."
    )


def is_capable() -> bool:
    """Whether a terminal here can do more than write one line after another."""
    return os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


def has_colours() -> bool:
    """Whether a terminal here has styles, and nobody wants it without."""
    term = os.environ.get("TERM", "").lower()
    wanted = not os.environ.get("NO_COLOR")
    return is_capable() and wanted and not term.startswith("vt") and term[-2:] != "-m"


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(map(_plain, letters)), error.end


def _plain(letter: str) -> str:
    if letter in _PLAIN:
        return _PLAIN[letter]
    if "\u2500" <= letter <= "\u259f":  # lines, and the blocks of a bar
        return "-" if letter < "\u2580" else "#"
    if "\u2800" <= letter <= "\u28ff":  # a spinner's dots
        return "*"
    return letter.encode("ascii", "backslashreplace").decode()
