"""Writers for what a generation goes to: an exact stream, a terminal, and a line that lives on one.

Text goes to stdout and every cursor movement to stderr, so that where the two are one terminal,
stdout still carries the text and its styles alone.
"""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import IO, TextIO

from rich.cells import cell_len
from rich.style import Style

from mlxspec.metrics import Piece

ASIDE = Style(dim=True)
GONE = (OSError, ValueError)  # what writing to a closed stream raises

_OWN = Style(bold=True)  # readable on a dark and on a light background, unlike most colours
_UPSTREAM = Style(italic=True)
_BELOW = "\x1b[J"
_REST_OF_LINE = "\x1b[K"
_PICTURES = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
)


def visible(text: str) -> str:
    """`text` with a picture of every control character but newline and tab."""
    return text.translate(_PICTURES)


class TextOut:
    """Where the text goes: nowhere, unless a subclass says otherwise."""

    @property
    def in_line(self) -> bool:
        """Whether something written to the terminal now would continue a line of the text."""
        return False

    def write(self, pieces: Sequence[Piece], *, marked: bool) -> None:
        """Write and flush.

        Reasoning is dim where that is possible, an upstream's text is italic, and `marked` tells
        the target's own pieces of the answer apart.
        """

    def flush(self) -> None:
        """Write what an interrupt may have left behind."""

    def end(self) -> None:
        """Leave the terminal at the start of a line."""


class LiveLine:
    """The line that is kept up to date: none, unless a subclass says otherwise."""

    def make_way(self) -> None:
        """Text follows."""

    def draw(self, parts: Sequence[str]) -> None:
        """Show as many of `parts` as fit."""

    def erase(self) -> None:
        """Take the line away."""


class ExactText(TextOut):
    """Text for a file or a pipe.

    `beside` is a terminal to which the pipe's reader may be writing the text.
    """

    def __init__(self, stream: TextIO, beside: TextIO | None) -> None:
        self._stream = stream
        self._beside = beside
        self._in_line = False

    @property
    def in_line(self) -> bool:
        return self._beside is not None and self._in_line

    def write(self, pieces: Sequence[Piece], *, marked: bool) -> None:
        text = "".join(piece.text for piece in pieces)
        if text:
            self._stream.write(text)
            self._stream.flush()
            self._in_line = not text.endswith("\n")

    def flush(self) -> None:
        self._stream.flush()

    def end(self) -> None:
        if self._beside is not None and self._in_line:
            self._in_line = False
            self._beside.write("\n")
            self._beside.flush()


class TerminalText(TextOut):
    """Text for a terminal, and the column in which it leaves the cursor.

    A full line leaves the cursor waiting to wrap: `column` is then the terminal's width.
    """

    def __init__(self, stream: TextIO, *, end_on: TextIO, colours: bool) -> None:
        self.column = 0
        self._stream = stream
        self._end_on = end_on
        self._colours = colours
        self._width = size_of(stream).columns
        self._sure = True  # that `column` is right
        self._written = True

    @property
    def in_line(self) -> bool:
        return self.column > 0 or not self._sure or not self._written

    def anchor(self) -> int | None:
        """The cursor's column, if the cursor can be moved away and put back there.

        It cannot while it waits to wrap, and the column is unknown for the rest of a line that
        was resized or has characters about whose width terminals disagree.
        """
        self._notice_resize()
        sure = self._sure and self._written
        return self.column if sure and self.column < self._width else None

    def write(self, pieces: Sequence[Piece], *, marked: bool) -> None:
        if not any(piece.text for piece in pieces):
            return
        self._written = False  # until nothing can interrupt it any more
        self._notice_resize()
        for piece in pieces:
            text = self._laid_out(in_letters_of(self._stream, visible(piece.text)))
            if self._colours and piece.reasoning:
                text = ASIDE.render(text)
            elif self._colours and piece.upstream:
                text = _UPSTREAM.render(text)
            elif self._colours and marked and not piece.from_draft:
                text = _OWN.render(text)
            self._stream.write(text)
        self._stream.flush()
        self._written = True

    def flush(self) -> None:
        self._stream.flush()

    def end(self) -> None:
        if self.in_line:
            self.column, self._sure, self._written = 0, True, True
            self._end_on.write("\n")
            self._end_on.flush()

    def _laid_out(self, text: str) -> str:
        """`text` with its tabs as spaces, since a tab at the right edge differs by terminal."""
        laid_out = []
        for char in text:
            cells = self._tab() if char == "\t" else cells_of(char)
            laid_out.append(" " * cells if char == "\t" else char)
            self._advance(char, cells)
        return "".join(laid_out)

    def _tab(self) -> int:
        column = self.column % self._width
        return min(8 - column % 8, self._width - column)

    def _advance(self, char: str, cells: int) -> None:
        if char == "\n":
            self.column, self._sure = 0, True
            return
        self._sure = self._sure and is_sure(char)
        if self.column + cells > self._width:
            self.column = 0
        self.column += cells

    def _notice_resize(self) -> None:
        width = size_of(self._stream).columns
        if width != self._width:
            self._width = width
            self._sure = self._sure and self.column == 0


class LineBelow(LiveLine):
    """A live line in the row below the text's cursor, which it leaves in its place."""

    def __init__(self, stream: TextIO, text: TerminalText, colours: bool) -> None:
        self._stream = stream
        self._text = text
        self._style = ASIDE if colours else Style.null()
        self._drawn = False

    def make_way(self) -> None:
        self.erase()

    def draw(self, parts: Sequence[str]) -> None:
        self.erase()
        column, size = self._text.anchor(), size_of(self._stream)
        if column is None or size.lines < 2:
            return
        line = self._style.render(fitted(parts, size.columns - 1))
        self._drawn = True
        self._stream.write(f"\r\n{line}\x1b[A{_to_column(column)}")
        self._stream.flush()

    def erase(self) -> None:
        if self._drawn:
            column = self._text.anchor()
            # A key that was pressed, or ^C, may have been echoed after the text.
            home = "" if column is None else _to_column(column)
            self._stream.write(home + _BELOW)
            self._stream.flush()
            self._drawn = False


class LineAlone(LiveLine):
    """A live line on a terminal that does not show the text."""

    def __init__(self, stream: TextIO, colours: bool) -> None:
        self._stream = stream
        self._style = ASIDE if colours else Style.null()
        self._drawn = ""

    def draw(self, parts: Sequence[str]) -> None:
        line = fitted(parts, size_of(self._stream).columns - 1)
        if line != self._drawn:
            self._drawn = line
            self._stream.write(f"\r{_REST_OF_LINE}{self._style.render(line)}")
            self._stream.flush()

    def erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\r{_REST_OF_LINE}")
            self._stream.flush()
            self._drawn = ""


def fitted(parts: Sequence[str], cells: int) -> str:
    """As many of `parts` as fit. A `·` counts twice: in some fonts it is two cells wide."""
    for count in range(len(parts), 0, -1):
        line = " · ".join(parts[:count])
        if len(line) + line.count("·") <= cells:
            return line
    return parts[0][: max(cells, 0)] if parts else ""


def _to_column(column: int) -> str:
    return f"\r\x1b[{column}C" if column else "\r"


@lru_cache(maxsize=4096)
def cells_of(char: str) -> int:
    """The columns that a character takes by itself."""
    return cell_len(char)


@lru_cache(maxsize=4096)
def is_sure(char: str) -> bool:
    """Whether terminals agree about the width of `char`, whatever stands before it."""
    if char.isascii():
        return True
    joins = "\ufe00" <= char <= "\ufe0f" or "\U0001f1e6" <= char <= "\U0001f1ff"
    category = unicodedata.category(char)
    if joins or category in ("Mc", "Me", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"):
        return False
    return cells_of(char) > 0 or category == "Mn"


def in_letters_of(stream: TextIO, text: str) -> str:
    """What the stream makes of letters that its encoding lacks, which may be of another width."""
    encoding = codecs.lookup(stream.encoding).name
    if encoding == "utf-8":
        return text
    return text.encode(encoding, stream.errors or "strict").decode(encoding)


def columns_of(stream: IO[str]) -> int:
    """The width of the terminal that a stream goes to."""
    return size_of(stream).columns


def size_of(stream: IO[str]) -> os.terminal_size:
    """The size of the terminal that a stream goes to."""
    with suppress(*GONE):
        size = os.get_terminal_size(stream.fileno())
        if size.columns > 0:
            return size
    return os.terminal_size((80, 24))
