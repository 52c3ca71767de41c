"""The command line from outside: pipes, a terminal, errors, interrupts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cli_tools import (
    LETTERS,
    PATIENCE_S,
    ROOT,
    TerminalRun,
    assert_one_error,
    command,
    environment,
    is_one_error,
    mlxspec,
    save_model,
    started,
    wait_for,
)
from conftest import Ended
from tokenizers import Tokenizer

from mlxspec import __version__
from mlxspec.cli import interrupts
from mlxspec.cli.screen.display import Display
from mlxspec.decode.engine import Engine
from mlxspec.device import kernels
from mlxspec.errors import PromptError
from mlxspec.measure.audit import COMPARING
from mlxspec.models import cached_model
from mlxspec.pairs.table import find_pair, load_pairs, package_folder
from mlxspec.sampling import verify

STYLE = re.compile(r"\x1b\[[0-9;]*m")
FOREVER = ("--max-tokens", "100000")


@pytest.fixture(autouse=True)
def models_are_trusted(monkeypatch):
    """That a model's cache suits it is tried in other tests, and would be most of the time here."""
    monkeypatch.setattr(cached_model, "agrees", lambda *_: True)


@pytest.fixture
def generate(invoke):
    """Generates a little with the demo pair, greedily and without building kernels for it."""

    def call(*arguments: str, stdin: bytes | None = None) -> Ended:
        options = ("--no-compile", "--temp", "0", "--top-p", "1", "--max-tokens", "12")
        return invoke("generate", *options, *arguments, stdin=stdin)

    return call


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Options for a pair that writes letters and spaces without an end."""
    folder = str(save_model(tmp_path_factory.mktemp("models") / "letters"))
    return ("--target", folder, "--draft", folder, "--no-compile")


@pytest.fixture
def text_of(generate):
    """The text that the same arguments give with --json."""
    return lambda *arguments: generate("--json", *arguments).json["text"]


# --- where the prompt comes from --------------------------------------------------------


def test_a_prompt_is_the_argument_or_what_is_piped_in(generate):
    by_argument = generate("def f(x):", "--json").json
    assert by_argument["prompt_tokens"] > 1
    for run in (
        generate("--json", stdin=b"def f(x):"),
        generate("--json", "-", stdin=b"def f(x):"),
        generate("--json", "", stdin=b"def f(x):"),
        generate("--json", "def f(x):", stdin=b""),
    ):
        assert run.json["tokens"] == by_argument["tokens"]
        assert run.json["prompt_tokens"] == by_argument["prompt_tokens"]


def test_a_prompt_may_be_both_with_a_blank_line_between(generate):
    both = generate("--json", "import os", stdin=b"def f(x):\n").json
    whole = generate("--json", "import os\n\ndef f(x):\n").json
    assert both["prompt_tokens"] == whole["prompt_tokens"]
    assert both["tokens"] == whole["tokens"]


def test_a_real_pipe_into_the_process(letters, text_of):
    run = mlxspec("generate", *letters, "--max-tokens", "12", stdin=b"abc")
    assert run.returncode == 0
    assert run.stdout.decode() == text_of("abc", *letters)


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("--pair", "qwen3-8b"), None, "There is no prompt."),
        ((), b"", "There is no prompt."),
        (("-",), None, "The prompt is empty."),
        (("-",), b" \n", "The prompt is empty."),
        (("",), None, "The prompt is empty."),
        ((" \t\n",), None, "The prompt is empty."),
        ((), b"caf\xe9", "not valid UTF-8"),
        (("-",), b"\xff\xfe", "not valid UTF-8"),
        (("x",), b"\xff", "not valid UTF-8"),
        (("\udce9",), None, "not valid UTF-8"),
        ((), b"x = 1\n" * 4000, "the model's context is"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_one_error(generate, arguments, stdin, words):
    run = generate(*arguments, stdin=stdin)
    assert_one_error(run, 2, words)


def test_an_argument_that_is_not_utf8_reaches_the_process_as_bytes():
    run = mlxspec("generate", b"caf\xe9")
    assert_one_error(run, 2, "not valid UTF-8")


def test_a_terminal_is_never_waited_for():
    with TerminalRun("generate", "--pair", "qwen3-8b") as run:
        assert run.end() == 2
    assert "There is no prompt." in run.text


def test_a_pairs_own_prompt_and_sampling_hold_where_the_command_line_says_nothing(invoke):
    options = ("generate", "--no-compile", "--max-tokens", "8", "--json")
    run = invoke(*options)
    own, pair = run.json, find_pair("demo")
    assert pair.prompt.splitlines()[-1] in run.err
    assert own["sampling"] == dict(pair.sampling)
    assert own["prompt_tokens"] == invoke(*options, pair.prompt).json["prompt_tokens"]
    again = invoke(*options, "--seed", str(own["seed"])).json
    assert again["text"] == own["text"]
    mine = invoke(*options, "x = 1", "--top-p", "0.5").json
    assert mine["sampling"] == {**pair.sampling, "top_p": 0.5}
    assert mine["prompt_tokens"] < own["prompt_tokens"]


def test_plain_decoding_is_measured_beside_it(generate):
    run = generate("def f(x):", "--json", "--compare")
    speculating, plain = (run.json["compared"][name] for name in ("speculating", "plain"))
    assert speculating["tokens"] == plain["tokens"] == run.json["tokens"]
    assert speculating["speculation"]["enabled"] is True
    assert plain["speculation"]["enabled"] is False
    assert "tok/s with speculation" in run.err
    assert "the same text" in run.err


def test_a_pipe_that_stays_open_is_told_and_can_be_left_alone(letters):
    run, pipe = ("generate", *letters, "--max-tokens", "4", "abc"), subprocess.PIPE
    with subprocess.Popen(
        command(*run), env=environment(), stdin=pipe, stdout=pipe, stderr=pipe
    ) as waiting:
        assert b"waiting for stdin to end; --no-stdin" in waiting.stderr.readline()
        waiting.stdin.close()
        assert waiting.wait(60) == 0
    with subprocess.Popen(
        command(*run, "--no-stdin"), env=environment(), stdin=pipe, stdout=pipe, stderr=pipe
    ) as alone:
        assert alone.wait(60) == 0
        assert b"waiting" not in alone.stderr.read()


def test_a_byte_order_mark_is_no_part_of_a_prompt(generate):
    marked = generate("-", "--json", stdin=b"\xef\xbb\xbfdef f(x):").json
    assert marked["prompt_tokens"] == generate("def f(x):", "--json").json["prompt_tokens"]


def test_closed_streams_are_no_traceback():
    shell = 'exec "$0" -m mlxspec generate --pair qwen3-8b <&- 2>&1'
    run = subprocess.run(
        ["sh", "-c", shell, sys.executable], env=environment(), capture_output=True, check=False
    )
    assert run.returncode == 2
    assert is_one_error(run.stdout)


# --- what comes out ---------------------------------------------------------------------


def test_stdout_is_exactly_the_text_in_any_locale(tmp_path, text_of):
    # The two bytes of é in any order: characters, and replacements for what is none.
    accents = save_model(tmp_path / "accents", letters="abÃ©")
    sampling = ("--temp", "5", "--seed", "1", "--max-tokens", "60")
    arguments = ("--target", str(accents), "--no-compile", *sampling, "ab")
    with (tmp_path / "out.txt").open("wb") as out:
        run = subprocess.run(
            command("generate", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment(PYTHONIOENCODING="ascii:strict"),
            timeout=PATIENCE_S,
            check=False,
        )
    text = text_of(*arguments)
    assert run.returncode == 0
    assert (tmp_path / "out.txt").read_bytes() == text.encode()
    assert not text.isascii()
    assert len(run.stderr.splitlines()) == 1
    assert b"60 tokens" in run.stderr


def test_quiet_leaves_stderr_empty(generate):
    loud, quiet = generate("def f(x):"), generate("def f(x):", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out == loud.out
    assert len(loud.err.splitlines()) == 1


def test_a_reader_that_leaves_early_ends_it_quietly(letters):
    with started("generate", *letters, *FOREVER, "abc") as process:
        assert len(process.stdout.read(5)) == 5
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(PATIENCE_S) != 0
    assert len(stderr.splitlines()) <= 1
    assert b"Error" not in stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_is_one_error(letters):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        run = subprocess.run(
            command("generate", "abc", "--quiet", *letters),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert_one_error(run, 1)


def test_json_is_one_object_with_these_keys_and_types(generate):
    run = generate("def f(x):", "--json", "--draft-tokens", "3")
    assert run.out.endswith("}\n")
    assert run.out.count("\n") == 1
    number = (int, float)
    kinds = {
        "pair": str,
        "target": str,
        "draft": str,
        "prompt_tokens": int,
        "cached_prompt_tokens": int,
        "tokens": list,
        "text": str,
        "reasoning": str,
        "reasoning_tokens": int,
        "tool_calls": list,
        "finish_reason": str,
        "stopped_by": type(None),
        "written_by": dict,
        "seed": int,
        "sampling": dict,
        "notes": list,
        "speculation": {
            "enabled": bool,
            "draft_tokens": int,
            "verify": str,
            "exact": bool,
            "rounds": int,
            "drafted": int,
            "accepted": int,
            "acceptance_rate": number,
            "tokens_per_round": number,
            "drafted_by_position": list,
            "accepted_by_position": list,
            "by_source": dict,
            "history": list,
        },
        "timing": dict.fromkeys(
            ["load_s", "prefill_s", "time_to_first_token_s", "decode_s", "tokens_per_second"], float
        ),
        "memory": {"peak_gb": float},
    }

    def check(value, kind):
        if isinstance(kind, dict):
            assert list(value) == list(kind)
            for key in kind:
                check(value[key], kind[key])
        else:
            assert isinstance(value, kind)

    result = run.json
    check(result, kinds)
    assert (result["pair"], result["finish_reason"]) == ("demo", "length")
    assert len(result["tokens"]) == 12
    stats = result["speculation"]
    assert (stats["enabled"], stats["draft_tokens"]) == (True, 3)
    assert len(stats["accepted_by_position"]) == 3
    assert sum(stats["accepted_by_position"]) == stats["accepted"]
    assert stats["acceptance_rate"] == pytest.approx(stats["accepted"] / stats["drafted"], abs=1e-4)


# --- options ----------------------------------------------------------------------------


def pieces_of(tokens):
    tokenizer = Tokenizer.from_file(
        str(package_folder(find_pair("demo").target) / "tokenizer.json")
    )
    return [tokenizer.decode([token]) for token in tokens]


def test_text_ends_before_the_first_stop_string(generate):
    whole = generate("class Stack:\n", "--json", "--max-tokens", "60").json
    text, pieces = whole["text"], pieces_of(whole["tokens"])
    # A string that begins in one token and ends in the next one.
    ends = [sum(map(len, pieces[:count])) for count in range(5, 50)]
    at = next(end for end in ends if text.find(text[end - 1 : end + 1]) > 5)
    stop = text[at - 1 : at + 1]
    first = text[: text.find(stop)]
    for options in (["--stop", stop], ["--stop", stop, "--stop", "§"]):
        cut = generate("class Stack:\n", "--json", "--max-tokens", "60", *options).json
        assert (cut["text"], cut["finish_reason"]) == (first, "stop")
    plain = generate("class Stack:\n", "--max-tokens", "60", "--stop", stop, "--stop", first[3:6])
    assert plain.out == first[: first.find(first[3:6])]


def test_a_seed_repeats_the_text(generate):
    sample = ("def f(x):", "--json", "--temp", "1", "--max-tokens", "20")
    one, other = (generate(*sample, "--seed", seed).json for seed in ("1", "2"))
    assert generate(*sample, "--seed", "1").json["tokens"] == one["tokens"] != other["tokens"]
    assert one["speculation"]["draft_tokens"] == "auto"
    fixed = generate(*sample, "--seed", "1", "--draft-tokens", "5", "--verify", "coupled").json
    assert fixed["tokens"] == one["tokens"]
    # A seed that was drawn repeats a text where what is proposed does not depend on the clock.
    drawn = generate(*sample, "--draft-tokens", "3").json
    again = generate(*sample, "--draft-tokens", "3", "--seed", str(drawn["seed"])).json
    assert again["tokens"] == drawn["tokens"]
    assert drawn["speculation"]["verify"] == "block"
    assert one["speculation"]["verify"] == "coupled"


def test_what_was_chosen_is_told(generate):
    run = generate("def f(x):", "--json", "--max-tokens", "60")
    stats = run.json["speculation"]
    assert stats["draft_tokens"] == "auto"
    assert stats["history"][0]["round"] == 0
    assert {"round", "drafter", "draft_tokens"} == set(stats["history"][0])
    rounds = [visit["round"] for visit in stats["history"]]
    assert rounds == sorted(set(rounds))
    longest = max(visit["draft_tokens"] for visit in stats["history"])
    # A last round that the end cut short is in the history, and not counted.
    assert len(stats["drafted_by_position"]) == len(stats["accepted_by_position"]) <= longest
    assert sum(stats["drafted_by_position"]) == stats["drafted"]


def test_speculation_does_not_change_greedy_text(generate):
    arguments = ("def f(x):", "--json", "--max-tokens", "24")
    speculating = generate(*arguments, "--draft-tokens", "5").json
    assert speculating["speculation"]["enabled"] is True
    for option in (["--draft-tokens", "0"], ["--no-speculation"]):
        plain = generate(*arguments, *option).json
        assert plain["tokens"] == speculating["tokens"]
        assert plain["text"] == speculating["text"]
        assert plain["draft"] is None
        assert plain["speculation"]["enabled"] is False
        assert plain["speculation"]["draft_tokens"] == plain["speculation"]["drafted"] == 0


def test_sampled_text_by_the_coupled_rule_is_the_seeds_alone(generate):
    sample = ("def f(x):", "--json", "--temp", "1", "--verify", "coupled", "--seed", "5")
    filters = ("--top-p", "0.95", "--repetition-penalty", "1.1", "--xtc-probability", "0.2")
    results = [
        generate(*sample, *filters, *count).json
        for count in (("--no-speculation",), ("--draft-tokens", "2"), ("--max-draft-tokens", "5"))
    ]
    assert len({result["text"] for result in results}) == 1
    assert [result["speculation"]["draft_tokens"] for result in results] == [0, 2, 5]
    assert results[1]["speculation"]["verify"] == "coupled"


def test_penalties_and_biases_reach_the_text(generate):
    plain = generate("x = [", "--json").json["tokens"]
    banned = {str(token): "-inf" for token in set(plain)}
    result = generate("x = [", "--json", "--logit-bias", json.dumps(banned)).json
    assert not set(result["tokens"]) & set(plain)
    penalised = generate("x = [", "--json", "--repetition-penalty", "2").json
    assert len(set(penalised["tokens"])) > len(set(plain))


def test_relaxed_verification_is_labelled_everywhere(generate):
    relaxed = ("def f(x):", "--verify", "relaxed", "--temp", "1")
    assert "not exact: relaxed verification" in generate(*relaxed).err
    for arguments, exact in (
        (relaxed, False),
        ((*relaxed, "--no-speculation"), True),
        (("def f(x):", "--temp", "1"), True),
    ):
        run = generate(*arguments, "--json")
        assert run.json["speculation"]["exact"] is exact
        assert ("not exact" in run.err) is not exact


# --- audit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [(), ("--temp", "1", "--seed", "3")], ids=["greedy", "sampled"]
)
def test_an_audit_writes_one_line_and_no_text(invoke, sampling):
    options = ("--no-compile", "--max-tokens", "12", *sampling)
    run = invoke("audit", "def f(x):", *options)
    assert run.code == 0
    assert run.out.startswith("audit: identical: plain decoding writes the same ")
    assert run.out.count("\n") == 1
    report = invoke("audit", "def f(x):", "--json", *options).json["audit"]
    assert (report["outcome"], report["first"]) == ("identical", None)


def test_an_audit_beside_the_text(generate):
    text = generate("def f(x):").out
    run = generate("def f(x):", "--audit")
    assert (run.code, run.out) == (0, text)
    assert "audit: identical" in run.err
    assert generate("def f(x):", "--audit", "--json").json["audit"]["outcome"] == "identical"


def test_a_defect_is_told_and_ends_with_1(generate, monkeypatch):
    def tampered(logits, draft):
        verdict = greedy(logits, draft)
        return verdict._replace(next_token=verdict.next_token + 1)

    greedy = verify.greedy
    monkeypatch.setattr(verify, "greedy", tampered)
    run = generate("def f(x):", "--audit")
    assert run.code == 1
    assert "audit: defect at token " in run.err
    report = json.loads(generate("def f(x):", "--audit", "--json").out)["audit"]
    assert report["outcome"] == "defect"
    assert report["first"]["gap"] > report["noise"]


def test_an_audit_that_is_ended_says_how_far_it_came(invoke, monkeypatch):
    def measuring(self, progress):
        if (progress.what, progress.done) == (COMPARING, 20):
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "measuring", measuring)
    options = ("--no-compile", "--max-tokens", "24", "--draft-tokens", "3")
    run = invoke("audit", "def f(x):", *options)
    assert run.code == 130
    assert run.out.startswith("audit: identical, ended after 16 of 24 tokens: plain decoding ")
    run = invoke("generate", "def f(x):", "--audit", "--json", *options)
    assert run.code == 130
    result = json.loads(run.out)
    assert len(result["tokens"]) == 24
    assert (result["audit"]["tokens"], result["audit"]["of"]) == (16, 24)


def test_an_audit_that_mlx_keeps_from_listening_says_it_too(invoke, monkeypatch):
    def measuring(self, progress):
        if (progress.what, progress.done) == (COMPARING, 20):
            last_words = interrupts._leaving[-1]
            last_words()
            sys.exit(130)

    monkeypatch.setattr(Display, "measuring", measuring)
    run = invoke("audit", "def f(x):", "--no-compile", "--max-tokens", "24", "--draft-tokens", "3")
    assert run.out.startswith("audit: identical, ended after 16 of 24 tokens: plain decoding ")


def test_a_comparison_that_is_ended_takes_nothing_from_the_text(generate, monkeypatch):
    text = generate("def f(x):").out

    def ended(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", ended)
    run = generate("def f(x):", "--compare")
    assert (run.code, run.out) == (130, text)
    assert "output: 12 tokens in " in run.err
    run = generate("def f(x):", "--compare", "--json")
    assert (run.code, json.loads(run.out)["text"]) == (130, text.removesuffix("\n"))


# --- the prompt cache -------------------------------------------------------------------

CODE = "def fibonacci(n):\n    "


def test_a_second_run_takes_the_prompt_from_its_cache(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    without = generate(CODE).out
    first = generate(CODE, "--cache", "~/prompt")
    assert (first.out, "prompt" in first.err) == (without, False)
    second = generate(CODE, "--cache", "~/prompt")
    file = tmp_path / "prompt"
    count = generate(CODE, "--json", "--max-tokens", "1").json["prompt_tokens"]
    assert second.out == without
    assert f"read {count - 1} of {count} tokens of the prompt from {file}\n" in second.err
    longer = generate(f"{CODE}return 1\n", "--cache", str(file), "--json").json
    assert longer["cached_prompt_tokens"] == count - 1
    assert longer["text"] == generate(f"{CODE}return 1\n").out.removesuffix("\n")


def test_an_audit_takes_a_prompt_cache(invoke, tmp_path):
    options = ("--no-compile", "--max-tokens", "8", "--cache", str(tmp_path / "prompt"), "--json")
    invoke("generate", CODE, *options)
    result = invoke("audit", CODE, *options).json
    assert result["cached_prompt_tokens"] > 0
    assert result["audit"]["outcome"] == "identical"


def test_a_prompt_cache_that_is_no_file(generate, tmp_path):
    run = generate(CODE, "--cache", str(tmp_path))
    assert_one_error(run, 2, f"The prompt cache {tmp_path} is a folder.")
    run = generate(CODE, "--cache", "~nobody-of-that-name/cache")
    assert run.code == 0
    assert "the prompt could not be kept in ~nobody-of-that-name/cache" in run.err


# --- models -----------------------------------------------------------------------------


def test_folders_take_the_place_of_a_pairs_models(generate, letters):
    demo = package_folder("package:demo")
    own = generate("def f(x):", "--json").json
    target = generate("def f(x):", "--json", "--target", str(demo / "target")).json
    assert target["tokens"] == own["tokens"]
    assert (target["target"], target["draft"]) == (str(demo / "target"), None)
    draft = generate("def f(x):", "--json", "--draft", str(demo / "draft")).json
    assert draft["tokens"] == own["tokens"]
    assert (draft["pair"], draft["draft"]) == ("demo", str(demo / "draft"))
    pair = generate("abc", "--json", "--draft-tokens", "3", *letters).json
    assert pair["speculation"]["acceptance_rate"] == 1.0


def test_a_chat_template_is_used_unless_raw(generate, tmp_path):
    template = "{{ messages|map(attribute='content')|join }} {{ messages|length }}"
    folder = save_model(tmp_path / "chat", template=template)
    counted = {
        options: generate("abc", "--json", "--target", str(folder), *options).json["prompt_tokens"]
        for options in [(), ("--raw",), ("--system", "abcdef")]
    }
    # The template's figure is in no token.
    assert counted == {(): 4, ("--raw",): 3, ("--system", "abcdef"): 10}


def test_reasoning_is_apart_and_out_of_a_pipe(generate, tmp_path):
    # A template that opens the reasoning, of a model that never ends it.
    template = "{{ messages[0].content }} <think>{# and </think> ends it #}"
    folder = save_model(tmp_path / "thinks", letters=f"{LETTERS}<>", template=template)
    arguments = ("abc", "--target", str(folder), "--max-tokens", "9")
    piped, shown = generate(*arguments), generate(*arguments, "--show-reasoning")
    result = generate(*arguments, "--json").json
    assert len(result["reasoning"]) == 9
    assert result["text"] == piped.out == ""
    assert "inside the reasoning, at the limit of 9 tokens" in result["notes"][-1]
    assert piped.err.startswith(result["notes"][-1])
    assert shown.out == f"<think>\n{result['reasoning']}"
    raw = generate(*arguments, "--json", "--raw").json
    assert (len(raw["text"]), raw["reasoning"]) == (9, "")


def test_a_system_message_needs_a_chat_template(generate):
    for options in ([], ["--raw"]):
        run = generate("def f(x):", "--system", "Be brief.", *options)
        assert_one_error(run, 2, "system message")


@pytest.mark.parametrize(
    ("call", "nearest"),
    [(("generate", "a", "--pair", "dmo"), "demo"), (("pairs", "show", "qwen3-8c"), "qwen3-8b")],
)
def test_an_unknown_pair_suggests_the_nearest(invoke, call, nearest):
    run = invoke(*call)
    assert_one_error(run, 2, f"`{nearest}`")


def test_a_table_of_ones_own_gives_pairs(generate, letters, tmp_path):
    table = tmp_path / "mine.toml"
    table.write_text(f'[mine]\ntarget = "{letters[1]}"\ndraft = "{letters[1]}"\ndraft_tokens = 2\n')
    run = generate("abc", "--json", "--models", str(table), "--pair", "mine").json
    assert (run["pair"], run["speculation"]["draft_tokens"]) == ("mine", 2)
    table.write_text("[mine]\n")
    bad = generate("abc", "--models", str(table), "--pair", "mine")
    assert_one_error(bad, 2, str(table))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-tokens", "0"),
        ("--draft-tokens", "-1"),
        ("--draft-tokens", "65"),
        ("--temp", "-1"),
        ("--temp", "nan"),
        ("--temp", "inf"),
        ("--temp", "warm"),
        ("--top-p", "1.1"),
        ("--top-p", "nan"),
        ("--top-k", "-1"),
        ("--min-p", "2"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--draft-tokns", "3"),
        ("a second argument",),
        ("--verify", "blok"),
        ("--verify", "greedy", "--temp", "1"),
        ("--acceptance-threshold", "0.5"),
        ("--acceptance-threshold", "2", "--verify", "relaxed"),
        ("--xtc-probability", "1.5"),
        ("--xtc-threshold", "0.6"),
        ("--repetition-penalty", "-1"),
        ("--presence-penalty", "nan"),
        ("--frequency-context-size", "-1"),
        ("--logit-bias", "42"),
        ("--logit-bias", '{"a": 1}'),
        ("--logit-bias", '{"-1": 1}'),
        ("--logit-bias", '{"1": Infinity}'),
        ("--json-schema", "{}"),
        ("--grammar", "root ::= .*"),
        ("--pair", "qwen3-8b", "--target", "somewhere"),
        ("--audit", "--temp", "1", "--verify", "block"),
    ],
)
def test_what_is_out_of_range_or_unknown_ends_with_2(invoke, arguments):
    run = invoke("generate", "def f(x):", *arguments)
    assert_one_error(run, 2)


def test_a_schema_is_refused_with_what_there_is_in_its_place(generate):
    run = generate("abc", "--json-schema", "{}")
    assert is_one_error(run.err)
    assert "cannot be constrained" in run.err
    assert "logits processors" in run.err


def test_a_damaged_model_is_one_error(generate, tmp_path):
    run = generate("abc", "--target", str(tmp_path / "none"))
    assert_one_error(run, 1)


# --- commands that need no model --------------------------------------------------------


def test_interrupted_while_it_is_imported():
    program = """
import sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
from mlxspec.__main__ import main
main()
"""
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"")


def test_version(invoke):
    assert invoke("--version") == Ended(0, f"mlxspec {__version__}\n", "")


@pytest.mark.parametrize("name", [(), ("generate",), ("audit",), ("pairs",), ("pairs", "list")])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(invoke, name, option):
    run = invoke(*name, option)
    assert (run.code, run.err) == (0, "")
    assert "Usage:" in run.out


def test_pairs_list(invoke):
    run = invoke("pairs", "list")
    assert (run.code, run.err) == (0, "")
    listed = invoke("pairs", "list", "--json").json
    assert [pair["name"] for pair in listed] == list(load_pairs(Path(os.devnull)))
    for pair in listed:
        assert pair["name"] in run.out
        assert json.loads(json.dumps(find_pair(pair["name"]).as_dict())).items() <= pair.items()
    demo = listed[0]
    assert (demo["on_disk"], demo["fits"], demo["memory_is_exact"]) == ("here", True, True)
    assert 6e6 < demo["disk_bytes"] < demo["memory_bytes"] < 1e8


def test_pairs_list_by_tag_and_by_what_fits(invoke):
    tagged = invoke("pairs", "list", "--tag", "code", "--tag", "moe", "--json").json
    assert tagged
    assert all({"code", "moe"} <= set(pair["tags"]) for pair in tagged)
    fitting = invoke("pairs", "list", "--fits", "--json").json
    assert "demo" in [pair["name"] for pair in fitting]
    assert all(pair["fits"] for pair in fitting)
    neither = invoke("pairs", "list", "--tag", "embedded", "--tag", "moe")
    assert neither.out == "no pair of the table is like that\n"


@pytest.mark.parametrize(("columns", "widest"), [("80", 80), ("60", 60)])
def test_pairs_list_is_aligned_and_fits_a_terminal(invoke, monkeypatch, columns, widest):
    monkeypatch.setenv("COLUMNS", columns)
    lines = invoke("pairs", "list").out.splitlines()
    rows = [line for line in lines[1:] if re.search(r"[B?] +(yes|no|[?]) ", line)]
    head = lines[0]
    assert len(rows) > 20
    assert max(len(row.rstrip()) for row in rows) <= widest
    at = head.index("fits")
    assert {row[at:].split()[0] for row in rows} <= {"yes", "no", "?"}


def test_pairs_show(invoke):
    run = invoke("pairs", "show", "qwen3-8b")
    assert (run.code, run.err) == (0, "")
    shown = invoke("pairs", "show", "qwen3-8b", "--json").json
    entry = json.loads(json.dumps(find_pair("qwen3-8b").as_dict()))
    assert entry.items() <= shown.items()
    assert (shown["learned"], shown["memory"]) == ([], None)
    assert [one["on_disk"] for one in shown["models"]] == ["absent", "absent"]
    assert shown["target"] in run.out
    assert shown["draft"] in run.out
    assert "mlxspec pairs check qwen3-8b" in run.out


def test_pairs_show_sums_up_memory(invoke):
    def memory(*options: str) -> dict[str, Any]:
        shown: dict[str, Any] = invoke("pairs", "show", "demo", *options, "--json").json["memory"]
        return shown

    usual, short = memory(), memory("--context", "128")
    parts = usual["past"]
    assert {one["model"] for one in parts} == {"target", "draft"}
    assert usual["context"] == 1024
    together = sum(usual["weights"].values()) + sum(one["bytes"] for one in parts)
    together += usual["states"] + usual["passes"] + usual["headroom"]
    assert usual["total"] == together
    assert usual["fits"]
    assert short["total"] < usual["total"]
    run = invoke("pairs", "show", "demo")
    assert "memory for a text of 1,024 tokens" in run.out
    assert run.out.rstrip().endswith("it fits")


def test_pairs_show_what_a_table_says_to_the_letter(invoke, tmp_path):
    table = tmp_path / "mine.toml"
    table.write_text(
        '[mine]\ntarget = "org/[x]"\nnote = "fast [/b] [red]"\n["[b]"]\ntarget = "x"\n'
    )
    run = invoke("pairs", "show", "mine", "--models", str(table))
    assert run.code == 0
    assert "org/[x]" in run.out
    assert "fast [/b] [red]" in run.out
    assert "[b]" in invoke("pairs", "list", "--models", str(table)).out


def test_the_script_of_the_checkout_does_the_same(letters, text_of):
    run = subprocess.run(
        [sys.executable, "cli.py", "generate", *letters, "--max-tokens", "12", "abc"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    assert run.stdout.decode() == text_of("abc", *letters)


WITHOUT_MODELS = (["--help"], ["--version"], ["generate", "-h"], ["pairs", "default"])


def test_what_needs_no_model_imports_no_model_library():
    code = f"""
import sys
from mlxspec.cli.app import main
for arguments in {WITHOUT_MODELS!r}:
    sys.argv = ["mlxspec", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
heavy = {{"mlx", "mlx_lm", "transformers", "tokenizers", "huggingface_hub", "numpy"}}
print("imported:", heavy & {{name.partition(".")[0] for name in sys.modules}})
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, check=True
    )
    assert run.stdout.decode().splitlines()[-1] == "imported: set()"


SCREEN = "import typer, rich.console, rich.markdown, rich.table"  # any help text takes these


def processor_seconds(arguments):
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["pairs", "default"]])
def test_what_needs_no_model_answers_at_once(arguments):
    # A bound in seconds would depend on the machine; mlx-lm would add eight times as much.
    bare, ours = [], []
    for _ in range(6):  # on a busy machine the first may not tell
        bare.append(processor_seconds([sys.executable, "-c", SCREEN]))
        ours.append(processor_seconds(command(*arguments)))
        if min(ours) < 3 * min(bare):
            return
    raise AssertionError(f"{min(ours):.2f} s, and {min(bare):.2f} s without mlxspec")


# --- a terminal -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "styled"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_the_text_with_styles_where_it_has_colours(
    letters, text_of, tmp_path, changes, styled
):
    arguments = (*letters, "--max-tokens", "60", "abc")
    with (
        (tmp_path / "err").open("wb") as err,
        TerminalRun("generate", *arguments, env=environment(**changes), stderr=err) as run,
    ):
        assert run.end() == 0
    assert STYLE.sub("", run.text) == text_of(*arguments) + "\n"
    assert bool(STYLE.search(run.text)) is styled


def test_a_terminal_shows_text_live_line_and_summary(letters, text_of):
    # A fixed number: with auto, a draft that is as slow as its target may be given up.
    arguments = (*letters, "--max-tokens", "400", "--draft-tokens", "3", "abc")
    with TerminalRun("generate", *arguments) as run:
        run.read_until(lambda output: b"tok/s" in output and b"acceptance" in output)
        assert "length limit" not in run.text
        assert run.end() == 0
    summary = run.text[run.text.index("400 tokens") :]
    for words in ("tok/s", "length limit", "written", "tokens per round", "peak memory"):
        assert words in summary
    # A draft that is the target itself is never wrong.
    assert re.search(r"model \d\d% · (history \d+% · )?target \d+%", summary)
    assert text_of(*arguments)[:1] in run.text


def test_quiet_on_a_terminal_is_the_text_alone(letters, text_of):
    arguments = (*letters, "--max-tokens", "40", "abc")
    with TerminalRun("generate", *arguments, "--quiet") as run:
        assert run.end() == 0
    assert STYLE.sub("", run.text) == text_of(*arguments) + "\n"


def test_ctrl_c_keeps_the_text_and_sums_up(letters, text_of, tmp_path):
    out = tmp_path / "out.txt"
    with (
        out.open("wb") as stdout,
        TerminalRun("generate", *letters, *FOREVER, "abc", stdout=stdout) as run,
    ):
        wait_for(lambda: out.stat().st_size > 40)
        run.interrupt()
        assert run.end() == 130
    kept = out.read_text()
    assert text_of(*letters, "--max-tokens", str(len(kept)), "abc") == kept
    assert f"{len(kept)} tokens" in run.text
    assert "interrupted" in run.text
    assert "Traceback" not in run.text


def test_ctrl_c_on_a_terminal_leaves_it_usable(letters):
    with TerminalRun("generate", *letters, *FOREVER, "abc") as run:
        run.read_until(lambda output: b"acceptance" in output)
        run.interrupt()
        assert run.end() == 130
    assert "interrupted" in run.text
    assert "Traceback" not in run.text
    assert run.text.endswith("\n")
    assert run.text.count("\x1b[?25l") <= run.text.count("\x1b[?25h")


def test_ctrl_c_with_json_prints_the_object(letters, tmp_path):
    out = tmp_path / "out.json"
    with (
        out.open("wb") as stdout,
        TerminalRun("generate", *letters, *FOREVER, "--json", "abc", stdout=stdout) as run,
    ):
        run.read_until(lambda output: b"tok/s" in output)
        run.interrupt()
        assert run.end() == 130
    result = json.loads(out.read_text())
    assert result["finish_reason"] == "interrupted"
    assert len(result["tokens"]) == len(result["text"]) > 0


def test_ctrl_c_while_loading_is_quiet(tmp_path):
    os.mkfifo(tmp_path / "config.json")  # whoever reads it waits
    opened: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):
            opened.append(os.open(tmp_path / "config.json", os.O_WRONLY | os.O_NONBLOCK))
        return bool(opened)

    with started("generate", "abc", "--target", str(tmp_path)) as process:
        wait_for(is_read)
        process.send_signal(signal.SIGINT)
        os.close(opened[0])  # ends a read that began just after the signal
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, b"", b"")


# --- kernels for the CPU ----------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not (kernels.on_cpu() and kernels.can_compile()), reason="kernels are built on a CPU alone"
)


@needs_compiler
def test_building_kernels_is_said_and_can_be_interrupted(letters, tmp_path):
    arguments = [argument for argument in letters if argument != "--no-compile"]
    with TerminalRun("generate", *arguments, "abc", env=environment(TMPDIR=str(tmp_path))) as run:
        run.read_until(lambda output: b"building CPU kernels" in output)
        run.interrupt()
        assert run.end() == 130
    assert "Traceback" not in run.text
    assert "tokens in" not in run.text


@needs_compiler
def test_without_a_compiler_it_runs_uncompiled(letters, text_of, tmp_path):
    arguments = [argument for argument in letters if argument != "--no-compile"]
    env = environment(TMPDIR=str(tmp_path), PATH=str(tmp_path))
    run = mlxspec("generate", *arguments, "--max-tokens", "12", "abc", env=env)
    assert (run.returncode, run.stdout.decode()) == (0, text_of("abc", *letters))
    assert not list(tmp_path.rglob("*.so"))


# --- proposals from the text ------------------------------------------------------------

LOOP = "x = [0, 0, 0]\n" * 6


def test_a_model_alone_proposes_what_followed_before(generate):
    arguments = (LOOP, "--json", "--max-tokens", "40")
    plain = generate(*arguments, "--no-speculation").json
    run = generate(*arguments, "--draft", "history", "--draft-tokens", "4")
    assert run.json["tokens"] == plain["tokens"]
    assert run.json["draft"] is None
    history = run.json["speculation"]["by_source"]["history"]
    assert history["accepted"] > 10
    assert "accepted" in run.err


def test_what_is_expected_is_proposed(generate, tmp_path):
    plain = generate(LOOP, "--json", "--max-tokens", "40", "--no-speculation").json
    expected = tmp_path / "expected.txt"
    expected.write_text(plain["text"])
    run = generate(
        *(LOOP, "--json", "--max-tokens", "40", "--draft-tokens", "4"),
        *("--prediction", str(expected)),
    )
    assert run.json["tokens"] == plain["tokens"]
    sources = run.json["speculation"]["by_source"]
    assert sources["prediction"]["accepted"] > 10
    assert "model" in sources or sources["prediction"]["acceptance_rate"] == 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_prediction_that_cannot_be_read_is_one_error(generate, tmp_path, content):
    path = tmp_path / "expected.txt"
    if content is not None:
        path.write_bytes(content)
    run = generate("x", "--prediction", str(path))
    assert_one_error(run, PromptError.exit_code, "expected.txt")
