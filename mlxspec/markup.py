"""How a model marks its reasoning: with tags around it, or with channels whose headers name them.

A model writes these marks as control tokens where its tokenizer has such tokens. Only the tokens
count then: a reasoning about tags may spell them letter by letter, and that is text. So a control
token is *coded* as one letter that no text has, and marks are looked for in the coded text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mlxspec.tokens import Tokenizer, decodes_at_once

# What a text is, as far as its marks have told. A state of any other name is a header, or what
# stands between messages: its text is no part of the answer or the reasoning.
ANSWER, REASONING = "answer", "reasoning"
KEPT = "kept"  # the answer, of which the mark itself is a part: it begins a call of a tool
BEGINNING = "beginning"  # blank so far: the answer, unless a mark opens the reasoning
_HEADER, _CHANNEL, _ANALYSIS = "header", "channel", "analysis"

Edges = Mapping[str, tuple[tuple[str, str], ...]]

# Tags that a tokenizer has as tokens, beside those that mlx-lm knows.
_TAGS = (
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
)
# Tags that a template names and no token has.
_SPELT = (("<think>", "</think>"), ("<thought>", "</thought>"))
# They stand around an answer.
_FRAMES = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")
CALL_OF_HARMONY = "to=functions."  # in the header of a message: what follows is a name
# gpt-oss: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_HARMONY_ENDS = ("<|end|>", "<|return|>", "<|call|>")

_TAIL = 64  # tokens of a prompt that are searched for what begins an answer
_CODES = 0xFDD0  # the first of the letters that Unicode keeps out of every text


@dataclass(frozen=True)
class Markup:
    """The marks of one model.

    Args:
        edges: for each state, the coded marks that end it, each with the state that follows.
        tokens: names of the control tokens among the marks, by their ids.
        initial: the state of an answer that has no text yet, where that does not depend on
            the prompt.
    """

    edges: Edges
    tokens: Mapping[int, str] = field(default_factory=dict)
    initial: str | None = None

    @cached_property
    def codes(self) -> dict[str, str]:
        """The letters of the control tokens, by their names."""
        return _codes(self.tokens.values())

    @cached_property
    def without_calls(self) -> Markup:
        """The same where no tools are offered."""
        edges = {
            state: tuple((mark, to) for mark, to in marks if to != KEPT)
            for state, marks in self.edges.items()
        }
        return replace(self, edges=edges)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {ord(code): name for name, code in self.codes.items()}

    def named(self, coded: str) -> str:
        """Coded text as the model wrote it."""
        return coded if coded.isascii() else coded.translate(self._names)


def markup_of(tokenizer: Tokenizer, template: str) -> Markup | None:
    """The marks that a tokenizer or its template knows; None for a model that marks nothing.

    Args:
        template: its source.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    if is_harmony(vocabulary):
        return _coded(tokenizer, _harmony())
    formatted = getattr(tokenizer, "response_transitions", None)
    if formatted:
        initial = getattr(tokenizer, "response_initial_state", None)
        return _coded(tokenizer, _of_messages(formatted), initial)
    frames = [name for name in _FRAMES if name in vocabulary]
    frames += getattr(tokenizer, "structural_markers", ())
    known = (getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None))
    for start, end in (known, *_TAGS):
        if start and end and (start == known[0] or {start, end} <= vocabulary.keys()):
            return _coded(tokenizer, _between(start, end, frames))
    for start, end in _SPELT:
        if end in template:
            edges = _between(start, end, ())
            # Later on, letters may as well be a part of the answer.
            return Markup({**edges, ANSWER: ()})
    return None


def is_harmony(vocabulary: Collection[str]) -> bool:
    """Whether these are the tokens of gpt-oss."""
    return all(name in vocabulary for name in _HARMONY)


def begun(markup: Markup, tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """The state in which a prompt leaves its answer: a template may open the reasoning itself."""
    if markup.initial is not None:
        return markup.initial
    tail = _coded_text(markup, tokenizer, _last_turn(markup, tokenizer, prompt))
    if not markup.tokens:
        opening = tuple(mark for mark, to in markup.edges[BEGINNING] if to == REASONING)
        return REASONING if tail.rstrip().endswith(opening) else BEGINNING
    state = ANSWER
    while True:
        found = [(tail.find(mark), mark, to) for mark, to in markup.edges[state] if mark in tail]
        if not found:
            return BEGINNING if state == ANSWER else state
        start, mark, state = min(found)
        tail = tail[start + len(mark) :]


def _between(start: str, end: str, frames: Iterable[str]) -> Edges:
    opens = ((start, REASONING), *((frame, ANSWER) for frame in frames))
    return {BEGINNING: opens, ANSWER: opens, REASONING: ((end, ANSWER),)}


def _harmony() -> Edges:
    ends = tuple((name, _HEADER) for name in (*_HARMONY_ENDS, "<|start|>"))
    message = (*ends, ("<|channel|>", _CHANNEL))
    return {
        **dict.fromkeys((BEGINNING, ANSWER, REASONING), message),
        _HEADER: (("<|channel|>", _CHANNEL), ("<|message|>", ANSWER), (CALL_OF_HARMONY, KEPT)),
        _CHANNEL: (
            ("analysis", _ANALYSIS),
            ("final", _HEADER),
            ("commentary", _HEADER),
            ("<|message|>", ANSWER),
        ),
        _ANALYSIS: (("<|message|>", REASONING),),
    }


def _of_messages(transitions: Mapping[str, Iterable[tuple[str, str]]]) -> Edges:
    """mlx-lm's own description of an answer in several messages."""

    def state(name: str) -> str:
        return {"normal": ANSWER, "reasoning": REASONING, "tool": KEPT}.get(name, name)

    edges = {
        state(name): tuple((mark, state(to)) for mark, to in marks)
        for name, marks in transitions.items()
    }
    return {**edges, BEGINNING: edges.get(ANSWER, ())}


def _coded(tokenizer: Tokenizer, edges: Edges, initial: str | None = None) -> Markup:
    """The marks with a letter in place of each control token, where text comes token by token."""
    if not decodes_at_once(tokenizer):
        return Markup(edges, initial=initial)
    tokens = _tokens_in(tokenizer, {mark for some in edges.values() for mark, _ in some})
    codes = sorted(_codes(tokens.values()).items(), key=lambda one: -len(one[0]))

    def coded(mark: str) -> str:
        for name, code in codes:
            mark = mark.replace(name, code)
        return mark

    return Markup(
        {state: tuple((coded(mark), to) for mark, to in some) for state, some in edges.items()},
        tokens,
        initial,
    )


def _tokens_in(tokenizer: Tokenizer, marks: Iterable[str]) -> dict[int, str]:
    """The control tokens of which the marks consist, by their ids."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    added = [name for name in tokenizer.get_added_vocab() if len(name) > 1 and name[0] in "<["]
    found: dict[int, str] = {}
    for mark in marks:
        whole = mark in vocabulary and mark[0] in "<["
        found |= {vocabulary[name]: name for name in ([mark] if whole else added) if name in mark}
    return found


def _codes(names: Iterable[str]) -> dict[str, str]:
    return {name: chr(_CODES + at) for at, name in enumerate(sorted(set(names)))}


def _last_turn(markup: Markup, tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The end of a prompt, behind the last control token that marks something else."""
    others = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids} - {*markup.tokens}
    tail = list(prompt[-_TAIL:])
    starts = [at + 1 for at, token in enumerate(tail) if token in others]
    return tail[starts[-1] if starts else 0 :]


def _coded_text(markup: Markup, tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    text, run = "", list[int]()
    for token in tokens:
        if token not in markup.tokens:
            run.append(token)
            continue
        text += (str(tokenizer.decode(run)) if run else "") + markup.codes[markup.tokens[token]]
        run = []
    return text + (str(tokenizer.decode(run)) if run else "")
