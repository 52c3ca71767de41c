"""Functions in a text of Python: which were written to their end, and which of those parse."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

_START = re.compile(r"( *)(?:async )?def \w+\(")


def whole_functions(text: str) -> Iterator[str]:
    """The functions whose bodies a text ends: a line follows that is indented no further.

    A function that is cut off at the text's end is none of them, nor is a line that closes a
    signature's bracket an end. Functions inside functions count too.
    """
    lines = text.splitlines()
    for first, line in enumerate(lines):
        start = _START.match(line)
        if start is None:
            continue
        for last in range(first + 1, len(lines)):
            words = lines[last].lstrip(" ")
            if words and words[0] not in ")]}" and len(lines[last]) - len(words) <= start.end(1):
                yield textwrap.dedent("\n".join(lines[first:last]))
                break


def parses(source: str) -> bool:
    """Whether Python reads a source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            ast.parse(source)
        except (SyntaxError, ValueError):
            return False
    return True
