"""OpenAI's newer protocol, as its own client speaks it and as Codex does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import WAIT_S, Served, break_a_step
from talkers import CALL, WEATHER

from mlxspec.calling import Called
from mlxspec.conversations import ToolCall
from mlxspec.metrics import Event, Generation, Logprob, Piece, Place, SpeculationStats
from mlxspec.params import SamplingParams
from mlxspec.serve.openai.responses import usage
from mlxspec.serve.openai.responses_body import LOGPROBS, Body
from mlxspec.serve.protocol.parts import Parts
from mlxspec.spelling import Spelling

PROMPT = "def fibonacci(n):"
ARGUMENTS = '{"city": "Köln 🌧"}'
TOOL = {"type": "function", "strict": False} | WEATHER["function"]
THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
CALLED = {"type": "function_call", "name": "weather", "arguments": ARGUMENTS}


def client_of(server: Served) -> openai.OpenAI:
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=WAIT_S)


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with client_of(server) as one:
        yield one


@pytest.fixture
def chatting(chat: Served) -> Iterator[openai.OpenAI]:
    with client_of(chat) as one:
        yield one


def asked(prompt: Any = PROMPT, **others: Any) -> dict[str, Any]:
    return {"model": "any", "max_output_tokens": 200, "input": prompt} | others


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "text": text}


def items(response: Any) -> list[dict[str, Any]]:
    """The output, without names of items and what is the same in all of them."""
    found = []
    for item in response.output:
        given = item.model_dump(exclude_none=True)
        if item.type == "message":
            assert item.role == "assistant"
            given = said("".join(part.text for part in item.content))
        keep = ("type", "text", "content", "name", "arguments")
        found.append({name: given[name] for name in keep if name in given})
    return found


def refused(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post("/v1/responses", json=body)
    assert answer.status_code == 400
    return dict(answer.json()["error"])


# --- answers --------------------------------------------------------------------------------


def test_an_answer_is_the_text_of_the_library(client: openai.OpenAI, server: Served) -> None:
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
    body = asked(max_output_tokens=24, extra_body=sampled)
    expected = server.engine.generate(PROMPT, max_tokens=24, sampling=SamplingParams(**sampled))
    response = client.responses.create(**body)
    assert response.output_text == expected.text
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        expected.prompt_tokens,
        24,
    )
    assert (response.temperature, response.top_p, response.store) == (0.9, 0.9, False)
    assert response.model_extra is not None
    assert response.model_extra["timings"]["draft_n"] >= 0


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    body = asked(max_output_tokens=24, temperature=0.9, extra_body={"seed": 5})
    whole = client.responses.create(**body)
    deltas, last = "", None
    for event in client.responses.create(**body, stream=True):
        deltas += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert last is not None
    assert last.type == "response.incomplete"
    assert deltas == last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage


def test_the_asynchronous_client_gets_the_same(server: Served) -> None:
    body = asked(max_output_tokens=16, temperature=0)

    async def both() -> tuple[Any, list[Any]]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any") as client:
            whole = await client.responses.create(**body)
            stream = await client.responses.create(**body, stream=True)
            return whole, [event async for event in stream]

    whole, events = asyncio.run(both())
    expected = server.engine.generate(PROMPT, max_tokens=16)
    assert whole.output_text == events[-1].response.output_text == expected.text


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (0, [THOUGHT, said("so it is")]),
        (1, [THOUGHT, said("Let me look."), CALLED]),
        (2, [CALLED, CALLED]),
    ],
)
def test_reasoning_messages_and_calls_are_items(
    chatting: openai.OpenAI, which: int, expected: list[Any]
) -> None:
    body = asked(f"Reply {which}", tools=[TOOL])
    whole = chatting.responses.create(**body)
    with chatting.responses.stream(**body) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        assert items(response) == expected
        assert response.status == "completed"
        assert {item.status for item in response.output} == {"completed"}
        assert response.usage is not None
        reasoning = response.usage.output_tokens_details.reasoning_tokens
        assert (reasoning > 0) == (THOUGHT in expected)
        names = [item.id for item in response.output]
        assert len({*names}) == len(names)


def test_text_behind_a_call_is_an_item_of_its_own(chatting: openai.OpenAI) -> None:
    with chatting.responses.stream(**asked("Reply 3", tools=[TOOL])) as stream:
        assert items(stream.get_final_response()) == [CALLED, said("and more")]


def test_one_call_is_all_where_no_more_are_wanted(chatting: openai.OpenAI) -> None:
    for which in (2, 3):  # two calls; text behind one
        body = asked(f"Reply {which}", tools=[TOOL], parallel_tool_calls=False)
        *_, last = chatting.responses.create(**body, stream=True)
        for response in (chatting.responses.create(**body), last.response):
            assert items(response) == [CALLED]
            assert (response.status, response.parallel_tool_calls) == ("completed", False)


def test_log_probabilities_are_the_targets_own(client: openai.OpenAI, server: Served) -> None:
    body = asked(max_output_tokens=12, temperature=0, include=[LOGPROBS], top_logprobs=2)
    *events, last = client.responses.create(**body, stream=True)
    expected = server.engine.generate(PROMPT, max_tokens=12, logprobs=2)
    assert server.engine.tokenizer is not None
    values = Spelling(server.engine.tokenizer).as_dicts(expected.logprobs)
    deltas, done = [], []
    for event in events:
        deltas += event.logprobs if event.type == "response.output_text.delta" else []
        done += event.logprobs if event.type == "response.output_text.done" else []
    for response in (client.responses.create(**body), last.response):
        assert response.top_logprobs == 2
        (told,) = [part.logprobs for item in response.output for part in item.content]
        for logprobs in (told, deltas, done):
            assert [one.token for one in logprobs] == [one["token"] for one in values]
            for one, other in zip(logprobs, values, strict=True):
                assert one.logprob == pytest.approx(other["logprob"], abs=1e-4)
                tops = [top.token for top in one.top_logprobs]
                assert tops == [top["token"] for top in other["top_logprobs"]]


def test_log_probabilities_stand_with_their_message(chatting: openai.OpenAI) -> None:
    body = asked("Reply 1", tools=[TOOL], include=[LOGPROBS])
    *events, last = chatting.responses.create(**body, stream=True)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    streamed = [one.token for event in deltas for one in event.logprobs]
    for response in (chatting.responses.create(**body), last.response):
        _, message, _ = response.output
        told = [one.token for one in message.content[0].logprobs]
        assert told == streamed == [*"Let me look.", "\n"]
        assert not any(one.top_logprobs for one in message.content[0].logprobs)
    with chatting.responses.stream(**asked("Reply 3", tools=[TOOL], include=[LOGPROBS])) as stream:
        _, message = stream.get_final_response().output
    assert [one.token for one in message.content[0].logprobs] == [*"and more"]


def test_log_probabilities_follow_their_text_over_calls() -> None:
    """All of it in one round: a text, two calls in one block, and a text."""
    calls = tuple(ToolCall("weather", "{}", str(at)) for at in range(2))
    places: tuple[Place, ...] = ("reasoning", "text", "text", "call", "call", "text", "text")
    logprobs = tuple(Logprob(at, -0.5, place=place) for at, place in enumerate(places))
    pieces = (
        Piece("hm", from_draft=True, reasoning=True),
        Piece("so", from_draft=True),
        Called("", from_draft=True, calls=calls),
        Piece("and more", from_draft=True),
    )
    parts = Parts()
    changes = [*parts.add(Event(pieces=pieces, logprobs=logprobs, finish_reason="stop"))]
    told = [(part.kind, [one.token for one in part.logprobs]) for part in parts.all]
    assert told == [
        ("reasoning", []),
        ("text", [1, 2]),
        ("call", []),
        ("call", []),
        ("text", [5, 6]),
    ]
    grown = [one.token for change in changes for one in change.logprobs]
    assert grown == [1, 2, 5, 6]


def test_log_probabilities_are_told_to_those_who_ask(client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(max_output_tokens=4, top_logprobs=3))
    assert response.output[0].content[0].logprobs == []
    assert any("include" in note for note in response.model_extra["timings"]["notes"])


def test_a_stream_has_the_events_of_openai_in_their_order(chat: Served) -> None:
    body = asked("Reply 1", tools=[TOOL], stream=True)
    with chat.client() as client, client.stream("POST", "/v1/responses", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [event["type"] for event in events] == names
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    told: dict[int, list[str]] = {}
    for event in events[2:-1]:
        name = event["type"].removeprefix("response.")
        if told.setdefault(event["output_index"], [""])[-1] != name:
            told[event["output_index"]].append(name)

    def part(kind: str) -> list[str]:
        inside = [f"{kind}.delta", f"{kind}.done"]
        return ["content_part.added", *inside, "content_part.done"]

    called = ["function_call_arguments.delta", "function_call_arguments.done"]
    for index, inside in enumerate((part("reasoning_text"), part("output_text"), called)):
        assert told[index] == ["", "output_item.added", *inside, "output_item.done"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {item["id"] for item in done}


def test_half_a_call_is_no_call(chatting: openai.OpenAI) -> None:
    body = asked("Reply 2", tools=[TOOL], max_output_tokens=20)
    *_, last = chatting.responses.create(**body, stream=True)
    for response in (chatting.responses.create(**body), last.response):
        assert response.status == "incomplete"
        assert not [item for item in response.output if item.type == "function_call"]


def test_the_item_that_is_cut_is_incomplete_and_no_other(chatting: openai.OpenAI) -> None:
    body = asked(max_output_tokens=7)  # <think>hm</think> and three letters
    *events, last = chatting.responses.create(**body, stream=True)
    whole = chatting.responses.create(**body)
    for response in (whole, last.response):
        assert [item.status for item in response.output] == ["completed", "incomplete"]
        assert items(response) == [THOUGHT, said("so ")]
    done = [event.item.status for event in events if event.type == "response.output_item.done"]
    assert done == ["completed", "incomplete"]


def test_tools_are_not_offered_where_none_may_be_called(chatting: openai.OpenAI) -> None:
    response = chatting.responses.create(**asked("Reply 2", tools=[TOOL], tool_choice="none"))
    assert items(response) == [said(f"{CALL}\n{CALL}")]
    assert response.tool_choice == "none"


def test_tokens_are_counted_by_the_names_of_this_protocol() -> None:
    generation = Generation(10, SpeculationStats(0), SamplingParams(), cached_prompt_tokens=4)
    generation.tokens, generation.reasoning_tokens = [1, 2, 3], 2
    counts = usage(generation)
    assert counts["input_tokens"] == 10
    assert counts["input_tokens_details"]["cached_tokens"] == 4
    assert (counts["output_tokens"], counts["total_tokens"]) == (3, 13)
    assert counts["output_tokens_details"] == {"reasoning_tokens": 2}


# --- prompts --------------------------------------------------------------------------------


def turns_of(server: Served, **body: Any) -> list[dict[str, Any]]:
    notes: list[str] = []
    parsed = Body.model_validate({"model": "any"} | body)
    return list(parsed.all_options(server.service, notes.append)["messages"])


def test_items_become_turns(chat: Served) -> None:
    def call(name: str) -> dict[str, Any]:
        function = {"name": "weather", "arguments": ARGUMENTS}
        return {"id": name, "type": "function", "function": function}

    given = [
        {"type": "message", "role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "user", "content": "b"},
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "short"}]},
        THOUGHT | {"id": "rs_1", "summary": [], "encrypted_content": None},
        {
            "type": "message",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "c", "annotations": []},
                {"type": "refusal", "refusal": "no"},
            ],
        },
        CALLED | {"call_id": "c1", "id": "fc_1", "status": "completed"},
        CALLED | {"call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "sun"}],
        },
        {"role": "developer", "content": "e"},
    ]
    assert turns_of(chat, input=given, instructions="s") == [
        {"role": "system", "content": "s\n\nd"},
        {"role": "user", "content": "a\n\nb"},
        {
            "role": "assistant",
            "content": "cno",
            "reasoning_content": "short\n\nhm",
            "tool_calls": [call("c1"), call("c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "user", "content": "e"},
    ]


def test_what_was_answered_can_be_sent_back(chatting: openai.OpenAI) -> None:
    first = chatting.responses.create(**asked("Reply 1", tools=[TOOL]))
    given: list[Any] = [{"role": "user", "content": "Reply 1"}]
    given += [item.model_dump(exclude_none=True) for item in first.output]
    given += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "Reply 0"}
        for item in first.output
        if item.type == "function_call"
    ]
    second = chatting.responses.create(**asked(given, tools=[TOOL]))
    assert second.output_text == "so it is"


def test_a_prompt_longer_than_the_context_is_refused_before_any_event(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"context is 1,024") as caught:
        client.responses.create(**asked("word " * 2000, stream=True))
    assert caught.value.code == "context_length_exceeded"


# --- what Codex sends -----------------------------------------------------------------------


def of_codex(**others: Any) -> dict[str, Any]:
    """A body as Codex sends it: instructions, messages of a developer, tools of all kinds."""
    shell = {
        "type": "function",
        "name": "shell_command",
        "description": "Runs a shell command and returns its output. " * 10,
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {
                "command": {"type": "string"},
                "workdir": {"type": "string"},
                "timeout_ms": {"type": "number"},
            },
            "required": ["command"],
            "additionalProperties": False,
        },
    }
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch hunk+"}

    def message(role: str, text: str) -> dict[str, Any]:
        content = [{"type": "input_text", "text": text}]
        return {"type": "message", "role": role, "content": content}

    return {
        "model": "qwen3-coder",
        "instructions": "You are a coding agent. " * 200,
        "input": [
            message("developer", "<permissions instructions>…</permissions instructions>"),
            message("user", "<environment_context>\n  <cwd>/tmp</cwd>\n</environment_context>"),
            message("user", "Reply 1"),
        ],
        "tools": [
            shell,
            TOOL | {"strict": True},
            {"type": "custom", "name": "apply_patch", "description": "…", "format": grammar},
            {"type": "web_search", "external_web_access": True},
            {"type": "namespace", "name": "mcp__files", "tools": []},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199a213-81c0-7800-8aa1-bbab2a035a53",
        "text": {"verbosity": "medium"},
        "client_metadata": {"x-codex-installation-id": "0"},
    } | others


def test_what_codex_sends_is_answered(chat: Served) -> None:
    headers = {"originator": "codex_cli_rs", "session_id": "0", "accept": "text/event-stream"}
    with (
        chat.client() as client,
        client.stream("POST", "/v1/responses", json=of_codex(), headers=headers) as response,
    ):
        assert response.status_code == 200
        *_, line = [one for one in response.iter_lines() if one.startswith("data: ")]
    answer = json.loads(line.removeprefix("data: "))["response"]
    kinds = [item["type"] for item in answer["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    assert [tool["name"] for tool in answer["tools"]] == ["shell_command", "weather"]
    notes = " ".join(answer["timings"]["notes"])
    for what in ("custom", "web_search", "namespace", "effort", "strict"):
        assert what in notes


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "nobody", "content": "a"}]}, "input.0.message.role"),
        ({"input": [CALLED]}, "input.0.function_call.call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "8"}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "weather"}}, "tool_choice"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"include": [LOGPROBS], "top_logprobs": 21}, "top_logprobs"),
        ({"speculative": {"draft_tokens": 99}}, "speculative.draft_tokens"),
    ],
)
def test_a_field_that_is_wrong_is_named(server: Served, body: dict[str, Any], param: str) -> None:
    error = refused(server, asked() | body)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert param.split(".")[-1] in error["message"]


HALF = r'"\ud800"'  # of a character, which JSON can spell
DEEP = '{"a":' * 900 + "1" + "}" * 900
USER = '{"role": "user", "content": "a"}'
FUNCTION = '{"type": "function", "name": "f", "parameters": {"a": %s}}'


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/responses", f'"input": "a", "instructions": {HALF}', ""),
        ("/v1/responses", f'"input": "a", "reasoning": {{"effort": {HALF}}}', "reasoning.effort"),
        ("/v1/responses", f'"input": [{{"type": {HALF}}}]', "input.0"),
        ("/v1/responses", f'"input": "a", "tools": [{FUNCTION % "NaN"}]', "tools.0.parameters"),
        (
            "/v1/responses",
            f'"input": "a", "tools": [{FUNCTION % HALF}], "tool_choice": "none"',
            "tools.0.parameters",
        ),
        (
            "/v1/chat/completions",
            f'"messages": [{USER}], "chat_template_kwargs": {{"a": {HALF}}}',
            "chat_template_kwargs",
        ),
        (
            "/v1/messages",
            f'"messages": [{USER}], "tools": [{{"name": {HALF}}}]',
            "tools.0",
        ),
        (
            "/v1/chat/completions",
            f'"messages": [{USER}], "tools": [{FUNCTION % DEEP}]',
            "more than 100 levels deep",
        ),
    ],
)
def test_what_json_cannot_say_back_is_the_requests_fault(
    chat: Served, path: str, fields: str, param: str
) -> None:
    body = f'{{"max_tokens": 5, {fields}}}'
    headers = {"Content-Type": "application/json"}
    with chat.client() as client:
        answer = client.post(path, content=body, headers=headers)
    assert answer.status_code == 400
    assert param in answer.text


def test_half_of_a_character_in_what_is_told_back_is_a_question_mark(chat: Served) -> None:
    body = f'{{"input": "a", "metadata": {{"a": {HALF}}}, "stream": %s}}'
    with chat.client() as client:
        for stream in ("true", "false"):
            headers = {"Content-Type": "application/json"}
            answer = client.post("/v1/responses", content=body % stream, headers=headers)
            assert answer.status_code == 200
            assert '"metadata": {"a": "?"}' in answer.text


def test_only_text_can_be_read(chat: Served) -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64,"}
    error = refused(chat, asked([{"role": "user", "content": [picture]}]))
    assert "of type 'input_image'" in error["message"]


def test_an_error_in_the_middle_fails_the_response(
    server: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_a_step(monkeypatch, after=5)
    *_, last = client.responses.create(**asked(stream=True))
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert "planted" in last.response.error.message
    assert [item.status for item in last.response.output] == ["incomplete"]
    assert client.responses.create(**asked(max_output_tokens=1)).status == "incomplete"
