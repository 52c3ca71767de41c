"""Local answers first: the rules, the table, the three ways that a question goes, every fault."""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_tools import save_model, wait_for
from servers import served
from talkers import saying, talker
from upstreams import KEY, Misbehaving, asked, misbehaving, upstream

from mlxspec.cascade.breaker import REST_S, Breaker
from mlxspec.cascade.cascade import Cascade, Policy
from mlxspec.cascade.client import TRIES, Client, Fault, Question, Reply
from mlxspec.cascade.decision import Decision, similarity
from mlxspec.cascade.rules import MARKERS, Draft, Thresholds, entropy, judged
from mlxspec.cascade.upstreams import load_upstreams
from mlxspec.cli.screen.terminal import TerminalText
from mlxspec.decode.engine import Engine
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import TableError, UsageError
from mlxspec.metrics import Logprob, Piece

FACT = "The capital of France is Paris, which lies on the river Seine."
DOUBT = "I think that the sky is blue because of light. It is scattered by the air."
CODE = "def add(a, b):\n    return a - b  # maybe\n"
MINDED = Thresholds(max_draft_tokens=40)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def reply_to(client: Client, question: Question) -> Reply:
    return client.begin(question).result()


def decided(
    client: Client, engine: Engine, prompt: str = "Why?", most: Thresholds = MINDED, **options: Any
) -> tuple[Decision, list[str]]:
    """The decision on a prompt, and the texts that were shown, in order."""
    request = engine.request(prompt, **{"max_tokens": 200} | options)
    turns = [{"role": "user", "content": prompt}]
    question = Question.of(turns, 200, request)
    cascade = Cascade(Policy(client, most), engine, request, question, "near-model")
    shown = [event.text for event in cascade if event.text]
    assert cascade.decision is not None
    assert cascade.run.generation.logprobs == []
    return cascade.decision, shown


# --- three questions --------------------------------------------------------------------


def test_a_simple_question_stays_local_and_nothing_is_sent() -> None:
    with misbehaving("answer") as far:
        engine = saying(FACT)
        found, shown = decided(asked(far), engine)
        assert far.bodies == []
    read = len(engine.request("Why?").tokens)
    assert found.saved == pytest.approx((read * 1 + len(FACT) * 10) / 1e6)
    assert "".join(shown) == found.text == FACT
    assert len(shown) > 2, "it goes on as a stream"
    assert not found.spilled_over
    assert found.accepted
    assert found.rules == ()
    assert found.cost == 0
    assert found.draft_tokens == 40
    assert found.verified_tokens == 0
    assert found.model_used == "near-model"
    assert found.line().startswith("not exact: the local answer is used, because no rule asks")


def test_a_doubtful_explanation_is_verified_and_kept() -> None:
    agreeing = DOUBT.replace("I think", "I believe")
    with served(lambda: saying(agreeing)) as far:
        client = Client(upstream(f"{far.url}/v1"))
        found, shown = decided(client, saying(DOUBT))
        assert "".join(shown) == found.text == DOUBT
        assert len(shown) == 1, "an answer that may be taken back waits"
        assert found.spilled_over
        assert found.accepted
        assert found.rules == ("uncertain",)
        assert found.similarity == pytest.approx(similarity(DOUBT, agreeing))
        assert found.verified_tokens == len(DOUBT)
        assert found.cost is not None
        assert found.cost > len(agreeing) * 10 / 1e6


def test_code_that_differs_is_the_upstreams() -> None:
    right = "Use the sum: `lambda *given: sum(given)`, for any number of them."
    with served(lambda: saying(right)) as far:
        client = Client(upstream(f"{far.url}/v1"))
        found, shown = decided(client, saying(CODE), most=Thresholds(max_draft_tokens=60))
    assert shown == [right]
    assert found.text == right
    assert found.author == "upstream"
    assert found.model_used == "far-model"
    assert not found.accepted
    assert found.rules == ("short", "uncertain")
    values = found.as_dict()
    assert values["model_used"] == "far-model"
    assert values["speculative_decoding"]["exact"] is False
    assert {"draft_tokens", "verified_tokens", "accepted", "spilled_over"} < set(
        values["speculative_decoding"]
    )


# --- rules ------------------------------------------------------------------------------


def draft(text: str = "x" * 60, **changes: Any) -> Draft:
    return Draft(text=text, **{"tokens": 10, "limit": 100, "ended": False} | changes)


@pytest.mark.parametrize(
    ("one", "rules"),
    [
        (draft(), []),
        (draft(tokens=90), ["near_limit"]),
        (draft(tokens=89), []),
        (draft("Yes.", ended=True), ["short"]),
        (draft("Yes."), []),
        (draft("Well... " + "x" * 60), ["uncertain"]),
        (draft("MAYBE it is " + "x" * 60), ["uncertain"]),
        (draft("maybes " + "x" * 60), []),
        (draft("Kumquat, i think, " + "x" * 60), ["uncertain"]),
        (draft(logprobs=[-1.4, -1.7]), ["unlikely"]),
        (draft(logprobs=[-1.4, -1.5]), []),
        (draft(entropies=[1.0, 3.1]), ["undecided"]),
        (draft(entropies=[1.0, 3.0]), []),
    ],
)
def test_a_rule_finds_what_it_is_for(one: Draft, rules: list[str]) -> None:
    assert [found.rule for found in judged(one, Thresholds())] == rules
    assert judged(one, Thresholds(), frozenset(rules)) == []
    off = Thresholds(
        near_limit=None, min_chars=None, markers=(), min_logprob=None, max_entropy=None
    )
    assert judged(one, off) == []


def test_the_entropy_is_the_least_that_the_likeliest_tokens_leave() -> None:
    sure = Logprob(1, -0.1, ((1, math.log(0.9)), (2, math.log(0.1))))
    assert entropy(sure) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert entropy(Logprob(1, -3.0, ((1, math.log(0.05)),) * 20)) == pytest.approx(math.log(20))
    cut = Logprob(1, -3.0, ((1, math.log(0.05)),) * 10)
    assert entropy(cut) == pytest.approx(math.log(20))


def test_a_draft_is_judged_by_its_first_tokens_whatever_a_round_writes() -> None:
    late = "x" * 12 + " maybe " + "y" * 60
    most = Thresholds(max_draft_tokens=10)
    with misbehaving("answer") as far:
        for count in (0, 3, 16):
            found, _ = decided(asked(far), saying(late), most=most, draft_tokens=count)
            assert (found.draft_tokens, found.rules) == (10, ())
            found, _ = decided(asked(far), saying("Ten chars."), most=most, draft_tokens=count)
            assert (found.draft_tokens, found.rules) == (10, ("short",))


def test_a_model_in_doubt_of_its_tokens_asks() -> None:
    with misbehaving("answer") as far:
        found, _ = decided(asked(far), talker(FACT))
    assert found.rules == ("unlikely", "undecided")


def test_similarity_ignores_case_and_space_alone() -> None:
    assert similarity("A  b\nc", "a b C") == 1
    assert similarity("a + b", "a - b") < 1
    assert similarity("abc", "xyz") == 0


# --- faults -----------------------------------------------------------------------------

FAULTS = [
    ("slow", "did not answer within 0.5 s", 1),
    ("stalled", "did not answer within 0.5 s", 1),
    ("401", "refuses the key in THE_KEY (401)", 1),
    ("403", "refuses the key in THE_KEY (403)", 1),
    ("404", "has nothing at its base_url, or no such model (404)", 1),
    ("400", "refuses the request (400)", 1),
    ("429", "takes no more requests now (429)", TRIES),
    ("429 60", "takes no more requests now (429), and asks to wait 60 s", 1),
    ("500", "failed (500)", TRIES),
    ("503", "failed (503)", TRIES),
    ("cut", "broke off its answer", TRIES),
    ("broken_chunk", "cannot be reached, or broke off its answer", TRIES),
    ("error", "told an error in the middle of its answer", TRIES),
    ("nonsense", "sent something that is no answer", TRIES),
    ("page", "sent something that is no answer", TRIES),
    ("other", "sent something that is no answer", TRIES),
    ("empty", "gave no text as its answer", 1),
]


@pytest.mark.parametrize(("way", "why", "tries"), FAULTS, ids=[one[0] for one in FAULTS])
def test_a_fault_is_told_in_words_without_the_key(
    way: str, why: str, tries: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    limit_s = 0.5 if way in ("slow", "stalled") else 20.0
    with misbehaving(way) as far:
        client = asked(far, timeout_s=limit_s)
        with pytest.raises(Fault) as fault:
            reply_to(client, question())
        assert len(far.bodies) == tries
        assert far.keys[0] == f"Bearer {KEY}"
    assert fault.value.why == why
    told = [caplog.text, repr(client), repr(vars(client)), repr(fault.value)]
    assert KEY not in "".join(told)


def test_the_local_answer_stands_with_a_note() -> None:
    with misbehaving("503") as far:
        found, shown = decided(asked(far), saying(DOUBT))
    assert "".join(shown) == found.text == DOUBT
    assert found.accepted
    assert found.spilled_over
    assert found.failed
    assert found.cost is None
    assert found.spent_tokens is None
    assert found.reason.startswith("far failed (503) (the draft says")
    assert "the local answer is used, because far failed (503)" in found.line()


def test_an_upstream_that_is_down_cannot_be_reached() -> None:
    with misbehaving("answer") as far:
        pass
    with pytest.raises(Fault, match="cannot be reached"):
        reply_to(asked(far), question())


@pytest.mark.parametrize("way", ["503", "429 0", "cut", "nonsense"])
def test_what_passes_is_tried_again(way: str) -> None:
    with misbehaving(way, way, "answer") as far:
        reply = reply_to(asked(far), question())
    assert (reply.text, reply.tokens_in, reply.tokens_out) == (far.text, 1000, 100)
    assert reply.seconds > 0


def test_a_question_that_nobody_waits_for_is_ended() -> None:
    with misbehaving("stalled") as far:
        one = asked(far).begin(question())
        wait_for(lambda: bool(far.bodies))
        assert one.cancel()
        wait_for(lambda: far.left == 1)


def test_tries_wait_longer_and_longer_and_as_long_as_they_are_told() -> None:
    waits: list[float] = []
    with misbehaving("503", "429 7", "answer") as far:

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        reply_to(Client(upstream(far.url), sleep=sleep), question())
    assert 0.25 <= waits[0] <= 0.5
    assert waits[1] == 7


def question(**changes: Any) -> Question:
    turns = [{"role": "user", "content": "Why?"}]
    return Question(messages=turns, max_tokens=9, **changes)


def test_the_draft_goes_along_where_the_upstream_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-openai")
    with misbehaving("untold") as far:
        reply = reply_to(asked(far, prediction=True), question(draft="It is"))
        reply_to(asked(far), question(draft="It is"))
    assert (reply.tokens_in, reply.tokens_out) == (None, None)
    first, second = far.bodies
    assert first["prediction"] == {"type": "content", "content": "It is"}
    assert "prediction" not in second
    assert first["max_tokens"] == 9


def test_an_upstream_that_fails_again_and_again_is_left_alone() -> None:
    now = [100.0]
    breaker = Breaker(lambda: now[0])
    with misbehaving("401") as far:
        client = Client(upstream(far.url), breaker)
        for _ in range(3):
            with pytest.raises(Fault, match="refuses the key"):
                reply_to(client, question())
        with pytest.raises(Fault, match="failed before and is asked again in 30 s"):
            reply_to(client, question())
        assert len(far.bodies) == 3
        now[0] += REST_S
        with pytest.raises(Fault, match="refuses the key"):
            reply_to(client, question())
        with pytest.raises(Fault, match="asked again in 60 s"):
            reply_to(client, question())
        now[0] += 60
        far.ways[:] = ["answer"]
        assert reply_to(client, question()).text == far.text
        assert reply_to(client, question()).text == far.text


def test_one_request_alone_finds_out_whether_an_upstream_is_back() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for _ in range(3):
        breaker.failed()
    now[0] = REST_S
    assert breaker.enter() == 0
    assert breaker.enter() == REST_S
    breaker.succeeded()
    assert breaker.enter() == 0


def test_an_upstream_that_asks_for_a_rest_gets_it() -> None:
    breaker = Breaker(lambda: 5.0)
    breaker.failed(retry_after_s=12)
    assert breaker.enter() == 12


# --- the table --------------------------------------------------------------------------

TABLE = """
[rules]
max_draft_tokens = 24
min_chars = false
markers = ["perhaps"]

[upstreams.far]
base_url = "{url}"
model = "far-model"
api_key_env = "THE_KEY"
timeout_s = 20
price_in = 0.85
price_out = 1.2
"""


def test_a_table_gives_upstreams_and_thresholds(tmp_path: Path) -> None:
    path = tmp_path / "upstreams.toml"
    path.write_text(TABLE.format(url="https://api.example.com/v1"))
    table = load_upstreams(path)
    assert table.named("far").cost(10**6, 10**6) == pytest.approx(2.05)
    assert table.named("far").key() == KEY
    assert table.thresholds == Thresholds(max_draft_tokens=24, min_chars=None, markers=("perhaps",))
    assert Thresholds().markers == MARKERS
    with pytest.raises(UsageError) as error:
        table.named("fra")
    assert error.value.hint == "Did you mean `far`?"


GOOD = '[upstreams.far]\nbase_url = "https://a.example/v1"\nmodel = "m"\n'
BAD = [
    (f'{GOOD}api_key = "{KEY}"\n', "line 4", "upstreams.far.api_key", "api_key_env"),
    (f'{GOOD}api_key_env = "{KEY}"\n', "line 4", "api_key_env", "not the key"),
    (f"{GOOD}timeout_s = 0\n", "line 4", "timeout_s", "seconds"),
    (f'{GOOD}price_in = "1"\n', "line 4", "price_in", "million"),
    (f"{GOOD}prediction = 1\n", "line 4", "prediction", "true or false"),
    ('[upstreams.far]\nmodel = "m"\n', "line 1", "upstreams.far` has no `base_url", "NAME"),
    ('[upstreams.far]\nbase_url = "ftp://a"\nmodel = "m"\n', "line 2", "base_url", "https"),
    ('[upstreams.far]\nbase_url = "http://[a"\nmodel = "m"\n', "line 2", "base_url", "https"),
    (f'[upstreams.far]\nbase_url = "https://u:{KEY}@a"\nmodel = ""\n', "line 2", "more", "key_env"),
    ('[upstreams.far]\nbase_url = "https://a"\nmodel = ""\n', "line 3", "model", "name"),
    ("[upstreams]\nfar = 1\n", "line 2", "upstreams.far", "section"),
    ("[upstream.far]\n", "line 1", "upstream", "`upstreams`"),
    ("[rules]\nmin_confidance = 1\n", "line 2", "min_confidance", "`min_confidence`"),
    ("[rules]\nmin_confidence = 80\n", "line 2", "min_confidence", "0 to 1"),
    ("[rules]\nmarkers = [1]\n", "line 2", "markers", "maybe"),
    ("[rules]\nmin_logprob = true\n", "line 2", "min_logprob", "false"),
    ("rules = \n", "not valid TOML", "", "Correct"),
    (
        '[upstreams.far]\nbase_url = "http://a.example"\nmodel = "m"\napi_key_env = "K"\n',
        "line 2",
        "over http",
        "https",
    ),
]


@pytest.mark.parametrize(("text", "line", "found", "expected"), BAD)
def test_a_table_that_cannot_be_used_says_where(
    text: str, line: str, found: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "upstreams.toml"
    path.write_text(text)
    with pytest.raises(TableError) as error:
        load_upstreams(path)
    assert str(path) in error.value.message
    assert line in error.value.message
    assert found in error.value.message
    assert expected in error.value.hint
    assert KEY not in error.value.message + error.value.hint


@pytest.mark.parametrize("value", ["", "  ", f"{KEY}\u20ac", f"{KEY} x"])
def test_a_key_that_cannot_be_sent_is_not_shown(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(UsageError) as error:
        Client(upstream("https://a.example/v1"))
    assert "THE_KEY" in error.value.message
    assert KEY not in error.value.message + error.value.hint


# --- the command ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    template = "{% for one in messages %}{{ one.content }} {% endfor %}"
    folder = str(save_model(tmp_path_factory.mktemp("models") / "letters", template=template))
    return ("--target", folder, "--no-speculation", "--no-compile", "--max-tokens", "12")


def called(model: tuple[str, ...], far: Misbehaving, folder: Path) -> tuple[str, ...]:
    """A call with an upstream, whose table it writes."""
    path = folder / "upstreams.toml"
    path.write_text(TABLE.format(url=far.url))
    table = ("--upstreams", str(path), "--upstream", "far")
    return ("generate", *model, "--no-stdin", "abc", *table)


@pytest.fixture
def generate(model: tuple[str, ...], invoke: Any, tmp_path: Path) -> Any:
    def call(far: Misbehaving, *options: str) -> Any:
        return invoke(*called(model, far, tmp_path), *options)

    return call


def test_the_command_shows_one_answer_and_one_line_that_says_why(
    generate: Any, model: tuple[str, ...], invoke: Any
) -> None:
    plain = invoke("generate", *model, "--no-stdin", "abc")
    with misbehaving("answer") as far:
        ended = generate(far, "--system", "be brief")
        assert ended.code == 0
        assert ended.out.strip() == far.text
        said = [line for line in ended.err.splitlines() if line.startswith("not exact: ")]
        assert len(said) == 1
        assert "the answer of far is used, because the two are" in said[0]
        system, user = far.bodies[0]["messages"]
        assert system == {"role": "system", "content": "be brief"}
        assert user == {"role": "user", "content": "abc"}
        kept = generate(far, "--min-confidence", "0")
        assert kept.out == plain.out
        rules = ("near_limit", "unlikely", "undecided")
        alone = generate(far, *(part for name in rules for part in ("--no-rule", name)))
        assert alone.out == plain.out
        assert len(far.bodies) == 2


def test_the_object_has_the_decision_and_no_more_log_probabilities_than_asked_for(
    generate: Any,
) -> None:
    with misbehaving("answer") as far:
        found = generate(far, "--json", "--logprobs", "2").json
        assert "logprobs" not in generate(far, "--json").json
    assert found["text"] == far.text
    assert found["model_used"] == "far-model"
    assert found["finish_reason"] == "stop"
    assert all(len(one["top_logprobs"]) == 2 for one in found["logprobs"])
    decision = found["speculative_decoding"]
    assert decision["spilled_over"] is True
    assert decision["accepted"] is False
    assert decision["cost"] == pytest.approx((1000 * 0.85 + 100 * 1.2) / 1e6)
    assert decision["latency_s"] > 0


@pytest.mark.parametrize("way", ["401", "error"])
def test_the_command_keeps_the_key_to_itself(
    way: str, generate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with misbehaving(way) as far:
        ended = generate(far, "--json")
    assert ended.code == 0
    assert ended.json["speculative_decoding"]["accepted"] is True
    assert "not exact: the local answer is used, because far " in ended.err
    assert KEY not in ended.out + ended.err + caplog.text


def test_a_terminal_tells_an_upstreams_text_by_its_style() -> None:
    screen = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    text = TerminalText(screen, end_on=screen, colours=True)
    text.write((Piece("from far", from_draft=False, upstream=True),), marked=True)
    text.write((Piece(" and near", from_draft=True),), marked=True)
    screen.seek(0)
    assert screen.read() == "\x1b[3mfrom far\x1b[0m and near"


def test_who_does_not_wait_for_an_upstream_gets_the_local_answer(
    generate: Any, model: tuple[str, ...], invoke: Any
) -> None:
    plain = invoke("generate", *model, "--no-stdin", "abc").out
    with misbehaving("stalled") as far:

        def interrupt() -> None:
            wait_for(lambda: bool(far.bodies))
            os.kill(os.getpid(), signal.SIGINT)

        person = threading.Thread(target=interrupt)
        person.start()
        ended = generate(far)
        person.join()
    assert ended.code == INTERRUPTED
    assert ended.out == plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--probe-tokens", "3"), "--probe-tokens says nothing without --upstream"),
        (("--upstream", "far"), "no table of upstreams"),
        (("--upstream", "far", "--audit"), "--audit does not go with --upstream far"),
        (("--upstream", "far", "--raw"), "--raw does not go with --upstream far"),
    ],
)
def test_options_that_do_not_go_together_are_an_error(
    options: tuple[str, ...], words: str, model: tuple[str, ...], invoke: Any
) -> None:
    ended = invoke("generate", *model, "abc", *options)
    assert ended.code == 2
    assert words in ended.err
