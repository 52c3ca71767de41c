"""Turns and tools as clients send them: what reaches a template, and what is refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_templates import CHATML, CHATS, CONTROL, tokenizer_with

from mlxspec.conversations import messages_of, tools_of
from mlxspec.decode.requests import Requests
from mlxspec.errors import PromptError, UsageError
from mlxspec.text import encode_prompt

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "why"}
CALL = {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Köln", "days": [1]}'}}
CALLS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]
OPENS = "{% if add_generation_prompt %}<assistant>{% endif %}"
TOOLS = "{% for t in tools or [] %}<tool>{{ t | tojson }}{% endfor %}"


def turns(assistant: str, *, beside: str = "{{ m.content }}") -> str:
    """A template whose calls are written by `assistant`, a part of it."""
    return (
        TOOLS
        + "{% for m in messages %}<{{ m.role }}>"
        + beside
        + "{% for c in m.tool_calls or [] %}"
        "{% set f = c.function %}<call>{{ f.name }}"
        + assistant
        + "{% endfor %}{% endfor %}"
        + OPENS
    )


OBJECTS = turns("{{ f.arguments | tojson }}")
STRINGS = turns("{{ '' + f.arguments }}")
PRINTED = turns("{{ f.arguments }}")


def requests_of(template: str | None) -> Requests:
    return Requests(tokenizer_with(template), 400, 4096)


def prompt_of(template: str | None, messages: Any, **options: Any) -> str:
    requests = requests_of(template)
    tokens = requests.encode(messages=messages, **options)
    return str(tokenizer_with(template).decode(tokens))


def notes_of(template: str, messages: Any, **options: Any) -> tuple[str, ...]:
    return requests_of(template).make(messages=messages, **options).notes


def refused(template: str | None, messages: Any, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        prompt_of(template, messages, **options)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


# --- what reaches a template ------------------------------------------------------------


def test_turns_reach_the_template_in_their_order() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        USER,
        {"role": "assistant", "content": "so", "refusal": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert (
        prompt_of(TEMPLATE, messages) == "<system>be brief<user>why<assistant>so<user>ab<assistant>"
    )


def test_a_prompt_and_a_turn_of_a_user_are_the_same() -> None:
    requests = requests_of(CHATML)
    assert requests.encode("why", system="s") == requests.encode(messages=[USER], system="s")
    raw = requests_of(None)
    assert raw.encode("why") == raw.encode(messages=[USER])


@pytest.mark.parametrize("template", [OBJECTS, STRINGS, PRINTED])
def test_arguments_are_an_object_or_a_string_as_a_template_wants_them(template: str) -> None:
    text = prompt_of(template, CALLS, tools=[WEATHER])
    called = text[text.index("<call>weather") + len("<call>weather") : text.index("<tool>rain")]
    assert json.loads(called) == {"city": "Köln", "days": [1]}
    assert text.startswith("<tool>{")
    assert text.endswith("<tool>rain<assistant>")


def test_ids_are_shortened_for_templates_that_count_their_letters() -> None:
    counting = OBJECTS.replace(
        "{% set f = c.function %}",
        "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}[{{ c.id }}]"
        "{% set f = c.function %}",
    ).replace("{{ m.content }}", "{{ m.content }}{{ m.tool_call_id }}")
    text = prompt_of(counting, CALLS, tools=[WEATHER])
    short = text[text.index("[") + 1 : text.index("]<call>")].rpartition("[")[2]
    assert len(short) == 9
    assert f"<tool>rain{short}" in text
    own = [
        {**CALLS[1], "tool_calls": [{**CALL, "id": "abcDEF123"}]},
        {**CALLS[2], "tool_call_id": "abcDEF123"},
    ]
    assert "<tool>rainabcDEF123" in prompt_of(counting, [USER, *own])
    assert "<tool>rainc1" in prompt_of(counting.replace("!= 9", "> 9"), CALLS)


def test_a_tool_may_give_nothing() -> None:
    for content in (None, "", []):
        assert prompt_of(OBJECTS, [*CALLS[:2], {**CALLS[2], "content": content}]).endswith(
            "<tool><assistant>"
        )


def test_a_result_has_the_name_of_its_call() -> None:
    template = "{% for m in messages %}<{{ m.role }} {{ m.name }}>{{ m.content }}{% endfor %}"
    with_calls = template.replace("{% endfor %}", "{{ m.tool_calls }}{% endfor %}")
    assert "<tool weather>rain" in prompt_of(with_calls, CALLS)
    assert messages_of(CALLS)[2]["name"] == "weather"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_goes_to_templates_that_read_it(name: str) -> None:
    messages = [USER, {"role": "assistant", "content": "so", name: "hm"}, USER]
    for field in ("reasoning_content", "thinking"):
        template = TEMPLATE.replace("{{ m.content }}", f"({{{{ m.{field} }}}}){{{{ m.content }}}}")
        assert "(hm)so" in prompt_of(template, messages)
    assert notes_of(TEMPLATE, messages) == ()
    picky = TEMPLATE.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.thinking %}{{ raise_exception('no') }}{% endif %}",
    )
    assert "<assistant>so" in prompt_of(picky, messages)


def test_an_answer_may_lose_the_thoughts_in_it() -> None:
    template = TEMPLATE.replace("m.content", "m.content.split('</think>')[-1]")
    messages = [USER, {"role": "assistant", "content": "<think>hm</think>\n\nso"}, USER]
    assert "<assistant>\n\nso" in prompt_of(template, messages)
    lost = [USER, {"role": "assistant", "content": "so</think>"}, USER]
    assert refused(template, lost).message.endswith("leaves out message 2, of the assistant.")


def test_a_last_turn_of_the_assistant_is_gone_on_with() -> None:
    for template in (CHATML, TEMPLATE, CHATML.replace("m.content", "m.content | trim")):
        for text in ("so, ", "so", "so <|im_end|>\n", ""):
            messages = [USER, {"role": "assistant", "content": text}]
            prompt = prompt_of(template, messages)
            assert prompt.endswith(("<|im_start|>assistant\n" + text, "<assistant>" + text))
    request = requests_of(CHATML).make(messages=[USER, {"role": "assistant", "content": "so"}])
    assert request.continues
    assert not requests_of(CHATML).make(messages=[USER]).continues


def test_reasoning_without_an_answer_is_gone_on_with() -> None:
    template = TEMPLATE.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}",
    )
    messages = [USER, {"role": "assistant", "content": "", "reasoning_content": "hm, "}]
    assert prompt_of(template, messages).endswith("<think>hm, ")
    assert "cannot go on" in refused(TEMPLATE, messages).message


def test_a_turn_that_a_template_writes_twice_cannot_be_gone_on_with() -> None:
    twice = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}")
    said = refused(twice, [USER, {"role": "assistant", "content": "so"}])
    assert said.message == "The chat template cannot go on with the assistant's last turn."
    assert prompt_of(twice, [USER, {"role": "assistant", "content": "so"}, USER])


# --- refusals ---------------------------------------------------------------------------


def test_a_template_without_tools_is_refused_in_words() -> None:
    said = refused(CHATML, [USER], tools=[WEATHER])
    assert said.message == "The chat template takes no tools."
    # Their name may stand in a prompt by chance.
    assert refused(CHATML, [{"role": "user", "content": "weather"}], tools=[WEATHER])
    folds = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}[INST]"
    system = {"role": "system", "content": "be brief"}
    assert refused(folds + CHATML, [system, USER], tools=[WEATHER]).message == said.message
    raises = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + CHATML
    assert refused(raises, [USER], tools=[WEATHER]).message.endswith("refuses the tools: no tools.")
    assert "no place for tools" in refused(None, [USER], tools=[WEATHER]).message
    assert requests_of(CHATML).encode("why", tools=[]) == requests_of(CHATML).encode("why")


def test_of_named_templates_the_one_for_tools_is_taken_with_tools() -> None:
    names: Any = {"default": CHATML, "tool_use": TOOLS + CHATML}
    assert "weather" in prompt_of(names, [USER], tools=[WEATHER])
    assert "weather" not in prompt_of(names, [USER])


def test_what_a_template_leaves_out_is_named() -> None:
    no_tools = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}" + OPENS
    messages = [USER, {"role": "assistant", "content": "so"}, {"role": "tool", "content": "rain"}]
    assert refused(no_tools, messages).message.endswith("leaves out message 3, of the tool.")


def test_calls_that_a_template_never_writes_are_told() -> None:
    said = "the chat template leaves out the tool calls of message 2, of the assistant"
    assert notes_of(CHATML, CALLS) == (said,)
    first = OBJECTS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    other = {"function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    two = [USER, {"role": "assistant", "tool_calls": [CALL, other]}, *CALLS[2:]]
    assert notes_of(first, two) == (said,)
    assert notes_of(OBJECTS, two) == ()


def test_text_beside_calls_may_be_left_out_but_not_in_silence() -> None:
    beside = "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
    template = turns("{{ f.arguments | tojson }}", beside=beside)
    messages = [USER, {**CALLS[1], "content": "let me see"}, CALLS[2]]
    (note,) = notes_of(template, messages)
    assert note.endswith("leaves out the text beside the tool calls of message 2, of the assistant")
    assert notes_of(template, CALLS) == notes_of(OBJECTS, messages) == ()


def test_a_refusal_of_the_order_has_the_templates_words() -> None:
    ordered = (
        "{% if (messages | length) % 2 == 0 %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}" + TEMPLATE
    )
    said = refused(ordered, [USER, USER])
    assert said.message == "The chat template refuses the messages: roles must alternate."
    assert "--raw" not in said.hint


def test_a_conversation_folds_its_system_message_where_authors_do() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}[INST]"
    messages = [
        {"role": "system", "content": "be brief"},
        USER,
        {**USER, "role": "assistant"},
        USER,
    ]
    text = prompt_of(no_system + TEMPLATE, messages)
    assert text == "[INST]<user>be brief\n\nwhy<assistant>why<user>why<assistant>"
    # Nobody's turn to begin follows.
    alone = [messages[0], {"role": "tool", "content": "x"}]
    assert "refuses the system message: no" in refused(no_system + TEMPLATE, alone).message


DEEP = '{"a":' * 101 + "1" + "}" * 101

BAD: list[tuple[Any, str]] = [
    ("why", "no list of turns"),
    ([], "no list of turns"),
    ({"role": "user"}, "no list of turns"),
    (["why"], "Message 1 has no role"),
    ([{"role": "function", "content": "a"}], "Message 1 has no role"),
    ([{"role": "user"}], "Message 1 has no text"),
    ([{"role": "user", "content": 3}], "Message 1 has no text"),
    ([{"role": "user", "content": " "}], "The messages have no text"),
    (
        [USER, {"role": "user", "content": [{"type": "image_url"}]}],
        "2 has a part of type 'image_url'",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], "a part without a text"),
    ([{"role": "user", "content": [3]}], "a part of type 'int'"),
    ([{"role": "user", "content": "\ud800"}], "Message 1 is not valid Unicode"),
    ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "calls tools as user"),
    ([USER, {"role": "assistant", "tool_calls": [{}]}], "a tool call that names no function"),
    (
        [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        ],
        "Message 2 calls f with arguments that are no JSON object",
    ),
    (
        [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]},
        ],
        "arguments that are no JSON object",
    ),
    (
        [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
        ],
        "Message 2 has an object that is nested more than 100 levels deep",
    ),
    ([{"role": "tool", "content": "a", "tool_call_id": 3}], "The tool_call_id of message 1"),
]


@pytest.mark.parametrize(("messages", "words"), BAD)
def test_messages_that_are_none_are_refused_in_words(messages: Any, words: str) -> None:
    assert words in refused(TEMPLATE, messages).message


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("weather", "The tools are no list"),
        (WEATHER, "The tools are no list"),
        ([WEATHER, {"name": "f"}], "Tool 2 is no function with a name"),
        ([{"function": {"name": " "}}], "Tool 1 is no function with a name"),
        ([{"function": {"name": "f", "parameters": [1]}}], "parameters of tool 1 are no schema"),
        ([{"function": {"name": "f", "description": "\ud800"}}], "Tool 1 is not valid Unicode"),
        ([{"function": {"name": "f", "parameters": json.loads(DEEP)}}], "Tool 1 has an object"),
    ],
)
def test_tools_that_are_none_are_refused_in_words(tools: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        tools_of(tools)
    assert tools_of(None) == tools_of([]) == ()


def test_a_prompt_and_messages_go_one_without_the_other() -> None:
    requests = requests_of(CHATML)
    with pytest.raises(UsageError, match="a prompt and messages"):
        requests.encode("why", messages=[USER])
    with pytest.raises(UsageError, match="There is no prompt"):
        requests.make()
    said = refused(CHATML, [{"role": "system", "content": "a"}, USER], system="b")
    assert "two system messages" in said.message
    several = [USER, {"role": "assistant", "content": "a"}, USER]
    assert "no place for a conversation" in refused(None, several).message
    assert "no place for a conversation" in refused(CHATML, several, raw=True).message


# --- text that looks like control -------------------------------------------------------


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(CHATS)),
    st.lists(st.sampled_from([*CONTROL, "a", " ", "\n", '"', "é"])).map("".join),
)
def test_control_tokens_anywhere_in_a_conversation_are_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_with(OBJECTS, kind)
    call = {"function": {"name": "weather", "arguments": {f"k{text}": [text, {"x": text}]}}}
    messages = messages_of(
        [
            {"role": "user", "content": f"x{text}x"},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "content": f"x{text}x"},
        ]
    )
    tool = {"type": "function", "function": {"name": "weather", "description": text}}
    ids = encode_prompt(tokenizer, messages, tools=tools_of([tool]))
    control = tokenizer.convert_tokens_to_ids(list(CONTROL))
    assert [ids.count(token) for token in control] == [0, 0, 0]
