"""The server's bones: admission, limits, keys, errors, clients that go away."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_tools import wait_for
from servers import Served, break_a_step, served
from talkers import talks

from mlxspec.pairs.loading import load

PROMPT = "def fibonacci(n):"


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as one:
        yield one


def events(response: httpx.Response) -> list[Any]:
    """The objects of a stream, until its end mark."""
    lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_the_text_of_the_library(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()
    expected = load().generate(PROMPT, max_tokens=24, raw=True)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["timings"]["draft_n"] >= answer["timings"]["draft_n_accepted"] > 0


def test_a_stream_adds_up_to_the_whole(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 3}
    whole = client.post("/v1/completions", json=body).json()
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=streamed) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    text = "".join(one["choices"][0]["text"] for one in chunks if one["choices"])
    assert text == whole["choices"][0]["text"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert [one["choices"][0]["finish_reason"] for one in chunks[:-1]][-1] == "length"


def test_prompts_of_ids_and_several_of_them(client: httpx.Client, server: Served) -> None:
    ids = server.engine.encode(PROMPT, raw=True)
    body = {"max_tokens": 8, "temperature": 0}
    one = client.post("/v1/completions", json=body | {"prompt": PROMPT}).json()
    same = client.post("/v1/completions", json=body | {"prompt": ids}).json()
    both = client.post("/v1/completions", json=body | {"prompt": [PROMPT, "import os"]}).json()
    assert same["choices"] == one["choices"]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["choices"][0]["text"] == one["choices"][0]["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": PROMPT, "max_tokens": "8"}, "max_tokens"),
        ({"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
        ({"prompt": PROMPT, "temperature": -1}, "temperature"),
        ({"prompt": PROMPT, "top_p": 2}, "top_p"),
        ({"prompt": PROMPT, "n": 99}, "n"),
        ({"prompt": PROMPT, "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": PROMPT, "speculative": {"draft_tokens": 99}}, "speculative.draft_tokens"),
        ({"prompt": PROMPT, "speculative": {"draft_model": "x"}}, "speculative.draft_model"),
        ({"prompt": PROMPT, "echo": True}, "echo"),
        ({"prompt": []}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_a_field_that_is_wrong_is_named(client: httpx.Client, body: Any, param: str) -> None:
    answer = client.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] is not None
    assert error["param"].startswith(param)
    assert param in error["message"] or "texts" in error["message"]


@pytest.mark.parametrize(
    ("route", "others", "message"),
    [
        ("completions", {"echo": True}, "echo is true, and this server takes false alone."),
        (
            "chat/completions",
            {"response_format": {"type": "json_object"}},
            "response_format.type is \"json_object\", and this server takes 'text' alone.",
        ),
    ],
)
def test_a_value_that_is_not_taken_is_named_with_those_that_are(
    client: httpx.Client, route: str, others: dict[str, Any], message: str
) -> None:
    body = {"prompt": PROMPT, "messages": [{"role": "user", "content": PROMPT}]}
    answer = client.post(f"/v1/{route}", json=body | others)
    assert answer.json()["error"]["message"] == message


def test_an_unknown_field_is_ignored(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "user": "me", "store": False}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_a_prompt_longer_than_the_context_is_refused_before_any_header(
    client: httpx.Client,
) -> None:
    body = {"prompt": [1] * 5000, "stream": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "5,000" in answer.json()["error"]["message"]


def test_what_was_read_of_a_prompt_outlasts_the_server(tmp_path: Path) -> None:
    body = {"prompt": [(7 * at) % 2000 + 1 for at in range(300)], "max_tokens": 8, "temperature": 0}

    def answered() -> Any:
        with served(folder=tmp_path / "pasts") as server, server.client() as client:
            answer = client.post("/v1/completions", json=body).json()
            again = client.post("/v1/completions", json=body).json()
            assert again["choices"] == answer["choices"]
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 299
            return answer

    first, later = answered(), answered()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert later["usage"]["prompt_tokens_details"]["cached_tokens"] == 299
    assert later["choices"] == first["choices"]


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with served(talks, folder=tmp_path / "file") as server, server.client() as client:
        body = {"prompt": PROMPT, "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
    assert server.log


def test_a_key_is_asked_for_and_taken_in_both_headers() -> None:
    with served(talks, key="s3cret") as server, server.client() as client:
        body = {"prompt": PROMPT, "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "s3cre"}):
            answer = client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for headers in ({"Authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}):
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_body_that_is_too_long_is_refused() -> None:
    with served(talks, max_body_bytes=1000) as server, server.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "x" * 2000})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        parts = (b"x" * 100 for _ in range(20))
        headers = {"Content-Type": "application/json"}
        unsized = client.post("/v1/completions", content=parts, headers=headers)
        assert unsized.status_code == 413


def test_limits_of_the_server_are_told() -> None:
    with served(talks, max_tokens=10, max_prompt_tokens=3) as server, server.client() as client:
        long = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 11})
        assert long.json()["error"]["param"] == "max_tokens"
        assert "10 at most" in long.json()["error"]["message"]
        read = client.post("/v1/completions", json={"prompt": PROMPT})
        assert read.json()["error"]["code"] == "context_length_exceeded"
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert answer.json()["usage"]["completion_tokens"] <= 10


def test_a_server_that_loads_is_alive_and_not_ready() -> None:
    goes_on = threading.Event()

    def make() -> Any:
        goes_on.wait()
        return talks()

    with served(make, wait=False) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        answer = client.post("/v1/completions", json={"prompt": PROMPT})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        goes_on.set()
        wait_for(lambda: client.get("/ready").status_code == 200)


def test_texts_end_with_an_error_when_a_round_breaks_and_the_next_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served(talks) as server, server.client() as client:
        break_a_step(monkeypatch, after=0)
        body = {"prompt": PROMPT, "max_tokens": 4}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 500
        assert "planted" in answer.json()["error"]["message"]
        assert any("planted" in line for line in server.log)
        assert client.post("/v1/completions", json=body).status_code == 200
