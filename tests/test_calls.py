"""What a person meets before any model is loaded: help, and calls that are wrong."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_tools import assert_one_error, is_one_error

from mlxspec.cli.app import main
from mlxspec.cli.arguments.prompts import read_prompt
from mlxspec.cli.screen import streams
from mlxspec.errors import PromptError

ENCODINGS = ("utf-8", "ascii", "latin-1", "cp1252")
COMMANDS = ("generate", "audit", "probe", "tune", "pairs")


class Ended(NamedTuple):
    code: int
    out: bytes
    err: bytes


Call = Callable[..., Ended]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Call:
    """Calls the command with streams of an encoding, which is strict at first."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("COLUMNS", raising=False)

    def called(*arguments: str, encoding: str = "utf-8", columns: int | None = None) -> Ended:
        written = io.BytesIO(), io.BytesIO()
        with monkeypatch.context() as patch:
            for name, stream in zip(("stdout", "stderr"), written, strict=True):
                patch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))
            patch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115, PTH123
            patch.setattr(sys, "argv", ["mlxspec", *arguments])
            if columns is not None:
                patch.setenv("COLUMNS", str(columns))
            with pytest.raises(SystemExit) as ended:
                main()
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdin.close()
            return Ended(ended.value.code or 0, written[0].getvalue(), written[1].getvalue())

    return called


# --- help -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 200])
def test_help_fits_any_width_and_cuts_no_name(call: Call, columns: int) -> None:
    for command in COMMANDS:
        words = call(command, "--help", columns=columns).out.decode()
        assert "…" not in words
        for line in words.partition("Examples:")[0].splitlines():
            # What is too long for a line is one name that a person may copy.
            assert len(line) <= min(columns, 100) or "  " not in line.strip()
            assert len(line) <= min(columns, 100) or columns <= 60
    words = call("generate", "--help", columns=columns).out.decode()
    for name in ("--repetition-context-size", "--draft-tokens, --max-draft-tokens", "--help"):
        assert name in words
    titles = [line for line in words.splitlines() if line.endswith(":") and line[0] != " "]
    expected = ["Arguments", "Models", "Speculation", "Text", "Sampling", "Penalties", "Output"]
    expected += ["Upstream", "Many texts"]
    assert titles == [f"{title}:" for title in (*expected, "Options", "Examples")]


@pytest.mark.parametrize("columns", [20, 30, 40, 60])
def test_pairs_are_whole_in_any_width(call: Call, columns: int) -> None:
    lines = call("pairs", "list", columns=columns).out.decode().splitlines()
    assert max(map(len, lines)) <= columns
    words = "".join("".join(lines).split())
    for part in ("demo", "qwen3-8b", "deepseek-r1-qwen-32b", "gpt-oss-120b"):
        assert part in words
    shown = call("pairs", "show", "demo", columns=columns).out.decode()
    assert "draftpackage:demo/draft" in "".join(shown.split())


def test_groups_show_their_help_alone(call: Call) -> None:
    for group, inside in [((), "generate"), (("pairs",), "list")]:
        run = call(*group)
        assert (run.code, run.err) == (2, b"")
        assert f"\n  {inside} ".encode() in run.out
        assert run.out == call(*group, "--help").out


# --- wrong calls ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "-5 + 3",
        "--- a/file\n+++ b/file",
        "- one\n- two",
        "-5",
        "-q is what?",
        "-h what",
        "-- x",
        "---",
    ],
)
@pytest.mark.parametrize("before", [(), ("--max-tokens", "3", "-q")])
def test_a_prompt_that_begins_with_a_dash_is_told_how_to_go(
    call: Call, prompt: str, before: tuple[str, ...]
) -> None:
    run = call("generate", *before, prompt)
    assert_one_error(run, 2, "begins with a dash", "mlxspec generate -- ")
    # And so it goes: what is missing now is the model.
    assert b"no model folder" in call("generate", "--target", "/none", "--", prompt).err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--draft-tokns", "3", "a"], "no option --draft-tokns.|--draft-tokens"),
        (["generate", "-x", "a b"], "no option -x.|a prompt that begins with a dash"),
        (["generate", "-qx"], "no option -x."),
        (["pairs", "list", "-5 x"], "no option -5.|lists all."),
        (["generate", "--max-tokens"], "'--max-tokens' requires|mlxspec generate --help"),
        (["generate", "--max-tokens", "x"], "'--max-tokens': Input should be a valid integer."),
        (["generate", "one", "two"], "another argument: two.|in quotes"),
        (["generate", "--", "-5", "--raw"], "another argument: --raw.|options before --"),
        (["generat", "x"], "command 'generat'.|Did you mean 'generate'?"),
        (["Why is it?"], "command 'Why is it?'.|mlxspec generate 'Why is it?' writes a text"),
        (
            ["pairs", "lst"],
            "command 'lst'.|Did you mean 'list'?| pairs --help` lists them.\n",
        ),
        (["list"], "Did you mean `| pairs list`? `| --help` lists them; "),
        (["pull", "x"], "Did you mean `| pairs pull`?"),
        (["run", "qwen3-8b"], "Did you mean `| chat`?"),
        (["pairs", "list", "--tag", "cod"], "No pair has the tag 'cod'.|Tags: |code, "),
        (["doctor", "x"], "another argument: x.| doctor --help` shows what it takes.\n"),
        (["pairs", "show"], "Missing argument 'name'.|mlxspec pairs show --help"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_hint(call: Call, arguments: list[str], words: str) -> None:
    run = call(*arguments, columns=30)  # whose width breaks no line
    assert_one_error(run, 2, *words.split("|"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "x", "--models", "/none.toml"], "The table /none.toml cannot be read"),
        (["--models", "~nobody-here/x.toml"], "The table ~nobody-here/x.toml cannot be read"),
        (["--prediction", "~nobody-here/x"], "The file ~nobody-here/x cannot be read"),
        (["--kv-group-size", "32"], "says nothing without --kv-bits"),
        (["--draft-bits", "5"], "--draft-bits is 5."),
        (["--compare", "--no-speculation"], "--compare has nothing to compare"),
        (["--compare", "--draft-tokens", "0"], "--compare has nothing to compare"),
        (["--compare", "--quiet"], "--compare shows nothing with --quiet"),
        (["--no-speculation", "--draft-tokens", "4"], "leaves --draft-tokens 4 no place"),
        (["--no-speculation", "--draft-tokens", "auto"], "leaves --draft-tokens auto no place"),
        (["--stop", "x", "--stop", ""], "A stop string is empty."),
    ],
)
def test_what_is_given_beside_something_else_is_true_too(
    call: Call, arguments: list[str], words: str
) -> None:
    run = call("generate", *arguments, "a")
    assert_one_error(run, 2, words)


# --- stdin ------------------------------------------------------------------------------


def test_a_file_that_a_loop_reads_is_left_to_it(tmp_path: Path) -> None:
    """While a shell reads it line by line, each line is the argument of a command."""
    path, notes = tmp_path / "lines", list[str]()
    path.write_text("one\ntwo\nthree\n")
    with path.open("rb", buffering=0) as stdin:
        assert read_prompt("say", stdin, tell=notes.append) == "say\n\none\ntwo\nthree\n"
        for offset in (4, 14):
            stdin.seek(offset)
            assert read_prompt("one", stdin, tell=notes.append) == "one"
            assert stdin.tell() == offset
        assert len(notes) == 2
        assert "left alone" in notes[0]
        stdin.seek(4)
        assert read_prompt("-", stdin) == "two\nthree\n"
        stdin.seek(4)
        assert read_prompt(None, stdin) == "two\nthree\n"
        assert len(notes) == 2


# --- encodings --------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_encoding_holds_what_is_said(call: Call, tmp_path, encoding: str) -> None:
    table = tmp_path / "models.toml"
    table.write_text(
        '[mine]\ntarget = "é/ж"\nnote = "5 … 6 · “漢”"\n["ж"]\ntarget = "x"\n', encoding="utf-8"
    )
    for arguments in (["--help"], *([command, "-h"] for command in COMMANDS)):
        run = call(*arguments, encoding=encoding)
        assert (run.code, run.err) == (0, b"")
    mine = ("--models", str(table))
    for arguments in (["list", *mine], ["show", "mine", *mine]):
        run = call("pairs", *arguments, encoding=encoding)
        assert (run.code, run.err) == (0, b"")
        assert "ж" in run.out.decode(encoding) or "\\u0436" in run.out.decode(encoding)
        shown = run.out.decode(encoding)
        if encoding == "ascii" and "show" in arguments:
            assert '5 ... 6 - "\\u6f22"' in " ".join(shown.split())
    # An object is in UTF-8 wherever it goes.
    assert '"é/ж"'.encode() in call("pairs", "show", "mine", "--json", *mine, encoding=encoding).out
    run = call("generate", "--pair", "ж\udce9", encoding=encoding)
    assert run.code == 2
    assert is_one_error(run.err.decode(encoding))


def test_letters_of_terminals_have_plain_ones() -> None:
    streams.prepare()
    plain = "─│╭█▌⠋×·".encode("ascii", "mlxspec.plain")
    assert plain == b"---##*x-"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "mlxspec.plain")


def test_an_argument_in_utf8_is_text_where_the_locale_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What Python makes of it where the locale is that of C.
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    given = "é ж".encode().decode("ascii", "surrogateescape")
    assert streams.as_text(given, "The prompt") == "é ж"
    assert streams.as_text("é", "The prompt") == "é"
    with pytest.raises(PromptError, match="The prompt is not valid UTF-8"):
        streams.as_text("a\udce9", "The prompt")
