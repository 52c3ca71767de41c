"""A model's reasoning apart from its answer, while the text is being written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mlxspec.markup import ANSWER, BEGINNING, KEPT, REASONING, Markup
from mlxspec.metrics import FinishReason, Piece
from mlxspec.pieces import Held, first_of, longest_beginning

PARAGRAPH = "\n\n"  # between two answers, or two reasonings, of one text; and around a call


class Mark(Piece):
    """A piece that is the name of a control token."""


@dataclass(frozen=True)
class Reasoning:
    """How the reasoning of one text is told from its answer.

    Args:
        begins: the state in which the prompt leaves the answer.
        limit: what ends the text, and how to move it. less: how to ask for less reasoning.
    """

    markup: Markup
    begins: str
    limit: str
    less: str

    def remark(self, place: str, finish: FinishReason, *, stopped: bool) -> str:
        """What a person should know of a text that ends where an answer is still to come.

        Args:
            place: where it ends. stopped: whether a stop string ended it.
        """
        if stopped:
            how = "at a stop string: choose one that only the answer has"
        elif finish == "length":
            how = f"at {self.limit}"
        else:
            return f"the model ended its text {place}, and gave no answer"
        return f"the text ends {place}, {how}{self.less}"


class Sorter:
    """Sorts final text into answer and reasoning, and leaves out the marks.

    What comes out does not depend on where pieces begin and end. Line ends beside a mark belong
    to it.
    """

    def __init__(self, markup: Markup, begins: str) -> None:
        self._markup = markup
        self._state = begins
        self._held = Held()
        self._header: list[Piece] = []  # of the message that was not begun yet
        self._told = {ANSWER: False, REASONING: False}  # whether there is such a text
        self._opening = begins == REASONING  # whether the text after a mark is still to come

    @property
    def reasons(self) -> bool:
        """Whether the text so far ends in the reasoning."""
        return self._state == REASONING

    @property
    def answers(self) -> bool:
        """Whether the text so far ends in the answer: not in the reasoning, nor in a header."""
        return self._state in (ANSWER, BEGINNING)

    @property
    def place(self) -> str:
        """Where the text so far ends, in words, if its answer is still to come; else empty."""
        if self.reasons:
            return "inside the reasoning"
        came = self._told[REASONING] and not self._told[ANSWER]
        return "after the reasoning" if came else ""

    def add(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The text that is final and whose kind is known."""
        for piece in pieces:
            code = self._markup.codes[piece.text] if isinstance(piece, Mark) else piece.text
            self._held.put(Piece(code, piece.from_draft))
        told: list[Piece] = []
        while self._held.text and self._goes_on(told):
            pass
        return told

    def finish(self) -> list[Piece]:
        """The rest, once no text will follow."""
        if self._state == BEGINNING:
            self._state = ANSWER
        rest = self._as_told(self._held.take_all())
        if self._state in self._told or any(self._told.values()):
            return rest
        # A header alone: the model does not write as its marks promise.
        return [self._named(piece) for piece in self._header]

    def _goes_on(self, told: list[Piece]) -> bool:
        """Tell what can be told up to the next mark; whether there was one."""
        edges = dict(self._markup.edges.get(self._state, ()))
        held = self._held.text
        found = first_of(tuple(edges), held)
        if self._state == BEGINNING:
            blank = len(held) - len(held.lstrip())
            if found is None or found[0] > blank:
                if any(mark.startswith(held[blank:]) for mark in edges):
                    return False
                self._state = ANSWER
                return True
            self._held.take(blank)
            held, found = held[blank:], (0, found[1])
        size = len(held) - longest_beginning(tuple(edges), held) if found is None else found[0]
        ends = size - len(held[:size].rstrip("\n")) if self._state == REASONING else 0
        told += self._as_told(self._held.take(size - ends))
        if found is None:
            return False
        self._held.take(ends)
        mark, state = self._held.take(len(found[1])), edges[found[1]]
        self._enter(ANSWER if state == KEPT else state)
        told += self._as_told(mark) if state == KEPT else []
        return True

    def _enter(self, state: str) -> None:
        if state not in self._told:
            self._header = [] if self._state in self._told else self._header
        if state != self._state:
            self._opening = state in self._told
        self._state = state

    def _as_told(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces as those of the state, without line ends behind its mark."""
        if self._state not in self._told:
            self._header += pieces
            return []
        told = []
        for piece in pieces:
            text = piece.text.lstrip("\n") if self._opening else piece.text
            if not text:
                continue
            if self._opening and self._told[self._state]:
                text = PARAGRAPH + text
            self._opening, self._told[self._state] = False, True
            told.append(self._named(replace(piece, text=text)))
        return told

    def _named(self, piece: Piece) -> Piece:
        text = self._markup.named(piece.text)
        return Piece(text, piece.from_draft, reasoning=self._state == REASONING)
