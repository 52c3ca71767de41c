"""Text that waits until it is final, as stretches that each have one author."""

from __future__ import annotations

from collections import deque

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
                first, rest = piece.text[:size], piece.text[size:]
                self._pieces.appendleft(Piece(rest, piece.from_draft, piece.reasoning))
                piece = Piece(first, piece.from_draft, piece.reasoning)
            taken.append(piece)
            size -= len(piece.text)
        return taken

    def take_all(self) -> list[Piece]:
        return self.take(len(self.text))


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
