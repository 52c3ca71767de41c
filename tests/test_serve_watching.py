"""What can be seen of the server: /events, /stats, /metrics, its log and its watchdog."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from cli_tools import wait_for
from prometheus_client.parser import text_string_to_metric_families
from servers import Served, served
from talkers import talks

from mlxspec.defaults import MODEL
from mlxspec.metrics import TARGET, RoundStats
from mlxspec.parked import Parked
from mlxspec.serve.core.broadcast import Broadcast
from mlxspec.serve.core.counts import Histogram

BODY = {"prompt": "def fibonacci(n):", "max_tokens": 24, "temperature": 0}
ENDLESS = BODY | {"max_tokens": 900, "logit_bias": {"0": -100}, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(measures=True, about={"pair": "demo"}, max_rows=2) as one:
        yield one


@contextmanager
def listening(server: Served) -> Iterator[list[dict[str, Any]]]:
    """The happenings of `/events` as they come, from a moment at which somebody listens."""
    heard: list[dict[str, Any]] = []
    begun = threading.Event()

    def listen() -> None:
        with server.client() as client, client.stream("GET", "/events") as response:
            for line in response.iter_lines():
                begun.set()
                if line.startswith("data: "):
                    heard.append(json.loads(line.removeprefix("data: ")))
                    if heard[-1]["type"] == "end":
                        return

    thread = threading.Thread(target=listen)
    thread.start()
    assert begun.wait(10)
    yield heard
    thread.join()


def samples(client: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    """The values of `/metrics`, by name and values of labels."""
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_events_tell_every_round_of_a_text_and_its_two_ends(server: Served) -> None:
    with server.client() as client, listening(server) as heard:
        response = client.post("/v1/completions", json=BODY)
    answer = response.json()
    kinds = [one["type"] for one in heard]
    assert (kinds[0], kinds[-1]) == ("join", "end")
    assert set(kinds[1:-1]) <= {"read", "round"}
    rounds = [one for one in heard if one["type"] == "round"]
    assert len(rounds) == answer["timings"]["rounds"]
    assert sum(one["tokens"] for one in rounds) == answer["usage"]["completion_tokens"]
    assert sum(one["accepted"] for one in rounds) >= answer["timings"]["draft_n_accepted"]
    assert {one["request"] for one in heard} == {response.headers["x-request-id"]}
    assert {one["path"] for one in heard} == {"/v1/completions"}
    assert rounds[1].keys() == rounds[0].keys() >= {"bucket", "running", "source", "draft_tokens"}
    assert heard[-1]["finish_reason"] == "length"
    assert "fibonacci" not in json.dumps(heard)


def test_stats_and_metrics_count_the_same(server: Served) -> None:
    with server.client() as client:
        before, earlier = client.get("/stats").json(), samples(client)
        answers = [client.post("/v1/completions", json=BODY).json() for _ in range(3)]
        client.post("/v1/completions", json={})
        after, later = client.get("/stats").json(), samples(client)

    def more(name: str, *labels: str) -> float:
        return later[name, labels] - earlier.get((name, labels), 0)

    drafted = sum(answer["timings"]["draft_n"] for answer in answers)
    accepted = sum(answer["timings"]["draft_n_accepted"] for answer in answers)
    assert after["speculation"]["drafted"] - before["speculation"]["drafted"] == drafted
    assert more("vllm:spec_decode_num_draft_tokens_total", "demo") == drafted
    assert more("vllm:spec_decode_num_accepted_tokens_total", "demo") == accepted
    first = sum(answer["timings"]["accepted_by_position"][0] for answer in answers)
    assert more("vllm:spec_decode_num_accepted_tokens_per_pos_total", "demo", "0") == first
    assert more("mlxspec_texts_ended_total", "length") == 3
    assert more("mlxspec_time_to_first_token_seconds_count") == 3
    assert more("mlxspec_requests_total", "/v1/completions", "400") == 1
    assert after["requests"]["errors"] - before["requests"]["errors"] == 1
    written = after["tokens"]["written"] - before["tokens"]["written"]
    assert (
        written
        == 72
        == sum(after["tokens"]["written_by"].values())
        - sum(before["tokens"]["written_by"].values())
    )
    rows = sum(value for (name, _), value in later.items() if name == "mlxspec_rows_total")
    assert rows == sum(one["count"] for one in after["rounds"])
    assert after["plain"]["tokens_per_second"] > 0
    assert [one["draft_tokens"] for one in after["measured"]["rounds"]] == list(range(1, 9))
    assert later["mlxspec_plain_round_seconds", ()] == pytest.approx(after["plain"]["seconds"], 0.1)


def test_what_a_controller_learned_is_told_by_rows(server: Served) -> None:
    body = BODY | {"max_tokens": 60, "speculative": {"draft_tokens": "auto"}}
    with server.client() as client:
        client.post("/v1/completions", json=body | {"n": 2})
        client.post("/v1/completions", json=body)
        stats = client.get("/stats").json()
    learned = {(one["rows"], one["drafter"]): one for one in stats["learned"]}
    alone = next(one for (rows, _), one in learned.items() if rows == 1)
    assert len(alone["costs"]) > 1
    assert alone["costs"][0] > 0
    assert any(rows == 2 for rows, _ in learned)
    assert stats["server"]["pair"] == "demo"
    assert stats["controller"]["doing"]
    (choice,) = stats["controller"]["choices"]
    assert choice["texts"] in (1, 2)
    assert (choice["draft_tokens"] > 0) != (choice["drafter"] == "")


def test_why_nothing_is_proposed_is_told_in_words(server: Served) -> None:
    server.service.watch.latest = RoundStats(0, 0, parked=Parked(0.125, 9))
    with server.client() as client:
        told = client.get("/stats").json()["controller"]
    assert told["doing"] == "nothing is proposed"
    assert told["parked"] == "speculation was losing 12%; it is tried again in 9 rounds"


def test_a_text_whose_client_is_gone_is_counted_as_cancelled(server: Served) -> None:
    with server.client() as client:
        before = client.get("/stats").json()["requests"]["cancelled"]
        with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
            lines = response.iter_lines()
            next(lines)
        wait_for(server.is_idle)
        assert client.get("/stats").json()["requests"]["cancelled"] == before + 1


def test_a_client_of_openai_skips_rounds_in_its_stream(server: Served) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        asked: dict[str, Any] = BODY | {"model": "any", "stream": True}
        plain = list(client.completions.create(**asked))
        traced = list(
            client.completions.create(**asked, extra_body={"speculative": {"trace": True}})
        )
    texts = [
        [chunk.choices[0].text for chunk in chunks if chunk.choices] for chunks in (plain, traced)
    ]
    assert "".join(texts[0]) == "".join(texts[1]) != ""
    assert sum(not chunk.choices for chunk in traced) > 0


def test_a_prompt_that_was_read_before_is_a_hit_of_the_cache(server: Served) -> None:
    body = BODY | {"prompt": "import os\n" * 40, "max_tokens": 2}
    with server.client() as client:
        client.post("/v1/completions", json=body)
        before, earlier = client.get("/stats").json(), samples(client)
        answer = client.post("/v1/completions", json=body).json()
        after, later = client.get("/stats").json(), samples(client)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert after["tokens"]["cached"] - before["tokens"]["cached"] == cached
    assert after["cache"]["hits"] == before["cache"]["hits"] + 1
    hits = ("mlxspec_cache_hits_total", ())
    assert later[hits] == earlier[hits] + 1
    assert 0 < later["mlxspec_cache_bytes", ()] <= later["mlxspec_cache_max_bytes", ()]


def test_a_stream_tells_its_rounds_where_it_is_asked_to(server: Served) -> None:
    fixed = {"draft_tokens": 3}
    body = BODY | {"stream": True, "speculative": fixed | {"trace": True}}
    with server.client() as client:
        plain = client.post("/v1/completions", json=BODY | {"speculative": fixed}).json()
        lines = client.post("/v1/completions", json=body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    rounds = [one for one in chunks if one["object"] == "mlxspec.round"]
    others = [one for one in chunks if one["object"] == "text_completion"]
    text = "".join(piece["text"] for one in rounds for piece in one["pieces"])
    assert text == "".join(one["choices"][0]["text"] for one in others if one["choices"])
    assert text == plain["choices"][0]["text"]
    assert sum(len(one["token_ids"]) for one in rounds) == 24
    assert len(rounds) == plain["timings"]["rounds"]
    assert {piece["by"] for one in rounds for piece in one["pieces"]} == {MODEL, TARGET}


def test_the_live_line_has_what_runs_now(server: Served) -> None:
    with server.client() as client:
        with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
            lines = response.iter_lines()
            next(lines)
            wait_for(lambda: server.service.watch.live().running == 1)
            assert server.service.watch.live().waiting == 0
        wait_for(server.is_idle)
        live = server.service.watch.live()
        assert live.running == 0
        assert live.tokens_per_second > 0
        assert live.cache is not None
        assert live.cache.texts > 0


def test_every_request_is_logged_once_and_looks_are_not() -> None:
    with served(key="s3cret") as server:
        with server.client("s3cret") as client:
            answer = client.post("/v1/completions", json=BODY)
            client.post("/v1/completions", json={"prompt": 1})
            client.get("/stats")
        with server.client("wr0ng") as client:
            refused = client.get("/stats?secret")
        written, wrong, unknown = (call.as_dict() for call in server.calls)
        assert written | {"seconds": 0} == {
            "request": answer.headers["x-request-id"],
            "method": "POST",
            "path": "/v1/completions",
            "status": 200,
            "seconds": 0,
            "prompt_tokens": answer.json()["usage"]["prompt_tokens"],
            "written_tokens": 24,
            "acceptance_rate": written["acceptance_rate"],
            "finish_reasons": ["length"],
        }
        assert written["seconds"] > 0
        assert 0 < written["acceptance_rate"] <= 1
        assert (wrong["status"], unknown["status"]) == (400, 401)
        assert unknown["request"] == refused.headers["x-request-id"]
        said = json.dumps([written, wrong, unknown]) + "".join(
            call.in_words() for call in server.calls
        )
        assert not any(word in said for word in ("fibonacci", "s3cret", "wr0ng", "secret"))


def test_prompts_and_texts_are_logged_where_that_is_asked_for() -> None:
    with served(talks, log_texts=True) as server, server.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "Köln 0", "max_tokens": 40}).json()
        client.post("/v1/completions", json={"prompt": 1})
        written, wrong = server.calls
        assert written.as_dict()["prompts"] == ["Köln 0"]
        assert written.as_dict()["texts"] == [answer["choices"][0]["text"]]
        assert '"Köln 0"' in written.in_words()
        assert "prompts" not in wrong.as_dict()


def test_a_round_that_does_not_end_is_told_once_and_its_end_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlxspec.decode.batch import Batch

    step, goes_on = Batch.step, threading.Event()

    def stuck(batch: Batch) -> Any:
        goes_on.wait()
        return step(batch)

    with served(talks, stuck_s=0.2) as server, server.client() as client:
        monkeypatch.setattr(Batch, "step", stuck)
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            wait_for(lambda: client.get("/ready").status_code == 503)
            assert "has not ended a round" in client.get("/ready").json()["reason"]
            wait_for(lambda: len(server.log) == 1)
            assert "has not ended" in server.log[0]
            goes_on.set()
            wait_for(lambda: len(server.log) == 2)
            assert "has ended after" in server.log[1]
            response.read()
        assert client.get("/ready").status_code == 200


def test_a_slow_listener_loses_the_oldest_and_is_told_how_many() -> None:
    async def run() -> None:
        broadcast = Broadcast()
        with broadcast.listen(3) as slow, broadcast.listen(100) as quick:
            say = threading.Thread(
                target=lambda: [broadcast.say([{"n": n}, {"n": n}]) for n in range(5)]
            )
            say.start()
            say.join()
            news = [{"n": n} for n in range(5) for _ in range(2)]
            assert await slow.heard(1) == (news[-3:], 7)
            assert await quick.heard(1) == (news, 0)
            assert await quick.heard(0.01) == ([], 0)
            broadcast.say([{"n": 9}])
            broadcast.close()
            assert await slow.heard(1) == ([{"n": 9}], 0)
            assert await slow.heard(1) is None
        assert not broadcast

    asyncio.run(run())


def test_a_server_that_ends_lets_listeners_go() -> None:
    with served(talks, drain_s=30) as server, server.client() as client:
        with client.stream("GET", "/events") as response:
            server.server.tell_to_end()
            response.read()
        wait_for(lambda: not server.service.watch.listeners)


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram((1, 2))
    for seconds in (0.5, 1, 1.5, 3):
        histogram.add(seconds)
    assert histogram.up_to() == [2, 3, 4]
    assert (histogram.count, histogram.total_s) == (4, 6)
