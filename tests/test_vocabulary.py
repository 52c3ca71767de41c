"""Which tokens mean the same: tokenizers of both spellings, held against what they decode to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import BYTE_LEVEL
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxspec.drafters.vocabulary import ENOUGH, Shared, shared_tokens

SENTENCE_PIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
)


def tokenizer_of(
    names: Sequence[str], decoder: Any, added: Sequence[str] = (), **special: str
) -> TokenizerWrapper:
    """A tokenizer whose ids are the places of `names`, and of `added` after them."""
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.decoder = decoder
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    fast.add_tokens([AddedToken(name, special=True) for name in added])
    return TokenizerWrapper(fast)


def byte_level(names: Sequence[str], *added: str, **special: str) -> TokenizerWrapper:
    return tokenizer_of(names, decoders.ByteLevel(), added, **special)


def sentence_piece(names: Sequence[str], *added: str, **special: str) -> TokenizerWrapper:
    return tokenizer_of(names, SENTENCE_PIECE, added, **special)


def spelled(text: str) -> str:
    """As byte-level BPE spells it."""
    return "".join(name for word, _ in BYTE_LEVEL.pre_tokenize_str(text) for name in word)


def found(target: TokenizerWrapper, draft: TokenizerWrapper) -> Shared:
    shared = shared_tokens(target, draft)
    assert shared is not None
    return shared


# --- ids that mean the same -------------------------------------------------------------


@pytest.mark.parametrize("draft", [["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c"]])
def test_ids_that_agree_need_no_mapping(draft: list[str]) -> None:
    target = byte_level(["a", "b", "c"])
    assert shared_tokens(target, byte_level(draft)) is None
    assert shared_tokens(byte_level(draft), target) is None


@pytest.mark.parametrize("draft", [["b", "a", "c"], ["a", "b", "x"], ["a", "c"]])
def test_an_id_that_means_another_token_needs_one(draft: list[str]) -> None:
    shared = found(byte_level(["a", "b", "c"]), byte_level(draft))
    assert shared.partners == {i: draft.index(n) for i, n in enumerate("abc") if n in draft}
    assert shared.tokens == 3


def test_added_tokens_count_where_ids_are_compared() -> None:
    one, two = byte_level("abc", "<x>", "<y>"), byte_level("abc", "<y>", "<x>")
    assert shared_tokens(one, one) is None
    assert found(one, two).partners == {0: 0, 1: 1, 2: 2, 3: 4, 4: 3}


# --- spellings --------------------------------------------------------------------------


def test_a_space_a_line_end_and_bytes_in_both_spellings() -> None:
    target = byte_level([spelled(text) for text in ("the", " the", "\n", " ", "é", "\t")])
    draft = sentence_piece(["<0x09>", "▁", "é", "<0x0A>", "▁the", "the"])
    assert found(target, draft).partners == {0: 5, 1: 4, 2: 3, 3: 1, 4: 2, 5: 0}
    assert found(draft, target).partners == {5: 0, 4: 1, 3: 2, 1: 3, 2: 4, 0: 5}


def test_letters_of_one_spelling_are_text_in_the_other() -> None:
    assert found(byte_level(["Ġa", "b"]), sentence_piece(["b", "Ġa"])).partners == {1: 0}
    assert found(byte_level([spelled("Ġa"), "b"]), sentence_piece(["b", "Ġa"])).overlap == 1


def test_part_of_a_character_is_its_byte() -> None:
    first, second = spelled("é")
    draft = sentence_piece(["<0xA9>", "<0xC3>"])
    assert found(byte_level([first, second]), draft).partners == {0: 1, 1: 0}


def test_every_byte_is_known_by_its_letter() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    partners = found(byte_level(letters), sentence_piece([f"<0x{b:02X}>" for b in range(256)]))
    assert partners.overlap == 1
    for code in (*range(0x800), *range(0x800, 0xD800, 0x40), 0x10000, 0x40000, 0x10FFFF):
        bytes_of = [partners.partners[letters.index(letter)] for letter in spelled(chr(code))]
        assert bytes(bytes_of) == chr(code).encode()


def test_a_decoder_of_several_steps() -> None:
    steps = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    assert found(tokenizer_of(["Ġa", "b"], steps), sentence_piece(["b", "▁a"])).overlap == 1


def test_a_name_outside_the_alphabet_is_text() -> None:
    assert found(byte_level(["漢 x", "a"]), sentence_piece(["a", "漢▁x"])).overlap == 1


def test_a_decoder_with_letters_of_its_own() -> None:
    target = byte_level([spelled(text) for text in (" the", "ing", "\n", " ")])
    draft = tokenizer_of(["_", "_the", "ing", "\n"], decoders.Metaspace(replacement="_"))
    assert found(target, draft).partners == {0: 1, 1: 2, 2: 3, 3: 0}
    draft = tokenizer_of(["x", "##ing", "the"], decoders.WordPiece(cleanup=False))
    assert found(target, draft).partners == {0: 2, 1: 1}


def test_ids_that_have_no_token_mean_nothing() -> None:
    state = json.loads(byte_level(["a", "b", "c"]).backend_tokenizer.to_str())
    state["model"]["vocab"] = {"b": 0, "a": 4, "c": 9}
    draft = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert found(byte_level(["a", "b", "c"]), draft).partners == {0: 4, 1: 0, 2: 9}


TEXTS = st.lists(
    st.text("ab \n\té漢Ġ", min_size=1, max_size=4), min_size=1, max_size=12, unique=True
)


@settings(max_examples=60)
@given(mine=TEXTS, theirs=TEXTS, spelling=st.booleans())
def test_partners_are_those_that_decode_to_the_same_text(
    mine: list[str], theirs: list[str], spelling: bool
) -> None:
    target = byte_level([spelled(text) for text in mine])
    draft: TokenizerWrapper
    if spelling:
        draft = byte_level([spelled(text) for text in theirs])
    else:
        draft = sentence_piece([text.replace(" ", "▁") for text in theirs])
    assert [target.decode([i]) for i in range(len(mine))] == mine
    assert [draft.decode([i]) for i in range(len(theirs))] == theirs
    expected = {i: theirs.index(text) for i, text in enumerate(mine) if text in theirs}
    shared = shared_tokens(target, draft)
    if shared is None:
        assert all(own == other for own, other in expected.items())
        return
    assert shared.partners == expected
    # The longest end of what is not shared, if any.
    for i, text in enumerate(mine):
        ends = [text[at:] for at in range(len(text)) if text[at:] in theirs]
        assert (i in shared.stand_ins) == (bool(ends) and i not in expected)
        if i in shared.stand_ins:
            assert theirs[shared.stand_ins[i]] == ends[0]


# --- duplicates -------------------------------------------------------------------------


def test_of_two_tokens_that_mean_the_same_the_written_one_is_proposed() -> None:
    draft = byte_level([spelled(" "), spelled("\n"), "a"])
    target = sentence_piece(["a", "<0x0A>", "<0x20>", "\n", "▁"])
    shared = found(target, draft)
    assert shared.partners == {0: 2, 3: 1, 4: 0}
    # The other one is shown as the same token, and never proposed.
    assert shared.stand_ins == {1: 1, 2: 0}
    assert found(draft, target).partners == {2: 0, 1: 3, 0: 4}


def test_two_of_each_are_told_apart() -> None:
    target = sentence_piece(["<0x0A>", "\n", "a"])
    assert found(target, sentence_piece(["a", "\n", "<0x0A>"])).partners == {0: 2, 1: 1, 2: 0}


@settings(max_examples=30)
@given(order=st.permutations(range(6)))
def test_a_choice_depends_on_nothing_but_names_and_ids(order: list[int]) -> None:
    # The order in which a vocabulary is listed is no part of it.
    target = sentence_piece(["<0x0A>", "\n", "a", "<0x61>", "▁", " "])
    draft = byte_level([spelled(" "), "a", spelled("\n")])
    expected = found(target, draft)
    entries = list(target.get_vocab().items())
    listed = dict(entries[place] for place in order)
    target._tokenizer.get_vocab = lambda: listed
    assert found(target, draft) == expected


# --- added tokens -----------------------------------------------------------------------


def test_added_tokens_correspond_by_name_alone() -> None:
    target = sentence_piece(["a", "b"], "<|user|>", "▁b")
    draft = byte_level(["b", "Ġb", "a"], "<|user|>", "<|tool|>")
    # The target's added "▁b" is a name, and no space and a letter.
    assert found(target, draft).partners == {0: 2, 1: 0, 2: 3}


def test_an_added_token_that_is_text_means_its_text() -> None:
    target = byte_level([spelled("\n\n"), spelled("   "), "a"])
    draft = sentence_piece(["a"])
    draft._tokenizer.add_tokens(["   ", "\n\n"])
    assert found(target, draft).partners == {0: 2, 1: 1, 2: 0}


def test_an_added_token_that_is_text_in_one_of_two_has_its_name() -> None:
    target, draft = byte_level(["a"], "<think>"), byte_level(["b", "a"])
    draft._tokenizer.add_tokens(["<think>"])
    assert found(target, draft).partners == {0: 1, 1: 2}
    assert found(draft, target).partners == {1: 0, 2: 1}


def test_ends_and_beginnings_of_text_correspond_under_any_name() -> None:
    target = byte_level(["a"], bos_token="<|begin|>", eos_token="<|end|>")
    draft = sentence_piece(["a"], eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    shared = found(target, draft)
    ends = {
        target.eos_token_id: draft.eos_token_id,
        target.bos_token_id: draft.bos_token_id,
    }
    assert shared.partners == {0: 0, **ends}
    assert shared.overlap == 1
    assert found(byte_level(["a"], eos_token="<|end|>"), byte_level(["b", "a"])).partners == {0: 1}


def test_an_end_that_has_a_token_of_its_name_keeps_it() -> None:
    # A chat's end of turn, where the draft ends a text otherwise.
    target = byte_level(["a"], "<|end|>", "<|turn|>", eos_token="<|turn|>")
    draft = byte_level(["b", "a"], "<|turn|>", "<|end|>", eos_token="<|end|>")
    names = {target.get_vocab()[name]: draft.get_vocab()[name] for name in ("<|end|>", "<|turn|>")}
    assert found(target, draft).partners == {0: 1, **names}


def test_no_token_is_proposed_for_two() -> None:
    # The draft's end of text is another of the target's markers.
    target = byte_level(["a"], "</s>", eos_token="<|end|>")
    shared = found(target, byte_level(["b", "a"], eos_token="</s>"))
    assert shared.partners == {0: 1, target.get_vocab()["</s>"]: 2}


def test_what_is_shown_for_a_marker_is_an_end_of_text() -> None:
    target = byte_level(["a"], "<|user|>")
    draft = byte_level(["b", "a"], eos_token="</s>", unk_token="<unk>")
    assert found(target, draft).placeholder == draft.eos_token_id
    unknown = byte_level(["b", "a"], unk_token="<unk>")
    assert found(target, unknown).placeholder == unknown.unk_token_id == 2
    assert found(target, byte_level(["b", "a"])).placeholder == 0


# --- how much is shared -----------------------------------------------------------------


def test_padding_of_the_target_is_no_token() -> None:
    # Its embedding may have rows that no token has; they are not in its tokenizer.
    shared = found(byte_level(["a", "b"]), byte_level(["b", "a", "c", "d"]))
    assert (shared.tokens, shared.overlap, shared.percent) == (2, 1, 100)


@pytest.mark.parametrize(("missing", "enough", "percent"), [(99, True, 90), (101, False, 89)])
def test_just_below_and_just_above(missing: int, enough: bool, percent: int) -> None:
    names = [f"a{i}" for i in range(1000)]
    draft = [*names[missing:][::-1], *(f"b{i}" for i in range(missing))]
    shared = found(byte_level(names), byte_level(draft))
    assert shared.overlap == (1000 - missing) / 1000
    assert (shared.overlap >= ENOUGH) is enough
    assert shared.percent == percent


def test_a_refusal_never_names_the_percentage_that_is_enough() -> None:
    nearly = Shared({i: i for i in range(8999)}, {}, 0, 10_000)
    assert nearly.overlap < ENOUGH
    assert nearly.percent == 89
    assert Shared({i: i for i in range(9)}, {}, 0, 10).overlap >= ENOUGH
