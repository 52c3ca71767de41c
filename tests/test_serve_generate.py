"""`/generate`: a text and the figures of its speculation, against this machine's own rounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import Served, served

from mlxspec.defaults import MAX_AUTO_TOKENS
from mlxspec.params import SamplingParams

PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(measures=True) as one:
        yield one


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with server.client() as one:
        yield one


def test_a_text_and_its_figures(client: httpx.Client, server: Served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 40, "draft_tokens": 4}
    answer = client.post("/generate", json=body).json()
    expected = server.engine.generate(PROMPT, max_tokens=40, draft_tokens=4)
    stats, figures = expected.speculation, answer["metrics"]
    assert answer["text"] == expected.text
    assert figures["acceptance_rate"] == stats.acceptance_rate
    assert figures["tokens_per_round"] == stats.tokens_per_round
    assert figures["K"] == 4
    measured = server.service.worker.measured
    assert measured is not None
    assert (figures["draft_s"], figures["verify_s"]) == measured.halves[4]
    assert figures["draft_s"] > 0 < figures["verify_s"]


def test_the_speedup_is_against_measured_plain_rounds(
    client: httpx.Client, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8}
    speedup = client.post("/generate", json=body).json()["metrics"]["speedup"]
    plain_s = server.service.watch.plain_s()
    assert plain_s is not None
    monkeypatch.setattr(server.service.watch, "plain_s", lambda: plain_s * 1000)
    assert client.post("/generate", json=body).json()["metrics"]["speedup"] > 20 * speedup > 0


def test_every_k_that_auto_takes_is_measured(server: Served) -> None:
    measured = server.service.worker.measured
    assert measured is not None
    assert [*measured.halves] == [*range(1, MAX_AUTO_TOKENS + 1)]
    assert measured.plain_s > 0


def test_without_speculation_there_is_nothing_to_rate(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 16}
    auto = client.post("/generate", json=body).json()
    plain = client.post("/generate", json=body | {"use_speculative": False, "draft_tokens": 3})
    figures = plain.json()["metrics"]
    assert plain.json()["text"] == auto["text"]
    assert figures.pop("speedup") > 0
    assert figures.pop("tokens_per_round") == 1
    assert figures == {"acceptance_rate": None, "K": 0, "draft_s": None, "verify_s": None}


def test_what_was_not_measured_is_null(server: Served, client: httpx.Client) -> None:
    more = {"prompt": PROMPT, "max_tokens": 40, "draft_tokens": MAX_AUTO_TOKENS + 1}
    figures = client.post("/generate", json=more).json()["metrics"]
    assert (figures["K"], figures["draft_s"]) == (MAX_AUTO_TOKENS + 1, None)
    with served() as other, other.client() as asking:
        assert other.service.watch.plain_s() is None
        figures = asking.post("/generate", json=more | {"draft_tokens": 2}).json()["metrics"]
    assert (figures["K"], figures["verify_s"]) == (2, None)


def test_a_seed_gives_the_text_of_the_library(client: httpx.Client, server: Served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.9, "seed": 7}
    sampling = SamplingParams(temperature=0.9, seed=7)
    expected = server.engine.generate(PROMPT, max_tokens=24, sampling=sampling)
    assert client.post("/generate", json=body).json()["text"] == expected.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "use_speculative": "yes"}, "use_speculative"),
        ({"prompt": "a", "draft_tokens": 65}, "draft_tokens"),
    ],
)
def test_a_field_that_is_wrong_is_named(client: httpx.Client, body: Any, param: str) -> None:
    answer = client.post("/generate", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("name", "most", "beyond"),
    [
        ("temperature", 1e30, 1e39),
        ("presence_penalty", 1e30, -1e39),
        ("frequency_penalty", -1e30, 1e39),
        ("repetition_penalty", 1e-30, 1e-39),
        ("repetition_penalty", 1e30, 1e39),
        ("logit_bias", {"5": 1e30}, {"5": 1e39}),
    ],
)
def test_numbers_that_a_model_cannot_count_with_are_the_requests_fault(
    client: httpx.Client, name: str, most: Any, beyond: Any
) -> None:
    body = {"prompt": "a a a", "max_tokens": 4}
    assert client.post("/generate", json=body | {name: most}).status_code == 200
    answer = client.post("/generate", json=body | {name: beyond})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(name)


def test_a_prompt_longer_than_the_context_is_refused(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "word " * 5000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_text_is_as_long_as_that_of_the_command_where_nothing_is_said() -> None:
    with served(max_tokens=5) as server, server.client() as client:
        written = client.post("/generate", json={"prompt": PROMPT}).json()["text"]
        assert written == server.engine.generate(PROMPT, max_tokens=5).text
