"""Prompts become tokens, and tokens become text that ends before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from conftest import CHAT_TOKENIZER, TOKENIZER, cut, tokens_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokens import tokenizer_of

from mlxspec.errors import PromptError
from mlxspec.metrics import Piece
from mlxspec.text import TextStream, encode_prompt, is_raw

SENTENCE_PIECE = tokenizer_of("sentence piece")

# --- prompts --------------------------------------------------------------------------------


def test_a_turn_goes_through_the_template() -> None:
    ids = encode_prompt(CHAT_TOKENIZER, "abé", system="be brief")
    assert CHAT_TOKENIZER.decode(ids) == "<system>be brief<user>abé<assistant>"
    ids = encode_prompt(CHAT_TOKENIZER, " abé ")
    assert CHAT_TOKENIZER.decode(ids) == "<user> abé <assistant>"
    assert all(type(token) is int for token in ids)


def test_an_empty_system_message_is_one() -> None:
    ids = encode_prompt(CHAT_TOKENIZER, "a", system="")
    assert CHAT_TOKENIZER.decode(ids) == "<system><user>a<assistant>"


def test_raw_text_is_taken_as_it_is() -> None:
    for raw in (
        encode_prompt(TOKENIZER, " abé\n"),
        encode_prompt(TOKENIZER, " abé\n", raw=True),
        encode_prompt(CHAT_TOKENIZER, " abé\n", raw=True),
    ):
        assert TOKENIZER.decode(raw) == " abé\n"


def test_raw_is_what_has_no_template() -> None:
    assert is_raw(TOKENIZER, False)
    assert is_raw(TOKENIZER, True)
    assert is_raw(CHAT_TOKENIZER, True)
    assert not is_raw(CHAT_TOKENIZER, False)


class WithStart:
    """A tokenizer that begins every text with its own token, as Llama's does."""

    bos_token = "<bos>"
    has_chat_template = False

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        first = [1] if add_special_tokens else []
        if text.startswith("<bos>"):
            return first + [1, 2]
        return first + [2]


def test_the_first_token_is_not_doubled() -> None:
    assert encode_prompt(WithStart(), "text") == [1, 2]
    assert encode_prompt(WithStart(), "<bos>text") == [1, 2]


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_empty_prompts_are_refused(text: str) -> None:
    with pytest.raises(PromptError) as raised:
        encode_prompt(TOKENIZER, text)
    assert raised.value.hint


def test_raw_prompts_carry_no_system_message() -> None:
    with pytest.raises(PromptError):
        encode_prompt(TOKENIZER, "a", system="b")
    with pytest.raises(PromptError):
        encode_prompt(CHAT_TOKENIZER, "a", system="b", raw=True)


# --- streams --------------------------------------------------------------------------------


def pieces_of(
    tokens: Sequence[int], *, stop: Sequence[str] = (), continues: bool = True
) -> tuple[list[list[Piece]], bool]:
    """What became final with every token, and at the end."""
    stream = TextStream(TOKENIZER, continues=continues, stop=stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token, from_draft=False))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def joined(pieces: Sequence[Sequence[Piece]]) -> str:
    return "".join(piece.text for some in pieces for piece in some)


def test_text_without_stop_strings_is_not_held_back() -> None:
    pieces, stopped = pieces_of(tokens_of("abc."))
    assert [joined([some]) for some in pieces] == ["a", "b", "c", ".", ""]
    assert not stopped


def test_incomplete_characters_are_held_back() -> None:
    pieces, _ = pieces_of(tokens_of("aé€😀"))
    expected = ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert [joined([some]) for some in pieces] == expected


def test_a_character_that_stays_incomplete_is_told() -> None:
    pieces, _ = pieces_of(tokens_of("a😀")[:-1])
    assert joined(pieces) == "a\ufffd"


def test_text_is_held_while_a_stop_string_may_come() -> None:
    pieces, stopped = pieces_of(tokens_of("aEND"), stop=["ENDE", "ND!"])
    assert [joined([some]) for some in pieces] == ["a", "", "", "", "END"]
    assert not stopped
    pieces, stopped = pieces_of(tokens_of("aENX"), stop=["END"])
    assert [joined([some]) for some in pieces] == ["a", "", "", "ENX", ""]
    assert not stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcab", ["ca"], "ab"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("abc", ["abc"], ""),
        ("a\n\nb", ["\n\n"], "a"),
        ("xéy", ["é"], "x"),
        ("xéy", ["y", "é", "x!"], "x"),
        ("abc", ["", "c"], "ab"),
        ("abcd", ["bcd", "d"], "a"),
        ("one two", [" two"], "one"),
    ],
)
def test_stop_strings(text: str, stop: list[str], expected: str) -> None:
    pieces, stopped = pieces_of(tokens_of(text), stop=stop)
    assert stopped
    assert joined(pieces) == expected


def test_nothing_is_a_stop_string() -> None:
    pieces, stopped = pieces_of(tokens_of("abc"), stop=[""])
    assert joined(pieces) == "abc"
    assert not stopped


def test_a_stop_string_that_ends_with_the_held_space() -> None:
    pieces, stopped = pieces_of(tokens_of("ab "), stop=["b "])
    assert joined(pieces) == "a"
    assert stopped


class Pieces:
    """A tokenizer whose tokens are stretches of text."""

    def convert_ids_to_tokens(self, tokens: list[str]) -> list[str]:
        return tokens

    def decode(self, tokens: list[str]) -> str:
        return "".join(tokens)


@example("aba", ["aba", "b"], [3] * 12)
@settings(max_examples=300)
@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=12, max_size=12),
)
def test_the_end_does_not_depend_on_where_tokens_end(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    stream = TextStream(Pieces(), continues=False, stop=stop)
    written, rest = [], text
    for size in sizes:
        token, rest = rest[:size], rest[size:]
        written.append(stream.add(token, from_draft=False))  # type: ignore[arg-type]
        if stream.stopped:
            break
    assert joined([*written, stream.finish()]) == cut(text, stop)
    assert stream.stopped == any(one in text for one in stop)


def test_pieces_say_who_wrote_them() -> None:
    stream = TextStream(TOKENIZER, continues=True, stop=["cd!"])
    pieces = []
    for letter, from_draft in [("a", True), ("b", False), ("c", True), ("d", False), ("e", True)]:
        pieces += stream.add(tokens_of(letter)[0], from_draft)
    expected = [("a", True), ("b", False), ("c", True), ("d", False), ("e", True)]
    assert pieces == [Piece(text, from_draft) for text, from_draft in expected]


@pytest.mark.parametrize("continues", [True, False])
def test_leading_spaces_are_kept_where_the_tokenizer_keeps_them(continues: bool) -> None:
    for text in (" ab", "ab", "é", "    a", "\nab", " "):
        pieces, _ = pieces_of(TOKENIZER.encode(text), continues=continues)
        assert joined(pieces) == text


def test_what_the_tokenizer_drops_at_a_start_is_dropped_there_alone() -> None:
    for text, answer in (("▁ab", "ab"), ("▁▁ab", " ab"), ("ab", "ab")):
        for continues in (True, False):
            stream = TextStream(SENTENCE_PIECE, continues=continues)
            tokens = SENTENCE_PIECE.convert_tokens_to_ids(list(text))
            pieces = [stream.add(token, False) for token in tokens]
            expected = text.replace("▁", " ") if continues else answer
            assert joined([*pieces, stream.finish()]) == expected


def test_streams_do_not_share_their_text() -> None:
    first, second = (TextStream(TOKENIZER, continues=True) for _ in range(2))
    first.add(tokens_of("a")[0], False)
    assert joined([second.add(tokens_of("b")[0], False), second.finish()]) == "b"
