"""Wherever a text ends within a round, it ends as plain decoding would end it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import (
    TEMPLATE,
    TOKENIZER,
    build,
    cut,
    draft_for,
    plain,
    prompt_of,
    tokens_of,
    wrapped,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxspec.decode.engine import Engine
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.decode.round import FusedRound
from mlxspec.errors import PromptError, UsageError
from mlxspec.metrics import Event, Generation, Piece, SpeculationStats
from mlxspec.params import SamplingParams

PROMPT = [1, 2, 3]
VOCABULARY = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id
MOST = 5  # proposals


class Script(nn.Module):
    """A model that says the same text whatever it is shown."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = mx.array([*PROMPT, *tokens])

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        batch, rows = tokens.shape
        offset = mx.zeros((batch,), mx.int32)
        if cache is not None:
            offset = offset + cache[0].offset
            nothing = mx.zeros((batch, 1, rows, 1))
            cache[0].update_and_fetch(nothing, nothing)
        following = mx.minimum(offset[:, None] + mx.arange(1, rows + 1), self.tokens.size - 1)
        said = self.tokens[following][..., None] == mx.arange(VOCABULARY)
        return said.astype(mx.float32)

    @property
    def layers(self) -> list[None]:
        return [None]


def engine_of(text: Sequence[int], mistakes: Sequence[int] = ()) -> Engine:
    """Says `text`, with a draft that is wrong about the tokens with these numbers."""
    proposed = [
        (token + 1) % VOCABULARY if number in mistakes else token
        for number, token in enumerate(text)
    ]
    return Engine(Script(text), Script(proposed), TOKENIZER, compiled=False)


class Expected(NamedTuple):
    tokens: list[int]
    text: str
    finish_reason: str


def plainly(
    text: Sequence[int], max_tokens: int, stop: Sequence[str] = (), *, ignore_eos: bool = False
) -> Expected:
    """The result of saying `text` token by token."""
    tokens: list[int] = []
    reason = "length"
    for token in text[:max_tokens]:
        if token == EOS and not ignore_eos:
            reason = "stop"
            break
        tokens.append(token)
        if any(one in shown(tokens) for one in stop):
            break
    written = decoded(tokens)
    if any(one in written for one in stop):
        reason = "stop"
    return Expected(tokens, cut(written, stop), reason)


def shown(tokens: Sequence[int]) -> str:
    """The text that is told before the end: without what may be an incomplete character."""
    text = decoded(tokens)
    return text[: len(text) - min(len(text) - len(text.rstrip("\ufffd")), 3)]


def decoded(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(tokens))


def rounds_of(
    text: Sequence[int], mistakes: Sequence[int], draft_tokens: int, needed: int
) -> list[int]:
    """How many proposals are kept in each round, until `needed` tokens are there.

    The first round has none.
    """
    kept = [0]
    while sum(kept) + len(kept) < needed:
        start = sum(kept) + len(kept)
        wrong = [n for n in range(start, start + draft_tokens) if n in mistakes]
        kept.append(min(wrong, default=start + draft_tokens) - start)
    return kept


def assert_as_expected(result: Generation, expected: Expected) -> None:
    assert Expected(result.tokens, result.text, result.finish_reason) == expected


def named(name: str) -> int:
    return int(TOKENIZER.convert_tokens_to_ids(name))


# Half characters among them.
WORDS = sorted({*map(named, ["ab", "abab", "Ġa", "bc", "Ã©", "ĠĠ"]), *tokens_of("abc! é€")})


@settings(max_examples=120)
@given(st.data())
def test_every_end_is_the_plain_one(data: st.DataObject) -> None:
    text = data.draw(st.lists(st.sampled_from([*WORDS, EOS]), min_size=1, max_size=20))
    mistakes = data.draw(st.sets(st.integers(0, 20), max_size=6))
    max_tokens = data.draw(st.integers(1, 20))
    said = str(TOKENIZER.decode(text))
    within = st.tuples(st.integers(0, len(said) - 1), st.integers(1, 6)).map(
        lambda at: said[at[0] : at[0] + at[1]].replace("\ufffd", "") or "!"
    )
    stop = data.draw(st.lists(within | st.text("abc! é", min_size=1, max_size=4), max_size=3))
    ignore_eos = data.draw(st.booleans())
    text = text + [named("c")] * 40
    expected = plainly(text, max_tokens, stop, ignore_eos=ignore_eos)
    engine = engine_of(text, list(mistakes))
    for draft_tokens in range(MOST + 1):
        run = engine.run(
            PROMPT,
            max_tokens=max_tokens,
            draft_tokens=draft_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        events = list(run)
        assert_as_expected(run.generation, expected)
        check_events(events, run.generation)
        ended_by_token = len(expected.tokens) < max_tokens and text[len(expected.tokens)] == EOS
        needed = len(expected.tokens) + (ended_by_token and not run_stopped(expected, stop))
        check_statistics(
            events, run.generation, rounds_of(text, list(mistakes), draft_tokens, needed)
        )


def run_stopped(expected: Expected, stop: Sequence[str]) -> bool:
    """Whether a stop string ended the text before the token for its end was looked at."""
    return any(one in shown(expected.tokens) for one in stop)


def check_events(events: list[Event], result: Generation) -> None:
    assert "".join(event.text for event in events) == result.text
    assert [token for event in events for token in event.tokens] == result.tokens
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == result.finish_reason
    assert all(len(event.from_draft) == len(event.tokens) for event in events)


def check_statistics(events: list[Event], result: Generation, kept: list[int]) -> None:
    speculation = result.speculation
    assert [event.round.accepted for event in events if event.round] == kept
    assert speculation.rounds == len(kept)
    # All rounds are full but perhaps the last.
    whole = sum(kept) + len(kept) == len(result.tokens)
    full = kept if whole else kept[:-1]
    assert speculation.full_rounds == len(full)
    assert speculation.drafted == len(full[1:]) * speculation.draft_tokens
    assert speculation.accepted == sum(full)
    assert speculation.accepted_by_position == [
        sum(count > position for count in full) for position in range(speculation.draft_tokens)
    ]
    if full:
        assert speculation.tokens_per_round == 1 + sum(full) / len(full)
    else:
        assert speculation.tokens_per_round is None
    if speculation.drafted:
        assert speculation.acceptance_rate == sum(full) / speculation.drafted
    else:
        assert speculation.acceptance_rate is None
    for event, count in zip(events, kept, strict=True):
        origins = [index < count for index in range(len(event.tokens))]
        assert list(event.from_draft) == origins


TEXT = tokens_of("the cat sat on the mat, and so did the dog. ")


@pytest.mark.parametrize("draft_tokens", range(MOST + 1))
def test_ends_on_every_position_of_a_round(draft_tokens: int) -> None:
    engine = engine_of(TEXT * 2, mistakes=[9, 10, 17])
    for count in range(1, 24):
        result = engine.generate(PROMPT, max_tokens=count, draft_tokens=draft_tokens)
        assert_as_expected(result, plainly(TEXT, count))
        assert result.finish_reason == "length"
        ended = [*TEXT[:count], EOS, *TEXT]
        result = engine_of(ended, mistakes=[9, 10, 17]).generate(
            PROMPT, max_tokens=40, draft_tokens=draft_tokens
        )
        assert_as_expected(result, Expected(TEXT[:count], decoded(TEXT[:count]), "stop"))


@pytest.mark.parametrize("draft_tokens", [0, 1, 3, 5])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["t"], ""),
        (["sat on"], "the cat "),
        (["the mat"], "the cat sat on "),
        ([" on the dog", " the dog"], "the cat sat on the mat, and so did"),
        (["dog", "mat"], "the cat sat on the "),
        (["atat"], "the cat sat on the mat, and so did the dog. "),
        (["dog."], "the cat sat on the mat, and so did the "),
    ],
    ids=str,
)
def test_stop_strings(stop: list[str], text: str, draft_tokens: int) -> None:
    engine = engine_of(TEXT * 2, mistakes=[5, 20])
    result = engine.generate(PROMPT, max_tokens=len(TEXT), draft_tokens=draft_tokens, stop=stop)
    assert_as_expected(result, plainly(TEXT, len(TEXT), stop))
    assert result.text == text
    assert result.stopped_by in ([None] if stop == ["atat"] else stop)  # the text has no "atat"


def test_a_stop_string_that_begins_beyond_the_limit_does_not_count() -> None:
    # The round goes on to "def"; what comes after max_tokens was never said.
    result = engine_of(tokens_of("abcdefghijkl")).generate(
        PROMPT, max_tokens=3, draft_tokens=5, stop=["d", "cd"]
    )
    assert_as_expected(result, Expected(tokens_of("abc"), "abc", "length"))


def test_an_end_beyond_a_stop_string_does_not_count() -> None:
    text = [*tokens_of("abcd"), EOS, *tokens_of("efghijkl")]
    result = engine_of(text).generate(PROMPT, max_tokens=9, draft_tokens=5, stop=["c"])
    assert_as_expected(result, Expected(tokens_of("abc"), "ab", "stop"))


def test_a_stop_string_found_at_the_limit_is_a_stop() -> None:
    # A space is told when the text ends, and only then completes the stop string.
    result = engine_of(tokens_of("ab abab")).generate(
        PROMPT, max_tokens=3, draft_tokens=2, stop=["b "]
    )
    assert_as_expected(result, Expected(tokens_of("ab "), "a", "stop"))


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_the_end_may_be_ignored(draft_tokens: int) -> None:
    text = [*tokens_of("ab"), EOS, *tokens_of("cdefgh")]
    options = {"max_tokens": 5, "draft_tokens": draft_tokens}
    assert engine_of(text).generate(PROMPT, **options).tokens == text[:2]
    result = engine_of(text).generate(PROMPT, ignore_eos=True, **options)
    assert_as_expected(result, Expected(text[:5], "ab<eos>cd", "length"))


def test_a_token_by_name_ends_the_text_too() -> None:
    text = [*tokens_of("ab"), EOS]
    assert engine_of(text).generate(PROMPT, eos=["b"]).text == "a"
    assert engine_of(text).generate(PROMPT, eos=["c"]).text == "ab"
    assert engine_of(text).request(PROMPT, eos=["b"], ignore_eos=True).ends == frozenset()
    with pytest.raises(UsageError, match="no token '<nothing>'"):
        engine_of(text).request(PROMPT, eos=["<nothing>"])


def test_one_text_stands_for_a_list_of_one() -> None:
    engine = engine_of(tokens_of("abEND"))
    assert engine.request(PROMPT, stop="END").stop == ("END",)
    assert engine.request(PROMPT, stop=None, eos=None).stop == ()
    assert engine.request(PROMPT, eos="b").ends == engine.request(PROMPT, eos=["b"]).ends
    assert engine.request(PROMPT, cache="a/b").cache == Path("a/b")


@pytest.mark.parametrize("prompt", [[1.0], ["a"], [True, 1.5], [[1]], [-1]])
def test_a_prompt_of_other_things_than_tokens_is_refused(prompt: list[Any]) -> None:
    with pytest.raises(PromptError, match="not one of the model's"):
        engine_of(TEXT).request(prompt)


def test_the_end_of_a_turn_ends_the_text() -> None:
    tokenizer = wrapped(TEMPLATE + "<bos>")  # behind every turn, as a token that is no end of text
    text = [*tokens_of("ab"), named("<bos>"), *tokens_of("c")]
    engine = Engine(Script(text), None, tokenizer, compiled=False)
    result = engine.generate(PROMPT, max_tokens=4)
    assert (result.text, result.finish_reason) == ("ab", "stop")


def test_how_a_prompt_was_made_is_told() -> None:
    engine = Engine(Script(tokens_of("ab")), None, wrapped(TEMPLATE), compiled=False)
    request = engine.request("why", template_args={"effort": "low"}, max_tokens=1)
    assert request.tokens == engine.request("why").tokens
    assert "effort" in request.notes[0]
    assert request.notes[0] in engine.generate(request).notes


def test_a_text_that_ends_at_once() -> None:
    result = engine_of([EOS] * 9).generate(PROMPT, max_tokens=9, draft_tokens=3)
    assert_as_expected(result, Expected([], "", "stop"))
    assert result.speculation.rounds == 1
    assert result.speculation.acceptance_rate is None


def test_pieces_say_who_wrote_them() -> None:
    engine = engine_of(tokens_of("xabcdefgh"), mistakes=[2, 6])
    events = list(engine.run(PROMPT, max_tokens=9, draft_tokens=3))
    assert [event.pieces for event in events] == [
        (Piece("x", False),),
        (Piece("a", True), Piece("b", False)),
        (Piece("c", True), Piece("d", True), Piece("e", True), Piece("f", False)),
        (Piece("g", True), Piece("h", True)),
    ]


def test_text_prompts_are_continued() -> None:
    prompt = "ab "
    engine = engine_of(tokens_of(" abc def"))
    engine.target.tokens = mx.array([*TOKENIZER.encode(prompt), *tokens_of(" abc def")])
    assert engine.generate(prompt, max_tokens=4, draft_tokens=2).text == " abc"


def test_a_model_with_caches() -> None:
    target = build("llama", vocabulary=VOCABULARY)
    engine = Engine(target, draft_for(target, "half"), TOKENIZER, compiled=False)
    text = plain(target, prompt_of(7), 60)
    assert len(set(text)) > 20
    for draft_tokens in (0, 1, 4):
        for stop in ([], [decoded(text)[20:22]], [decoded(text)[9], "zz"]):
            result = engine.generate(
                prompt_of(7), max_tokens=50, draft_tokens=draft_tokens, stop=stop
            )
            assert_as_expected(result, plainly(text, 50, stop))


def test_without_a_tokenizer_there_are_tokens_alone() -> None:
    engine = Engine(Script(TEXT), Script(TEXT), compiled=False)
    result = engine.generate(PROMPT, max_tokens=9, draft_tokens=2)
    assert (result.tokens, result.text) == (TEXT[:9], "")
    with pytest.raises(UsageError):
        engine.run(PROMPT, stop=["a"])
    with pytest.raises(UsageError):
        engine.run("text")


def test_arguments_out_of_range() -> None:
    engine = engine_of(TEXT)
    for options in ({"max_tokens": 0}, {"draft_tokens": -1}, {"draft_tokens": 65}):
        with pytest.raises(UsageError):
            engine.run(PROMPT, **options)
    with pytest.raises(PromptError):
        engine.run([])


def test_result_so_far() -> None:
    run = engine_of(TEXT).run(PROMPT, max_tokens=20, draft_tokens=3)
    assert run.generation.prompt_tokens == 3
    events = iter(run)
    first = next(events)
    assert run.generation.tokens == list(first.tokens)
    assert run.generation.finish_reason == "interrupted"
    timing = run.generation.timing
    assert 0 < timing.prefill_s < timing.time_to_first_token_s
    list(events)
    assert run.generation.finish_reason == "length"
    assert timing.decode_s > 0
    assert run.generation.tokens_per_second == 20 / timing.decode_s
    assert run.generation.peak_gb > 0


def test_stream_and_generate_agree() -> None:
    engine = engine_of(TEXT)
    options = {"max_tokens": 11, "sampling": SamplingParams(seed=4)}
    result = engine.generate(PROMPT, **options)
    assert "".join(event.text for event in engine.stream(PROMPT, **options)) == result.text
    assert result.seed == 4


def test_statistics_as_plain_values() -> None:
    empty = SpeculationStats(3)
    assert empty.as_dict()["acceptance_rate"] is None
    assert empty.accepted_by_position == [0, 0, 0]
    values = engine_of(TEXT, mistakes=[2]).generate(PROMPT, max_tokens=7, draft_tokens=3).as_dict()
    assert values["tokens"] == TEXT[:7]
    assert values["text"] == "the cat"
    assert values["finish_reason"] == "length"
    # No proposal, then one kept, then three.
    assert values["speculation"]["accepted_by_position"] == [2, 1, 1]
    assert values["speculation"]["acceptance_rate"] == round(4 / 6, 4)
    assert values["speculation"]["tokens_per_round"] == round(7 / 3, 4)


# --- an interrupt -------------------------------------------------------------------------------


def interrupt_after(rounds: int, patch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come while the round behind that many is built, and another holds its state."""
    run, left = FusedRound.run, iter(range(rounds))

    def interrupted(self: FusedRound, *given: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run(self, *given, **options)

    patch.setattr(FusedRound, "run", interrupted)


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_an_interrupted_run_keeps_its_text(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(rounds, monkeypatch)
    engine = engine_of(range(60))
    engine.prefixes = PrefixCache(1 << 20)
    run = engine.stream(PROMPT, max_tokens=50, draft_tokens=2)
    with pytest.raises(KeyboardInterrupt):
        list(run)
    run.close()
    count = len(run.generation.tokens)
    assert run.generation.tokens == list(range(count))
    assert count >= rounds - 1  # one was in flight
    monkeypatch.undo()
    assert engine.generate(PROMPT, max_tokens=50, draft_tokens=2).tokens == list(range(50))


def test_an_interrupted_batch_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(6, monkeypatch)
    batch = engine_of(range(60)).batch(max_rows=2)
    rows = [batch.add(PROMPT, max_tokens=50, draft_tokens=2) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        list(iter(batch.step, []))
    batch.close()
    for row in rows:
        assert row.generation.tokens == list(range(len(row.generation.tokens)))
        assert row.generation.finish_reason == "interrupted"
