"""`mlxspec cascade eval`: what thresholds would have done, answers that are kept, the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tools import assert_one_error, save_model
from hypothesis import given
from hypothesis import strategies as st
from talkers import talker
from upstreams import KEY, Misbehaving, misbehaving

from mlxspec.cascade.answers import Kept, Local, drafted
from mlxspec.cascade.client import Client, Reply
from mlxspec.cascade.evaluation import ALL, FAR, LOCAL, Outcome, outcomes
from mlxspec.cascade.gathering import Case, Gathering
from mlxspec.cascade.rules import RULES, Thresholds
from mlxspec.cascade.upstreams import Upstream
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import UsageError
from mlxspec.metrics import Generation, Logprob, SpeculationStats
from mlxspec.params import SamplingParams

FAR_AWAY = Upstream("far", "http://127.0.0.1:1/v1", "far-model", price_in=1.0, price_out=10.0)
USUAL = Thresholds()
TEXT = "a sure and long enough answer that says what was to be said, and no more"


def local(text: str = TEXT, **changes: Any) -> Local:
    """A local answer with a token for each character, each of which took 10 ms."""
    count = len(text)
    values = {
        "text": text,
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "tokens": count,
        "limit": 1000,
        "temperature": 0.0,
        "top_p": 0.0,
        "decoded": text,
        "ends": list(range(1, count + 1)),
        "logprobs": [-0.1] * count,
        "entropies": [0.2] * count,
        "first_s": 0.5,
        "whole_s": 0.5 + 0.01 * count,
    }
    return Local(**values | changes)


def reply(text: str = TEXT, *, seconds: float = 2.0) -> Reply:
    return Reply(text=text, finish_reason="stop", tokens_in=100, tokens_out=10, seconds=seconds)


def found(cases: Sequence[Case], most: Thresholds = USUAL, **given: Any) -> Any:
    """The outcomes by the name of a threshold and its value."""
    options = {"off": frozenset(), "upstream": FAR_AWAY} | given
    return {(one.name, one.value): one for one in outcomes(cases, most, **options)}


# --- outcomes ---------------------------------------------------------------------------

CASES = [
    Case("sure", local(), reply()),
    Case("sure and wrong", local(), reply("Something else entirely: 12345.")),
    Case("doubted", local(f"maybe {TEXT}"), reply(f"perhaps {TEXT}")),
    Case("doubted and wrong", local(f"maybe {TEXT}"), reply("Quite another thing: 6789.")),
]


def test_a_setting_sends_some_prompts_and_uses_some_of_the_answers() -> None:
    table = found(CASES)
    all_rules: Outcome = table[ALL, None]
    assert all_rules.asked == 0.5
    assert all_rules.used == 0.25
    assert all_rules.missed == 0.25
    assert all_rules.cost == pytest.approx(2 * 200 / 1e6)
    assert CASES[2].similarity is not None
    assert CASES[3].similarity is not None
    assert all_rules.similarity == (CASES[2].similarity + CASES[3].similarity) / 2
    whole = [case.local.whole_s for case in CASES if case.local]
    sent = 0.5 + 10 * 0.01 + 2.0  # the first ten tokens, and then the upstream
    assert all_rules.latency_s == pytest.approx((whole[0] + whole[1] + 2 * sent) / 4)
    assert table["markers", "maybe"] == replace(
        all_rules, name="markers", value="maybe", is_set=True
    )
    assert table["markers", "I think"].asked == 0


def test_the_two_ends_stand_beside_them() -> None:
    table = found(CASES)
    assert (table[LOCAL, None].asked, table[LOCAL, None].missed) == (0, 0.5)
    assert table[LOCAL, None].cost == 0
    far = table[FAR, None]
    assert (far.asked, far.used, far.missed, far.latency_s) == (1, 0.5 + 0.5, 0, 2.0)
    assert far.cost == pytest.approx(4 * 200 / 1e6)


def test_what_is_set_is_among_what_is_tried_and_marked() -> None:
    most = Thresholds(max_draft_tokens=7, min_confidence=0.33, min_chars=None, markers=("um",))
    table = found(CASES, most, off=frozenset({"undecided"}))
    marked = {name: value for (name, value), one in table.items() if one.is_set}
    assert marked == {
        "max_draft_tokens": 7,
        "min_confidence": 0.33,
        "near_limit": 0.9,
        "min_logprob": -1.5,
        "markers": "um",
    }
    assert len({name for name, _ in table}) == 3 + 7
    assert table[ALL, None].asked == 0


def test_a_rule_is_tried_without_the_others() -> None:
    short = [Case("short", local("Yes, maybe."), reply())]
    table = found(short, Thresholds(max_draft_tokens=20))
    assert table["min_chars", 20].asked == 1
    assert table["min_logprob", -1.5].asked == 0
    assert table["markers", "maybe"].asked == 1
    assert table["max_draft_tokens", 5].asked == 0
    assert table["max_draft_tokens", 80].asked == 1


def test_more_similarity_uses_more_of_the_upstream() -> None:
    table = found(CASES)
    used = [one.used for (name, _), one in table.items() if name == "min_confidence"]
    assert used == sorted(used)
    assert used[0] < used[-1]


def test_what_is_not_known_is_none() -> None:
    lost = [Case("doubted", local(f"maybe {TEXT}"), fault="failed (500)")]
    one = found(lost)[ALL, None]
    assert one.asked == 1
    assert (one.similarity, one.used, one.missed, one.cost, one.latency_s) == (None,) * 5
    alone = found(CASES, upstream=None)
    assert alone[ALL, None].cost is None
    assert not any(name in (FAR, "min_confidence") for name, _ in alone)
    assert outcomes([Case("not yet")], Thresholds(), frozenset(), None) == []


@given(st.text("ab.é🌧 ", min_size=1, max_size=12), st.integers(1, 14), st.booleans())
def test_a_draft_is_the_one_that_was_judged(text: str, most: int, stopped: bool) -> None:
    tokenizer = _ENGINE.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = Generation(5, SpeculationStats(0), SamplingParams())
    whole.tokens, whole.text = tokens, text
    whole.finish_reason = "stop" if stopped else "length"
    whole.logprobs = [Logprob(one, -one / 300, ((one, -one / 300),)) for one in tokens]
    request = _ENGINE.request("Why?", max_tokens=20)
    answer = Local.of(whole, request, tokenizer).draft(most)
    so_far = replace(whole, finish_reason="interrupted")
    is_whole = len(tokens) <= most
    judged_one = drafted(whole if is_whole else so_far, tokenizer, most, 20, ended=is_whole)
    assert answer.text == judged_one.text
    assert (answer.tokens, answer.ended) == (judged_one.tokens, judged_one.ended)
    assert answer.limit == judged_one.limit == 20
    assert answer.logprobs == pytest.approx(judged_one.logprobs, abs=1e-6)
    assert answer.entropies == pytest.approx(judged_one.entropies, abs=1e-6)


_ENGINE = talker(TEXT)


# --- answers that are kept --------------------------------------------------------------


def test_an_answer_that_is_kept_is_found_by_all_that_it_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept = Kept(path)
    kept.add({"prompt": "a", "max_tokens": 9}, local())
    kept.add({"prompt": "a", "max_tokens": 9}, reply())
    again = Kept(path)
    assert again.local({"max_tokens": 9, "prompt": "a"}) == local()
    assert again.reply({"prompt": "a", "max_tokens": 9}) == reply()
    assert again.local({"prompt": "a", "max_tokens": 8}) is None
    assert again.reply({"prompt": "b", "max_tokens": 9}) is None


def test_a_line_that_was_cut_short_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    Kept(path).add({"prompt": "a"}, reply())
    whole = path.read_bytes()
    for cut in (1, 12, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        kept = Kept(path)
        kept.add({"prompt": "b"}, reply())
        assert Kept(path).reply({"prompt": "a"}) == Kept(path).reply({"prompt": "b"}) == reply()
    path.write_bytes(whole[:20])
    assert Kept(path).reply({"prompt": "a"}) is None
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", ["a prompt", "a prompt\n", '{"prompt": "a"}\n', "[1]\n"])
def test_a_file_of_something_else_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(UsageError, match="is no file of answers"):
        Kept(path)
    assert path.read_text() == content
    with pytest.raises(UsageError, match="cannot be used"):
        Kept(tmp_path / "nowhere" / "kept.jsonl")


# --- collecting -------------------------------------------------------------------------


def gathering(
    folder: Path,
    far: Misbehaving | None,
    write: Callable[[str], Local] = lambda prompt: local(prompt + TEXT),
    waits: list[float] | None = None,
) -> Gathering:
    client = None
    if far is not None:
        client = Client(replace(FAR_AWAY, base_url=far.url, timeout_s=25.0))
    kept, slept = Kept(folder / "kept.jsonl"), [] if waits is None else waits
    return Gathering(
        ["a", "b", "a", "c"], kept, {"seed": 1}, "Be brief.", write, client, slept.append
    )


def test_each_prompt_is_answered_once(tmp_path: Path) -> None:
    with misbehaving("answer") as far:
        first = gathering(tmp_path, far)
        steps = list(first)
        assert [(one.done, one.total) for one in steps] == [(0, 3), (1, 3), (2, 3)]
        sent = [body["messages"][1]["content"] for body in far.bodies]
        assert sorted(sent) == ["a", "b", "c"]  # two are asked at a time
        assert far.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert far.bodies[0]["max_tokens"] == 1000
        again = gathering(tmp_path, far, write=None)  # type: ignore[arg-type]
        assert not again.lacks_local
        assert list(again) == []
        assert len(far.bodies) == 3
    assert [case.reply for case in again.cases] == [case.reply for case in first.cases]
    assert all(case.similarity is not None for case in again.cases)


def test_without_an_upstream_nothing_is_sent(tmp_path: Path) -> None:
    alone = gathering(tmp_path, None)
    assert len(list(alone)) == 3
    assert [case.reply for case in alone.cases] == [None] * 3


def test_what_failed_is_asked_for_by_the_next_evaluation(tmp_path: Path) -> None:
    with misbehaving("answer", "400", "answer") as far:
        first = gathering(tmp_path, far)
        list(first)
        (refused,) = [case for case in first.cases if case.fault is not None]
        assert refused.fault == "refuses the request (400)"
        assert len(list(gathering(tmp_path, far))) == 1
        *sent, last = [body["messages"][1]["content"] for body in far.bodies]
        assert sorted(sent) == ["a", "b", "c"]  # two are asked at a time
        assert last == refused.prompt


def test_an_upstream_that_says_when_is_asked_again_then(tmp_path: Path) -> None:
    waits: list[float] = []
    with misbehaving("429 30", "answer") as far:
        one = gathering(tmp_path, far, waits=waits)
        client = one._client
        assert client is not None
        client.breaker.failed = lambda *_: None  # type: ignore[method-assign]
        list(one)
    assert waits == [30]
    assert [case.fault for case in one.cases] == [None] * 3


def test_an_evaluation_that_is_ended_keeps_what_is_there(tmp_path: Path) -> None:
    def write(prompt: str) -> Local:
        if prompt == "c":
            raise KeyboardInterrupt
        return local(prompt)

    with misbehaving("answer") as far:
        one = gathering(tmp_path, far, write)
        with pytest.raises(KeyboardInterrupt):
            list(one)
        assert [case.local is not None for case in one.cases] == [True, True, False]
    kept = Kept(tmp_path / "kept.jsonl")
    assert kept.local({"prompt": "b", "seed": 1}) is not None
    assert one.cases[0].reply is not None


# --- the command ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    template = "{% for one in messages %}{{ one.content }} {% endfor %}"
    return str(save_model(tmp_path_factory.mktemp("models") / "letters", template=template))


def call(folder: str, place: Path, *options: str) -> tuple[str, ...]:
    models = ("--target", folder, "--no-speculation", "--no-compile", "--max-tokens", "11")
    return ("cascade", "eval", "--prompts", str(place / "mine.txt"), *models, *options)


def test_the_command_shows_a_table_and_a_second_call_needs_no_model(
    folder: str, invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    (tmp_path / "mine.txt").write_text("abc\nxyz\n")
    alone = invoke(*call(folder, tmp_path))
    assert alone.code == 0, alone.err
    assert "min_confidence" not in alone.out
    assert "no upstream was asked" in alone.err
    monkeypatch.setattr("mlxspec.cli.engines.load_engine", None)
    with misbehaving("answer") as far:
        table = tmp_path / "upstreams.toml"
        table.write_text(
            f'[upstreams.far]\nbase_url = "{far.url}"\nmodel = "m"\napi_key_env = "THE_KEY"\n'
            "price_in = 1\nprice_out = 2\n"
        )
        options = ("--upstreams", str(table), "--upstream", "far")
        for columns in ("80", "60"):
            monkeypatch.setenv("COLUMNS", columns)
            ended = invoke(*call(folder, tmp_path, *options))
            assert ended.code == 0, ended.err
            lines = ended.out.splitlines()
            assert max(map(len, lines)) <= int(columns)
            assert any(line.split()[:2] == ["0.8", "*"] for line in lines)
            _, _, asked, _, used, missed, cost, _ = lines[1].split()
            assert (asked, used, missed, cost) == ("100%", "100%", "0%", "0.0024")
        found = invoke(*call(folder, tmp_path, *options, "--json")).json
        assert len(far.bodies) == 2
        assert KEY not in (tmp_path / "mine.answers.jsonl").read_text() + json.dumps(found)
    assert found["compared"] == 2
    assert {one["prompt"] for one in found["cases"]} == {"abc", "xyz"}
    assert set(found["cases"][0]["rules"]) <= set(RULES)
    every = found["outcomes"][0]
    assert (every["name"], every["asked"], every["used"]) == (ALL, 1, 1)


def test_ctrl_c_shows_what_is_there(
    folder: str, invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxspec.cli.evaluating import Writing

    def write(self: Writing, prompt: str) -> Local:
        if prompt == "xyz":
            raise KeyboardInterrupt
        return local(prompt)

    monkeypatch.setattr(Writing, "load", lambda self: None)
    monkeypatch.setattr(Writing, "write", write)
    (tmp_path / "mine.txt").write_text("abc\nxyz\n")
    ended = invoke(*call(folder, tmp_path))
    assert ended.code == INTERRUPTED
    assert "all rules" in ended.out
    assert "1 of 2 prompts are answered" in ended.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "mine.txt cannot be read"),
        (("--no-rule", "shrot"), "There is no rule named 'shrot'"),
        (("--upstream", "far"), "no table of upstreams"),
        (("--answers", "/"), "The file of answers / cannot be used"),
    ],
)
def test_what_cannot_be_used_is_one_error(
    options: tuple[str, ...], words: str, folder: str, invoke: Any, tmp_path: Path
) -> None:
    if options:
        (tmp_path / "mine.txt").write_text("abc\n")
    ended = invoke(*call(folder, tmp_path, *options))
    assert_one_error(ended, 2, words)


def test_an_evaluation_needs_prompts(invoke: Any) -> None:
    ended = invoke("cascade", "eval")
    assert_one_error(ended, 2, "--prompts FILE")
