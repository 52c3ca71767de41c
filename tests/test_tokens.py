"""Text is what all its tokens decode to, wherever rounds end and whatever tokens there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxspec.text import TextStream
from mlxspec.tokens import Detokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
REPLACE = decoders.Replace("▁", " ")
DECODERS: dict[str, Any] = {
    "byte level": decoders.ByteLevel(),
    "byte level, fused": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    "sentence piece": decoders.Sequence(
        [REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "sentence piece, all spaces": decoders.Sequence(
        [REPLACE, decoders.ByteFallback(), decoders.Fuse()]
    ),
    "metaspace": decoders.Metaspace(),
    "word piece": decoders.WordPiece(),
    "suffixes": decoders.BPEDecoder(suffix="▁"),
}
WORDS = [
    "the",
    "Ġworld",
    "▁world",
    "ĠĠĠĠ",
    "▁▁▁▁",
    "▁",
    "##ing",
    "Ċ",
    "日本",
    "na▁",
    "'",
    "n't",
    ".",
]
ADDED = ["<|end|>", "é", "Ġx", "a b", "日本語", "\n\n", "   ", "<0x41>x", "\ufffd", "ñ▁"]


def tokenizer_of(
    kind: str, *, words: Sequence[str] = WORDS, gap: int = 0, cleans: bool = False
) -> TokenizerWrapper:
    """Bytes, words and added tokens; after the bytes `gap` ids have no token."""
    names = [*(ALPHABET if kind.startswith("byte") else BYTES), "a", "b", "c", *words, "<unk>"]
    unique = list(dict.fromkeys(names))
    ids = {name: place + (gap if place >= 256 else 0) for place, name in enumerate(unique)}
    if kind.startswith("word"):
        backend = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    else:
        backend = Tokenizer(
            models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback="sentence" in kind)
        )
    if kind.startswith("byte"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif "piece" in kind and not kind.startswith("word"):
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = DECODERS[kind]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=cleans, eos_token="</s>"
    )
    fast.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
    fast.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = cleans
    return TokenizerWrapper(fast)


def told(tokenizer: Any, tokens: Sequence[int], *, continues: bool = False) -> list[str]:
    """What became final with every token, and at the end."""
    stream = Detokenizer(tokenizer, continues=continues)
    return [*(stream.add(token) for token in tokens), stream.finish()]


def ids_of(tokenizer: Any, *names: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in names]


TOKENIZERS = {
    (kind, gap, cleans): tokenizer_of(kind, gap=gap, cleans=cleans)
    for kind in DECODERS
    for gap in (0, 5)
    for cleans in (False, True)
}
LARGEST = 256 + 5 + 3 + len(WORDS) + len(ADDED) + 20
# Words and added tokens as often as bytes, whose runs are seldom characters.
IDS = st.one_of(
    st.integers(0, LARGEST),
    st.integers(256, LARGEST),
    st.sampled_from([*"é€😀 ".encode()]),
    st.just(10**6),
)


@settings(max_examples=400)
@given(
    which=st.sampled_from(sorted(TOKENIZERS)),
    tokens=st.lists(IDS, max_size=24),
    continues=st.booleans(),
)
@example(which=("suffixes", 5, False), tokens=[266, 0], continues=False)
@example(which=("suffixes", 5, False), tokens=[266, 0], continues=True)
def test_the_parts_are_what_all_tokens_decode_to(
    which: tuple[str, int, bool], tokens: list[int], continues: bool
) -> None:
    tokenizer = TOKENIZERS[which]
    text = "".join(told(tokenizer, tokens, continues=continues))
    if not continues:
        assert text == tokenizer.decode(tokens)
        return
    before = tokenizer.encode("a", add_special_tokens=False)
    whole, start = tokenizer.decode([*before, *tokens]), tokenizer.decode(before)
    # A comma that follows at once would be cleaned up together with the text before it.
    assert text == whole[len(start) :] or which[2]


@settings(max_examples=200)
@given(
    which=st.sampled_from(sorted(TOKENIZERS)),
    text=st.text("ab \n\té€😀日本語<>|.,'", max_size=16),
    stop=st.lists(st.text("ab \né", min_size=1, max_size=3), max_size=2),
)
def test_texts_come_back(which: tuple[str, int, bool], text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[which]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, continues=False, stop=stop)
    pieces = []
    for token in tokens:
        pieces += stream.add(token, from_draft=False)
        if stream.stopped:
            break
    written = "".join(piece.text for piece in pieces + stream.finish())
    decoded = tokenizer.decode(tokens)
    assert decoded.startswith(written)
    assert stream.stopped == any(one in decoded for one in stop)
    assert written == decoded or stream.stopped


@pytest.mark.parametrize("kind", ["byte level", "sentence piece", "metaspace"])
def test_text_is_told_as_soon_as_it_is_final(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = ids_of(tokenizer, "a", "the", "<|end|>", "b", "c")
    assert told(tokenizer, tokens) == ["a", "the", "<|end|>", "b", "c", ""]


def test_bytes_of_sentence_piece_decode_together() -> None:
    # Three bytes are a character, but each is unreadable where one follows that fits none.
    tokenizer = tokenizer_of("sentence piece")
    euro = [*"€".encode()]
    a = ids_of(tokenizer, "a")
    assert told(tokenizer, [*euro, *a]) == ["", "", "", "€a", ""]
    assert told(tokenizer, [*euro, 0xFF, *a]) == ["", "", "", "", "\ufffd" * 4 + "a", ""]
    assert told(tokenizer, euro) == ["", "", "", "€"]


def test_ids_without_a_token_leave_no_trace() -> None:
    for kind in DECODERS:
        tokenizer = tokenizer_of(kind, gap=5)
        a, b = ids_of(tokenizer, "a", "b")
        expected = told(tokenizer, [a, b])
        parts = told(tokenizer, [257, a, 258, 10**6, b, 259])
        assert [parts[1], parts[4]] == expected[:2], kind
        assert "".join(parts) == "".join(expected)


def test_unreadable_letters_are_held_back_only_while_they_may_change() -> None:
    tokenizer = tokenizer_of("byte level")
    parts = told(tokenizer, ids_of(tokenizer, "ÿ") * 6)  # the byte FF, which no character has
    assert [len("".join(parts[:count])) for count in range(1, 8)] == [0, 0, 0, 1, 2, 3, 6]


class Raising:
    """A tokenizer of somebody's own, which raises for ids that it does not know."""

    clean_up_tokenization_spaces = False

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return ["abc"[token] for token in tokens]

    def decode(self, tokens: list[int]) -> str:
        if 1 in tokens:
            raise KeyError(1)
        return "".join(self.convert_ids_to_tokens(tokens))


@example([1, 0])
@given(st.lists(st.integers(0, 5), max_size=8))
def test_a_tokenizer_that_raises_ends_no_text(tokens: list[int]) -> None:
    expected = "".join("abc"[token] for token in tokens if token in (0, 2))
    assert "".join(told(Raising(), tokens)) == expected
