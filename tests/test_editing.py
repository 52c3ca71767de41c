"""A person's own table: what commands change in it, and what stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_tools import LETTERS, assert_one_error, save_model

from mlxspec.pairs import editing
from mlxspec.pairs.table import default_pair, find_pair, load_pairs, user_table

BEFORE = """# my pairs

[first]  # the best
target = "org/a"   # of the hub
draft = ["org/b",
         "org/c"]

# another
[second]
target = "org/d"
"""


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = user_table()
    assert tmp_path in path.parents
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    big = save_model(place / "big", hidden_size=64, num_hidden_layers=4)
    other = save_model(place / "other", letters=LETTERS.upper())
    return {"big": str(big), "small": str(save_model(place / "small")), "other": str(other)}


def written(table: Path) -> Path:
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(BEFORE)
    return table


def test_an_entry_is_added_behind_the_others_which_stay_to_the_letter(table):
    written(table)
    pair = editing.add("third", {"target": "org/e", "draft": "history", "tags": ["x"]})
    assert pair == find_pair("third")
    assert table.read_text().startswith(BEFORE)
    assert list(load_pairs())[-3:] == ["first", "second", "third"]


def test_a_table_is_made_where_there_is_none(table):
    assert not table.exists()
    editing.add("a.b", {"target": "org/e"})
    assert table.read_text() == '["a.b"]\ntarget = "org/e"\n'


def test_an_entry_is_changed_in_its_place(table):
    written(table)
    editing.add("first", {"target": "org/z"})
    text = table.read_text()
    assert text.index('target = "org/z"') < text.index("# another") < text.index("[second]")
    assert find_pair("first").drafts == ()


def test_an_entry_is_removed_alone(table):
    written(table)
    assert editing.remove("first") is False
    text = table.read_text()
    assert text == '# my pairs\n\n\n# another\n[second]\ntarget = "org/d"\n'


def test_the_shipped_pair_holds_again_once_a_change_of_it_is_removed(table):
    editing.add("demo", {"target": "org/z"})
    assert find_pair("demo").target == "org/z"
    assert editing.remove("demo") is True
    assert find_pair("demo").target == "package:demo/target"


def test_the_default_is_the_first_line_and_is_changed_there(table):
    written(table)
    editing.choose("second")
    assert default_pair() == "second"
    assert table.read_text() == 'default = "second"\n\n' + BEFORE
    editing.choose("demo")
    assert table.read_text() == 'default = "demo"\n\n' + BEFORE
    editing.choose("first")
    editing.remove("first")
    assert default_pair() == "demo"


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (("add", "x", "--target", "org/a", "--no-check", "--draft-tokens", "65"), 2, "0-64"),
        (("add", "x", "--target", "org/a", "--no-check", "--draft-tokens", "many"), 2, "'many'"),
        (("add", "x", "--target", "", "--no-check"), 2, "`x.target` is empty"),
        (("remove", "demo"), 2, "is a pair that is shipped"),
        (("remove", "frist"), 2, "`first`"),
        (("default", "frist"), 2, "`first`"),
    ],
)
def test_a_wrong_change_changes_nothing(table, invoke, call, code, words):
    written(table)
    run = invoke("pairs", *call)
    assert_one_error(run, code, words)
    assert table.read_text() == BEFORE


def test_a_table_that_cannot_be_used_is_never_written_over(table, invoke):
    written(table).write_text("[first]\nno = 1\n")
    run = invoke("pairs", "add", "x", "--target", "org/a", "--no-check")
    assert run.code == 2
    assert f"{table}, line 2: `first.no`" in run.err
    assert table.read_text() == "[first]\nno = 1\n"


def test_a_pair_is_added_once_its_models_fit_together(table, models, invoke):
    good = ("--target", models["big"], "--draft", models["small"], "--tag", "mine")
    run = invoke("pairs", "add", "good", *good)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"good is in {table}\n"
    pair = find_pair("good")
    assert (pair.target, pair.drafts, pair.tags) == (models["big"], (models["small"],), ("mine",))
    text = invoke("generate", "--pair", "good", "--no-compile", "--max-tokens", "4", "abc")
    assert text.code == 0
    before = table.read_text()
    bad = invoke("pairs", "add", "bad", "--target", models["big"], "--draft", models["other"])
    assert bad.code == 2
    assert "bad was not added" in bad.err
    assert table.read_text() == before


def test_the_default_runs_where_nothing_is_named(table, models, invoke):
    editing.add("own", {"target": models["small"]})
    run = invoke("pairs", "default", "own")
    assert run.out == "own runs where no pair is named\n"
    written_text = invoke("generate", "--json", "--no-compile", "--max-tokens", "4", "abc")
    assert written_text.json["pair"] == "own"
    assert invoke("pairs", "default").out == "own runs where no pair is named\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('[a]\ntarget = "x"\n[a.sampling]\ntop_k = 1\n[b]\ntarget = "y"\n', '[b]\ntarget = "y"\n'),
        ('[a]\ntarget = "x"\n[b]\ntarget = "y"\n[a.sampling]\ntop_k = 1\n', '[b]\ntarget = "y"\n'),
        ('[b]\ntarget = "y"\n\n[a]\nprompt = """\n[c]\n# no comment\n"""\ntarget = "x"\n',
         '[b]\ntarget = "y"\n\n'),
        ('[a]\ntarget = "x"\n# the end\n', "# the end\n"),
    ],
)  # fmt: skip
def test_whatever_an_entry_looks_like_it_is_removed_whole(table, before, after):
    written(table).write_text(before)
    editing.remove("a")
    assert table.read_text() == after
