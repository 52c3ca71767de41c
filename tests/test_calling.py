"""Calls of tools in the language of every parser of mlx-lm, wherever pieces and texts end."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import mlx_lm.tool_parsers
import pytest
from conftest import TEMPLATE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.chat_templates.muse_spark import RESPONSE_FORMAT
from mlx_lm.tokenizer_utils import TokenizerWrapper
from talkers import CALL, NAMES, WEATHER, talker, talking_tokenizer
from test_reasoning import HARMONY, made

from mlxspec import Engine
from mlxspec.calling import Called, Caller, Calling, calling_of
from mlxspec.conversations import ToolCall
from mlxspec.decode.request import Request
from mlxspec.decode.requests import Requests
from mlxspec.metrics import Piece
from mlxspec.spelling import Spelling
from mlxspec.text import TextStream

NAME = "weather"
CITY = "Köln 🌧 東京 {"
DEEP = {"a": [1, {"b": "}"}], "c": None}
BOTH: dict[str, Any] = {"city": CITY, "deep": DEEP}
JSON = json.dumps(BOTH, ensure_ascii=False)
DEEP_JSON = json.dumps(DEEP, ensure_ascii=False)
CALLED = (NAME, BOTH)

GLM = (
    f"<tool_call>{NAME}\n<arg_key>city</arg_key>\n<arg_value>{CITY}</arg_value>\n"
    f"<arg_key>deep</arg_key>\n<arg_value>{DEEP_JSON}</arg_value>\n</tool_call>"
)
# A call, or several in one pair of marks, and what they are.
FORMATS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "function_gemma": (
        f"<start_function_call>call:{NAME}{{city:<escape>Köln 🌧, 東京<escape>,days:2}}"
        "<end_function_call>",
        [(NAME, {"city": "Köln 🌧, 東京", "days": 2})],
    ),
    "gemma4": (
        f'<|tool_call>call:{NAME}{{city:<|"|>{CITY}<|"|>,deep:{{a:[1,{{b:<|"|>}}<|"|>}}],c:null}}}}'
        "<tool_call|>",
        [CALLED],
    ),
    "glm47": (GLM, [CALLED]),
    "json_tools": (
        f'<tool_call>\n{{"name": "{NAME}", "arguments": {JSON}}}\n</tool_call>',
        [CALLED],
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{NAME}:{at}<|tool_call_argument_begin|>{JSON}"
            "<|tool_call_end|>"
            for at in range(2)
        )
        + "<|tool_calls_section_end|>",
        [CALLED, CALLED],
    ),
    "kimi_k3": (
        f'<|open|>tools<|sep|><|open|>call tool="{NAME}" index="1"<|sep|>'
        f'<|open|>argument key="city" type="string"<|sep|>{CITY}<|close|>argument<|sep|>'
        f'<|open|>argument key="deep" type="object"<|sep|>{DEEP_JSON}<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        [CALLED],
    ),
    "laguna": (GLM, [CALLED]),
    "longcat": (
        GLM.replace("tool_call", "longcat_tool_call").replace("arg_", "longcat_arg_"),
        [CALLED],
    ),
    "minicpm5": (
        f'<function name="{NAME}"><param name="city">{CITY}</param>'
        f'<param name="deep">{DEEP_JSON}</param></function>',
        [CALLED],
    ),
    "minimax_m2": (
        "<minimax:tool_call>\n"
        + 2
        * (
            f'<invoke name="{NAME}">\n<parameter name="city">{CITY}</parameter>\n'
            f'<parameter name="deep">{DEEP_JSON}</parameter>\n</invoke>\n'
        )
        + "</minimax:tool_call>",
        [CALLED, CALLED],
    ),
    "mistral": (f"[TOOL_CALLS]{NAME}[ARGS]{JSON}", [CALLED]),
    "muse_spark": (
        f'<atem:function_calls>\n<atem:invoke name="{NAME}">\n'
        f'<atem:parameter name="city">{CITY}</atem:parameter>\n'
        f'<atem:parameter name="deep">{DEEP_JSON}</atem:parameter>\n'
        "</atem:invoke>\n</atem:function_calls>",
        [CALLED],
    ),
    "pythonic": (
        f'<|tool_call_start|>[{NAME}(city="{CITY}", deep={DEEP_JSON})]<|tool_call_end|>',
        [CALLED],
    ),
    "qwen3_coder": (
        f"<tool_call>\n<function={NAME}>\n<parameter=city>\n{CITY}\n</parameter>\n"
        f"<parameter=deep>\n{DEEP_JSON}\n</parameter>\n</function>\n</tool_call>",
        [CALLED],
    ),
}


def calling(name: str) -> Calling:
    module = import_module(f"mlx_lm.tool_parsers.{name}")
    marks = module.tool_call_start, module.tool_call_end
    return Calling(*marks, module.parse_tool_call, [WEATHER])


def tokenizer_for(name: str) -> TokenizerWrapper:
    """One in which the marks of this parser are tokens."""
    how = calling(name)
    names = [*NAMES, *(mark for mark in (how.start, how.end) if mark and mark not in NAMES)]
    return TokenizerWrapper(
        talking_tokenizer(names)._tokenizer,
        tool_parser=how.parse,
        tool_call_start=how.start,
        tool_call_end=how.end,
    )


def plain(calls: Sequence[ToolCall]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


def parts_of(pieces: Sequence[Piece]) -> list[Any]:
    """Text and calls in their order."""
    parts: list[Any] = []
    for piece in pieces:
        if isinstance(piece, Called):
            parts += plain(piece.calls)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += piece.text
        else:
            parts.append(piece.text)
    return parts


def told(how: Calling, texts: Sequence[str], *, cut: bool = False) -> list[Any]:
    caller = Caller(how)
    pieces = [piece for text in texts for piece in caller.add([Piece(text, False)])]
    if cut:
        caller.cut()
    return parts_of([*pieces, *caller.finish()])


def streamed(name: str, text: str, **options: Any) -> list[Any]:
    """The same token by token: one for each mark and each byte."""
    tokenizer = tokenizer_for(name)
    how = calling_of(tokenizer, [WEATHER])
    assert how is not None
    assert how.tokens
    stream = TextStream(tokenizer, continues=False, calling=how, **options)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = [piece for token in tokens for piece in stream.add(token, False)]
    return parts_of([*pieces, *stream.finish()])


# --- every parser -----------------------------------------------------------------------


def test_every_parser_of_mlx_lm_is_tried() -> None:
    found = {module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)}
    assert found == set(FORMATS)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_are_told_from_text_wherever_pieces_end(name: str) -> None:
    block, calls = FORMATS[name]
    behind = "" if name == "mistral" else "\nDone. 🌧"
    whole = f"Let me see.\n\n{block}\n{block}{behind}"
    expected = ["Let me see.", *calls, *calls, *(["\n\nDone. 🌧"] if behind else [])]
    how = calling(name)
    assert told(how, [whole]) == told(how, list(whole)) == streamed(name, whole) == expected
    for at in range(1, len(whole)):
        assert told(how, [whole[:at], whole[at:]]) == expected, whole[:at]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_call_is_told_as_soon_as_it_ends_and_text_at_once(name: str) -> None:
    block, calls = FORMATS[name]
    caller = Caller(calling(name))
    assert parts_of(caller.add([Piece("I <b>know</b> {it}.", False)])) == ["I <b>know</b> {it}."]
    found = parts_of(caller.add([Piece(block, False)]))
    if name == "mistral":  # only what follows, or the end of the text, ends its calls
        found += parts_of(caller.add([Piece("[TOOL_CALLS]", False)]))
    assert found == calls


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_call_that_is_cut_is_text_and_never_half_a_call(name: str) -> None:
    block, calls = FORMATS[name]
    start, end = calling(name).start, calling(name).end
    for at in range(1, len(block)):
        found = told(calling(name), ["So.\n", block[:at]], cut=True)
        assert found == ["So.\n" + block[:at]], block[:at]
    assert told(calling(name), ["So.\n", block], cut=True) == ["So.", *calls]
    # What a model ends itself may lack its mark, and is read as it is.
    whole = told(calling(name), ["So.\n", block.removesuffix(end)])
    assert whole in (["So.", *calls], ["So.\n" + block.removesuffix(end)])
    assert told(calling(name), [start]) == [start]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_marks_are_tokens_where_a_tokenizer_has_them(name: str) -> None:
    block, calls = FORMATS[name]
    tokenizer = tokenizer_for(name)
    how = calling_of(tokenizer, [WEATHER])
    assert how is not None
    stream = TextStream(tokenizer, continues=False, calling=how)
    spelt = [token for letter in block for token in tokenizer.encode(letter)]
    pieces = [piece for token in spelt for piece in stream.add(token, False)]
    assert parts_of([*pieces, *stream.finish()]) == [block]
    assert streamed(name, block) == calls


BLOCK, _ = FORMATS["muse_spark"]
MESSAGES = {
    # Names of control tokens, and the texts of several messages with a call among them.
    "muse": (
        ("<|message|>", "<|eom|>", "<|eot|>"),
        f"to=self<|message|>hm<|eom|><|start|>assistant to={NAME}<|message|>{BLOCK}<|eom|>"
        "<|start|>assistant to=user<|message|>Done.<|eot|>",
        ["hm", CALLED, "Done."],
    ),
    "harmony": (
        (*HARMONY, "<|constrain|>"),
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>"
        f"So.<|end|><|start|>assistant<|channel|>commentary to=functions.{NAME} "
        f"<|constrain|>json<|message|>{JSON}<|call|>",
        ["hmSo.", CALLED],
    ),
    "harmony, with the name first": (
        (*HARMONY, "<|constrain|>"),
        "<|channel|>analysis<|message|>hm<|end|>"
        f"<|start|>assistant to=functions.{NAME}<|channel|>commentary json<|message|>{JSON}<|end|>"
        f"<|start|>assistant to=functions.{NAME}<|channel|>commentary json<|message|>{JSON}<|end|>",
        ["hm", CALLED, CALLED],
    ),
}


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_a_call_may_be_a_message_of_several(kind: str) -> None:
    names, text, expected = MESSAGES[kind]
    fast = made(names, TEMPLATE)._tokenizer
    how = calling("muse_spark")
    tokenizer = TokenizerWrapper(fast)
    if kind == "muse":
        marks = {"tool_call_start": how.start, "tool_call_end": how.end}
        tokenizer = TokenizerWrapper(
            fast, response_format=RESPONSE_FORMAT, tool_parser=how.parse, **marks
        )
    requests = Requests(tokenizer, 999, None)
    prompt = [*tokenizer.encode("<|start|>assistant", add_special_tokens=False)]
    request = requests.make(prompt, tools=[WEATHER])

    def written(one: Request, text: str) -> list[Any]:
        stream = TextStream(
            tokenizer, continues=False, reasoning=one.reasoning, calling=one.calling
        )
        tokens = tokenizer.encode(text, add_special_tokens=False)
        pieces = [piece for token in tokens for piece in stream.add(token, False)]
        return parts_of([*pieces, *stream.finish()])

    assert written(request, text) == expected
    assert request.notes == ()
    if kind != "muse":
        broken = written(request, text.replace(JSON, JSON[:-1]))
        assert all(isinstance(part, str) for part in broken)
        assert NAME in "".join(broken)
        # Without tools the header of a message stays a header.
        assert NAME not in "".join(written(requests.make(prompt), text))


# --- what cannot be read ----------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [
        "no JSON",
        '{"name": "weather", "arguments": {"city": "Köln}}',
        '{"name": 3}',
        '{"name": " "}',
        "[]",
        "3",
        '"weather"',
        '{"arguments": {}}',
        '{"name": "weather", "arguments": [1]}',
        '{"name": "weather", "arguments": "no JSON"}',
        '{"name": "weather", "arguments": {"x": NaN}}',
        "[" * 3000,
        "",
    ],
)
def test_what_is_no_call_stays_in_the_text(block: str) -> None:
    text = f"a\n<tool_call>{block}</tool_call>\nb"
    caller = Caller(calling("json_tools"))
    pieces = [*caller.add([Piece(text, False)]), *caller.finish()]
    assert parts_of(pieces) == [text]
    assert caller.remarks() == ("a tool call could not be read, and stayed in the text",)
    # It takes nothing else with it.
    block, calls = FORMATS["json_tools"]
    assert told(calling("json_tools"), [f"{text}\n{block}\nc"]) == [text, *calls, "\n\nc"]


def test_what_a_parser_only_guesses_is_no_call() -> None:
    for block in ("", "some words", "unknown words in here"):
        text = f"<tool_call>{block}</tool_call>"
        found = told(calling("glm47"), [text])
        assert found in ([text], [(block, {})])
    assert told(calling("glm47"), ["<tool_call>weather Köln</tool_call>"]) == [
        (NAME, {"raw": "Köln"})
    ]


@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        ('{"name": "weather"}', {}),
        ('{"name": "weather", "parameters": {"x": 1}}', {"x": 1}),
        ('{"name": "weather", "arguments": "{\\"x\\": 1}"}', {"x": 1}),
        ('{"name": "weather", "arguments": {"x": "\\ud83c"}}', {"x": "\ud83c"}),
        ('{"name": "weather", "arguments": {"x": "</tool_call> <tool_call> \\" }"}}', None),
    ],
)
def test_arguments_are_an_object_as_json(block: str, arguments: Any) -> None:
    arguments = arguments if arguments is not None else {"x": '</tool_call> <tool_call> " }'}
    (call,) = told(calling("json_tools"), list(f"<tool_call>{block}</tool_call>"))
    assert call == (NAME, arguments)
    (found,) = calling("json_tools").calls_in(block)
    assert found.arguments.encode("utf-8")
    assert found.as_dict()["function"] == {"name": NAME, "arguments": found.arguments}
    assert found.id.isalnum()
    assert len(found.id) == 9


def test_an_id_of_the_models_own_is_kept() -> None:
    block, _ = FORMATS["kimi_k2"]
    caller = Caller(calling("kimi_k2"))
    (called,) = caller.add([Piece(block, False)])
    assert isinstance(called, Called)
    assert [call.id for call in called.calls] == ["functions.weather:0", "functions.weather:1"]


ATOMS = ["<tool_call>", "</tool_call>", '{"name": "weather"}', '"', "{", "\n", "a", "</tool", "\\"]


@example([0, 3, 1, 0, 2, 1, 6], [2, 1])
@example([5, 0, 2, 1, 5, 5, 6, 0, 2, 1], [3])
@settings(max_examples=300)
@given(
    st.lists(st.integers(0, len(ATOMS) - 1), max_size=12),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_reading_does_not_depend_on_where_pieces_end(atoms: list[int], sizes: list[int]) -> None:
    text = "".join(ATOMS[one] for one in atoms)
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    how = calling("json_tools")
    assert told(how, pieces) == told(how, [text])
    block = '<tool_call>{"name": "weather"}</tool_call>'
    parts = [part if isinstance(part, str) else block for part in told(how, [text])]
    assert "".join(parts).replace("\n", "") == text.replace("\n", "")
    assert (block in parts) == (block in text.replace("\n", ""))


# --- generations ------------------------------------------------------------------------

USER = [{"role": "user", "content": "why"}]
THOUGHT = "<think>\nhm\n</think>\n\n"


def said(reply: str, **options: Any) -> Any:
    options = {"tools": [WEATHER], "max_tokens": 200, "draft_tokens": 2} | options
    return talker(reply).generate(messages=USER, **options)


def test_a_generation_has_its_calls_apart() -> None:
    result = said(f"{THOUGHT}Let me see.\n{CALL}\n{CALL}")
    assert (result.reasoning, result.text, result.notes) == ("hm", "Let me see.", [])
    assert plain(result.tool_calls) == [(NAME, {"city": "Köln 🌧"})] * 2
    assert result.finish_reason == "stop"
    assert len({call.id for call in result.tool_calls}) == 2
    assert result.as_dict()["tool_calls"] == [call.as_dict() for call in result.tool_calls]


def test_without_tools_a_text_is_as_it_was() -> None:
    for options in ({"tools": None}, {"tools": []}):
        result = said(CALL, **options)
        assert (result.text, result.tool_calls) == (CALL, [])
    assert said("It rains.\n\n").text == "It rains.\n\n"


def test_events_have_a_call_when_it_ends_and_text_at_once() -> None:
    run = talker(f"Let me see.\n{CALL}").run(messages=USER, tools=[WEATHER], draft_tokens=0)
    events = [event for event in run if event.tokens]
    words = "Let me see."
    assert [event.text for event in events] == [*words, *([""] * (len(events) - len(words)))]
    tokens = [token for event in events for token in event.tokens]
    assert run.generation.tokens == tokens
    *before, last = events
    assert [call.name for call in last.tool_calls] == [NAME]
    assert not any(event.tool_calls for event in before)


def test_a_call_inside_the_reasoning_is_a_call() -> None:
    result = said(f"<think>\nhm\n{CALL}")
    assert (result.reasoning, result.text) == ("hm", "")
    assert plain(result.tool_calls) == [(NAME, {"city": "Köln 🌧"})]
    assert result.notes == []


@pytest.mark.parametrize("count", [12, 30, 60])
def test_a_limit_inside_a_call_leaves_it_in_the_text(count: int) -> None:
    result = said(f"So. {CALL}", max_tokens=count)
    assert result.finish_reason == "length"
    assert result.tool_calls == []
    assert f"So. {CALL}".startswith(result.text)
    assert result.notes == ["the text was cut inside a tool call, which is left in the text"]


@pytest.mark.parametrize("stop", ["weather", "Köln", "tool_call", '"}', "</tool_call>", "see.\n<"])
def test_stop_strings_match_what_people_see(stop: str) -> None:
    result = said(f"Let me see.\n{CALL}\nDone.", stop=stop)
    assert (result.text, len(result.tool_calls)) == ("Let me see.\n\nDone.", 1)


def test_a_stop_string_ends_the_text_before_or_behind_a_call() -> None:
    before = said(f"Let me see.\n{CALL}", stop="me")
    assert (before.text, before.tool_calls, before.finish_reason) == ("Let ", [], "stop")
    behind = said(f"Let me see.\n{CALL}\nDone. Or not.", stop=["Or"])
    assert (behind.text, len(behind.tool_calls)) == ("Let me see.\n\nDone. ", 1)
    across = said(f"Let me see.\n{CALL}\nDone.", stop="see.\n\nDone")
    assert across.text == "Let me see.\n\nDone."
    reasoning = said("<think>\nhm, so\n</think>\n\nok", stop="so")
    assert (reasoning.reasoning, reasoning.text) == ("hm, ", "")


BOTH = '<tool_call>[{"name": "weather", "arguments": {"city": "Köln 🌧"}}, {"name": "weather"}]'


@pytest.mark.parametrize(
    "reply", [f"{CALL}\n{CALL}", f"{CALL}and more", f"{CALL}\n{CALL[:30]}", f"{BOTH}</tool_call>"]
)
@pytest.mark.parametrize("draft_tokens", [0, 8])
def test_a_text_ends_behind_its_first_call_where_one_is_the_most(
    reply: str, draft_tokens: int
) -> None:
    result = said(f"{THOUGHT}Look: {reply}", parallel_calls=False, draft_tokens=draft_tokens)
    assert plain(result.tool_calls) == [(NAME, {"city": "Köln 🌧"})]
    assert (result.reasoning, result.text) == ("hm", "Look: ")
    assert (result.finish_reason, result.stopped_by, result.notes) == ("stop", None, [])
    several = said(f"{THOUGHT}Look: {reply}", draft_tokens=draft_tokens)
    assert len(several.tokens) > len(result.tokens) or len(several.tool_calls) == 2


def test_what_is_no_call_ends_no_text() -> None:
    result = said(f"<tool_call>\nno\n</tool_call>{CALL}{CALL}", parallel_calls=False)
    assert result.text == "<tool_call>\nno\n</tool_call>"
    assert len(result.tool_calls) == 1


def test_each_token_tells_whether_it_is_reasoning_text_or_a_call() -> None:
    engine = talker(f"{THOUGHT}Let me see.\n{CALL}and more")
    options: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 200, "logprobs": 0}
    result = engine.generate(messages=USER, **options)
    assert engine.tokenizer is not None
    places = dict.fromkeys(("reasoning", "text", "call"), b"")
    spelling = Spelling(engine.tokenizer)
    for one in result.logprobs:
        places[one.place] += spelling(one.token).bytes
    assert places["reasoning"].decode() == "<think>\nhm\n</think>"
    # Line ends beside a mark are written, and left out of the text.
    assert places["text"].decode() == "\n\nLet me see.\nand more"
    assert places["call"].decode() == CALL


def test_a_model_without_a_parser_leaves_calls_in_its_text() -> None:
    engine = talker(CALL)
    fast = engine.tokenizer._tokenizer
    alone = Engine(engine.target, tokenizer=TokenizerWrapper(fast))
    result = alone.generate(messages=USER, tools=[WEATHER], max_tokens=200)
    assert result.text == CALL
    assert result.notes == ["no parser is known for this model's tool calls: they stay in the text"]


def test_a_conversation_goes_on_behind_a_call() -> None:
    engine = talker(f"{THOUGHT}Let me see.\n{CALL}", "It rains.")
    options: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 200, "draft_tokens": 2}
    first = engine.generate(messages=USER, **options)
    turn = {
        "role": "assistant",
        "content": first.text,
        "reasoning_content": first.reasoning,
        "tool_calls": [call.as_dict() for call in first.tool_calls],
    }
    (call,) = first.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "1 mm"}
    request = engine.request(messages=[*USER, turn, result], **options)
    written = f"{THOUGHT}Let me see.\n{CALL}<|im_end|>\n<|im_start|>tool\n1 mm<|im_end|>\n"
    assert written in engine.tokenizer.decode(request.tokens)
    assert request.tokens[: len(first.tokens)] != first.tokens  # the prompt comes first
    second = engine.generate(request)
    assert (second.text, second.tool_calls) == ("It rains.", [])
    batch = engine.generate_many([engine.request(messages=USER, **options), request])
    assert [len(one.tool_calls) for one in batch] == [1, 0]
