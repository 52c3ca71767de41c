"""Who answers a server's requests: the local model, an upstream, or what the two decide."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from cli_tools import assert_one_error, wait_for
from servers import Served, served
from talkers import CALL, saying
from upstreams import KEY, Misbehaving, asked, misbehaving, upstream

from mlxspec.cascade.breaker import Breaker
from mlxspec.cascade.cascade import Policy
from mlxspec.cascade.client import Client
from mlxspec.cascade.rules import Thresholds

SURE = "The capital of France is Paris, which lies on the river Seine."
DOUBT = "I think that the sky is blue because of light. It is scattered by the air."
THOUGHT = f"<think>hm</think>{DOUBT}"
TOLD = "An answer from far away."
MINDED = Thresholds(max_draft_tokens=40)
ROUTED: dict[str, Any] = {"strategy": "speculative_decoding"}


@dataclass
class Both:
    """A server and its upstream. The last digit of a prompt chooses a local answer: SURE, DOUBT,
    THOUGHT or CALL."""

    near: Served
    far: Misbehaving
    client: httpx.Client

    def post(self, route: str, digit: int, routing: Any = None, **fields: Any) -> httpx.Response:
        """A request, with the fields of its protocol."""
        prompt = f"Why {digit}?"
        turns = [{"role": "user", "content": prompt}]
        of_route: dict[str, dict[str, Any]] = {
            "/v1/chat/completions": {"messages": turns, "max_tokens": 90},
            "/v1/responses": {"input": prompt, "max_output_tokens": 90},
            "/v1/messages": {"messages": turns, "max_tokens": 90},
            "/generate": {"prompt": prompt, "max_tokens": 90},
            "/v1/completions": {"prompt": prompt, "max_tokens": 9},
        }
        body = of_route[route] | fields | ({} if routing is None else {"routing": routing})
        return self.client.post(route, json=body)

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get("/stats").json()["routing"]
        return found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)


@pytest.fixture(scope="module")
def server() -> Iterator[Both]:
    with pytest.MonkeyPatch.context() as patch, misbehaving("answer") as far:
        patch.setenv("THE_KEY", KEY)
        policy = Policy(asked(far), MINDED)
        making = served(lambda: saying(SURE, DOUBT, THOUGHT, CALL), upstream=policy)
        with making as near, near.client() as client:
            yield Both(near, far, client)


@pytest.fixture
def both(server: Both) -> Both:
    """The server, whose upstream is well and was asked nothing."""
    server.far.ways[:] = ["answer"]
    server.far.bodies.clear()
    policy = server.near.service.settings.upstream
    assert policy is not None
    policy.client.breaker = Breaker()
    return server


ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate")


def text_of(route: str, answer: dict[str, Any]) -> str:
    """The text of a whole answer."""
    if route == "/v1/chat/completions":
        return str(answer["choices"][0]["message"]["content"])
    if route == "/v1/responses":
        return "".join(
            part["text"]
            for item in answer["output"]
            if item["type"] == "message"
            for part in item["content"]
        )
    if route == "/v1/messages":
        return "".join(one["text"] for one in answer["content"] if one["type"] == "text")
    return str(answer["text"])


def streamed(response: httpx.Response) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and the fields of its decision."""
    text, fields = "", {}
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        one = json.loads(line.removeprefix("data: "))
        for choice in one.get("choices", ()):
            text += choice["delta"].get("content", "")
        delta = one.get("delta")
        is_text = one.get("type") in ("content_block_delta", "response.output_text.delta")
        if is_text and not (isinstance(delta, dict) and delta["type"] != "text_delta"):
            text += delta["text"] if isinstance(delta, dict) else delta
        told = one.get("response", one)
        if "model_used" in told:
            fields = {name: told[name] for name in ("model_used", "speculative_decoding")}
    return text, fields


# --- who answers ------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_a_sure_answer_stays_and_nothing_is_sent(both: Both, route: str) -> None:
    answer = both.post(route, 0, ROUTED).json()
    assert text_of(route, answer) == SURE
    assert answer["model_used"] == "demo"
    decision = answer["speculative_decoding"]
    assert (decision["spilled_over"], decision["accepted"], decision["cost"]) == (False, True, 0)
    assert decision["saved"] > 0
    assert decision["exact"] is False
    assert both.far.bodies == []


@pytest.mark.parametrize("route", ROUTES)
def test_a_doubted_answer_that_differs_is_the_upstreams(both: Both, route: str) -> None:
    answer = both.post(route, 1, ROUTED).json()
    assert text_of(route, answer) == TOLD
    assert answer["model_used"] == "far-model"
    decision = answer["speculative_decoding"]
    assert (decision["spilled_over"], decision["accepted"]) == (True, False)
    assert decision["rules"] == ["uncertain"]
    assert decision["cost"] == pytest.approx((1000 * 1 + 100 * 10) / 1e6)
    assert decision["spent_tokens"] == 1100
    (body,) = both.far.bodies
    assert body["messages"] == [{"role": "user", "content": "Why 1?"}]
    assert body["max_tokens"] == 90


@pytest.mark.parametrize("route", ROUTES[:3])
def test_a_stream_shows_nothing_that_is_taken_back(both: Both, route: str) -> None:
    trace = {"speculative": {"trace": True}}
    response = both.post(route, 2, ROUTED, stream=True, **trace)
    text, fields = streamed(response)
    assert text == TOLD
    assert fields["model_used"] == "far-model"
    assert "sky" not in response.text
    assert "hm" not in response.text, "reasoning that led to another answer goes with it"
    assert ": the answer waits" in response.text


@pytest.mark.parametrize("route", ROUTES[:3])
def test_a_stream_of_a_sure_answer_goes_on_as_it_is_written(both: Both, route: str) -> None:
    response = both.post(route, 0, ROUTED, stream=True)
    text, fields = streamed(response)
    assert text == SURE
    assert fields["speculative_decoding"]["spilled_over"] is False
    assert response.text.count("delta") > 3, "it is no single piece"


def test_answers_that_agree_are_the_local_one(both: Both) -> None:
    routing = ROUTED | {"min_confidence": 0.1}
    for stream in (False, True):
        response = both.post(ROUTES[0], 1, routing, stream=stream)
        if stream:
            text, fields = streamed(response)
        else:
            fields = response.json()
            text = text_of(ROUTES[0], fields)
        assert text == DOUBT
        assert fields["model_used"] == "demo"
        assert fields["speculative_decoding"]["similarity"] > 0.1
        assert fields["speculative_decoding"]["accepted"] is True


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_may_ask_for_the_upstream_itself(both: Both, route: str) -> None:
    before = both.client.get("/stats").json()["requests"]["texts"]
    answer = both.post(route, 0, {"strategy": "upstream", "upstream": "far"}).json()
    assert text_of(route, answer) == TOLD
    assert answer["speculative_decoding"]["reason"] == "the request asks for far"
    assert route != "/generate" or answer["metrics"]["speedup"] is None
    assert both.client.get("/stats").json()["requests"]["texts"] == before
    if route == ROUTES[0]:
        assert answer["usage"]["completion_tokens"] == 100
        assert answer["usage"]["prompt_tokens"] == 1000


def test_a_request_that_says_nothing_is_local(both: Both) -> None:
    plain = both.post(ROUTES[0], 1).json()
    assert text_of(ROUTES[0], plain) == DOUBT
    assert "model_used" not in plain
    assert both.far.bodies == []


def test_the_upstream_gets_what_the_request_says(both: Both) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "stop": ["END"]}
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "Why 1?"}]
    both.post(ROUTES[0], 1, {"strategy": "upstream"}, messages=turns, **fields)
    (body,) = both.far.bodies
    assert body["messages"] == turns
    assert {name: body[name] for name in fields} == fields
    both.client.post(ROUTES[0], json={"messages": turns[1:], "routing": {"strategy": "upstream"}})
    assert "max_tokens" not in both.far.bodies[1], "its own limit holds where none is asked for"


@pytest.mark.parametrize(
    ("changes", "spilled"),
    [
        ({"markers": False}, False),
        ({"markers": ["river"]}, False),
        ({"markers": ["sky"]}, True),
        ({"max_draft_tokens": 1}, False),
        ({"max_draft_tokens": 1, "near_limit": 0.01}, True),
        ({"markers": False, "max_draft_tokens": 89, "min_chars": 200}, True),
        ({"markers": False, "max_draft_tokens": 89, "min_chars": False}, False),
    ],
)
def test_a_request_has_thresholds_of_its_own(
    both: Both, changes: dict[str, Any], spilled: bool
) -> None:
    answer = both.post("/generate", 1, ROUTED | changes).json()
    assert answer["speculative_decoding"]["spilled_over"] is spilled


# --- what cannot be done ----------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("route", "routing", "fields", "words"),
    [
        (ROUTES[0], {"strategy": "remote"}, {}, "and this server takes 'local', "),
        (ROUTES[0], ROUTED | {"upstream": "near"}, {}, "is 'near', and this server has far"),
        (ROUTES[0], ROUTED | {"min_confidance": 1}, {}, "routing.min_confidance: Extra"),
        (ROUTES[0], ROUTED | {"min_confidence": 80}, {}, "routing.min_confidence"),
        (ROUTES[0], ROUTED | {"max_draft_tokens": 0}, {}, "routing.max_draft_tokens"),
        (ROUTES[0], ROUTED, {"n": 2}, "it decides on one text"),
        (ROUTES[0], ROUTED, {"tools": [TOOL]}, "an upstream is offered no tools"),
        (ROUTES[0], ROUTED, {"logprobs": True}, "no log-probabilities"),
        (ROUTES[0], ROUTED, {"messages": [{"role": "nobody", "content": "x"}]}, "no role"),
        ("/v1/completions", ROUTED, {}, "no text that is to go on"),
        ("/v1/completions", {"strategy": "upstream"}, {}, "no text that is to go on"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    both: Both, route: str, routing: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    refused = both.post(route, 0, routing, **fields)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]
    assert both.far.bodies == []


def test_a_server_that_ends_asks_nobody(both: Both) -> None:
    both.near.service.draining = True
    try:
        for strategy in ("speculative_decoding", "upstream"):
            assert both.post(ROUTES[0], 1, {"strategy": strategy}).status_code == 503
    finally:
        both.near.service.draining = False
    assert both.far.bodies == []


def test_a_servers_own_strategy_holds_where_it_can() -> None:
    with misbehaving("answer") as far:
        choices = {"upstream": Policy(asked(far), MINDED), "routing": "speculative_decoding"}
        with served(lambda: saying(SURE, DOUBT), **choices) as near, near.client() as client:
            both = Both(near, far, client)
            assert both.post(ROUTES[0], 1).json()["model_used"] == "far-model"
            assert "model_used" not in both.post(ROUTES[0], 1, {"strategy": "local"}).json()
            told = both.post(ROUTES[0], 1, tools=[TOOL]).json()
            assert "model_used" not in told
            assert "because an upstream is offered no tools" in told["timings"]["notes"][0]
            told = both.post("/v1/completions", 1).json()
            assert "no text that is to go on" in told["timings"]["notes"][0]
            assert len(far.bodies) == 1


def test_a_server_without_an_upstream_says_so() -> None:
    with served(lambda: saying(SURE)) as near, near.client() as client:
        both = Both(near, None, client)  # type: ignore[arg-type]
        for routing in (ROUTED, {"upstream": "far"}):
            refused = both.post(ROUTES[0], 0, routing)
            assert refused.status_code == 400
            assert "was started without one" in refused.json()["error"]["message"]
        assert text_of(ROUTES[0], both.post(ROUTES[0], 0, {"strategy": "local"}).json()) == SURE
        assert both.stats() is None


# --- faults -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["401", "429 60", "503", "cut", "nonsense"])
@pytest.mark.parametrize("strategy", ["speculative_decoding", "upstream"])
def test_the_local_answer_stands_with_a_note(both: Both, way: str, strategy: str) -> None:
    both.far.ways[:] = [way]
    stream = way in ("503", "cut")
    response = both.post(ROUTES[0], 1, {"strategy": strategy}, stream=stream)
    if stream:
        text, fields = streamed(response)
    else:
        fields = response.json()
        text = text_of(ROUTES[0], fields)
        assert fields["timings"]["notes"][-1].startswith("not exact: the local answer is used")
    assert text == DOUBT
    assert fields["model_used"] == "demo"
    decision = fields["speculative_decoding"]
    assert decision["accepted"] is True
    assert decision["reason"].startswith("far ")
    assert decision["cost"] is None
    assert KEY not in response.text


@pytest.mark.parametrize("strategy", ["speculative_decoding", "upstream"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_the_question_too(
    both: Both, strategy: str, stream: bool
) -> None:
    both.far.ways[:], both.far.left = ["stalled"], 0
    body = {
        "messages": [{"role": "user", "content": "Why 1?"}],
        "routing": {"strategy": strategy},
        "stream": stream,
    }
    content = json.dumps(body)
    head = f"POST {ROUTES[0]} HTTP/1.1\r\nHost: near\r\nContent-Type: application/json\r\n"
    port = int(both.near.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        wait_for(lambda: bool(both.far.bodies))
        assert not both.far.left
    wait_for(lambda: both.far.left == 1)
    wait_for(both.near.is_idle)


def test_sums_count_what_was_spent_and_saved(both: Both) -> None:
    before = both.stats()
    for digit, way in ((0, "answer"), (1, "answer"), (1, "401")):
        both.far.ways[:] = [way]
        both.post(ROUTES[0], digit, ROUTED)
    after = both.stats()
    names = ("answers", "spilled", "used", "failed", "spent_tokens")
    grown = [after[name] - before[name] for name in names]
    assert grown == [3, 2, 1, 1, 1100]
    assert after["cost"] - before["cost"] == pytest.approx(0.002)
    assert after["saved"] > before["saved"]
    assert after["rules"]["uncertain"] - before["rules"].get("uncertain", 0) == 2
    assert 0 < after["spilled_share"] < 1
    metrics = both.client.get("/metrics").text
    assert f"mlxspec_routed_spilled_total {after['spilled']}.0" in metrics
    assert 'mlxspec_routed_rules_total{rule="uncertain"}' in metrics


def test_no_secret_and_no_text_is_logged(both: Both) -> None:
    both.post(ROUTES[0], 1, ROUTED)
    call = both.near.calls[-1]
    logged = json.dumps(call.as_dict()) + call.in_words() + "".join(both.near.log)
    assert call.as_dict()["routing"]["used"] == "upstream"
    assert "far asked, its answer" in call.in_words()
    seen = [logged, both.client.get("/stats").text, both.client.get("/metrics").text]
    for secret in (KEY, "sky", TOLD, "Why 1"):
        assert secret not in "".join(seen)


def test_a_second_server_is_an_upstream() -> None:
    with served(lambda: saying("Quite another explanation, from a second server.")) as far:
        client = Client(upstream(f"{far.url}/v1"))
        choices = {"upstream": Policy(client, MINDED), "routing": "speculative_decoding"}
        with served(lambda: saying(DOUBT), **choices) as near, near.client() as http:
            answer = Both(near, None, http).post(ROUTES[0], 0).json()  # type: ignore[arg-type]
    assert text_of(ROUTES[0], answer).startswith("Quite another")
    assert answer["speculative_decoding"]["spent_tokens"] > 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--routing", "upstream"), "--routing upstream has no upstream"),
        (("--routing", "upstraem"), "--routing upstraem is no strategy"),
        (("--probe-tokens", "3"), "--probe-tokens says nothing without --upstream"),
        (("--upstream", "far"), "no table of upstreams"),
    ],
)
def test_a_server_that_cannot_route_does_not_start(
    options: tuple[str, ...], words: str, invoke: Any
) -> None:
    ended = invoke("serve", *options)
    assert_one_error(ended, 2, words)
