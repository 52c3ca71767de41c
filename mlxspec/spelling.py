"""What single tokens stand for inside a text: bytes, which may be part of a character. No MLX."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from mlxspec.metrics import Logprob
from mlxspec.tokens import BYTE, UNREADABLE, Tokenizer, name_of

LEAST = -9999.0  # JSON has no infinity; this is what OpenAI's API tells of a token without a chance


class Spelled(NamedTuple):
    """A token as text, with UNREADABLE for bytes that are no whole character, and as bytes."""

    text: str
    bytes: bytes


class Spelling:
    """The text and the bytes of single tokens, as they stand behind others.

    The bytes of a text's tokens together are the text; only at its start a tokenizer may drop a
    space. An id without a token has no bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = cache(self._found)

    def __call__(self, token: int) -> Spelled:
        spelled = self._bytes_of(token)
        return Spelled(spelled.decode(errors="replace"), spelled)

    def as_dicts(self, logprobs: Iterable[Logprob]) -> list[dict[str, Any]]:
        """Log-probabilities as plain values for JSON, named as in OpenAI's API, with ids beside."""
        return [
            self._as_dict(one.token, one.logprob)
            | {"top_logprobs": [self._as_dict(*alternative) for alternative in one.top]}
            for one in logprobs
        ]

    def _as_dict(self, token: int, logprob: float) -> dict[str, Any]:
        text, spelled = self(token)
        # What is no number is not greater either.
        value = logprob if logprob > LEAST else LEAST
        return {"token": text, "id": token, "logprob": value, "bytes": list(spelled)}

    def _found(self, token: int) -> bytes:
        name = name_of(self._tokenizer, token)
        if name is None:
            return b""
        if getattr(self._tokenizer, "backend_tokenizer", None) is not None:
            return bytes_of(self._tokenizer, [(name, token)])[0]
        once, twice = (str(self._tokenizer.decode([token] * times)) for times in (1, 2))
        if UNREADABLE in once:
            return _of_sentence_piece(name) if BYTE.fullmatch(name) else _of_alphabet(name)
        return twice[len(once) :].encode()


def bytes_of(tokenizer: Tokenizer, tokens: Sequence[tuple[str, int]]) -> list[bytes]:
    """The bytes that tokens of these names and ids stand for inside a text."""
    spelled = _of_alphabet if _is_byte_level(tokenizer) else _of_sentence_piece
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return [spelled(name) for name, _ in tokens]

    def decoded(times: int) -> list[str]:
        ids = [[index] * times for _, index in tokens]
        return list(backend.decode_batch(ids, skip_special_tokens=False))

    # Behind itself: at the start of a text a decoder may drop a space, or join no word with one.
    return [
        # Part of a character is told by its letters alone.
        spelled(name)
        if UNREADABLE in once and UNREADABLE not in name
        else twice[len(once) :].encode()
        for (name, _), once, twice in zip(tokens, decoded(1), decoded(2), strict=True)
    ]


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    state = json.loads(backend.decoder.__getstate__())
    return any(step["type"] == "ByteLevel" for step in state.get("decoders", [state]))


def _of_sentence_piece(name: str) -> bytes:
    byte = BYTE.fullmatch(name)
    return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()


def _of_alphabet(name: str) -> bytes:
    if all(character in _ALPHABET for character in name):
        return bytes(_ALPHABET[character] for character in name)
    return name.encode()


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: a printable byte is itself, the others are those from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()
