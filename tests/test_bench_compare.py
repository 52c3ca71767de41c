"""Results beside each other: what changed, over time, against targets, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarked import ARMS, NONE, PLAIN, TYPES, cell, cells, results, samples
from cli_tools import assert_one_error
from typer.testing import CliRunner

from mlxspec.bench.applying import keys
from mlxspec.bench.cells import Cell, Configuration
from mlxspec.bench.compare import compare, differences, unsteadiness
from mlxspec.bench.history import lines, sparkline
from mlxspec.bench.judging import recommendation
from mlxspec.bench.llama_bench import jsonl
from mlxspec.bench.results import Drift, Recommendation
from mlxspec.bench.statistics import Interval, Verdict
from mlxspec.bench.targets import targets
from mlxspec.cli.app import app
from mlxspec.errors import UsageError
from mlxspec.pairs.table import Pair, find_pair

AUTO = ARMS[-1]


BASE = results(cells=(), drift=Drift(), peers=(), shape=())


def run(seed, *, slowdown=0.0, later=0.0, noise=0.03, prompts=27, wobble=0.005):
    """A run with a level of its own in which `auto` may be slower; nine types of prompts."""
    rng = np.random.default_rng(seed)
    level = np.exp(wobble * rng.standard_normal())
    made = []
    for arm in (NONE, ARMS[1], AUTO):
        factor = (1 - slowdown) if arm == AUTO else 1.0
        base = samples(2.0 if arm != NONE else 1.0, turns=prompts, noise=0.2, seed=7)
        speeds = level * factor * np.exp(noise * rng.standard_normal(prompts))
        firsts = np.exp(noise * rng.standard_normal(prompts)) * (1 + later * (arm == AUTO))
        own = tuple(
            replace(
                one,
                tokens_per_second=one.tokens_per_second * float(speed),
                ttft_s=one.ttft_s * float(first),
            )
            for one, speed, first in zip(base, speeds, firsts, strict=True)
        )
        gain = None if arm == NONE else Interval(median=2.0, low=1.9, high=2.1)
        made.append(Cell(question="configs", configuration=arm, samples=own, speedup=gain))
        for place, kind in enumerate(TYPES):
            each = prompts // len(TYPES)
            some = own[each * place : each * place + each]
            made.append(Cell(question="prompts", configuration=arm, prompt_type=kind, samples=some))
    return replace(BASE, cells=tuple(made))


def called(found, *verdicts):
    return {
        (one.cell.question, one.cell.configuration.name, one.what)
        for one in found.compared
        if one.change.verdict in verdicts
    }


# --- two runs ---


def test_a_slowdown_of_10_percent_is_found_among_60_comparisons():
    found = [compare(run(2 * seed), run(2 * seed + 1, slowdown=0.1)) for seed in range(20)]
    assert all(len(one.compared) == 60 for one in found)
    hits = [("configs", "auto", "tokens/s") in called(one, Verdict.SLOWER) for one in found]
    assert np.mean(hits) >= 0.9
    others = [called(one, Verdict.SLOWER, Verdict.FASTER) for one in found]
    wrong = [{(name, what) for _, name, what in one} - {("auto", "tokens/s")} for one in others]
    assert np.mean(list(map(bool, wrong))) <= 0.15  # 5% of 20 runs, and two deviations
    assert np.mean([bool(one.regressions(0.2)) for one in found]) <= 0.15


def test_a_slowdown_of_1_percent_is_not_called_and_nothing_else_is():
    found = [compare(run(2 * s), run(2 * s + 1, slowdown=0.01)) for s in range(40)]
    assert np.mean([bool(called(one, Verdict.SLOWER, Verdict.FASTER)) for one in found]) <= 0.1
    assert np.mean([bool(one.regressions(0.05)) for one in found]) <= 0.05


def test_noise_raises_no_alarm():
    pairs = [(run(2 * s, noise=0.1), run(2 * s + 1, noise=0.1)) for s in range(40)]
    found = [compare(*one) for one in pairs]
    alarms = [bool(called(one, Verdict.SLOWER, Verdict.FASTER)) for one in found]
    assert np.mean(alarms) <= 0.1  # 5% of the runs, and one deviation


def test_a_later_first_token_is_a_regression():
    found = compare(run(0), run(1, later=0.3))
    worst, *others = found.regressions(0.05)
    assert worst.cell.question == "configs"
    assert worst.after == pytest.approx(1.3 * worst.before, rel=0.05)
    assert {(one.what, one.cell.configuration.name) for one in (worst, *others)} == {
        ("first token", "auto")
    }


def test_the_same_results_are_the_same():
    found = compare(results(), results())
    assert found.count(Verdict.SAME) == len(found.compared) == 2 * len(cells())
    assert found.beside == found.versions == ()
    assert differences(results(), results()) == []


def test_prompts_that_only_one_run_had_are_left_out():
    before, after = run(0), run(1)
    short = replace(after.cells[0], samples=after.cells[0].samples[:5])
    found = compare(before, replace(after, cells=(short,)))
    assert len(found.compared) == 2
    assert found.compared[0].before == pytest.approx(
        np.median([one.tokens_per_second for one in before.cells[0].samples[:5]])
    )
    other = replace(short, samples=tuple(replace(s, prompt="new") for s in short.samples))
    assert compare(before, replace(after, cells=(other,))).compared == ()


def test_a_prompt_that_was_repeated_counts_once():
    one = run(0, prompts=2, noise=0.01)
    often = tuple(
        replace(sample, turn=turn) for turn in range(20) for sample in one.cells[0].samples
    )
    many = replace(one, cells=(replace(one.cells[0], samples=often),))
    slower = tuple(replace(s, tokens_per_second=0.9 * s.tokens_per_second) for s in often)
    odd = tuple(replace(s, tokens_per_second=1.0) if s.turn == 0 else s for s in slower)
    found = compare(many, replace(many, cells=(replace(many.cells[0], samples=odd),)))
    noisy = run(1, prompts=2, noise=0.1)
    assert found.compared[0].change.ratio.median == pytest.approx(0.9)
    (speed, *_) = compare(many, noisy).compared
    assert speed.change.verdict is Verdict.UNCLEAR  # two prompts tell little, however often


def test_a_machine_that_drifted_takes_more_to_be_called():
    at = tuple(float(one) for one in range(20))
    drifting = Drift(at_s=at, tokens_per_second=tuple(40 * (1 - 0.01 * one) for one in at))
    before, after = run(0), run(1, slowdown=0.1)
    assert compare(before, after).regressions(0.05)
    shaky = replace(after, drift=drifting)
    assert unsteadiness(shaky) == pytest.approx(0.19, abs=0.02)
    assert not compare(before, shaky).regressions(0.05)
    assert unsteadiness(replace(after, drift=Drift(at_s=(0.0,), tokens_per_second=(0.0,)))) == 0


def test_what_is_counted_is_told_beside():
    after = results()
    changed = tuple(
        replace(one, memory_ratio=1.5, identical=0.9, acceptance=cells()[1].acceptance)
        if one.question == "configs" and one.configuration == AUTO
        else one
        for one in after.cells
    )
    told = compare(results(), replace(after, cells=changed)).beside
    assert told == (
        "auto had 63.1% of its proposals accepted, and now 62.1%",
        "auto took 1.18 x the memory of the target alone, and now 1.50 x",
        "auto wrote the text of plain decoding in 100.0% of all turns, and now in 90.0%",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": {"processor": "M1"}}, "processor: Apple M3 Max, then M1"),
        ({"machine": {"power_mode": None}}, "power mode: automatic, then unknown"),
        ({"machine": {"on_battery": True}}, "running on a battery: no, then yes"),
        ({"pair": {"target": "other"}}, "target: package:target, then other"),
        ({"settings": {"max_tokens": 64}}, "length of the texts: 128, then 64"),
        ({"prompts_hash": "0"}, "the prompts are not the same"),
    ],
)
def test_what_makes_two_results_incomparable_is_named(changes, words):
    made = results()
    values = {
        name: {**getattr(made, name), **value} if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    assert differences(made, replace(made, **values)) == [words]


# --- over time ---


def test_results_of_the_same_work_make_a_line(tmp_path):
    for day, others in enumerate([{}, {"prompts_hash": "0"}, {}]):
        folder = tmp_path / f"run {day}"
        folder.mkdir()
        made = results(created=f"2026-03-0{3 - day}T09:30:00+00:00", cells=cells()[:5], **others)
        (folder / "results.json").write_text(made.as_json(), encoding="utf-8")
    (tmp_path / "results.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    heard = []
    found = lines(tmp_path, heard.append)
    assert [[one.created[:10] for _, one in line.runs] for line in found] == [
        ["2026-03-01", "2026-03-03"],
        ["2026-03-02"],
    ]
    assert len(heard) == 1
    assert "not JSON" in heard[0]


def test_a_folder_without_results_is_one_clear_error(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=r"no results in|is no folder"):
            lines(folder, print)


def test_a_sparkline_shows_changes_and_hides_noise():
    assert sparkline([1, 2, None, 3]) == "▁▄ █" or sparkline([1, 2, None, 3]) == "▁▅ █"
    assert set(sparkline([100.0, 100.2, 99.9])) <= {"▄", "▅"}
    assert sparkline([None]) == ""
    assert len(set(sparkline([5.0] * 4))) == 1


# --- targets ---


def test_the_targets_are_held_against_the_recommendation():
    found = targets(results())
    assert [(one.measured, one.verdict) for one in found] == [
        ("63.1%", "fail"),
        ("2.04 x (1.92–2.16)", "pass"),
        ("+5.0% (+5.0% to +5.0%)", "pass"),
        ("1.18 x", "pass"),
    ]


def test_a_target_is_met_only_beyond_its_limit():
    at = Interval(median=2.0, low=1.9, high=2.1)
    (plain, *_, auto) = (one for one in cells() if one.question == "configs")
    late = tuple(replace(one, ttft_s=0.08 * 1.11) for one in auto.samples)
    auto = replace(auto, speedup=at, memory_ratio=2.0, samples=late)
    found = targets(results(cells=(plain, auto)))
    assert [one.verdict for one in found] == ["fail"] * 4


def test_targets_that_were_not_measured_are_not_passed():
    for made in (results(cells=()), results(cells=cells()[:1])):
        assert [one.verdict for one in targets(made)] == ["not measured"] * 4


def test_in_place_of_plain_decoding_the_fastest_is_held_against_the_targets():
    plain = Recommendation(configuration=NONE, speedup=None, words="Do not speculate.")
    assert targets(results(recommendation=plain)) == targets(results())


# --- other forms ---


def test_llama_bench_lines_have_its_fields():
    rows = [json.loads(line) for line in jsonl(results()).splitlines()]
    wrote = [row for row in rows if row["n_gen"]]
    read = [row for row in rows if row["n_prompt"]]
    assert len(wrote) + len(read) == len(rows)
    first = wrote[0]
    assert (first["n_prompt"], first["n_gen"], first["n_depth"]) == (0, 128, 60)
    assert first["avg_ts"] == pytest.approx(PLAIN, rel=0.05)
    assert first["avg_ns"] == pytest.approx(1e9 * 128 / PLAIN, rel=0.05)
    assert first["avg_ts"] == pytest.approx(np.mean(first["samples_ts"]))
    assert first["stddev_ts"] == pytest.approx(np.std(first["samples_ts"], ddof=1))
    assert read[0]["avg_ts"] == pytest.approx(60 / 0.08)
    assert {row["configuration"] for row in rows} == {arm.name for arm in ARMS}


def test_nothing_measured_is_no_line():
    assert jsonl(results(cells=())) == ""
    assert jsonl(results(cells=(replace(cells()[0], samples=()),))) == ""


# --- a recommendation for the table of pairs ---

PAIR = Pair("demo", "package:target", "package:draft")
MEASURED = {"name": "demo", "target": "package:target", "draft": "package:draft"}


TWO = {**MEASURED, "draft": "a/one + b/two"}
NO_DRAFT = {**MEASURED, "draft": None}


def recommended(name, pair=MEASURED, **others):
    arm = Configuration(name=name, **others)
    best = Recommendation(configuration=arm, speedup=None, words="")
    return replace(BASE, pair=pair, recommendation=best)


def of_demo(name, **others):
    pair = find_pair("demo")
    about = {"name": "demo", "target": pair.target_name, "draft": pair.draft_name}
    return recommended(name, about, **others)


def test_a_cold_start_is_never_recommended():
    cold = Configuration(name="cold:auto", draft_tokens=0, auto=True, cold=True)
    some = [cell("configs", NONE), cell("configs", AUTO, 1.5), cell("configs", cold, 3.0)]
    best = recommendation(some)
    assert best is not None
    assert best.configuration == AUTO


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (recommended("auto", draft_tokens=64, auto=True), {"draft_tokens": "auto"}),
        (recommended("5", draft_tokens=5), {"draft_tokens": 5}),
        (recommended("none", draft_tokens=0), {"draft_tokens": 0}),
        (
            recommended("history:4", draft_tokens=4, drafter="history"),
            {"draft_tokens": 4, "draft": "history"},
        ),
        (recommended("model:4", draft_tokens=4, drafter="model"), {"draft_tokens": 4}),
        (
            recommended("3", TWO, draft_tokens=3),
            {"draft_tokens": 3, "draft": ["a/one", "b/two"]},
        ),
        (
            recommended("two:3", TWO, draft_tokens=3, drafter="two"),
            {"draft_tokens": 3, "draft": "b/two"},
        ),
        (
            recommended("3", NO_DRAFT, draft_tokens=3),
            {"draft_tokens": 3, "draft": []},
        ),
    ],
)
def test_a_recommendation_becomes_keys_of_the_pair(made, wanted):
    assert keys(made, PAIR) == wanted


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (results(recommendation=None, pair=MEASURED), "recommend nothing"),
        (recommended("3", {**MEASURED, "target": "b"}, draft_tokens=3), "are of the target b"),
        (recommended("block:3", draft_tokens=3, rule="block"), "no key for a rule"),
    ],
)
def test_what_the_table_cannot_hold_is_one_clear_error(made, words):
    with pytest.raises(UsageError, match=words):
        keys(made, PAIR)


# --- the command ---


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def bench(*arguments):
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def saved(folder: Path, made) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(made.as_json(), encoding="utf-8")
    return folder


def test_a_regression_ends_with_exit_code_1(tmp_path):
    before, after = saved(tmp_path / "a", run(0)), saved(tmp_path / "b", run(1, slowdown=0.1))
    done = bench("compare", before, after)
    assert done.exit_code == 1
    assert "regression" in done.output
    assert bench("compare", before, after, "--threshold", "20%").exit_code == 0
    assert bench("compare", before, before).exit_code == 0
    told = json.loads(bench("compare", before, after / "results.json", "--json").output)
    assert told["regressions"][0]["configuration"] == "auto"
    assert told["threshold"] == 0.05


def test_other_prompts_are_compared_only_when_told_to(tmp_path):
    before = saved(tmp_path / "a", run(0))
    after = saved(tmp_path / "b", replace(run(1), prompts_hash="0"))
    with pytest.raises(UsageError, match="the prompts are not the same"):
        bench("compare", before, after)
    done = bench("compare", before, after, "--anyway")
    assert done.exit_code == 0
    assert "not the same: the prompts are not the same" in done.output


def test_history_is_a_table_with_sparklines(tmp_path):
    for day in range(3):
        made = replace(run(day, slowdown=0.2 * (day == 2)), created=f"2026-03-0{day + 1}T09:30:00")
        saved(tmp_path / str(day), made)
    output = bench("history", tmp_path).output
    assert output.count("2026-03-0") == 3
    assert "% same" in output or "% unclear" in output
    assert "% slower" in output
    (line,) = (one for one in output.splitlines() if one.strip().startswith("auto  "))
    assert line.split()[1][2] == "▁"


def test_a_report_is_written_of_results(tmp_path):
    printed = bench("report", saved(tmp_path / "a", results()), "-").stdout
    done = bench("report", tmp_path / "a", tmp_path / "new")
    assert printed == (tmp_path / "new" / "report.md").read_text()
    assert done.output.split() == [
        str(tmp_path / "new" / name) for name in ("results.json", "report.md", "report.html")
    ]
    assert (tmp_path / "new" / "report.html").stat().st_size > 50_000


def test_what_is_applied_is_what_generate_takes(home):
    pair = find_pair("demo")
    made = recommended(
        "5", {"name": "demo", "target": pair.target_name, "draft": pair.draft_name}, draft_tokens=5
    )
    path = saved(home / "a", made)
    with pytest.raises(UsageError, match="of another machine: processor Apple M3 Max, and here"):
        bench("apply", path)
    assert find_pair("demo") == pair
    assert bench("apply", path, "--anyway").exit_code == 0
    assert find_pair("demo") == replace(pair, draft_tokens=5)
    assert "draft_tokens = 5" in (home / "config" / "mlxspec" / "models.toml").read_text()


def test_applying_keeps_the_rest_of_an_entry(home):
    table = home / "config" / "mlxspec" / "models.toml"
    table.parent.mkdir(parents=True)
    table.write_text('# mine\n[demo]\nnote = "kept"  # why\ndraft_tokens = 2\n')
    pair = find_pair("demo")
    made = recommended(
        "auto",
        {"name": "demo", "target": pair.target_name, "draft": pair.draft_name},
        draft_tokens=64,
        auto=True,
    )
    bench("apply", saved(home / "a", made), "--anyway")
    assert table.read_text() == '# mine\n[demo]\nnote = "kept"  # why\ndraft_tokens = "auto"\n'


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"schema": 9}', "\udcff"])
def test_a_file_that_is_none_is_one_clear_error(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content, errors="surrogateescape")
    for arguments in (("compare", path, path), ("report", path, tmp_path / "x"), ("apply", path)):
        with pytest.raises(UsageError):
            bench(*arguments)


def test_the_command_says_what_is_wrong_in_one_error(tmp_path, invoke):
    done = invoke("bench", "compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert_one_error(done, 1)
