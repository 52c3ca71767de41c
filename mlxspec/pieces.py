"""Text that waits until it is final, as stretches that each have one author."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from mlxspec.metrics import Piece


class Held:
    """Pieces in their order, from which text is taken from the front."""

    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self._pieces)

    def put(self, piece: Piece) -> None:
        if piece.text:
            self._pieces.append(piece)

    def take(self, size: int) -> list[Piece]:
        """The first `size` letters."""
        taken = []
        while size > 0:
            piece = self._pieces.popleft()
            if len(piece.text) > size:
                (piece,), rest = split(piece, size)
                self._pieces.extendleft(rest)
            taken.append(piece)
            size -= len(piece.text)
        return taken

    def take_all(self) -> list[Piece]:
        return self.take(len(self.text))


def split(piece: Piece, size: int) -> tuple[list[Piece], list[Piece]]:
    """The first `size` letters of a piece, and the others; no piece is empty."""
    parts = piece.text[:size], piece.text[size:]
    first, rest = ([replace(piece, text=text)] if text else [] for text in parts)
    return first, rest


def first_of(texts: tuple[str, ...], held: str) -> tuple[int, str] | None:
    """Where the text begins that is complete first, as if `held` came letter by letter."""
    found = [(held.find(text) + len(text), -len(text), text) for text in texts if text in held]
    if not found:
        return None
    end, _, text = min(found)
    return end - len(text), text


def longest_beginning(texts: tuple[str, ...], held: str) -> int:
    """Length of the longest end of `held` with which one of the texts begins."""
    longest = max(map(len, texts), default=0) - 1
    for size in range(min(longest, len(held)), 0, -1):
        if any(text.startswith(held[-size:]) for text in texts):
            return size
    return 0
