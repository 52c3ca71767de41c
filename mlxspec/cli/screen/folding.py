"""An answer on a terminal: raw while it streams, then as Markdown; its reasoning is folded away.

What is on the screen can be taken back, what has scrolled away cannot. So where an answer is longer
than the screen, the blocks of it that are whole become Markdown before they scroll away.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from time import monotonic
from typing import TextIO

from rich.console import Console
from rich.markdown import Markdown

from mlxspec.cli.screen.terminal import (
    TerminalText,
    cells_of,
    in_letters_of,
    is_sure,
    size_of,
    visible,
)
from mlxspec.metrics import Piece
from mlxspec.pieces import split

_MARGIN = 3  # rows that stay free below an answer before its first blocks are settled
_WIDEST = 100  # columns, of which longer lines are hard to read
_CODE = "ansi_dark"  # the terminal's own colours, on its own background
_JOINER = "\u200d"  # between the parts of one emoji
_FENCE = re.compile(r" {0,3}(```+|~~~+)")


class FoldingText(TerminalText):
    """Text that is raw until it ends, and Markdown then.

    Where the rows of the raw text cannot be told, it stays as it is.
    """

    def __init__(self, stream: TextIO, *, end_on: TextIO, colours: bool) -> None:
        super().__init__(stream, end_on=end_on, colours=colours)
        self._raw: list[tuple[Piece, bool]] = []  # what stands below all that is settled
        self._thinks_since: float | None = None
        self._settled = False  # whether a part of this answer is
        self._resized = False

    @property
    def in_line(self) -> bool:
        """What is written now would stand between an answer and its beginning: it waits."""
        return bool(self._raw) or super().in_line

    def write(self, pieces: Sequence[Piece], *, marked: bool) -> None:
        for piece in pieces:
            if piece.reasoning and self._thinks_since is None:
                self._thinks_since = monotonic()
            elif not piece.reasoning and self._thinks_since is not None:
                self._fold(monotonic() - self._thinks_since, between=piece)
                continue
            self._raw.append((piece, marked))
            super().write([piece], marked=marked)
        if self._thinks_since is None:
            self._settle_what_leaves()

    def end(self) -> None:
        text = self._text
        if text.strip() and self._thinks_since is None and self._take_back(text):
            self._render(text)
        self._raw, self._thinks_since, self._settled = [], None, False
        super().end()

    @property
    def _text(self) -> str:
        return "".join(piece.text for piece, _ in self._raw)

    def _fold(self, seconds: float, between: Piece) -> None:
        """Put one line in the place of the reasoning, as far as it is on the screen.

        Args:
            between: what parts the reasoning from the answer where it stays.
        """
        self._thinks_since = None
        lines, below = size_of(self._stream).lines, self._below(self._text)
        self._raw = []
        if below is None:
            super().write([between], marked=False)
            return
        self._up(min(below, lines - 1))
        super().write([Piece(f"thought for {seconds:.1f} s\n", True, reasoning=True)], marked=False)

    def _settle_what_leaves(self) -> None:
        """Turn the blocks that are whole into Markdown, where they are about to scroll away."""
        text = self._text
        below, lines = self._below(text), size_of(self._stream).lines
        if below is None or below < lines - _MARGIN:
            return
        size = end_of_blocks(text)
        if size == 0:
            return
        rest = _behind(self._raw, size)
        if self._take_back(text):
            self._render(text[:size])
            for piece, marked in rest:
                super().write([piece], marked=marked)
        self._raw = rest

    def _take_back(self, text: str) -> bool:
        """Erase the text, if all of it is on the screen."""
        below = self._below(text)
        if below is None or below >= size_of(self._stream).lines:
            return False
        self._up(below)
        return True

    def _below(self, text: str) -> int | None:
        """How many rows the cursor is below the first row of a text; None where none can tell."""
        if self._resized:
            return None
        return rows_below(in_letters_of(self._stream, visible(text)), self._width)

    def _up(self, rows: int) -> None:
        self._stream.write("\r" + (f"\x1b[{rows}A" if rows else "") + "\x1b[J")
        self.column, self._sure = 0, True

    def _render(self, text: str) -> None:
        console = Console(
            file=self._stream,
            width=min(self._width, _WIDEST),
            force_terminal=True,
            color_system="auto" if self._colours else None,
            highlight=False,
        )
        if self._settled:
            console.print()
        self._settled = True
        console.print(Markdown(visible(text), code_theme=_CODE, hyperlinks=False))
        self._stream.flush()
        self.column, self._sure = 0, True

    def _notice_resize(self) -> None:
        before = self._width
        super()._notice_resize()
        self._resized = self._resized or (before != self._width and bool(self._raw))


def rows_below(text: str, width: int) -> int | None:
    """How many rows a text that begins at the left edge moves the cursor down.

    None where that depends on characters about whose width terminals disagree.
    """
    rows = 0
    for line in text.split("\n"):
        least, most = _wraps(line, width, unsure=0), _wraps(line, width, unsure=2)
        if least != most:
            return None
        rows += 1 + least
    return rows - 1


def _wraps(line: str, width: int, *, unsure: int) -> int:
    """How often a line wraps, if each character of an unknown width has `unsure` columns."""
    column = rows = 0
    joined = False
    for char in line:
        if char == "\t":
            cells = min(8 - column % width % 8, width - column % width)
        elif is_sure(char) and not joined:
            cells = cells_of(char)
        else:
            cells = unsure
        joined = char == _JOINER
        if column + cells > width:
            rows, column = rows + 1, 0
        column += cells
    return rows


def end_of_blocks(text: str) -> int:
    """The length of the blocks of Markdown that are whole, whatever may follow."""
    at = end = 0
    fence, blank = "", False
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if fence:
            fence = "" if found and line.strip().startswith(fence) else fence
        else:
            if blank and line[:1].strip():  # an indented line may belong to a list above
                end = at
            fence = found[1] if found else ""
        blank = not fence and not line.strip()
        at += len(line) + 1
    return end


def _behind(raw: list[tuple[Piece, bool]], size: int) -> list[tuple[Piece, bool]]:
    """The pieces behind the first `size` letters."""
    rest = []
    for piece, marked in raw:
        rest += [(one, marked) for one in split(piece, max(size, 0))[1]]
        size -= len(piece.text)
    return rest
