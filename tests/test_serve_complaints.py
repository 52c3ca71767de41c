"""What people complain of in other servers, held against this one over real sockets, by number."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx
import mlx.nn as nn
import openai
import pytest
from cli_tools import wait_for
from servers import WAIT_S, Served, served
from talkers import CALL, WEATHER, talker, talking_tokenizer

from mlxspec.decode.engine import Engine
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.decode.reader import BETWEEN_S
from mlxspec.serve.core.worker import Step

BREAKS = "\a"  # where the target would write it, its scores are no numbers
LETTERS = "Grüße, 日本語 👩‍👩‍👧 🌧 – ç̧"
REPLIES = (
    "<think>hm</think>so it is",
    f"<think>hm</think>Let me look.\n{CALL}",
    "a b STO c STOP d e f",
    LETTERS,
    f"well {BREAKS} then",
    "word " * 40,
)
SO, CALLS, STOPS, UNICODE, BROKEN, LONG = "012345"  # a prompt's last digit chooses the reply
FIXED = {"speculative": {"draft_tokens": 3}}
MANY = 16  # tokens: a pass over more of them reads a prompt
CAP = 120_000  # bytes of the prefix cache


class Watched(nn.Module):
    """A model whose passes are counted and can be held up, and whose scores break at a token.

    passes, fed: passes, and the tokens of a row in them. threads: those that ran them. held: set
    while a pass waits for `go_on`. reads_s: the seconds that a pass over a prompt takes at least.
    """

    def __init__(self, inner: nn.Module, breaks: int) -> None:
        super().__init__()
        self.inner = inner
        self.breaks = breaks
        self.passes = self.fed = 0
        self.threads: set[str] = set()
        self.reads_s = 0.0
        self.held = threading.Event()
        self._open = threading.Event()
        self._left = 0
        self.go_on()

    def hold(self, after: int) -> None:
        """Let so many passes through, and hold up the next."""
        self.held.clear()
        self._left = after
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self._left -= 1
        if self._left < 0 and not self._open.is_set():
            self.held.set()
            assert self._open.wait(WAIT_S)
        if tokens.shape[1] > MANY:
            time.sleep(self.reads_s)
        self.passes += 1
        self.fed += tokens.shape[1]
        self.threads.add(threading.current_thread().name)
        logits = self.inner(tokens, cache=cache)
        breaks = mx.argmax(logits, axis=-1, keepdims=True) == self.breaks
        return mx.where(breaks, mx.nan, logits)

    @property
    def layers(self) -> list[None]:
        return [None]


class Talks:
    """A server of a model that says what it is told; its target and its draft are watched."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self.target: Any = server.engine.models[0].model
        self.draft: Any = server.engine.models[1].model
        self.openai = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=WAIT_S
        )

    def answer(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
        with self.server.client() as client:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def beside(self, *bodies: dict[str, Any]) -> list[Any]:
        """The responses to requests that come in this order, before one of them is begun."""
        wait_for(self.server.is_idle)
        self.target.hold(0)

        def post(body: dict[str, Any]) -> Any:
            with self.server.client() as client:
                return client.post("/v1/chat/completions", json=body)

        def texts() -> int:
            return sum(self.server.service.worker.load)

        asked = []
        with ThreadPoolExecutor(len(bodies)) as pool:
            for body in bodies:
                count = texts() + body.get("n", 1)
                asked.append(pool.submit(post, body))
                wait_for(lambda count=count: texts() == count)
            self.target.go_on()
            return [one.result() for one in asked]


def watched_talker() -> Engine:
    (breaks,) = talking_tokenizer().encode(BREAKS, add_special_tokens=False)
    engine = talker(*REPLIES, around=lambda model: Watched(model, breaks))
    engine.prefixes = PrefixCache(CAP)
    return engine


@pytest.fixture(scope="module")
def module() -> Iterator[Talks]:
    with served(watched_talker) as server:
        talks = Talks(server)
        with talks.openai:
            yield talks


@pytest.fixture
def talks(module: Talks) -> Iterator[Talks]:
    module.server.calls.clear()
    yield module
    module.target.reads_s = 0.0
    module.target.go_on()
    wait_for(module.server.is_idle)


@pytest.fixture
def demo(server: Served) -> Served:
    return server


def asked(prompt: Any, **others: Any) -> dict[str, Any]:
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return {"model": "any", "max_tokens": 900, "messages": messages, "temperature": 0} | others


def sent(server: Served, body: dict[str, Any]) -> socket.socket:
    """A request on a socket of its own, which its client may close at any moment."""
    address, content = urlsplit(server.url), json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection((address.hostname, address.port), WAIT_S)
    connection.sendall(head.encode() + content)
    return connection


def deltas(lines: str) -> list[str]:
    """The parts of a text that a stream brings, one for each chunk with any."""
    chunks = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    texts = [choice["delta"].get("content") for choice in choices]
    return [text for text in texts if text]


def content_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_01_a_full_prompt_cache_and_a_prompt_of_many_pieces_stop_nothing(talks: Talks) -> None:
    for topic in "abcd":
        answer = talks.answer(asked(f"{topic} " * 1500 + SO, max_tokens=20))
        assert content_of(answer) == "so it is"
    assert talks.server.engine.prefixes.stats.nbytes > CAP / 2


def test_01_while_a_round_does_not_end_the_server_is_not_ready_and_takes_nothing() -> None:
    with served(watched_talker, stuck_s=0.2) as server:
        talks = Talks(server)
        talks.target.hold(0)
        with sent(server, asked(SO)) as stuck, server.client() as client:
            wait_for(lambda: client.get("/ready").status_code == 503)
            assert "has not ended a round" in client.get("/ready").json()["reason"]
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/chat/completions", json=asked(SO))
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            assert "has not ended a round" in refused.json()["error"]["message"]
            talks.target.go_on()
            assert stuck.recv(12) == b"HTTP/1.1 200"
            wait_for(lambda: client.get("/ready").status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_02_one_bad_row_ends_alone(talks: Talks, *, stream: bool) -> None:
    bad, good = talks.beside(asked(BROKEN, stream=stream), asked(LONG))
    assert content_of(good.json()) == REPLIES[int(LONG)]
    if stream:
        assert "well ".startswith("".join(deltas(bad.text)))  # by how much a round proposes
        assert "data: [DONE]" not in bad.text
    else:
        assert bad.status_code == 500
    assert "not a distribution" in bad.text
    assert content_of(talks.answer(asked(SO))) == "so it is"


def test_03_one_thread_uses_the_device(talks: Talks, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    for name in ("eval", "async_eval", "synchronize"):
        plain = getattr(mx, name)

        def watched(*arrays: Any, plain: Any = plain) -> Any:
            threads.add(threading.current_thread().name)
            return plain(*arrays)

        monkeypatch.setattr(mx, name, watched)
    talks.beside(asked(SO), asked(LONG, stream=True, n=2, logprobs=True), asked(CALLS))
    with talks.server.client() as client:
        for path in ("/stats", "/metrics", "/ready", "/v1/models"):
            assert client.get(path).status_code == 200
        body = {"model": "any", "messages": asked(SO)["messages"]}
        assert client.post("/v1/messages/count_tokens", json=body).status_code == 200
    assert threads == talks.target.threads == talks.draft.threads == {"device"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "passes"), [("x " * 900 + LONG, 2), (LONG, 6)])
def test_04_a_client_that_goes_away_frees_its_row_within_a_round(
    talks: Talks, prompt: str, passes: int, *, stream: bool
) -> None:
    talks.target.reads_s = BETWEEN_S / 2  # so that a step reads one piece
    talks.target.hold(passes)  # in the prompt, or in the text
    with sent(talks.server, asked(prompt, stream=stream)):
        assert talks.target.held.wait(WAIT_S)
    wait_for(lambda: bool(talks.server.calls))  # the server has seen that nobody is there
    before = talks.target.passes
    talks.target.go_on()
    wait_for(talks.server.is_idle)
    assert talks.target.passes - before <= 2  # the one that was held, and one under way
    (call,) = talks.server.calls
    assert call.as_dict()["finish_reasons"] == ["interrupted"]


def test_05_more_than_the_queue_takes_are_told_to_come_again() -> None:
    with served(watched_talker, max_rows=1, max_queue=1) as server, server.client() as client:
        talks = Talks(server)
        talks.target.hold(0)
        with sent(server, asked(SO, n=2)) as first:
            wait_for(lambda: sum(server.service.worker.load) == 2)
            refused = client.post("/v1/chat/completions", json=asked(SO, stream=True))
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
            talks.target.go_on()
            assert first.recv(12) == b"HTTP/1.1 200"
        wait_for(server.is_idle)
        assert content_of(talks.answer(asked(SO))) == "so it is"


def test_06_others_wait_for_one_piece_of_a_long_prompt_at_most(talks: Talks) -> None:
    steps: list[Step] = []
    watchers = talks.server.service.worker.watchers
    watchers.append(steps.append)
    talks.target.reads_s = BETWEEN_S / 2  # so that a step reads one piece
    talks.beside(asked(LONG, **FIXED), asked("y " * 1500 + SO, **FIXED))
    watchers.remove(steps.append)
    while_read = []
    for step in steps:
        read = [ticket for ticket, event in step.events if event.prefill is not None]
        told = [ticket for ticket, event in step.events if event.round is not None]
        if read and step.running:
            while_read.append((len(read), len(told)))
    assert len(while_read) > 3
    assert set(while_read) == {(1, 1)}


def test_07_caches_and_the_pool_stay_under_their_cap(talks: Talks) -> None:
    prefixes, held = talks.server.engine.prefixes, []
    for topic in "bcdefghijklm":
        talks.answer(asked(f"{topic} " * 400 + SO, max_tokens=20))
        assert prefixes.stats.nbytes <= CAP
        held.append(mx.get_active_memory() + mx.get_cache_memory())
    assert prefixes.stats.nbytes > CAP / 2
    # Single readings hold a spare buffer more or less; what is never freed raises them all.
    assert median(held[6:]) < median(held[:6]) + CAP / 4


def test_08_a_prompt_that_is_all_in_the_cache_has_its_answer(talks: Talks) -> None:
    first, again = [talks.answer(asked(f"All of it, {SO}")) for _ in range(2)]
    assert content_of(again) == content_of(first) == "so it is"
    assert cached(again) == again["usage"]["prompt_tokens"] - 1


def test_09_target_and_draft_go_on_from_the_cache_and_know_what_is_in_it(talks: Talks) -> None:
    marked = f"The word is {LONG}. " + "z " * 300  # nothing behind this tells what to say
    turns = [{"role": "user", "content": marked}]
    first = talks.answer(asked(turns, max_tokens=8, **FIXED))
    turns += [{"role": "assistant", "content": content_of(first)}]
    turns += [{"role": "user", "content": "Which word?"}]
    fed = talks.target.fed, talks.draft.fed
    again = talks.answer(asked(turns, max_tokens=20, **FIXED))
    assert content_of(again) == REPLIES[int(LONG)][:20]
    assert cached(again) >= len(marked)
    assert again["timings"]["draft_n_accepted"] == again["timings"]["draft_n"] > 0
    assert talks.target.fed - fed[0] < 200
    assert talks.draft.fed - fed[1] < 200


def test_10_a_reasoning_that_is_not_sent_back_costs_no_earlier_turn(talks: Talks) -> None:
    turns = [{"role": "user", "content": "w " * 200 + SO}]
    for _ in range(3):
        message = (answer := talks.answer(asked(turns)))["choices"][0]["message"]
        assert message["reasoning_content"] == "hm"
        before = len(talks.server.engine.encode(messages=turns)) - len("<assistant\n")
        turns += [{"role": "assistant", "content": message["content"]}]
        turns += [{"role": "user", "content": f"And {SO}?"}]
        answer = talks.answer(asked(turns, max_tokens=1))
        assert cached(answer) >= before


def test_11_two_streams_take_no_more_passes_than_the_longer_one_alone(talks: Talks) -> None:
    def passes(*prompts: str) -> int:
        before = talks.target.passes
        talks.beside(*[asked(prompt, **FIXED) for prompt in prompts])
        return talks.target.passes - before

    long, other = f"One {LONG}", f"Two {LONG}"
    passes(long, other)  # from here on both prompts are in the cache
    alone = passes(long)
    assert alone > 40
    assert passes(long, other) <= alone + 10


def test_12_texts_beside_each_other_are_speculated_on_or_told_why_not(talks: Talks) -> None:
    same = [one.json() for one in talks.beside(asked(LONG, **FIXED), asked(f"b{LONG}", **FIXED))]
    other = {"speculative": {"draft_tokens": 1}}
    unlike = [one.json() for one in talks.beside(asked(LONG, **FIXED), asked(LONG, **other))]
    for answer in (*same, *unlike):
        assert answer["timings"]["draft_n_accepted"] > 75
    assert [answer["timings"]["notes"] for answer in same] == [[], []]
    assert any("takes turns" in note for one in unlike for note in one["timings"]["notes"])


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_13_a_stop_string_over_several_tokens_is_held_back(talks: Talks, count: int) -> None:
    speculative = {"draft_tokens": count}
    body = asked(STOPS, stop=["STOP"], speculative=speculative)
    whole = talks.answer(body)
    assert content_of(whole) == "a b STO c "
    assert whole["choices"][0]["finish_reason"] == "stop"
    with talks.server.client() as client:
        streamed = client.post("/v1/chat/completions", json=body | {"stream": True})
    assert "".join(deltas(streamed.text)) == "a b STO c "


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_14_characters_of_several_tokens_come_whole(talks: Talks, count: int) -> None:
    body = asked(UNICODE, stream=True, speculative={"draft_tokens": count})
    with talks.server.client() as client:
        parts = deltas(client.post("/v1/chat/completions", json=body).text)
    assert "".join(parts) == LETTERS
    assert not any("\ufffd" in part for part in parts)
    assert len(parts) > 3


@pytest.mark.parametrize("most", range(1, 60, 6))
def test_15_a_call_that_is_cut_is_no_call(talks: Talks, most: int) -> None:
    body = asked(CALLS, tools=[WEATHER], max_tokens=most)
    choice = talks.openai.chat.completions.create(**body).choices[0]
    assert choice.finish_reason == "length"
    assert not choice.message.tool_calls  # what there is of it stays in the text
    assert f"Let me look.\n{CALL}".startswith(choice.message.content or "")
    *_, last = talks.openai.chat.completions.create(**body, stream=True)
    assert last.choices[0].finish_reason == "length"
    assert not last.choices[0].delta.tool_calls


def test_16_text_streams_although_there_are_tools(talks: Talks) -> None:
    body = asked(LONG, tools=[WEATHER], stream=True, **FIXED)
    with talks.server.client() as client:
        parts = deltas(client.post("/v1/chat/completions", json=body).text)
    assert "".join(parts) == REPLIES[int(LONG)]
    assert len(parts) > 45


def test_17_a_seed_is_a_rows_own_whoever_is_beside(demo: Served) -> None:
    body = {"prompt": "def fibonacci(n):", "max_tokens": 24, "temperature": 0.9} | FIXED

    def texts(**others: Any) -> list[str]:
        with demo.client() as client:
            answer = client.post("/v1/completions", json=body | others).json()
        return [choice["text"] for choice in answer["choices"]]

    alone = [*texts(seed=5), *texts(seed=6)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(texts, seed=5, n=2) for _ in range(2)]
    assert [one.result() for one in both] == [alone, alone]


def test_17_logprobs_are_the_targets_own_under_speculation(talks: Talks) -> None:
    body = asked(SO, logprobs=True, top_logprobs=2)
    told = talks.openai.chat.completions.create(**body).choices[0].logprobs
    assert told is not None
    assert told.content is not None
    expected = talks.server.engine.generate(
        messages=body["messages"], max_tokens=200, logprobs=2, draft_tokens=0
    )
    assert [one.logprob for one in told.content] == pytest.approx(
        [one.logprob for one in expected.logprobs if one.place == "text"], abs=1e-5
    )
    assert all(one.logprob < 0 and len(one.top_logprobs) == 2 for one in told.content)
    text = b"".join(bytes(one.bytes or ()) for one in told.content).decode()
    assert text == expected.text
    streamed = [
        one
        for chunk in talks.openai.chat.completions.create(**body, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for one in choice.logprobs.content or ()
    ]
    assert streamed == told.content


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "long " * 4000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "long " * 4000}]}),
        ("/v1/responses", {"input": "long " * 4000}),
        (
            "/v1/messages",
            {"max_tokens": 9, "messages": [{"role": "user", "content": "long " * 4000}]},
        ),
    ],
)
def test_18_a_prompt_that_is_too_long_is_refused_before_any_header(
    demo: Served, path: str, body: dict[str, Any]
) -> None:
    with demo.client() as client:
        refused = client.post(path, json=body | {"stream": True})
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/json"
    assert "context" in refused.json()["error"]["message"]


def test_18_an_error_behind_the_headers_is_an_event(talks: Talks) -> None:
    stream = talks.openai.chat.completions.create(**asked(BROKEN), stream=True)
    with pytest.raises(openai.APIError, match="not a distribution"):
        list(stream)
