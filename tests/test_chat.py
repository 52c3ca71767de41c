"""Conversations without a terminal: turns, files, and what of them a model reads."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from talkers import Talker, talker, talking_tokenizer

from mlxspec import Engine
from mlxspec.bench.questions.turns import summed_up, waits
from mlxspec.chat import documents
from mlxspec.chat.conversation import Conversation, Turn
from mlxspec.chat.sending import Sending
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.errors import MlxspecError, UsageError

TURNS = [Turn("one", "first"), Turn("two", "second", "because"), Turn("three", "third")]


def talked() -> Conversation:
    return Conversation("be kind", list(TURNS))


def answered(engine: Engine, conversation: Conversation, question: str) -> Any:
    """Answer a question, which becomes a turn."""
    options = Sending(engine, {}).options(conversation, question)
    generation = engine.generate(**options, max_tokens=60)
    conversation.add(Turn(question, generation.text, generation.reasoning))
    return generation


# --- turns ------------------------------------------------------------------------------


def test_no_reasoning_is_sent_back():
    assert talked().messages("four") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "third"},
        {"role": "user", "content": "four"},
    ]


def test_undo_takes_back_what_was_left_out_too():
    conversation = talked()
    conversation.left_out = 2
    assert conversation.messages("four")[1:] == [
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "third"},
        {"role": "user", "content": "four"},
    ]
    assert [conversation.undo() for _ in range(4)] == [*reversed(TURNS), None]
    assert conversation.left_out == 0


# --- files ------------------------------------------------------------------------------

texts = st.text(
    st.one_of(st.sampled_from("#\\ \n\r"), st.characters(exclude_categories=["Cs"])), max_size=40
)
headings = st.sampled_from(["## User", "\\## User", "## Assistant\n", "x\n## System\n\ny"])
words = st.one_of(texts, headings).filter(str.strip)


@given(
    system=st.none() | words,
    turns=st.lists(st.builds(Turn, words, words, st.just("") | words), min_size=1, max_size=3),
)
def test_a_chat_is_the_same_after_a_file(tmp_path_factory, system, turns):
    folder = tmp_path_factory.mktemp("chats")
    conversation = Conversation(system, turns)
    documents.save(conversation, folder / "chat.json")
    assert documents.load(folder / "chat.json") == (conversation, "")
    documents.save(conversation, folder / "chat.md")
    loaded, question = documents.load(folder / "chat.md")
    assert question == ""

    def plain(text: str) -> str:
        return text.replace("\r\n", "\n").strip("\n")

    assert loaded.system == (None if system is None else plain(system))
    assert [(one.question, one.answer) for one in loaded.turns] == [
        (plain(one.question), plain(one.answer)) for one in turns
    ]


def test_a_question_without_an_answer_is_still_to_be_asked(tmp_path):
    (tmp_path / "chat.md").write_text("## User\n\none\n\n## Assistant\n\nfirst\n\n## User\n\ntwo\n")
    conversation, question = documents.load(tmp_path / "chat.md")
    assert (conversation.turns, question) == ([Turn("one", "first")], "two")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat.txt", "x", "neither JSON nor Markdown"),
        ("chat.json", "{", "not valid JSON"),
        ("chat.json", "[]", "no list of turns"),
        ("chat.json", '{"messages": 3}', "no list of turns"),
        ("chat.json", '[{"role": "assistant", "content": "x"}]', "do not take turns"),
        ("chat.json", '[{"role": "user", "content": [{"type": "image_url"}]}]', "image_url"),
        ("chat.md", "hello", "first line"),
        ("chat.md", "", "no list of turns"),
    ],
)
def test_a_file_that_is_no_conversation_is_one_error(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        documents.load(tmp_path / name)
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_file_that_cannot_be_read_or_written_is_one_error(tmp_path: Path):
    with pytest.raises(MlxspecError, match="cannot be read: No such file"):
        documents.load(tmp_path / "none.md")
    with pytest.raises(MlxspecError, match="cannot be written: No such file"):
        documents.save(talked(), tmp_path / "none" / "chat.md")


def test_what_openai_clients_save_is_read(tmp_path):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    assert documents.load(tmp_path / "chat.json") == (Conversation(), "hi")


# --- what a model reads -----------------------------------------------------------------


class Counting(Talker):
    """Counts the tokens that it reads in passes of more than a round's."""

    read = 0

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if tokens.shape[1] > 3:  # K is 2
            self.read += tokens.shape[1]
        return super().__call__(tokens, cache)


def test_turn_20_reads_only_what_is_new():
    tokenizer = talking_tokenizer()
    replies = ["<think>\nhm\n</think>\n\nIt is so.", "It is so."]
    tokens = [tokenizer.encode(one, add_special_tokens=False) for one in replies]
    target, draft = Counting(tokenizer, tokens), Counting(tokenizer, tokens)
    engine = Engine(target, draft, tokenizer, draft_tokens=2, compiled=False)
    engine.prefixes = PrefixCache(10**8)
    conversation = Conversation("be kind")
    target_read, draft_read, new = [], [], []
    for turn in range(20):
        before = target.read, draft.read
        generation = answered(engine, conversation, f"question {'abcdefghij'[turn % 10]} 1")
        new.append(generation.prompt_tokens - generation.cached_prompt_tokens)
        target_read.append(target.read - before[0])
        draft_read.append(draft.read - before[1])
    assert generation.prompt_tokens > 20 * 40
    asked = len("<>user\nquestion a 1<>\n<>assistant\n") + 8  # and the end of the answer before
    assert max(new[1:]) <= asked
    assert max(target_read[1:]) <= asked
    assert max(draft_read[1:]) <= asked


def test_a_reasoning_is_not_read_again_by_the_next_turn():
    engine = talker("<think>\nlong thoughts\n</think>\n\nYes.")
    conversation = Conversation()
    answered(engine, conversation, "why")
    assert conversation.turns == [Turn("why", "Yes.", "long thoughts")]
    request = engine.request(**Sending(engine, {}).options(conversation, "and"))
    assert "long thoughts" not in engine.tokenizer.decode(list(request.tokens))


def test_a_model_without_turns_goes_on_with_the_text():
    engine = talker("x")
    engine.tokenizer._tokenizer.chat_template = None
    engine.tokenizer.has_chat_template = False
    sending = Sending(engine, {})
    conversation = Conversation("# a file", [Turn("def f(x):", "\n    return x")])
    assert not sending.has_turns
    text = "# a file\ndef f(x):\n    return x\ndef g(x):"
    assert sending.options(conversation, "def g(x):") == {"prompt": text, "raw": True}
    assert engine.request(**sending.options(conversation, "def g(x):")).continues


def test_the_oldest_turns_are_left_out_after_a_note_and_seldom():
    engine = talker("It is so, whatever you say.", context=600)
    conversation, notes = Conversation("be kind"), []
    dropped = []
    for turn in range(30):
        question = f"question {'abcdefghij'[turn % 10]}"
        before = len(notes), conversation.left_out
        Sending(engine, {}).fit(conversation, question, 50, notes.append)
        if conversation.left_out > before[1]:
            assert len(notes) == before[0] + 1
            dropped.append(turn)
        answered(engine, conversation, question)
    assert "the context of 600 tokens is full: the oldest" in notes[0]
    assert len(conversation.turns) == 30  # they are kept all the same
    assert 2 <= len(dropped) <= 8, "turns are left out in one go, not at every question"
    assert conversation.messages("x")[0]["content"] == "be kind"


def test_a_question_that_is_too_long_alone_is_an_error_and_leaves_the_turns():
    engine = talker("x", context=100)
    conversation = Conversation()
    answered(engine, conversation, "short")
    Sending(engine, {}).fit(conversation, "long " * 40, 50, lambda note: None)
    with pytest.raises(UsageError, match="the model's context is 100"):
        answered(engine, conversation, "long " * 40)
    assert conversation.turns == [Turn("short", "x")]


def test_the_figure_of_turns_counts_what_is_read():
    found = list(waits(talker("It is so."), ["why"] * 8, 20, 2))
    assert all(one.prompt > before.prompt for before, one in pairwise(found))
    assert found[0].read == found[0].prompt
    assert len({one.read for one in found[2:]}) == 1, "the same is new in each turn"
    assert all(one.read < one.prompt / 2 for one in found[4:])
    assert all(one.first_s > 0 and one.anew_s > 0 for one in found)
    late = [one._replace(first_s=2.0, anew_s=9.0) for one in found[3:]]
    early = [one._replace(first_s=1.0, anew_s=1.0) for one in found[:6]]
    assert summed_up([*early, *late]) == {"first_s": [1.0, 2.0], "anew_s": [1.0, 9.0]}
