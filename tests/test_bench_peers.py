"""Other programs beside a benchmark's configurations: servers, broken ones too, and mlx-lm."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from architectures import build
from conftest import CHAT_TOKENIZER, TOKENIZER, draft_for
from servers import Served, served
from test_bench_run import concluded, made_run
from upstreams import KEY, Misbehaving, misbehaving

from mlxspec.bench import peers
from mlxspec.bench.arms import Asked, Place, own_arms
from mlxspec.bench.cells import Configuration
from mlxspec.bench.measuring import Run
from mlxspec.bench.mlx_lm_arm import mlx_lm_arms, rounds_of
from mlxspec.bench.peers import Lost, ServerArm, model_of, server_arms
from mlxspec.bench.plan import NO_TYPES, PLAIN, Settings, configurations, planned
from mlxspec.bench.prompt_sets import shipped
from mlxspec.bench.questions import serve
from mlxspec.bench.report import tables
from mlxspec.bench.summing import Series
from mlxspec.cli.bench.peers import PeerOptions
from mlxspec.decode.engine import Engine
from mlxspec.errors import UsageError
from mlxspec.pairs import diagnosis, servers
from mlxspec.pairs.servers import Server, looked_at, root_of

ASKED = Asked(prompt="a0", messages=[[{"role": "user", "content": "ab cd"}]], max_tokens=24)
PLACE = Place(0, 0, 0.0)


def arm_of(one: Misbehaving, tokenizer: Any = CHAT_TOKENIZER, **options: Any) -> ServerArm:
    (arm,) = server_arms([one.url], tokenizer, target="org/far", **options)
    return arm


@contextmanager
def absent() -> Iterator[int]:
    """A port on which nobody listens, and which nobody else is given meanwhile."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]


# --- finding servers --------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["localhost:1234", "http://localhost:1234/", "http://localhost:1234/v1/"]
)
def test_a_servers_root(url: str) -> None:
    assert root_of(url) == "http://localhost:1234"
    assert root_of("https://host/api/v1") == "https://host/api"


@pytest.mark.parametrize(
    "url", ["", "ftp://host", "http://", "http://host:x", f"http://{KEY}@host"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        root_of(url)
    assert KEY not in str(caught.value) + caught.value.hint


def test_servers_are_running_refused_absent_or_not_what_was_asked_for() -> None:
    with misbehaving("answer") as one:
        url = root_of(one.url)
        found = looked_at(url)
        assert (found.state, found.models, found.words) == ("running", ("far",), "with far")
        one.models = [f"m{at}" for at in range(5)]
        assert looked_at(url).words == "with m0, m1, m2 and 2 more"
        one.key = KEY
        assert looked_at(url).state == "refused"
        assert "(401)" in looked_at(url, key="other").words
        assert looked_at(url, key=KEY).state == "running"
        one.models = None
        assert looked_at(url).words == "it has nothing at /v1/models (404)"
    with absent() as port:
        gone = looked_at(f"http://127.0.0.1:{port}")
    assert (gone.state, gone.words) == ("absent", "nobody listens there")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        found = looked_at(f"http://127.0.0.1:{port}", patience_s=0.05)
        assert (found.state, found.words) == ("failed", "it does not answer in time")


def test_the_doctor_looks_at_the_same_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    with misbehaving("answer") as one, misbehaving("answer") as other, absent() as port:
        other.key = KEY
        ports = [int(root_of(each.url).rpartition(":")[2]) for each in (one, other)]
        names = dict(zip(ports, ["LM Studio", "Ollama"], strict=True)) | {port: "exo"}
        monkeypatch.setattr(servers, "KNOWN", names)
        first, second = diagnosis._servers()
        assert (first.mark, first.words) == ("✓", "LM Studio: running, with far")
        assert (second.mark, second.what) == ("!", f"port {ports[1]}")
        arms = server_arms(["known"], TOKENIZER, target="org/far")
        assert [arm.name for arm in arms] == ["LM Studio", "Ollama", "exo"]
        assert [arm.server.state for arm in arms] == ["running", "refused", "absent"]


def test_a_model_is_the_one_that_is_named_like_the_target() -> None:
    server = Server("http://x", "x", "running", ("llama3:8b", "Qwen3-8B-4bit", "far"))
    assert model_of(server, "mlx-community/Qwen3-8B-4bit") == "Qwen3-8B-4bit"
    assert model_of(server, "org/Other") == "llama3:8b"
    assert model_of(Server("http://x", "x", "running"), "org/Other") == "default"


# --- one server's answers ---------------------------------------------------------------


def test_a_sample_is_counted_by_the_servers_usage() -> None:
    with misbehaving("cached") as one:
        arm = arm_of(one)
        written = arm.write(ASKED, PLACE)
        assert written.texts == [one.text]
        assert one.bodies[0]["messages"] == [{"role": "user", "content": "ab cd"}]
        assert (one.bodies[0]["temperature"], one.bodies[0]["model"]) == (0.0, "far")
        sample = written.sample
        assert (sample.tokens, sample.prompt_tokens, sample.ended) == (100, 1000, "stop")
        first = len(CHAT_TOKENIZER.encode(one.text[:9], add_special_tokens=False))
        assert sample.ttft_s is not None
        assert sample.tokens_per_second is not None
        behind_s = (100 - first) / sample.tokens_per_second
        assert 0.04 < behind_s <= sample.total_s - sample.ttft_s
        told = arm.result(Series([sample]), [], {"none": [sample]})
        assert (told.status, told.counted_by, told.model) == ("measured", "usage", "far")
        assert told.words == "it had 99% of the prompts in its cache"


def test_without_usage_our_tokenizer_counts_and_it_is_said() -> None:
    with misbehaving("untold") as one:
        arm = arm_of(one, TOKENIZER)
        sample = arm.write(ASKED, PLACE).sample
        assert one.bodies[0]["prompt"] == "ab cd"  # no chat template, so a plain completion
        assert sample.tokens == len(TOKENIZER.encode(one.text, add_special_tokens=False))
        told = arm.result(Series([sample]), ["it broke off its answer."], {})
        assert told.counted_by == "tokenizer"
        assert told.words == (
            "1 of 2 texts are lost: it broke off its answer; "
            "it sends no usage, and our tokenizer counts its tokens"
        )


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("401", "refuses a request without a key (401)"),
        ("404", "has nothing at /v1/chat/completions, or no model 'far' (404)"),
        ("429 7", "takes no more requests now (429), and asks to wait 7 s"),
        ("429", "takes no more requests now (429)"),
        ("422", "refuses the request (422)"),
        ("500", "failed (500)"),
        ("cut", "broke off its answer"),
        ("broken_chunk", "broke off its answer"),
        ("error", "told an error in the middle of its answer"),
        ("nonsense", "sent something that is no answer"),
        ("page", "sent something that is no answer"),
        ("other", "sent something that is no answer"),
        ("empty", "wrote nothing"),
        ("slow", "did not answer in time"),
        ("stalled", "did not answer in time"),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    way: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "TIMEOUT", 0.3)
    monkeypatch.setattr(peers, "LONGEST_S", 0.5)
    with misbehaving(way) as one:
        arm = arm_of(one)
        with pytest.raises(Lost) as caught:
            arm.write(ASKED, PLACE)
    assert caught.value.message == f"it {words}."
    assert KEY not in caught.value.message + caught.value.hint


def test_a_key_comes_from_the_environment_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    with misbehaving("403") as one:
        one.key = KEY
        arm = arm_of(one, key_env="FAR_KEY")
        with pytest.raises(Lost, match=r"refuses the key in FAR_KEY \(403\)") as caught:
            arm.write(ASKED, PLACE)
        assert one.keys == [f"Bearer {KEY}"] * 2
        assert KEY not in caught.value.message + caught.value.hint
        for value in ("", "two words", "schlüssel"):
            monkeypatch.setenv("FAR_KEY", value)
            with pytest.raises(UsageError, match="FAR_KEY"):
                arm_of(one, key_env="FAR_KEY")


def test_a_server_that_is_gone_is_asked_no_more() -> None:
    with misbehaving("answer") as one:
        arm = arm_of(one)
    for _ in range(peers.GIVEN_UP):
        with pytest.raises(Lost, match="cannot be reached"):
            arm.write(ASKED, PLACE)
    with pytest.raises(Lost, match="asked no more"):
        arm.write(ASKED, PLACE)


def test_a_named_model_is_asked_for_where_no_list_tells() -> None:
    with misbehaving("answer") as one:
        one.models = None
        arm = arm_of(one, model="mine")
        arm.write(ASKED, PLACE)
        assert one.bodies[0]["model"] == "mine"
        with pytest.raises(Lost, match=r"nothing at /v1/models \(404\)"):
            arm_of(one).write(ASKED, PLACE)


# --- in a run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    target = build("llama", vocabulary=len(CHAT_TOKENIZER.get_vocab()))
    return Engine(target, draft_for(target, "half"), CHAT_TOKENIZER, compiled=False)


def test_a_server_that_dies_loses_a_row_and_not_the_run(engine: Engine) -> None:
    ways = ["cached", "cached", "cut", *["cached"] * 100]
    with misbehaving(*ways) as one, misbehaving("500") as failing:
        gone = Server("http://127.0.0.1:9", "exo", "absent", words="nobody listens there")
        others = [arm_of(one), arm_of(failing), ServerArm(gone, "x", CHAT_TOKENIZER)]
        run, _, told = made_run(engine, {"none": 10.0, "3": 20.0}, peers=others)
        for _ in run:
            pass
    results = concluded(run)
    assert results.finished
    good, failed, absent = results.peers
    assert good.status == "measured"
    turns = max(len(cell.samples) for cell in results.of("configs"))
    assert len(good.samples) == turns - 1
    assert good.words.startswith(f"1 of {turns} texts are lost: it broke off its answer")
    assert good.over is not None
    assert good.ours_over is not None
    # Ours at K = 3 is the fastest, and twice as fast as plain decoding.
    assert good.ours_over.median == pytest.approx(2 / good.over.median, rel=1e-6)
    assert (failed.status, failed.words) == ("failed", "it failed (500)")
    assert (absent.status, absent.words) == ("absent", "nobody listens there")
    assert any("exo is left out: nobody listens there" in line for line in told)


# --- a real server ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Served]:
    with served(lambda: Engine(engine.target, None, CHAT_TOKENIZER, compiled=False)) as one:
        yield one


def test_a_real_server_writes_the_same_text(engine: Engine, server: Served) -> None:
    (arm,) = server_arms([server.url], CHAT_TOKENIZER, target="demo")
    assert (arm.server.name, arm.model) == ("mlxspec", "demo")
    written = arm.write(ASKED, PLACE)
    own = own_arms(engine, [PLAIN], {})["none"].write(ASKED, PLACE)
    assert written.texts == own.texts
    assert written.sample.tokens == own.sample.tokens
    assert written.sample.prompt_tokens == own.sample.prompt_tokens
    assert written.sample.ended == own.sample.ended


# --- mlx-lm -----------------------------------------------------------------------------


def test_mlx_lm_writes_the_same_text_plain_and_with_the_draft(engine: Engine) -> None:
    arms = own_arms(engine, [PLAIN, Configuration(name="2", draft_tokens=2)], {})
    others = mlx_lm_arms(arms)
    assert [one.name for one in others] == ["mlx-lm", "mlx-lm 2"]
    own = arms["none"].write(ASKED, PLACE)
    told = []
    for other in others:
        written = other.write(ASKED, PLACE)
        assert written.texts == own.texts
        assert written.sample.tokens == own.sample.tokens
        assert written.sample.prompt_tokens == own.sample.prompt_tokens
        series = Series()
        series.add(written)
        told.append(other.result(series, [], {"none": [own.sample]}))
    plain, drafted = told
    assert (plain.name, plain.configuration, plain.acceptance) == ("mlx-lm", "none", None)
    assert drafted.configuration == "2"
    assert drafted.acceptance is not None
    assert drafted.acceptance.drafted == 2 * drafted.acceptance.rounds
    assert drafted.acceptance.rate is not None
    assert 0 < drafted.acceptance.rate < 1


def test_mlx_lm_drafts_at_its_own_k_and_never_with_other_tokens(engine: Engine) -> None:
    assert [one.draft_tokens for one in mlx_lm_arms(own_arms(engine, [PLAIN], {}))] == [0, 3]
    alone = Engine(engine.target, None, CHAT_TOKENIZER, compiled=False)
    assert [one.draft_tokens for one in mlx_lm_arms(own_arms(alone, [PLAIN], {}))] == [0]


def test_rounds_of_mlx_lm_are_counted_whole() -> None:
    # The last round was cut.
    found = rounds_of([True, True, False, False, True, False, True, True], 3)
    assert (found.full_rounds, found.drafted, found.accepted) == (3, 9, 3)
    assert found.tokens_per_round == 2
    assert found.accepted_by_position == [2, 1, 0]


def test_texts_side_by_side_are_those_alone(engine: Engine, server: Served) -> None:
    words = ["ab cd", "some other words", "a"]
    asked = replace(ASKED, messages=[[{"role": "user", "content": one}] for one in words])
    plain = own_arms(engine, [PLAIN], {})["none"]
    own = plain.write_beside(asked, PLACE)
    theirs, drafted = mlx_lm_arms({"none": plain})
    (far,) = server_arms([server.url], CHAT_TOKENIZER, target="demo")
    assert (theirs.beside, drafted.beside, far.beside) == (True, False, True)
    for other in (theirs, far):
        written = other.write_beside(asked, PLACE)
        assert written.texts == own.texts
        assert written.sample.tokens == own.sample.tokens == sum(map(len, own.tokens))
        assert written.sample.prompt_tokens == own.sample.prompt_tokens
        assert written.sample.tokens_per_second == pytest.approx(
            written.sample.tokens / written.sample.total_s, rel=0.1
        )


def test_other_programs_take_part_under_every_condition(engine: Engine) -> None:
    settings = Settings(types=(NO_TYPES,), rows=(2,), contexts=(40,), max_tokens=8)
    chosen = configurations(["2", "serial:2"], ["model"])
    arms = own_arms(engine, chosen, {})
    groups, prompts = planned(settings, chosen, shipped()), shipped()[:3]
    run = Run(arms, groups, prompts, settings, peers=mlx_lm_arms(arms), tell=lambda _: None)
    for _ in run:
        if all(one.turns for one in run.groups):
            break
    found = {(one.configuration, one.question, one.row): one for one in concluded(run).peers}
    assert set(found) == {
        ("none", "context", "40"),
        ("2", "context", "40"),
        ("none", "rows", "2"),
    }
    assert all(one.status == "measured" for one in found.values())
    beside = found["none", "rows", "2"]
    assert all(sample.tokens <= 16 for sample in beside.samples)
    assert tables.titled(beside) == "mlx-lm, plain; 2 side by side"


def test_one_turn_of_two_servers_gives_a_ratio_without_limits() -> None:
    one, several = serve.ratio([3.0], [2.0]), serve.ratio([3.0, 3.3, 3.0], [2.0, 2.0, 2.0])
    assert json.dumps([one], allow_nan=False) == '[{"median": 1.5, "low": null, "high": null}]'
    assert serve.in_words(one) == "1.50 (–)"
    assert several["low"] is not None
    assert several["low"] < 1.5 < several["high"]
    assert serve.in_words(several).startswith("1.50 (1.")


# --- options ----------------------------------------------------------------------------


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="'mlxlm' is no program"):
        PeerOptions(against=["mlxlm"]).require_sense()
    with pytest.raises(UsageError, match="--server-model says nothing without --server"):
        PeerOptions(server_model="x").require_sense()
    with pytest.raises(UsageError, match="--server-key-env says nothing"):
        PeerOptions(server_key_env="x").require_sense()
    PeerOptions(against=["mlx-lm"], server=["localhost:1"], server_model="x").require_sense()
