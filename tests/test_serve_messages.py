"""Anthropic's protocol, as its own client speaks it and as Claude Code does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from servers import WAIT_S, Served, break_a_step, served
from talkers import CALL, WEATHER, talker, talks

from mlxspec.metrics import Generation, SpeculationStats
from mlxspec.params import SamplingParams
from mlxspec.serve.anthropic.messages import usage
from mlxspec.serve.anthropic.messages_body import Conversation
from mlxspec.serve.protocol.thinking import template_args

PROMPT = "def fibonacci(n):"
ARGUMENTS = {"city": "Köln 🌧"}
SCHEMA = WEATHER["function"]["parameters"]
TOOL = {"name": "weather", "description": "The weather of a city.", "input_schema": SCHEMA}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "unsigned"}
CALLED = {"type": "tool_use", "name": "weather", "input": ARGUMENTS}


def client_of(server: Served, key: str = "any") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_S)


@pytest.fixture
def client(server: Served) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as one:
        yield one


@pytest.fixture
def chatting(chat: Served) -> Iterator[anthropic.Anthropic]:
    with client_of(chat) as one:
        yield one


def asked(prompt: Any = PROMPT, **others: Any) -> dict[str, Any]:
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return {"model": "any", "max_tokens": 200, "messages": messages} | others


def blocks(message: Any) -> list[dict[str, Any]]:
    """The content, without what a client adds and without the names of calls."""
    given = [block.model_dump(exclude_none=True) for block in message.content]
    return [{name: value for name, value in one.items() if name != "id"} for one in given]


def prompt_tokens(message: dict[str, Any]) -> int:
    """The tokens of the prompt, whether they were read or came from a cache."""
    counts = message["usage"]
    return int(counts["input_tokens"] + counts["cache_read_input_tokens"])


def refused(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post("/v1/messages", json=body)
    error = answer.json()
    assert (answer.status_code, error["type"]) == (400, "error")
    assert error["error"]["type"] == "invalid_request_error"
    return dict(error["error"])


# --- answers --------------------------------------------------------------------------------


def test_an_answer_is_the_text_of_the_library(client: anthropic.Anthropic, server: Served) -> None:
    sampled = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5}
    message = client.messages.create(**asked(max_tokens=24), extra_body=sampled)
    expected = server.engine.generate(PROMPT, max_tokens=24, sampling=SamplingParams(**sampled))
    assert blocks(message) == [{"type": "text", "text": expected.text}]
    assert (message.role, message.stop_reason) == ("assistant", "max_tokens")
    assert prompt_tokens(message.model_dump()) == expected.prompt_tokens
    assert message.usage.output_tokens == 24
    assert message.model_extra["timings"]["draft_n"] >= 0


def test_a_stream_adds_up_to_the_whole(client: anthropic.Anthropic) -> None:
    body = asked(max_tokens=24, extra_body={"temperature": 0.9, "seed": 5})
    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    assert blocks(streamed) == blocks(whole)
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)


def test_the_asynchronous_client_gets_the_same(server: Served) -> None:
    body = asked(max_tokens=16, extra_body={"temperature": 0})

    async def both() -> tuple[Any, Any]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any") as client:
            whole = await client.messages.create(**body)
            async with client.messages.stream(**body) as stream:
                return whole, await stream.get_final_message()

    whole, streamed = asyncio.run(both())
    assert blocks(whole) == blocks(streamed)
    expected = server.engine.generate(PROMPT, max_tokens=16)
    assert blocks(whole) == [{"type": "text", "text": expected.text}]


@pytest.mark.parametrize(
    ("which", "expected", "reason"),
    [
        (0, [THOUGHT, {"type": "text", "text": "so it is"}], "end_turn"),
        (1, [THOUGHT, {"type": "text", "text": "Let me look."}, CALLED], "tool_use"),
        (2, [CALLED, CALLED], "tool_use"),
    ],
)
def test_thoughts_text_and_calls_are_blocks(
    chatting: anthropic.Anthropic, which: int, expected: list[Any], reason: str
) -> None:
    body = asked(f"Reply {which}", tools=[TOOL])
    whole = chatting.messages.create(**body)
    with chatting.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert blocks(message) == expected
        assert message.stop_reason == reason
        thinking = message.usage.output_tokens_details
        assert thinking is not None
        assert (thinking.thinking_tokens > 0) == (THOUGHT in expected)
    names = [block.id for block in streamed.content if block.type == "tool_use"]
    assert len({*names}) == len(names)


def test_text_behind_a_call_is_a_block_of_its_own(chatting: anthropic.Anthropic) -> None:
    with chatting.messages.stream(**asked("Reply 3", tools=[TOOL])) as stream:
        assert blocks(stream.get_final_message()) == [CALLED, {"type": "text", "text": "and more"}]


def test_one_call_is_all_where_no_more_are_wanted(chatting: anthropic.Anthropic) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    for which in (2, 3):  # two calls; text behind one
        body = asked(f"Reply {which}", tools=[TOOL], tool_choice=choice)
        with chatting.messages.stream(**body) as stream:
            for message in (stream.get_final_message(), chatting.messages.create(**body)):
                assert blocks(message) == [CALLED]
                assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)


def test_a_stream_has_the_events_of_anthropic_in_their_order(chat: Served) -> None:
    body = asked("Reply 1", tools=[TOOL], stream=True)
    with chat.client() as client, client.stream("POST", "/v1/messages", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [event["type"] for event in events] == names
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    assert events[0]["message"]["content"] == []
    told: dict[int, list[str]] = {}
    for event in events[2:-2]:
        name = event["type"].removeprefix("content_block_")
        name = event["delta"]["type"] if name == "delta" else name
        if told.setdefault(event["index"], [""])[-1] != name:
            told[event["index"]].append(name)
    assert told == {
        0: ["", "start", "thinking_delta", "signature_delta", "stop"],
        1: ["", "start", "text_delta", "stop"],
        2: ["", "start", "input_json_delta", "stop"],
    }
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 0


def test_a_stop_sequence_is_named_and_not_told(chatting: anthropic.Anthropic) -> None:
    body = asked(stop_sequences=["xyz", " it"])
    whole = chatting.messages.create(**body)
    with chatting.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " it")
        assert blocks(message)[-1] == {"type": "text", "text": "so"}


def test_half_a_call_is_no_call(chatting: anthropic.Anthropic) -> None:
    body = asked("Reply 2", tools=[TOOL], max_tokens=20)
    whole = chatting.messages.create(**body)
    with chatting.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "max_tokens"
        assert not [block for block in message.content if block.type == "tool_use"]


def test_an_end_at_the_context_is_told_apart() -> None:
    with served(lambda: talker("long " * 50, context=60)) as server, client_of(server) as client:
        message = client.messages.create(**asked("Hello", max_tokens=500))
        assert message.stop_reason == "model_context_window_exceeded"


def test_tools_are_not_offered_where_none_may_be_called(chatting: anthropic.Anthropic) -> None:
    body = asked("Reply 2", tools=[TOOL])
    message = chatting.messages.create(**body, tool_choice={"type": "none"})
    assert blocks(message) == [{"type": "text", "text": f"{CALL}\n{CALL}"}]
    counts = [
        chatting.messages.count_tokens(
            model="any", messages=body["messages"], tools=body["tools"], tool_choice={"type": kind}
        ).input_tokens
        for kind in ("none", "auto")
    ]
    assert counts[0] < counts[1]


def test_cached_tokens_are_not_counted_twice() -> None:
    generation = Generation(10, SpeculationStats(0), SamplingParams(), cached_prompt_tokens=4)
    counts = usage(generation)
    assert (counts["input_tokens"], counts["cache_read_input_tokens"]) == (6, 4)


# --- prompts --------------------------------------------------------------------------------


def turns_of(server: Served, **body: Any) -> list[dict[str, Any]]:
    conversation = Conversation.model_validate(asked(**body))
    return list(conversation.prompt_options(server.service, lambda note: None)["messages"])


def test_blocks_become_turns(chat: Served) -> None:
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {
            "role": "assistant",
            "content": [
                THOUGHT,
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "d"},
                CALLED | {"id": "t1"},
                CALLED | {"id": "t2"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "text", "text": "none"}],
                    "is_error": True,
                },
                {"type": "text", "text": "e"},
            ],
        },
        {"role": "system", "content": "f"},
    ]
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
        for name in ("t1", "t2")
    ]
    assert turns_of(chat, prompt=prompt, system=[{"type": "text", "text": "s"}]) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\n\nb\n\nc"},
        {"role": "assistant", "content": "d", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: none"},
        {"role": "user", "content": "e\n\nf"},
    ]


def test_a_conversation_with_calls_goes_on(chatting: anthropic.Anthropic) -> None:
    first = chatting.messages.create(**asked("Reply 1", tools=[TOOL]))
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Reply 0"}
        for block in first.content
        if block.type == "tool_use"
    ]
    turns = [
        {"role": "user", "content": "Reply 1"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    second = chatting.messages.create(**asked(turns, tools=[TOOL]))
    assert blocks(second)[-1] == {"type": "text", "text": "so it is"}


def test_a_turn_that_is_begun_is_gone_on_with(chat: Served) -> None:
    begun = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    request = chat.engine.request(messages=turns_of(chat, prompt=begun))
    assert request.continues


def test_tokens_of_a_prompt_are_counted(chatting: anthropic.Anthropic) -> None:
    prompt = {"messages": [{"role": "user", "content": "why"}], "system": "be brief"}
    counted = chatting.messages.count_tokens(model="any", tools=[TOOL], **prompt)
    answered = chatting.messages.create(**asked(tools=[TOOL]) | prompt)
    assert counted.input_tokens == prompt_tokens(answered.model_dump())


def test_tokens_of_a_prompt_beyond_the_context_are_counted_too(
    client: anthropic.Anthropic, server: Served
) -> None:
    long = [{"role": "user", "content": "word " * 2000}]
    assert client.messages.count_tokens(model="any", messages=long).input_tokens > 1024
    with pytest.raises(anthropic.BadRequestError, match=r"context is 1,024"):
        client.messages.create(**asked(long, stream=True))


READS_BOTH = "{% if enable_thinking %}{% endif %}{{ m.thinking }}{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("template", "asks", "given", "told"),
    [
        (READS_BOTH, {"on": True}, {"enable_thinking": True}, 0),
        (
            READS_BOTH,
            {"on": False, "effort": "high"},
            {
                "enable_thinking": False,
                "reasoning_effort": "high",
            },
            0,
        ),
        (READS_BOTH, {"effort": "none"}, {"enable_thinking": False}, 0),
        (READS_BOTH, {"effort": "max"}, {"reasoning_effort": "high"}, 0),
        (READS_BOTH + "{{ 'xhigh' }}", {"effort": "xhigh"}, {"reasoning_effort": "xhigh"}, 0),
        ("{% if thinking %}", {"on": True}, {"thinking": True}, 0),
        ("{{ m.thinking }}{{ m['thinking'] }}", {"on": True}, {}, 1),
        ("{{ thinking_budget }}", {"budget": 99}, {"thinking_budget": 99}, 0),
        ("", {"on": False, "effort": "low", "budget": 9}, {}, 3),
        ("", {}, {}, 0),
    ],
)
def test_a_template_is_told_what_it_can_take(
    template: str, asks: dict[str, Any], given: dict[str, Any], told: int
) -> None:
    notes: list[str] = []
    assert template_args(template, notes.append, **asks) == given
    assert len(notes) == told


# --- what Claude Code sends -----------------------------------------------------------------


def of_claude_code(attribution: str, **others: Any) -> dict[str, Any]:
    """A body as Claude Code sends it: long, marked for caches, and with fields of betas."""
    cached = {"cache_control": {"type": "ephemeral"}}
    header = f"x-anthropic-billing-header: cc_version=2.1.150.{attribution}; cc_entrypoint=cli;"
    names = ("Task", "Bash", "Glob", "Grep", "Read", "Edit", "Write", "TodoWrite")
    tools = [
        {
            "name": name,
            "description": f"{name} does what its name says. " * 20,
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {"path": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["path"],
                "additionalProperties": False,
            },
        }
        for name in names
    ]
    reminder = {"type": "text", "text": "<system-reminder>\nBe careful.\n</system-reminder>"}
    return {
        "model": "claude-sonnet-4-5-20250929",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "system": [
            {"type": "text", "text": header},
            {"type": "text", "text": "You are Claude Code."} | cached,
            {"type": "text", "text": "Use the tools that you have. " * 100} | cached,
        ],
        "messages": [
            {"role": "user", "content": [reminder, {"type": "text", "text": "Reply 1"} | cached]}
        ],
        "tools": [*tools, TOOL | cached | {"strict": True}],
        "metadata": {"user_id": "user_0_account__session_0"},
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
    } | others


def test_what_claude_code_sends_is_answered(chat: Served) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
    body = of_claude_code("a1b", top_k=1)  # its temperature would draw from all tokens
    with chat.client() as client:
        answer = client.post(
            "/v1/messages?beta=true", json=body | {"stream": False}, headers=headers
        ).json()
        assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
        notes = " ".join(answer["timings"]["notes"])
        for what in ("switch", "effort", "budget", "strict"):
            assert what in notes
        with client.stream(
            "POST", "/v1/messages?beta=true", json=body, headers=headers
        ) as response:
            assert response.status_code == 200
            assert "event: message_stop" in [*response.iter_lines()]
        for name in ("max_tokens", "stream", "temperature"):
            del body[name]
        count = client.post("/v1/messages/count_tokens?beta=true", json=body, headers=headers)
        assert count.json()["input_tokens"] == prompt_tokens(answer)


def test_the_prompt_does_not_change_with_the_line_of_attribution(chat: Served) -> None:
    prompts = [turns_of(chat, **{"prompt": "why"} | of_claude_code(one)) for one in ("a1b", "ffe")]
    assert prompts[0] == prompts[1]
    with chat.client() as client:
        bodies = [of_claude_code(one, stream=False, max_tokens=1) for one in ("c0d", "bad")]
        _, again = [client.post("/v1/messages", json=body).json() for body in bodies]
    assert again["usage"]["cache_read_input_tokens"] > 0.9 * prompt_tokens(again)
    assert prompts[0][0]["content"].startswith("You are Claude Code.\n\nUse the tools")


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            'messages.0.role is "tool", and this server takes ',
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"temperature": -1}, "temperature: "),
        ({"top_k": "5"}, "top_k: "),
        ({"stop_sequences": "a"}, "stop_sequences: "),
        ({"system": [{"type": "text"}]}, "system.0.text: "),
        ({"thinking": {"type": "maybe"}}, 'thinking.type is "maybe", and this server takes '),
        ({"tools": [{"name": "a", "input_schema": []}]}, "tools.0.input_schema: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: web_search"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: "),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format: "),
        ({"speculative": {"draft_model": "x"}}, "speculative.draft_model is 'x'"),
    ],
)
def test_a_field_that_is_wrong_is_named(server: Served, body: dict[str, Any], words: str) -> None:
    assert refused(server, asked() | body)["message"].startswith(words)


@pytest.mark.parametrize(
    ("role", "block", "words"),
    [
        ("user", {"type": "image", "source": {}}, "messages.0.content.0 is of type 'image'"),
        ("user", THOUGHT, "a turn of the user has no block of type thinking"),
        ("assistant", {"type": "tool_result", "tool_use_id": "a"}, "a turn of the assistant has"),
        (
            "user",
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "document"}]},
            "messages.0.content.0.tool_result.content.0",
        ),
    ],
)
def test_a_block_that_cannot_be_read_is_named(
    chat: Served, role: str, block: dict[str, Any], words: str
) -> None:
    body = asked([{"role": role, "content": [block]}])
    assert words in refused(chat, body)["message"]


def test_a_key_is_asked_for_in_the_words_of_anthropic() -> None:
    with served(talks, key="s3cret") as server:
        with client_of(server, "s3cret") as client:
            assert client.messages.create(**asked(max_tokens=1)).usage.output_tokens == 1
        with client_of(server, "wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**asked(max_tokens=1))


def test_an_error_in_the_middle_is_an_event(
    server: Served, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_a_step(monkeypatch, after=3)
    with (
        pytest.raises(anthropic.APIStatusError, match="planted") as caught,
        client.messages.stream(**asked()) as stream,
    ):
        for _ in stream:
            pass
    assert caught.value.body["error"]["type"] == "api_error"
    assert client.messages.create(**asked(max_tokens=1)).usage.output_tokens == 1


def test_the_model_is_listed(server: Served, client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == ("demo", "model", "demo")
    assert model.created_at.year > 2000
    assert client.models.retrieve("demo") == model


def test_speculation_is_the_requests_to_choose(client: anthropic.Anthropic) -> None:
    texts = []
    for choice in ({"enabled": False}, {"draft_tokens": 3}):
        message = client.messages.create(**asked(max_tokens=24, extra_body={"speculative": choice}))
        assert (message.model_extra["timings"]["draft_n"] > 0) == ("draft_tokens" in choice)
        texts.append(blocks(message))
    assert texts[0] == texts[1]


def test_a_client_of_another_protocol_is_told_so(server: Served) -> None:
    with httpx.Client(base_url=server.url) as client:
        answer = client.get("/v1/messages/batches")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
