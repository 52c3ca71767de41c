"""Between text and tokens: what a prompt becomes, and how committed tokens turn into text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mlxspec.errors import PromptError
from mlxspec.metrics import Piece
from mlxspec.tokens import Detokenizer, Tokenizer


def encode_prompt(
    tokenizer: Tokenizer, text: str, *, system: str | None = None, raw: bool = False
) -> list[int]:
    """The token ids of one user turn, or of `text` itself.

    Args:
        system: a system message before the turn.
        raw: no chat template. A tokenizer that has none is always raw.

    Raises:
        PromptError: for an empty text, or a system message that nothing can carry.
    """
    if not text.strip():
        raise PromptError("The prompt is empty.", hint="Give a text as argument or on stdin.")
    if is_raw(tokenizer, raw):
        if system is not None:
            raise PromptError(
                "A raw prompt has no place for a system message.",
                hint="Leave out --system, or use a model with a chat template and no --raw.",
            )
        bos = tokenizer.bos_token
        return list(tokenizer.encode(text, add_special_tokens=not bos or not text.startswith(bos)))
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": text})
    return list(
        tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=False
        )
    )


def is_raw(tokenizer: Tokenizer, raw: bool) -> bool:
    return raw or not tokenizer.has_chat_template


class TextStream:
    """Turns tokens into final text, one at a time, and looks for stop strings.

    Text is held back while it could still become part of a stop string, and while a character
    is incomplete.

    Args:
        continues: the text continues the prompt, so that a leading space belongs to it.
        stop: the text ends before the first of these, wherever tokens begin and end.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._held: deque[Piece] = deque()
        self._detokenizer = Detokenizer(tokenizer, continues=continues)

    def add(self, token: int, from_draft: bool) -> list[Piece]:
        """The text that became final with this token; sets `stopped` when a stop string ended."""
        return self._release(Piece(self._detokenizer.add(token), from_draft))

    def finish(self) -> list[Piece]:
        """The rest of the text, once no token will follow."""
        released = self._release(Piece(self._detokenizer.finish(), from_draft=False))
        rest = [] if self.stopped else list(self._held)
        self._held.clear()
        return released + rest

    def _release(self, piece: Piece) -> list[Piece]:
        if piece.text:
            self._held.append(piece)
        held = "".join(piece.text for piece in self._held)
        # The one that is complete first, as if the text came letter by letter.
        found = [(held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in held]
        if found:
            self.stopped = True
            return self._take(sum(min(found)))
        return self._take(len(held) - self._longest_beginning(held))

    def _longest_beginning(self, held: str) -> int:
        """Length of the longest end of `held` with which a stop string begins."""
        longest = max(map(len, self._stop), default=0) - 1
        for size in range(min(longest, len(held)), 0, -1):
            if any(stop.startswith(held[-size:]) for stop in self._stop):
                return size
        return 0

    def _take(self, size: int) -> list[Piece]:
        taken = []
        while size > 0:
            piece = self._held.popleft()
            if len(piece.text) > size:
                self._held.appendleft(Piece(piece.text[size:], piece.from_draft))
                piece = Piece(piece.text[:size], piece.from_draft)
            taken.append(piece)
            size -= len(piece.text)
        return taken
