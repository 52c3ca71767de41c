"""What a probe predicts from what it measured, what it recommends, and what a tuning remembers."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from cli_tools import assert_one_error, save_model
from clocks import Clock, Slowed, growing
from conftest import draft_for, foreign, model
from rich.console import Console

from mlxspec.cli import interrupts
from mlxspec.cli.app import main
from mlxspec.cli.arguments.prompts import read_prompts
from mlxspec.cli.screen.display import Display
from mlxspec.cli.screen.report import show
from mlxspec.control.estimates import TEXT
from mlxspec.control.records import Recommendation
from mlxspec.control.replay import Proposed, along_model, rounds
from mlxspec.decode.engine import Engine
from mlxspec.defaults import MAX_AUTO_TOKENS, MODEL
from mlxspec.drafters.history import History
from mlxspec.drafters.picks import Picks
from mlxspec.errors import PromptError, UsageError
from mlxspec.measure import plan
from mlxspec.measure.acceptance import agreement, of_head
from mlxspec.measure.findings import NOT_TRIED, Findings, described
from mlxspec.measure.forecast import (
    LEFT_TO_AUTO,
    PLAIN_DECODING,
    TOO_NOISY,
    WORTH_MEASURING,
    Ceiling,
    Contender,
    Forecast,
    MeasuredDrafter,
    Option,
    pass_seconds,
    recommended,
)
from mlxspec.measure.plan import (
    ALL,
    FIRST_PASSES,
    LOOK,
    PASSES,
    PLANS,
    RUNNING,
    STEPS,
    TEXTS,
    TRIAL,
)
from mlxspec.measure.probe import probe
from mlxspec.metrics import Progress

ROWS, TOKENS = ALL.rows, ALL.tokens

# Rounds of one, and of two: 0.8 of the first are right, and half of the second.
ROUNDS = {
    1: [Proposed(1, 1)] * 8 + [Proposed(1, 0)] * 2,
    2: [Proposed(2, 2)] * 4 + [Proposed(2, 1)] * 4 + [Proposed(2, 0)] * 2,
    3: [Proposed(3, 2)] * 4 + [Proposed(3, 1)] * 4 + [Proposed(3, 0)] * 2,
}
FROM_TEXT = {3: [Proposed(3, 3), Proposed(0, 0)]}
FOUND = Forecast(
    pass_s={rows: 1.0 + 0.1 * (rows - 1) for rows in ROWS},
    plain_s=1.1,
    noise=0.01,
    drafters={
        MODEL: MeasuredDrafter(first_s=0.2, step_s=0.1, host_s=0.05, rounds=ROUNDS),
        "history": MeasuredDrafter(first_s=0.0, step_s=0.0, host_s=0.0, rounds=FROM_TEXT),
    },
)
DEAR = replace(FOUND, pass_s={rows: 0.9 * rows * rows for rows in ROWS})


def printed(show, *arguments) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    show(*arguments, console)
    return console.export_text()


# --- arithmetic -------------------------------------------------------------------------


def test_what_is_expected_follows_from_what_was_measured() -> None:
    plain, one, two, _, text = FOUND.options()
    assert plain == Option("", 0, 1.0, 1.1, 1.0)
    # N(1) = 1 + 0.8; C(1) = the first draft step + a pass of two rows + the host's share.
    assert (one.drafter, one.draft_tokens) == (MODEL, 1)
    assert one.tokens == pytest.approx(1.8)
    assert one.seconds == pytest.approx(0.2 + 1.1 + 0.05)
    assert one.speed_up == pytest.approx(1.8 * 1.1 / 1.35)
    assert two.tokens == pytest.approx(1 + 0.8 + 0.4)
    assert two.seconds == pytest.approx(0.3 + 1.2 + 0.05)
    # A round of three that are all kept, and one where nothing is proposed.
    assert (text.drafter, text.tokens) == ("history", 2.5)
    assert text.seconds == pytest.approx((1.3 + 1.1) / 2)


def test_the_fastest_is_recommended_and_plain_decoding_where_nothing_pays() -> None:
    best = FOUND.best()
    assert (best.drafter, best.draft_tokens) == ("history", 3)
    model_alone = replace(FOUND, drafters={MODEL: FOUND.drafters[MODEL]})
    assert model_alone.best().draft_tokens == 2
    assert DEAR.best() == DEAR.options()[0]
    hardly = replace(model_alone, plain_s=1.1 * 1.01 / model_alone.best().speed_up)
    assert hardly.best().draft_tokens == 0
    assert replace(FOUND, drafters={}).best().draft_tokens == 0


def test_models_and_auto_are_tried() -> None:
    assert FOUND.contenders(1) == [PLAIN_DECODING, Contender(MODEL, 2), LEFT_TO_AUTO]
    assert len(FOUND.contenders(3)) == 5
    assert replace(FOUND, drafters={}).contenders(1) == [PLAIN_DECODING, LEFT_TO_AUTO]


def test_it_is_what_a_controller_starts_from() -> None:
    known = FOUND.knowledge()
    assert set(known) == {MODEL, TEXT}
    assert known[MODEL].costs == pytest.approx((1.1, 1.35, 1.55, 1.75))
    assert known[MODEL].acceptance == pytest.approx((0.8, 0.6, 0.3))
    assert min(known[MODEL].acceptance) >= 0.01
    assert known[TEXT].costs == pytest.approx((1.1, *(1.0 + 0.1 * k for k in range(1, 32))))
    assert known[TEXT].acceptance == ()


def test_no_round_is_expected_to_take_less_than_a_plain_one() -> None:
    # As on a busy machine: the pass of four rows was slow when it was timed, and not in a round.
    busy = replace(FOUND.drafters[MODEL], host_s=-3.0)
    found = replace(FOUND, drafters={MODEL: busy})
    assert [one.seconds for one in found.options()] == [found.plain_s] * 4
    assert found.best().speed_up == pytest.approx(2.2)
    assert min(found.knowledge()[MODEL].costs) == found.plain_s


def test_a_verdict_is_what_was_measured() -> None:
    two, three = Contender(MODEL, 2), Contender("small", 3)
    assert recommended({PLAIN_DECODING: 10.0, two: 19.0, three: 18.0}) == Recommendation(2, 1.9)
    assert recommended({PLAIN_DECODING: 10.0, two: 11.0, three: 18.0}) == Recommendation(
        3, 1.8, "small"
    )
    assert recommended({PLAIN_DECODING: 10.0, two: 11.0, LEFT_TO_AUTO: 18.0}) == Recommendation(
        "auto", 1.8
    )
    assert recommended({PLAIN_DECODING: 10.0, two: 10.1}) == Recommendation(0, 1.0)
    assert recommended({PLAIN_DECODING: 10.0, two: 5.0}) == Recommendation(0, 1.0)


def kept(replayed: list[Proposed]) -> list[int]:
    return [one.right for one in replayed]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_what_is_replayed_is_what_rounds_keep(count: int) -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    session = engine.session([1, 2, 3], max_tokens=TOKENS, draft_tokens=count)
    came = []
    while stats := session.step().stats:
        came.append(stats.accepted)
    text = [1, 2, 3], session.text[3:]
    replayed = kept(rounds(along_model(agreement(engine.models[1], text), 8), [count]))
    assert len(replayed) > 5
    assert came[: len(replayed)] == replayed


# --- words ------------------------------------------------------------------------------


def findings(found: Forecast, **tried: float) -> Findings:
    """The findings of a whole measurement; contenders by `plain`, `auto` and `modelK`."""
    names = {"plain": PLAIN_DECODING, "auto": LEFT_TO_AUTO}
    speeds = {
        names.get(name) or Contender(MODEL, int(name.removeprefix(MODEL))): speed
        for name, speed in tried.items()
    }
    return Findings(forecast=found, is_whole=True, tried=speeds, is_over=True)


def test_a_verdict_is_what_was_tried() -> None:
    tried = findings(FOUND, plain=10.0, model2=19.0, auto=18.0).verdict()
    assert tried.recommendation == Recommendation(2, 1.9)
    assert tried.words == "use 2 draft tokens: 1.90 x plain decoding"
    lost = findings(FOUND, plain=10.0, model2=9.0, auto=9.9).verdict()
    assert lost.words == "do not speculate: plain decoding is the fastest"


def test_a_verdict_says_what_was_not_tried() -> None:
    expected = findings(FOUND).verdict()
    assert expected.recommendation is not None
    assert expected.words == (
        "use 3 draft tokens of history: 2.29 x plain decoding (expected, not tried)"
    )
    model_alone = replace(FOUND, drafters={MODEL: FOUND.drafters[MODEL]})
    assert findings(model_alone).verdict().words.startswith("use 2 draft tokens: 1.56 x plain")
    slow = {rows: seconds if rows == 1 else 3.0 for rows, seconds in FOUND.pass_s.items()}
    lost = findings(replace(model_alone, pass_s=slow)).verdict()
    assert lost.words == f"do not speculate: plain decoding is the fastest ({NOT_TRIED})"


def test_a_verdict_names_what_settles_it() -> None:
    assert DEAR.ceiling == Ceiling(2, pytest.approx(4.0), pytest.approx(0.5))
    verdict = findings(DEAR).verdict()
    assert verdict.recommendation is not None
    assert verdict.recommendation.draft_tokens == 0
    assert verdict.words == (
        "do not speculate: a pass over 2 rows takes 4.00 times as long as one over 1 row, so even "
        "if every proposal were right, it would bring 0.50 x plain decoding"
    )
    edge = replace(FOUND, pass_s={1: 1.0, 2: 2 / WORTH_MEASURING * 0.99})
    assert not findings(edge).is_settled
    assert findings(replace(edge, pass_s={1: 1.0, 2: 2 / WORTH_MEASURING * 1.01})).is_settled


def test_a_busy_machine_settles_nothing() -> None:
    busy = replace(FOUND, noise=TOO_NOISY + 0.1)
    for one in (findings(busy), findings(busy, plain=10.0, model2=19.0)):
        assert one.verdict().recommendation is None
        assert "too busy to tell: the same pass varies by 30%" in one.verdict().words
    assert not findings(replace(DEAR, noise=TOO_NOISY + 0.1)).is_settled


def test_a_recommendation_in_words() -> None:
    assert str(Recommendation(1, 1.5)) == "use 1 draft token: 1.50 x plain decoding"
    assert str(Recommendation("auto", 1.5)) == "use --draft-tokens auto: 1.50 x plain decoding"


def test_a_prediction_stands_beside_what_came() -> None:
    close = printed(show, findings(FOUND, plain=100.0, model2=155.0, auto=170.0))
    words = [line.split() for line in close.splitlines()]
    assert ["model", "2", "155", "1.55", "1.56", "off", "by", "+1%"] in words
    assert ["auto", "170", "1.70"] in words
    assert "busy" not in close
    slow = printed(show, findings(FOUND, plain=9.96, model2=4.0))
    assert "busy" in slow
    words = [line.split() for line in slow.splitlines()]
    assert ["plain", "10.0", "1.00", "1.00"] in words
    some = (PLAIN_DECODING, Contender(MODEL, 2), LEFT_TO_AUTO)
    assert [described(one) for one in some] == ["plain", "model 2", "auto"]


def test_no_table_holds_a_second_verdict() -> None:
    told = findings(FOUND, plain=10.0, model2=19.0, auto=18.0)
    for words in ("use ", "do not speculate", "busy to tell"):
        assert words not in printed(show, told)
    assert printed(show, Findings()) == ""


def test_what_was_left_out_is_told_with_what_would_do() -> None:
    told = findings(FOUND, plain=10.0, auto=9.0)
    told.left_out, told.whole_s = ["1 of 4 prompts", "a trial, once"], 188.0
    assert (
        "Measured to stay within 60 s: 1 of 4 prompts; a trial, once. --budget 240 leaves the time "
        "to measure all." in " ".join(printed(show, told).split())
    )


def test_passes_that_were_not_timed_lie_on_a_line() -> None:
    pass_s = {1: 1.0, 2: 1.5, 5: 3.0}
    expected = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 8.0]
    rows = [1, 2, 3, 4, 5, 6, 15]
    assert [pass_seconds(pass_s, count) for count in rows] == pytest.approx(expected)
    assert pass_seconds({1: 1.0, 2: 1.0, 4: 0.8}, 9) == 0.8
    assert pass_seconds({1: 0.5}, 3) == 1.5
    few = replace(FOUND, pass_s=pass_s).knowledge()
    assert len(few[TEXT].costs) == 5


# --- measurements -----------------------------------------------------------------------

PROMPTS: Any = [[1, 2, 3], [4, 5]]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Makes a model slow on a made-up clock, so that little of it is measured."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return lambda model: Slowed(model, clock, growing(0.2, 0.01))


def test_everything_is_measured(slow: Callable[[Any], Any]) -> None:
    target = slow(model("llama"))
    engine = Engine(target, draft_for(target, "half"), texts=(History,), compiled=False)
    told = probe(engine, PROMPTS, budget_s=240)
    found = told.forecast
    assert found is not None
    assert all(seconds > 0 for seconds in found.pass_s.values())
    assert found.plain_s > 0
    assert found.noise >= 0
    assert list(found.drafters) == [MODEL, "history"]
    drafted, texts = found.drafters.values()
    assert drafted.step_s > 0
    assert list(drafted.rounds) == list(range(1, MAX_AUTO_TOKENS + 1))
    assert all(0.3 < drafted.acceptance(count)[0] < 0.95 for count in drafted.rounds)
    assert not texts.is_model
    assert list(texts.rounds) == [1, 3, 7, 15]
    assert len(found.options()) == 1 + MAX_AUTO_TOKENS + len(texts.rounds)
    assert len(told.tried) == 3
    assert all(speed > 0 for speed in told.tried.values())
    assert json.loads(json.dumps(told.as_dict()))["verdict_in_words"] == told.verdict().words


def test_a_draft_that_always_agrees_is_accepted_everywhere(slow: Callable[[Any], Any]) -> None:
    target = slow(model("llama"))
    told = probe(Engine(target, target, compiled=False), PROMPTS, candidates=2)
    assert told.forecast is not None
    drafted = told.forecast.drafters[MODEL]
    assert drafted.acceptance(4) == (1.0,) * 4
    assert PLAIN_DECODING in told.tried


def test_a_draft_of_another_tokenizer_is_probed_in_the_targets_tokens(
    slow: Callable[[Any], Any],
) -> None:
    target = model("llama")
    draft, shared = foreign(target)
    told = probe(Engine(slow(target), draft, shared=shared, compiled=False), PROMPTS)
    assert told.forecast is not None
    assert told.forecast.drafters[MODEL].acceptance(4) == (1.0,) * 4


class Knowing:
    """A head that knows the text, but says less than it is asked for where it has a `limit`."""

    taps, most, block = (), 3, 4

    def __init__(self, text: list[int], vocabulary: int, limit: int | None = None) -> None:
        self._text, self._ids, self._limit = mx.array(text), mx.arange(vocabulary), limit

    def begin(self, capacity: int) -> mx.array:
        return mx.zeros((1, 1))

    def propose(
        self, past: Any, last_two: Any, position: Any, picks: Picks, count: int, length: int
    ) -> Any:
        places = mx.minimum(position[:, None] + 1 + mx.arange(count), len(self._text) - 1)
        picks.pick_all((self._text[places][..., None] == self._ids).astype(mx.float32))
        if self._limit is not None:
            picks.limit(mx.full((1,), self._limit, mx.int32))
        return past

    def commit(self, past: Any, tokens: Any, features: Any, position: Any, kept: Any) -> Any:
        return past


def knowing(target: Any, limit: int | None = None) -> tuple[Engine, list[int]]:
    """An engine with a head that knows what follows 1, 2, 3, and that text."""
    plain = Engine(target, compiled=False)
    text = plain.generate([1, 2, 3], max_tokens=TOKENS + 4, ignore_eos=True).tokens
    head = Knowing([1, 2, 3, *text], plain.models[0].vocabulary, limit)
    return Engine(target, heads={"head": head}, compiled=False), text


def test_a_head_is_probed(slow: Callable[[Any], Any]) -> None:
    engine, _ = knowing(slow(model("llama")))
    told = probe(engine, PROMPTS[:1], budget_s=120)
    assert told.forecast is not None
    found = told.forecast.drafters["head"]
    assert found.at_once
    assert found.step_s == 0
    assert found.acceptance(3) == (1.0,) * 3
    brought = {one.draft_tokens: one.tokens for one in told.forecast.options()}
    assert brought == {0: 1, 1: 2, 2: 3, 3: 4}
    assert "head: one pass drafts all tokens" in printed(show, told)
    assert any(one.drafter == "head" for one in told.tried)


def test_a_head_that_proposes_less_than_it_is_asked_for() -> None:
    engine, text = knowing(model("llama"), limit=2)
    found = of_head(engine, [([1, 2, 3], text[:20])], 8)
    assert list(found) == [1, 2, 3]
    assert set(found[3]) == {Proposed(2, 2)}


def test_every_draft_is_probed(slow: Callable[[Any], Any]) -> None:
    target = slow(model("llama"))
    drafts = {"one": draft_for(target, "never"), "two": target}
    told = probe(Engine(target, drafts, compiled=False), PROMPTS, budget_s=120, candidates=2)
    found = told.forecast
    assert found is not None
    assert found.drafters["one"].acceptance(1)[0] < 0.1
    assert found.drafters["two"].acceptance(1) == (1.0,)
    assert set(found.knowledge()) == {"one", "two", TEXT}
    assert {one.drafter for one in told.tried} >= {"", "two"}


def test_a_target_alone_is_probed_with_its_text(slow: Callable[[Any], Any]) -> None:
    engine = Engine(slow(model("llama")), texts=(History,), compiled=False)
    found = probe(engine, PROMPTS).forecast
    assert found is not None
    assert list(found.drafters) == ["history"]
    assert set(found.knowledge()) == {TEXT}


def test_something_must_draft() -> None:
    with pytest.raises(UsageError, match="nothing to probe"):
        probe(Engine(model("llama"), compiled=False), ["x"])


# --- the commands -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "letters"))


@pytest.fixture
def table(folder: str, tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(f'[mine]\ntarget = "{folder}"\ndraft = "{folder}"\n')
    return path


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Ended]:
    """Runs a command in this process: it measures the least, on a clock that nothing makes busy."""
    monkeypatch.setattr(plan, "PLANS", PLANS[-1:])
    monkeypatch.setattr(time, "perf_counter", Clock())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mlxspec", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code or 0, *capfd.readouterr())  # type: ignore[arg-type]

    return call


def verdicts(text: str) -> list[str]:
    words = ("use ", "do not speculate", "this machine is too busy")
    lines = (line.removeprefix("not ").removeprefix("remembered: ") for line in text.splitlines())
    return [line for line in lines if line.startswith(words)]


def test_probe_prints_tables_and_one_verdict(
    folder: str, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n")
    options = ("--target", folder, "--draft", folder, "--no-compile", "--prompts", str(prompts))
    ended = run("probe", *options)
    assert ended.code == 0, ended.err
    for words in ("x one row", "a round brings", "model", "history", "expected", "tried", "auto"):
        assert words in ended.out
    assert verdicts(ended.out) == [ended.out.splitlines()[-1]]
    told = ended.err.splitlines()
    for part in (LOOK, FIRST_PASSES, PASSES, TEXTS, RUNNING, STEPS, TRIAL):
        assert sum(line.partition(":")[0] == part for line in told) == 1
    assert f"{PASSES}: about 1 s left" in told
    assert not run("probe", *options, "--quiet").err


def test_tune_remembers_what_it_says(
    table: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n")
    options = ("--models", str(table))
    ended = run("tune", "--pair", "mine", *options, "--no-compile", "--prompts", str(prompts))
    assert ended.code == 0, ended.err
    (words,) = verdicts(ended.out)
    assert ended.out.splitlines()[-1] == f"remembered: {words}"
    (kept,) = json.loads(run("pairs", "show", "mine", *options, "--json").out)["learned"]
    assert str(Recommendation(**kept["verdict"])) == words
    known = len(kept["learned"]["0"]["model"]["costs"]) - 1
    assert 1 <= known <= MAX_AUTO_TOKENS
    said = run("pairs", "show", "mine", *options).out
    measured = [line.split() for line in said.splitlines() if line.rstrip().endswith("%")]
    assert [row[-4] for row in measured] == [str(k) for k in range(1, known + 1)]
    assert words in said
    # A run begins with it, and adds to it.
    assert run("generate", "--pair", "mine", *options, "--no-compile", "abc").code == 0
    (after,) = json.loads(run("pairs", "show", "mine", *options, "--json").out)["learned"]
    assert after["learned"] != kept["learned"]
    assert after["verdict"] == kept["verdict"]


def interrupting(monkeypatch: pytest.MonkeyPatch, part: str, done: int) -> None:
    def measuring(self: Display, progress: Progress) -> None:
        if (progress.what, progress.done) == (part, done):
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "measuring", measuring)


def test_an_interrupted_tuning_prints_and_keeps_what_it_measured(
    table: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--pair", "mine", "--models", str(table), "--no-compile")
    interrupting(monkeypatch, TRIAL, 1)
    ended = run("tune", *options)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert "a round brings" in ended.out
    assert "(expected, not tried)" in ended.out.splitlines()[-1]
    assert "The measurement was ended before it was complete." in ended.out
    shown = run("pairs", "show", "mine", "--models", str(table), "--json")
    (kept,) = json.loads(shown.out)["learned"]
    assert f"remembered: {Recommendation(**kept['verdict'])}" == ended.out.splitlines()[-1]
    interrupting(monkeypatch, PASSES, 1)
    ended = run("tune", *options, "--json")
    assert ended.code == 130
    told = json.loads(ended.out)
    assert (told["verdict"], told["remembered"]) == (None, False)
    assert told["pass_s"]["1"] > 0


def test_a_tuning_that_mlx_keeps_from_listening_keeps_it_too(
    table: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measuring(self: Display, progress: Progress) -> None:
        if (progress.what, progress.done) == (TRIAL, 1):
            last_words = interrupts._leaving[-1]
            thread = threading.Thread(target=last_words)
            thread.start()
            thread.join()
            sys.exit(130)

    monkeypatch.setattr(Display, "measuring", measuring)
    ended = run("tune", "--pair", "mine", "--models", str(table), "--no-compile")
    assert ended.code == 130
    assert "a round brings" in ended.out
    shown = run("pairs", "show", "mine", "--models", str(table), "--json")
    (kept,) = json.loads(shown.out)["learned"]
    assert f"remembered: {Recommendation(**kept['verdict'])}" == ended.out.splitlines()[-1]


def test_a_damaged_memory_is_a_warning_and_no_more(
    table: Path, tmp_path: Path, invoke: Callable[..., Ended]
) -> None:
    state = tmp_path / "state" / "mlxspec"
    state.mkdir(parents=True)
    (state / "tuning.json").write_text("not json")
    ended = invoke("generate", "--pair", "mine", "--models", str(table), "--no-compile", "abc")
    assert ended.code == 0
    assert "is damaged" in ended.err
    assert "Traceback" not in ended.err
    assert json.loads((state / "tuning.json").read_text())["records"]


def test_a_target_alone_is_probed_by_the_command(folder: str, run: Callable[..., Ended]) -> None:
    ended = run("probe", "--target", folder, "--no-compile", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["pass_over_first"]["1"] == 1
    assert result["options"][0]["draft_tokens"] == 0
    assert set(result["drafters"]) == {"history"}
    assert set(result["measured_tokens_per_second"]) == {"plain", "auto"}
    assert set(result["verdict"]) == {"draft_tokens", "speed_up", "drafter", "note"}


def test_without_speculation_there_is_one_error(folder: str, invoke: Callable[..., Ended]) -> None:
    ended = invoke("probe", "--target", folder, "--no-speculation")
    assert_one_error(ended, UsageError.exit_code)


# --- files of prompts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n\n two\n", ["one", " two"]),
        ('["one", "two\\nlines"]', ["one", "two\nlines"]),
        ('[{"text": "one", "x": 1}]', ["one"]),
        ('{"prompt": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
        ('{"messages": [{"role": "user", "content": "one"}]}', ["one"]),
        ('{\n  "prompt": "one"\n}', ["one"]),
        ('{"prompt": null, "text": "one"}\n{"text": ""}', ["one"]),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', ["a"]),
        ("[1] one\n[2] two", ["[1] one", "[2] two"]),
        ("[ ] one\n[x] two", ["[ ] one", "[x] two"]),
        ("[-] one", ["[-] one"]),
        ('["one"] is a list', ['["one"] is a list']),
        ('{"a": 1} is one', ['{"a": 1} is one']),
        ("[" * 100_000, ["[" * 100_000]),
        ("[INST] one [/INST]\n[INST] two [/INST]\n", ["[INST] one [/INST]", "[INST] two [/INST]"]),
        ("{one}\n", ["{one}"]),
        ('\ufeff["one"]', ["one"]),
        ("\ufeffone\rtwo", ["one", "two"]),
        ("one\u2028more\x0cand\x85on\ntwo", ["one\u2028more\x0cand\x85on", "two"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content.encode())
    assert read_prompts(path) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no prompts in"),
        ("\n \n", "no prompts in"),
        ("[]", "no prompts in"),
        ('[""]', "no prompts in"),
        ("[1]", "no prompt where entry 1"),
        ('["a", {"x": 1}]', "no prompt where entry 2"),
        ('\n{"prompt": "a"}\n\nb', "no prompt where line 4"),
        ("[", "begins as a JSON list and is none: expecting value: line 1"),
        ('["a", "b",]', "begins as a JSON list"),
        ('[\n"a"\n"b"]', "begins as a JSON list and is none: expecting ',' delimiter: line 3"),
        ('["a \\ud800"]', "half of a character in entry 1"),
    ],
)
def test_files_without_prompts(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "prompts"
    path.write_text(content)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(path)
    for content, encoding in [("é", "latin1"), ("one", "utf-16")]:
        path.write_bytes(content.encode(encoding))
        with pytest.raises(PromptError, match="not valid UTF-8") as caught:
            read_prompts(path)
        assert f"iconv -f {encoding} " in caught.value.hint
