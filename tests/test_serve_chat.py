"""OpenAI's chats and completions, as its own client speaks them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import WAIT_S, Served
from talkers import CALL, WEATHER, talker

from mlxspec.decode.engine import Engine
from mlxspec.params import SamplingParams

ARGUMENTS = {"city": "Köln 🌧"}
REPLIES = (
    "<think>hm</think>so it is",
    f"<think>hm</think>Let me look.\n{CALL}",
    f"{CALL}\n{CALL}",
)
PROMPT = "def fibonacci(n):"


def talks() -> Engine:
    return talker(*REPLIES)


def client_of(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=WAIT_S)


@pytest.fixture
def client(chat: Served) -> Iterator[openai.OpenAI]:
    with client_of(chat) as one:
        yield one


def asked(prompt: Any, **others: Any) -> dict[str, Any]:
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return {"model": "any", "max_tokens": 200, "messages": messages, "temperature": 0} | others


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The message that a stream of chunks adds up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            message["content"] += delta.get("content", "")
            message["reasoning_content"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append((call["id"], call["function"]))
            message["finish_reason"] = choice.finish_reason
    return message


def test_an_answer_has_its_reasoning_apart(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**asked("0"))
    message = answer.choices[0].message
    assert message.content == "so it is"
    assert message.reasoning_content == "hm"  # type: ignore[attr-defined]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens == 3  # <think> and two letters
    assert answer.usage.completion_tokens > 3
    assert answer.timings["draft_n"] > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("digit", "calls"), [("0", 0), ("1", 1), ("2", 2)])
def test_calls_of_tools_come_whole_and_in_streams(
    client: openai.OpenAI, digit: str, calls: int
) -> None:
    body = asked(digit, tools=[WEATHER])
    whole = client.chat.completions.create(**body).choices[0]
    told = whole.message.tool_calls or []
    assert len(told) == calls
    assert len({call.id for call in told}) == calls
    for call in told:
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == ARGUMENTS
    assert whole.finish_reason == ("tool_calls" if calls else "stop")
    streamed = joined(list(client.chat.completions.create(**body, stream=True)))
    assert streamed["content"] == (whole.message.content or "")
    assert streamed["finish_reason"] == whole.finish_reason
    assert [function for _, function in streamed["tool_calls"]] == [
        call.function.model_dump() for call in told
    ]


def test_one_call_is_all_where_no_more_are_wanted(client: openai.OpenAI) -> None:
    for digit in ("2", "3"):  # two calls; text behind one
        body = asked(digit, tools=[WEATHER], parallel_tool_calls=False)
        whole = client.chat.completions.create(**body).choices[0]
        assert (whole.message.content, whole.finish_reason) == (None, "tool_calls")
        assert len(whole.message.tool_calls or []) == 1
        streamed = joined(list(client.chat.completions.create(**body, stream=True)))
        assert (streamed["content"], streamed["finish_reason"]) == ("", "tool_calls")
        assert len(streamed["tool_calls"]) == 1


def test_log_probabilities_of_the_reasoning_are_apart(client: openai.OpenAI) -> None:
    body = asked("0", logprobs=True, top_logprobs=1)
    whole = client.chat.completions.create(**body).choices[0].logprobs
    told = [
        chunk.choices[0].logprobs for chunk in client.chat.completions.create(**body, stream=True)
    ]
    for parts in ([whole], told):
        content = [one for part in parts if part is not None for one in part.content or ()]
        assert "".join(one.token for one in content) == "so it is"
        assert all(one.top_logprobs[0].token == one.token for one in content)
        reasoning = [
            one["token"]
            for part in parts
            if part is not None
            for one in part.reasoning_content  # type: ignore[attr-defined]
        ]
        assert "".join(reasoning) == "<think>hm</think>"


def test_a_client_may_send_back_what_it_got(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**asked("1", tools=[WEATHER])).choices[0].message
    call = (first.tool_calls or [])[0]
    turns: list[Any] = [
        {"role": "user", "content": "1"},
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain 0"},
    ]
    answer = client.chat.completions.create(**asked(turns, tools=[WEATHER]))
    assert answer.choices[0].message.content == "so it is"


def test_several_choices_of_one_prompt(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**asked("1", tools=[WEATHER], n=3))
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert all(len(choice.message.tool_calls or []) == 1 for choice in whole.choices)
    chunks = list(client.chat.completions.create(**asked("1", tools=[WEATHER], n=3), stream=True))
    for index in range(3):
        own = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert len(joined(own)["tool_calls"]) == 1


def test_clients_of_a_loop(chat: Served) -> None:
    async def both() -> tuple[Any, list[Any]]:
        client = openai.AsyncOpenAI(
            base_url=f"{chat.url}/v1", api_key="any", max_retries=0, timeout=WAIT_S
        )
        async with client:
            whole = await client.chat.completions.create(**asked("0"))
            stream = await client.chat.completions.create(**asked("0"), stream=True)
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(both())
    assert whole.choices[0].message.content == joined(chunks)["content"] == "so it is"


def test_a_completion_equals_the_library_with_the_same_seed(server: Served) -> None:
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=11)
    expected = server.engine.generate(
        PROMPT, raw=True, max_tokens=24, sampling=sampling, logprobs=1
    )
    with client_of(server) as client:
        answer = client.completions.create(
            model="any",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0.8,
            top_p=0.9,
            seed=11,
            logprobs=1,
        )
    choice = answer.choices[0]
    assert choice.text == expected.text
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(
        [one.logprob for one in expected.logprobs], abs=1e-5
    )
    assert "".join(choice.logprobs.tokens or ()) == choice.text


def test_a_prediction_is_counted(server: Served) -> None:
    with server.client() as client:
        # The embedded model has no chat template, so its turns are given as text.
        expected = server.engine.generate(PROMPT, raw=True, max_tokens=48).text
        body = {
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 48,
            "temperature": 0,
            "prediction": {"type": "content", "content": expected},
            "speculative": {"draft_tokens": 8},
        }
        answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == expected
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 20
    assert details["rejected_prediction_tokens"] >= 0


@pytest.mark.parametrize(
    ("others", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 9}, "n"),
        ({"speculative": {"draft_model": "other"}}, "speculative.draft_model"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    client: openai.OpenAI, others: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked("0") | {"extra_body": others})
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("speculative", "drafted"),
    [({"enabled": False}, False), ({"draft_tokens": 0}, False), ({"draft_tokens": 2}, True)],
)
def test_speculation_is_as_a_request_asks(
    client: openai.OpenAI, speculative: dict[str, Any], drafted: bool
) -> None:
    answer: Any = client.chat.completions.create(
        **asked("0"), extra_body={"speculative": speculative}
    )
    assert (answer.timings["draft_n"] > 0) is drafted
    assert len(answer.timings["drafted_by_position"]) == speculative.get("draft_tokens", 0)
    assert answer.choices[0].message.content == "so it is"


def test_turns_that_are_no_turns_are_refused_in_words(client: openai.OpenAI) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        client.chat.completions.create(**asked([{"role": "user", "content": picture}]))
