"""How the reasoning is shown beside the answer."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from mlxspec.metrics import Piece

_OPENING, _CLOSING = "<think>\n", "\n</think>"  # in plain text, whatever the model's marks are


class Shown(Enum):
    """Whether the reasoning is shown, and what tells it from the answer."""

    STYLED = "by its style"
    TAGGED = "by tags"
    LEFT_OUT = "not, as nobody asked for it"
    HIDDEN = "not, as was asked for"

    @classmethod
    def on(cls, *, terminal: bool, colours: bool, asked: bool | None) -> Shown:
        """How stdout shows it.

        Args:
            asked: None shows it on a terminal alone: what reads a pipe or a file wants the answer.
        """
        if asked is False:
            return cls.HIDDEN
        if not terminal:
            return cls.TAGGED if asked else cls.LEFT_OUT
        return cls.STYLED if colours else cls.TAGGED


class Layout:
    """Puts a blank line, and tags where there is no style, between reasoning and answer."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.reset()

    def reset(self) -> None:
        """Another text begins."""
        self._inside = False
        self._written = False

    def laid_out(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces that are shown, with what stands between them."""
        if self.shown in (Shown.LEFT_OUT, Shown.HIDDEN):
            return [piece for piece in pieces if not piece.reasoning]
        shown = []
        for piece in pieces:
            if piece.reasoning != self._inside:
                self._inside = piece.reasoning
                shown.append(Piece(self._between(), from_draft=True, reasoning=piece.reasoning))
                piece = Piece(piece.text.lstrip("\n"), piece.from_draft, piece.reasoning)
            self._written = True
            shown.append(piece)
        return shown

    def _between(self) -> str:
        tagged = self.shown is Shown.TAGGED
        if self._inside:
            return ("\n\n" if self._written else "") + (_OPENING if tagged else "")
        return (_CLOSING if tagged else "") + "\n\n"
