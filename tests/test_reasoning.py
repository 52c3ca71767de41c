"""Reasoning is told from the answer, however models mark it and wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import TEMPLATE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_tokens import tokenizer_of
from tokenizers import AddedToken

from mlxspec import Engine
from mlxspec.decode.requests import Requests
from mlxspec.markup import begun, markup_of
from mlxspec.metrics import Generation, Piece
from mlxspec.reasoning import Mark, Sorter
from mlxspec.templates import source_of
from mlxspec.text import TextStream

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
THINK = ("<think>", "</think>")
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {  # control tokens, and a template
    "tags": (THINK, TEMPLATE),
    "spelt": ((), TEMPLATE + "{# strips </think> #}"),
    "cleaned": (THINK, TEMPLATE),
    "magistral": (("[THINK]", "[/THINK]"), TEMPLATE),
    "channel": (("<|channel>", "<channel|>"), TEMPLATE),
    "frames": (
        ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        TEMPLATE,
    ),
    "xtml": (("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"), TEMPLATE),
    "harmony": (HARMONY, TEMPLATE.replace("<assistant>", "<|start|>assistant")),
}


def made(names: Sequence[str], template: str | None, *, cleans: bool = False) -> TokenizerWrapper:
    fast = tokenizer_of("byte level", cleans=cleans)._tokenizer
    fast.add_tokens([AddedToken(name, normalized=False) for name in (*names, "<assistant>")])
    fast.chat_template = template
    return TokenizerWrapper(fast)


TOKENIZERS = {
    name: made(tokens, template, cleans=name == "cleaned")
    for name, (tokens, template) in FORMATS.items()
}


def request_of(kind: str, prompt: Any = "why", **options: Any) -> Any:
    tokenizer = TOKENIZERS[kind]
    return Requests(tokenizer, len(tokenizer) + 300, 4096).make(prompt, **options)


def told(kind: str, text: str, *, prompt: Any = "why", **options: Any) -> tuple[str, str]:
    """Reasoning and answer of a text whose control tokens are tokens."""
    tokenizer, request = TOKENIZERS[kind], request_of(kind, prompt, **options)
    stream = TextStream(tokenizer, continues=False, reasoning=request.reasoning)
    pieces = [
        piece
        for token in tokenizer.encode(text, add_special_tokens=False)
        for piece in stream.add(token, False)
    ]
    return both([*pieces, *stream.finish()])


def both(pieces: Sequence[Piece]) -> tuple[str, str]:
    parts = {True: "", False: ""}
    for piece in pieces:
        parts[piece.reasoning] += piece.text
    return parts[True], parts[False]


def spelt(text: str) -> list[int]:
    """Tokens of single letters, whatever control tokens the text names."""
    encode = TOKENIZERS["tags"].encode
    return [token for letter in text for token in encode(letter, add_special_tokens=False)]


# --- formats ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "reasoning", "answer"),
    [
        ("tags", "<think>\nhm, ü\n</think>\n\n  ok\n", "hm, ü", "  ok\n"),
        ("tags", "\n<think>hm</think>ok", "hm", "ok"),
        ("tags", "<think>\n\n</think>\n\nok", "", "ok"),
        ("tags", "\n\n  ok", "", "\n\n  ok"),
        ("tags", "a<think>b</think>c<think>d\n\ne</think>f", "b\n\nd\n\ne", "a\n\nc\n\nf"),
        ("tags", "<think>hm\n", "hm\n", ""),
        ("tags", "a</think>b", "", "a</think>b"),
        ("spelt", " <think>hm</think>ok <think>", "hm", "ok <think>"),
        ("spelt", "a <think>hm</think>", "", "a <think>hm</think>"),
        ("spelt", "<think>hm</thi", "hm</thi", ""),
        ("cleaned", "<think>hm .</think>ok .", "hm.", "ok."),
        ("magistral", "[THINK]hm[/THINK]ok", "hm", "ok"),
        ("channel", "<|channel>thought\nhm\n<channel|>ok", "hm", "ok"),
        ("channel", "<|channel>other\nhm<channel|>ok", "", "<|channel>other\nhm<channel|>ok"),
        (
            "frames",
            "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>ok\n<|END_RESPONSE|>",
            "hm",
            "ok\n",
        ),
        (
            "xtml",
            "<|open|>think<|sep|>hm<|close|>think<|sep|><|open|>response<|sep|>ok"
            "<|close|>response<|sep|><|close|>message<|sep|>",
            "hm",
            "ok",
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>analysis"
            "<|message|>so<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>ok",
            "hm\n\nso",
            "ok",
        ),
        (
            "harmony",
            "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>"
            "final<|message|>Then.<|return|>",
            "",
            "First.\n\nThen.",
        ),
        ("harmony", "<|channel|>analysis<|message|>hm<|channel|>final<|message|>ok", "hm", "ok"),
        ("harmony", "<|message|>ok", "", "ok"),
        ("harmony", "<|channel|>analysis<|message|>hm<|end|><|start|>assistantfinal", "hm", ""),
        ("harmony", "ok", "", "ok"),  # no channels at all: nothing is lost
    ],
)
def test_marks_are_parsed(kind: str, text: str, reasoning: str, answer: str) -> None:
    assert told(kind, text) == (reasoning, answer)


def test_marks_that_are_spelt_are_text_where_there_are_tokens_for_them() -> None:
    tokenizer = TOKENIZERS["tags"]
    start, end = (tokenizer.get_vocab()[name] for name in THINK)
    stream = TextStream(tokenizer, continues=False, reasoning=request_of("tags").reasoning)
    tokens = [start, *spelt("a </think> b"), end, *spelt("<think> c")]
    pieces = [piece for token in tokens for piece in stream.add(token, False)]
    assert both([*pieces, *stream.finish()]) == ("a </think> b", "<think> c")


def test_a_prompt_may_open_the_reasoning() -> None:
    for kind in ("tags", "spelt"):
        for opening, expected in [
            ("<think>\n", ("hm", "ok")),
            ("<think>", ("hm", "ok")),
            ("<think>\n\n</think>\n\n", ("", "hm</think>ok")),
        ]:
            prompt = TOKENIZERS[kind].encode(f"<user>why<assistant>{opening}")
            assert told(kind, "\nhm</think>ok", prompt=prompt) in (
                expected,
                (expected[0], "\n" + expected[1]),
            )
    # What stands in a turn before it opens nothing.
    prompt = TOKENIZERS["tags"].encode("<user>why <think><assistant>")
    assert told("tags", "ok</think>", prompt=prompt) == ("", "ok</think>")
    for opening, expected in [
        ("<|start|>assistant", ("", "ok")),
        ("<|start|>assistant<|channel|>analysis<|message|>", ("ok", "")),
        ("<|start|>assistant<|channel|>final<|message|>", ("", "ok")),
    ]:
        prompt = TOKENIZERS["harmony"].encode(f"<|start|>user<|message|>why<|end|>{opening}")
        assert told("harmony", "ok", prompt=prompt) == expected


def test_raw_prompts_and_models_without_marks_are_left_alone() -> None:
    text = "<think>hm</think>ok"
    assert told("tags", text, raw=True) == ("", text)
    assert told("tags", text, raw=True, prompt=[1]) == ("", text)
    assert request_of("harmony", raw=True).reasoning is None
    assert markup_of(made((), TEMPLATE), TEMPLATE) is None
    assert markup_of(made(THINK[:1], TEMPLATE), TEMPLATE) is None
    plain = made(THINK, None)
    assert Requests(plain, 999, None).make("why").reasoning is None


def test_a_format_of_messages_that_mlx_lm_describes() -> None:
    from mlx_lm.chat_templates.muse_spark import RESPONSE_FORMAT

    fast = made(("<|message|>", "<|eom|>", "<|eot|>"), TEMPLATE)._tokenizer
    tokenizer = TokenizerWrapper(fast, response_format=RESPONSE_FORMAT)
    markup = markup_of(tokenizer, source_of(tokenizer))
    assert markup is not None
    reasoning = Requests(tokenizer, 999, None).make("why").reasoning
    stream = TextStream(tokenizer, continues=False, reasoning=reasoning)
    text = "to=self<|message|>hm<|eom|>assistant to=user<|message|>ok<|eot|>"
    pieces = [piece for token in tokenizer.encode(text) for piece in stream.add(token, False)]
    assert both([*pieces, *stream.finish()]) == ("hm", "ok")


# --- where pieces end -------------------------------------------------------------------

ATOMS = {
    "tags": [*THINK, "a", "\n", " ", "<thi", "</think"],
    "spelt": [*THINK, "a", "\n", " ", "<thi", "</", "think>"],
    "channel": ["<|channel>", "thought", "<channel|>", "a", "\n", "thou"],
    "harmony": [*HARMONY, "analysis", "final", "commentary", "a", "\n", "ana", " "],
}


def sorted_in(kind: str, begins: str, atoms: Sequence[str], sizes: Sequence[int]) -> Any:
    """What comes of it with letters in pieces of these sizes, again and again."""
    tokenizer = TOKENIZERS[kind]
    markup = markup_of(tokenizer, source_of(tokenizer))
    assert markup is not None
    sorter, letters, at = Sorter(markup, begins), "", 0
    pieces: list[Piece] = []

    def give(piece: Piece) -> None:
        nonlocal pieces
        pieces += sorter.add([piece])

    for atom in [*atoms, ""]:
        if atom and atom not in markup.codes:
            letters += atom
            continue
        while letters:
            size, at = sizes[at % len(sizes)], at + 1
            give(Piece(letters[:size], False))
            letters = letters[size:]
        if atom:
            give(Mark(atom, False))
    return both(pieces + sorter.finish()), sorter.place


@example("spelt", ["\n", "<thi", "a", *THINK], [2, 1], "beginning")
@example("tags", ["<think>", "\n", "a", "\n", "\n", "</think>", "\n", "a", "<think>", "a"], [9], "")
@example("harmony", ["<|channel|>", "analysis", "<|message|>", "a"], [3], "header")
@settings(max_examples=400)
@given(
    st.sampled_from(sorted(ATOMS)),
    st.lists(st.integers(0, 20), max_size=12),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(["beginning", "reasoning"]),
)
def test_sorting_does_not_depend_on_where_tokens_end(
    kind: str, numbers: list[Any], sizes: list[int], begins: str
) -> None:
    atoms = [
        one if isinstance(one, str) else ATOMS[kind][one % len(ATOMS[kind])] for one in numbers
    ]
    begins = begins or "beginning"
    letterwise = sorted_in(kind, begins, atoms, [1])
    assert sorted_in(kind, begins, atoms, sizes) == letterwise
    assert sorted_in(kind, begins, atoms, [1000]) == letterwise
    if kind == "tags":  # marks and blanks beside them are left out, and nothing else
        told = "".join(letterwise[0])
        for mark in THINK:  # where none is due, it is text
            told = told.replace(mark, "")
        letters = "".join(atom for atom in atoms if atom not in THINK)
        assert sorted("".join(told.split())) == sorted("".join(letters.split()))


# --- generations ------------------------------------------------------------------------


class Script(nn.Module):
    """A model that says the same text whatever it is shown."""

    def __init__(self, prompt: Sequence[int], tokens: Sequence[int], vocabulary: int) -> None:
        super().__init__()
        self.tokens = mx.array([*prompt, *tokens])
        self.size = vocabulary

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        offset = mx.zeros((tokens.shape[0],), mx.int32)
        if cache is not None:
            offset = offset + cache[0].offset
            nothing = mx.zeros((tokens.shape[0], 1, tokens.shape[1], 1))
            cache[0].update_and_fetch(nothing, nothing)
        at = offset[:, None] + mx.arange(1, tokens.shape[1] + 1)
        said = self.tokens[mx.minimum(at, self.tokens.size - 1)]
        return (said[..., None] == mx.arange(self.size)).astype(mx.float32)

    @property
    def layers(self) -> list[None]:
        return [None]


def generation_of(kind: str, text: str, context: int | None = None, **options: Any) -> Generation:
    tokenizer = TOKENIZERS[kind]
    size = max(tokenizer.get_vocab().values()) + 1
    prompt = request_of(kind).tokens
    model = Script(prompt, tokenizer.encode(text, add_special_tokens=False), size)
    engine = Engine(model, model, tokenizer, compiled=False, context=context)
    return engine.generate("why", draft_tokens=2, **options)


def test_a_generation_has_its_reasoning_apart() -> None:
    text = "<think>hm</think>ok"
    result = generation_of("tags", text, max_tokens=6)
    assert (result.reasoning, result.text, result.notes) == ("hm", "ok", [])
    assert result.as_dict()["reasoning"] == "hm"
    assert result.reasoning_tokens == 3  # its opening mark, and a token for each letter
    assert TOKENIZERS["tags"].decode(result.tokens) == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 3}, "inside the reasoning, at the limit of 3 tokens: raise it with --max-"),
        ({"max_tokens": 300, "context": 20}, "inside the reasoning, at the end of the model's"),
        ({"max_tokens": 6, "stop": ["m"]}, "inside the reasoning, at a stop string"),
        ({"max_tokens": 6, "eos": ["m"]}, "the model ended its text inside the reasoning"),
    ],
)
def test_an_end_inside_the_reasoning_is_told(options: dict[str, Any], words: str) -> None:
    result = generation_of("tags", "<think>hm, hm, hm, hm", **options)
    assert result.text == ""
    assert result.reasoning.startswith("h")
    assert len(result.notes) == 1
    assert words in result.notes[0]
    assert "enable_thinking" not in result.notes[0]  # this template does not read it


def test_an_end_between_reasoning_and_answer_is_told_too() -> None:
    for kind, text, tokens in [
        ("tags", "<think>hm</think>\nok", 4),
        ("tags", "<think>hm</think>\nok", 5),
        ("harmony", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant", 22),
    ]:
        result = generation_of(kind, text, max_tokens=tokens)
        assert (result.reasoning, result.text) == ("hm", "")
        assert "after the reasoning, at the limit of" in result.notes[0]
    assert generation_of("tags", "<think>hm</think>\nok", max_tokens=6).notes == []
    assert generation_of("tags", "<think></think>ok", max_tokens=2).notes == []


def test_the_advice_names_what_the_template_reads() -> None:
    for argument in ("enable_thinking", "reasoning_effort"):
        tokenizer = made(THINK, TEMPLATE + "{{ '' if " + argument + " else '' }}")
        reasoning = Requests(tokenizer, 999, None).make("why", max_tokens=None).reasoning
        assert reasoning is not None
        assert f"--template-arg {argument}=" in reasoning.remark("", "length", stopped=False)


def test_begun_needs_no_more_than_the_end_of_a_prompt() -> None:
    tokenizer = TOKENIZERS["tags"]
    markup = markup_of(tokenizer, "")
    assert markup is not None
    long = spelt("a" * 200)
    assert begun(markup, tokenizer, [*long, tokenizer.get_vocab()["<think>"]]) == "reasoning"
    assert begun(markup, tokenizer, []) == "beginning"
