"""Names of control tokens in a text, which reach a model as text.

A text is cut behind the first letter of such a name, so that its tokens cannot join.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from mlxspec.tokens import Tokenizer

_MARKER = re.compile(r"<.+>|\[.+\]", re.DOTALL)
# Before a text that continues another, for tokenizers that put a space before every text.
_BEFORE = ("\n", "a", "0", ".")


def control_tokens(tokenizer: Tokenizer, template: str) -> list[str]:
    """Names of added tokens that steer a model: special ones, a template's own, and markers."""
    special = {
        str(token)
        for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        if getattr(token, "special", True)
    }
    return [
        name
        for name in tokenizer.get_added_vocab()
        # What is one letter or blank is text in any template.
        if len(name) > 1
        and name.strip()
        and (name in special or name in template or _MARKER.fullmatch(name))
    ]


def with_cuts(text: str, names: Iterable[str], cut: str) -> str:
    """A cut behind the first letter of every control token's name in the text."""
    places = {start + 1 for name in names for start in _places(name, text)}
    return _cut_at(text, places, cut)


def _cut_at(text: str, places: Collection[int], cut: str) -> str:
    edges = [0, *sorted(places), len(text)]
    return cut.join(text[start:end] for start, end in pairwise(edges))


def _places(name: str, text: str) -> Iterator[int]:
    """Where it begins, overlapping ones too."""
    start = text.find(name)
    while start >= 0:
        yield start
        start = text.find(name, start + 1)


def encoded(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """Tokens of a text whose pieces do not join."""
    tokens = list(tokenizer.encode(pieces[0], add_special_tokens=False))
    for piece in pieces[1:]:
        tokens += _continuing(tokenizer, piece)
    return tokens


def _continuing(tokenizer: Tokenizer, piece: str) -> list[int]:
    """Tokens of a text behind another one, without the space that some put before every text."""
    for text in _BEFORE:
        before = list(tokenizer.encode(text, add_special_tokens=False))
        tokens = list(tokenizer.encode(text + piece, add_special_tokens=False))
        if tokens[: len(before)] == before:
            return tokens[len(before) :]
    return list(tokenizer.encode(piece, add_special_tokens=False))
