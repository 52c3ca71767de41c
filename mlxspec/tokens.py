"""From tokens to text, one token at a time, exactly as the tokenizer decodes them all at once.

A tokenizer decodes a list of ids, and how one id reads may depend on those before it: a byte is
part of a character, a leading space is dropped at the start of a text, words are joined by spaces.
So text is never put together from the tokens' names. It is the difference that a token makes to
what the tokenizer itself decodes, over a window that reaches back to a place where text is final.
"""

from __future__ import annotations

import re
from typing import Any

Tokenizer = Any  # mlx-lm's TokenizerWrapper, or what it wraps

UNREADABLE = "\ufffd"  # what a byte decodes to that is no character, or not yet
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's, for what has no token of its own

# Texts with a token that can stand before another text, the first that leaves a trace.
_BEFORE = ("a", "x", "0", ".")
# Where cleaning spaces up never reaches across: a space after two letters.
_BETWEEN_WORDS = re.compile(r"[^\W_]{2}(?= )")


class Detokenizer:
    """Final text, token by token. Its parts together are what all tokens decode to.

    Text is held back while a later token can still change it: the bytes of an incomplete
    character, and SentencePiece's bytes up to the next token that is none, because those decode
    together. An id that has no token leaves no trace.

    Args:
        continues: the text continues another one, so that a leading space belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_it_is: dict[str, Any] = {}
        self._uncleaned: str | None = None
        if cleans_up(tokenizer):
            self._as_it_is = {"clean_up_tokenization_spaces": False}
            self._uncleaned = ""
        self._is_byte: dict[int, bool | None] = {}  # None for an id without a token
        self._before = _context(tokenizer) if continues else []
        # Asked only where words carry suffixes: it doubles what a token costs.
        self._follower = _context(tokenizer) if _reads_by_follower(tokenizer) else []
        self._window: list[int] = []  # tokens after `before`, with text that is not final
        self._seen = len(self._decoded(self._before))
        self._told = 0  # letters of the window's text that were returned

    def add(self, token: int) -> str:
        """The text that became final with `token`."""
        if token not in self._is_byte:
            self._is_byte[token] = self._kind(token)
        is_byte = self._is_byte[token]
        if is_byte is None:
            return ""
        self._window.append(token)
        if is_byte:
            return ""
        text = self._text()
        final = self._final(text)
        told = self._tell(text[:final])
        if final == len(text) and text and self._moves(text):
            self._before, self._window = self._window, []
            self._seen, self._told = len(self._decoded(self._before)), 0
        return told

    def finish(self) -> str:
        """The rest of the text, once no token will follow."""
        rest = self._tell(self._text())
        return rest if self._uncleaned is None else rest + self._cleaned("", over=True)

    def _text(self) -> str:
        """Of the window."""
        return self._decoded([*self._before, *self._window])[self._seen :]

    def _tell(self, text: str) -> str:
        told, self._told = text[self._told :], max(self._told, len(text))
        return told if self._uncleaned is None else self._cleaned(told)

    def _cleaned(self, text: str, *, over: bool = False) -> str:
        """The text that is final where the tokenizer drops spaces before punctuation."""
        text = f"{self._uncleaned}{text}"
        cuts = [len(text)] if over else [found.end() for found in _BETWEEN_WORDS.finditer(text)]
        cut = cuts[-1] if cuts else 0
        self._uncleaned = text[cut:]
        return str(self._tokenizer.clean_up_tokenization(text[:cut]))

    def _final(self, text: str) -> int:
        """How many letters of the window's text no later token can change."""
        # A character has up to three bytes before its last, and each may read as one letter.
        incomplete = len(text) - len(text.rstrip(UNREADABLE))
        final = len(text) - min(incomplete, 3)
        if not self._follower:
            return final
        followed = self._decoded([*self._before, *self._window, *self._follower])[self._seen :]
        changed = (at for at, letter in enumerate(text[:final]) if letter != followed[at : at + 1])
        return next(changed, final)

    def _moves(self, text: str) -> bool:
        """Whether the window can be what stands before the next one.

        It must leave a letter that stands for itself, so that what a decoder does at the start of
        a text is done there and not to the tokens that follow.
        """
        alone = self._decoded(self._window)
        return bool(alone) and text.endswith(alone)

    def _kind(self, token: int) -> bool | None:
        name = name_of(self._tokenizer, token)
        return None if name is None else bool(BYTE.fullmatch(name))

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, **self._as_it_is)) if tokens else ""


def name_of(tokenizer: Tokenizer, token: int) -> str | None:
    """The name of a token; None for an id that has none, or that cannot be decoded."""
    try:
        name = tokenizer.convert_ids_to_tokens([token])[0]
        tokenizer.decode([token])
    except Exception:  # a tokenizer's own code, which raises what it likes for an unknown id
        return None
    return None if name is None else str(name)


def _reads_by_follower(tokenizer: Tokenizer) -> bool:
    """Whether a token reads otherwise once another follows: a suffix becomes a space."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return decoder is not None and b"BPEDecoder" in decoder.__getstate__()


def decodes_at_once(tokenizer: Tokenizer) -> bool:
    """Whether a control token is text as soon as it is there, whatever follows."""
    return not cleans_up(tokenizer) and not _reads_by_follower(tokenizer)


def cleans_up(tokenizer: Tokenizer) -> bool:
    """Whether decoding also takes spaces away before punctuation."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    spares = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(model).__name__ != "BPE" or bool(getattr(tokenizer, spares, False))


def _context(tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text that another one can continue."""
    for text in _BEFORE:
        tokens = list(tokenizer.encode(text, add_special_tokens=False))
        if tokens and str(tokenizer.decode(tokens)).endswith(text):
            return tokens
    return []
