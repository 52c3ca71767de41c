"""The bytes of single tokens make up the text that all of them decode to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import DECODERS, Raising, ids_of, tokenizer_of

from mlxspec.metrics import Logprob
from mlxspec.spelling import LEAST, Spelling

KINDS = [kind for kind in DECODERS if "piece" in kind or kind.startswith("byte")]
TOKENIZERS: dict[str, Any] = {kind: tokenizer_of(kind, gap=3) for kind in KINDS}
SPELLINGS = {kind: Spelling(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
# Tokens that are whole characters, alone or together.
WHOLE = {
    kind: [[token] for token in tokenizer.get_vocab().values() if token > 255]
    for kind, tokenizer in TOKENIZERS.items()
}
for kind in KINDS[:2]:
    WHOLE[kind] += [[token] for token in range(256)]
for kind in ("sentence piece", "sentence piece, all spaces"):
    WHOLE[kind] += [list(letter.encode()) for letter in "aé日🙂"]  # its bytes come first


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_bytes_of_tokens_make_up_the_text(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    drawn = data.draw(st.lists(st.sampled_from(WHOLE[kind]), max_size=6))
    tokens = [token for one in drawn for token in one]
    spelling = SPELLINGS[kind]
    before = ids_of(tokenizer, "a")
    text = tokenizer.decode(before + tokens).removeprefix(tokenizer.decode(before))
    assert b"".join(spelling(token).bytes for token in tokens).decode(errors="replace") == text


@pytest.mark.parametrize("kind", ["byte level", "sentence piece"])
def test_part_of_a_character_has_bytes_and_no_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    names = ("Ã", "©") if kind == "byte level" else ("<0xC3>", "<0xA9>")
    first, second = map(Spelling(tokenizer), ids_of(tokenizer, *names))
    assert (first.bytes, second.bytes) == (b"\xc3", b"\xa9")
    assert first.text == second.text == "\ufffd"
    space = ids_of(tokenizer, "Ġworld" if kind == "byte level" else "▁world")[0]
    assert Spelling(tokenizer)(space) == (" world", b" world")


def test_an_id_without_a_token_has_no_bytes() -> None:
    spelling = Spelling(TOKENIZERS["byte level"])
    assert spelling(257) == spelling(10**6) == ("", b"")
    assert Spelling(Raising())(3).bytes == b""


class Python:
    """A tokenizer in Python, whose names are in byte-level BPE's alphabet."""

    NAMES = ("Ġworld", "Ã", "©", "<0x41>")

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return [self.NAMES[token] for token in tokens]

    def decode(self, tokens: list[int]) -> str:
        known = {0: b" world", 1: b"\xc3", 2: b"\xa9", 3: b"\x80"}
        return b"".join(known[token] for token in tokens).decode(errors="replace")


def test_a_tokenizer_in_python_is_asked_what_it_decodes() -> None:
    spelling = Spelling(Python())
    assert [spelling(token).bytes for token in range(3)] == [b" world", b"\xc3", b"\xa9"]
    assert spelling(3).bytes == b"\x41"  # a byte's own name goes before what it looks like


def test_values_are_json() -> None:
    tokenizer = TOKENIZERS["byte level"]
    token, other = ids_of(tokenizer, "a", "b")
    (one,) = Spelling(tokenizer).as_dicts(
        [Logprob(token, -0.5, ((other, float("-inf")), (token, float("nan"))))]
    )
    assert one == {
        "token": "a",
        "id": token,
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "b", "id": other, "logprob": LEAST, "bytes": [98]},
            {"token": "a", "id": token, "logprob": LEAST, "bytes": [97]},
        ],
    }
