"""`mlxspec bench` as a person runs it: tables, files, Ctrl-C, and calls that are wrong."""

from __future__ import annotations

import io
import json
import shlex
import sys
import threading
from pathlib import Path

import benchmarked
import pytest
from cli_tools import is_one_error, save_model
from rich.console import Console

from mlxspec.bench import plan, results
from mlxspec.bench.statistics import Interval
from mlxspec.cli import interrupts
from mlxspec.cli.bench import tables as bench_tables
from mlxspec.cli.bench.live import left, table_of
from mlxspec.cli.screen.display import Display
from mlxspec.errors import UsageError

PROMPTS = [
    {"question_id": 1, "category": "short", "turns": ["abc abc", "bcd"]},
    {"question_id": 2, "category": "short", "turns": ["the cat and the dog"]},
    {"question_id": 3, "category": "other", "turns": ["a b c d e f"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target, its draft, and prompts."""
    root = tmp_path_factory.mktemp("bench")
    save_model(root / "target")
    save_model(root / "draft", seed=1)
    (root / "question.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return root


@pytest.fixture
def bench(folder, invoke, monkeypatch, tmp_path):
    """Calls the command with the models of `folder`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, prompts: Path | None = None):
        return invoke(
            *("bench", "--target", str(folder / "target"), "--draft", str(folder / "draft")),
            *("--prompts", str(prompts or folder / "question.jsonl")),
            *("--no-compile", "--max-tokens", "8", *arguments),
        )

    return call


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.parametrize("name", ["batch", "long", "modes", "round", "sampling"])
def test_a_script_is_a_benchmark_that_there_is(invoke, monkeypatch, name):
    text = (SCRIPTS / f"bench_{name}").read_text().replace("\\\n", " ")
    (line,) = (one for one in text.splitlines() if " -m mlxspec bench " in one)
    words = [one.replace("$root", str(SCRIPTS.parent)) for one in shlex.split(line)]
    called = []
    monkeypatch.setattr(
        "mlxspec.cli.bench.command.measure", lambda *options: called.append(options)
    )
    ended = invoke(*words[words.index("bench") : -1], "--minutes", "1")
    assert ended.code == 0, ended.err
    ((options, others, _),) = called
    settings = options.settings()
    assert (settings.minutes, others.against) == (1, ["mlx-lm"])
    arms = plan.configurations(settings.configs, ("model", "history"))
    prompts = options.prompt_set(settings)
    groups = plan.planned(settings, arms, prompts)
    assert all(len(one.arms) > 1 and plan.steps_of(one, prompts) for one in groups)


def test_tables_and_files(bench, tmp_path):
    ended = bench("--configs", "none,2", "--minutes", "0.02", "--json", "r.json", "--report", "out")
    assert ended.code == 0, ended.err
    for words in ("Which setting is fastest", "For which kind of text", "tokens/s", "short"):
        assert words in ended.out
    found = results.read(tmp_path / "r.json")
    assert results.read(tmp_path / "out" / "results.json") == found
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "report.md",
        "report.html",
    }
    assert found.finished
    assert found.settings["configs"] == ["none", "2"]
    assert found.machine["mlxspec"]
    assert found.pair["bytes"]["target"] > 0
    assert [one.configuration.name for one in found.of("configs")] == ["none", "2"]
    assert {one.prompt_type for one in found.of("prompts")} == {"short", "other"}
    assert all(one.identical in (None, 1.0) for one in found.cells)
    assert "written: r.json" in ended.err
    assert len(found.drift.tokens_per_second) >= 1


def test_one_configuration_alone_and_json_on_stdout(bench):
    ended = bench("--configs", "none", "--minutes", "0.01", "--json", "-", "--quiet")
    assert ended.err == ""
    found = results.of_json(ended.out)
    assert [one.configuration.name for one in found.of("configs")] == ["none"]
    assert found.recommendation is None


def test_every_question_has_its_table(bench):
    ended = bench(
        *("--configs", "none,auto", "--types", "none", "--temps", "0,0.7"),
        *("--contexts", "64", "--rows", "1,2", "--system", "none,direct", "--minutes", "0.02"),
    )
    assert ended.code == 0, ended.err
    for words in ("What sampling changes", "What a long prompt", "What texts side by side"):
        assert words in ended.out
    assert "no chat template: system prompts are left out" in ended.err
    assert "What a system prompt changes" not in ended.out
    assert "Which setting is fastest" not in ended.out


def interrupting(monkeypatch, hook=None) -> None:
    def measuring(self, progress):
        if progress.what == "short" and progress.done == 1:
            if hook is not None:
                hook()
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "measuring", measuring)


def test_ctrl_c_writes_what_is_there(bench, monkeypatch, tmp_path):
    interrupting(monkeypatch)
    ended = bench("--configs", "none,2", "--json", "r.json", "--report", "out")
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert "The measurement was ended before it was complete." in ended.out
    found = results.read(tmp_path / "r.json")
    assert not found.finished
    assert [len(one.samples) for one in found.cells] == [0] * 6
    assert (tmp_path / "out" / "report.html").exists()


def test_where_mlx_keeps_python_busy_another_thread_writes_it(bench, monkeypatch, tmp_path):
    def leave():
        thread = threading.Thread(target=interrupts._leaving[-1])
        thread.start()
        thread.join()
        sys.exit(130)

    interrupting(monkeypatch, leave)
    ended = bench("--configs", "none,2", "--json", "r.json")
    assert ended.code == 130
    assert not results.read(tmp_path / "r.json").finished


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--configs", "none,x"], "'x' is no K"),
        (["--configs", "draft:3"], "no drafter and no rule 'draft'"),
        (["--types", "codes"], "no prompts of the type 'codes'"),
        (["--system", "rude"], "no system message 'rude'"),
        (["--temps", "warm"], "--temps 'warm'"),
        (["--contexts", "0"], "--contexts '0'"),
        (["--rows", "64"], "--rows '64'"),
        (["--precision", "3 x"], "--precision '3 x'"),
        (["--types", "none"], "nothing to measure"),
        (["--draft-tokens", "3"], "--draft-tokens has no place here"),
        (["--json", "no/such/folder/r.json"], "cannot be written"),
    ],
)
def test_a_wrong_call_is_one_error(bench, arguments, words):
    ended = bench("--configs", "none", *arguments)
    assert ended.code == UsageError.exit_code
    assert words in " ".join(ended.err.split())
    assert is_one_error(ended.err[ended.err.index("error:") :])


def test_a_report_that_is_a_file_is_refused_before_anything_is_measured(bench, tmp_path):
    (tmp_path / "out").write_text("mine")
    ended = bench("--report", "out")
    assert ended.code == UsageError.exit_code
    assert "out is no folder" in ended.err


def test_the_help_names_its_commands_and_options(invoke):
    ended = invoke("bench", "--help")
    for words in ("--configs", "--report", "--quick", "Examples:", "mlxspec bench --quick"):
        assert words in ended.out


def test_times_in_words():
    assert [left(one) for one in (0.2, 59, 89, 90, 601)] == [
        "1 s",
        "59 s",
        "89 s",
        "2 min",
        "10 min",
    ]
    assert table_of([]).row_count == 0


# --- what a terminal shows --------------------------------------------------------------


def shown(found, width=100):
    file = io.StringIO()
    bench_tables.show(found, Console(width=width, file=file, markup=False, highlight=False))
    return file.getvalue()


def test_every_part_of_the_results_is_shown():
    found = benchmarked.results()
    said = shown(found)
    for cell in found.cells:
        assert cell.row in said
        if cell.speedup is not None:
            assert bench_tables.times(cell.speedup) in said
    for peer in found.peers:
        assert peer.name in said
    for remark in found.warnings:
        assert f"! {remark.words}" in said
    assert said.splitlines()[-1] == found.recommendation.words


def test_a_narrow_terminal_cuts_nothing():
    found = benchmarked.results()
    tables = {line.rstrip() for line in shown(found).splitlines() if line.startswith("  ")}
    assert tables <= {line.rstrip() for line in shown(found, width=40).splitlines()}


def test_an_interval_that_says_nothing_is_not_shown():
    assert bench_tables.times(Interval(median=2.0, low=0.1, high=40.0)) == "2.00 (?)"
    assert bench_tables.times(Interval(median=2.0, low=1.9, high=2.1)) == "2.00 (1.90–2.10)"
    assert bench_tables.times(None) == "…"
