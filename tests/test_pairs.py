"""The table of pairs: what is shipped, what people lay over it, and tables that cannot be used."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlxspec.defaults import DEFAULT_DRAFT_TOKENS
from mlxspec.errors import TableError, UnknownPair
from mlxspec.pairs.table import Pair, default_pair, find_pair, load_pairs, package_folder
from mlxspec.pairs.table import user_table as place_of_user_table

SHIPPED = list(load_pairs(Path(os.devnull)))


@pytest.fixture(autouse=True)
def user_table(tmp_path, monkeypatch):
    """Where the user's table belongs on this platform, in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    path = place_of_user_table()
    assert tmp_path in path.parents
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def table(tmp_path):
    """Writes a table for `--models` and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "tables" / "mine.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_pairs_of_every_size_and_family_are_shipped():
    pairs = load_pairs()
    assert list(pairs) == SHIPPED
    assert len(pairs) > 20
    for name, pair in pairs.items():
        assert pair.name == name
        assert pair.target
        assert pair.draft
        assert pair.note
        assert "\n" not in pair.note
    assert all(pair.draft_tokens == DEFAULT_DRAFT_TOKENS for pair in pairs.values())
    tags = {tag for pair in pairs.values() for tag in pair.tags}
    assert {"8gb", "16gb", "32gb", "64gb", "128gb", "code", "moe", "hybrid"} <= tags


def test_every_repository_says_where_its_claim_comes_from_and_which_mac_it_is_for():
    for pair in load_pairs().values():
        if "embedded" in pair.tags:
            continue
        assert pair.source, pair.name
        assert sum(tag.endswith("gb") for tag in pair.tags) == 1, pair.name
        (memory,) = (int(tag[:-2]) for tag in pair.tags if tag.endswith("gb"))
        assert pair.gb is None or pair.gb < 0.75 * memory, pair.name
        assert not pair.trust_remote_code


def test_no_pair_mixes_the_vocabularies_of_qwen():
    """Qwen3.5 and later have other tokens than Qwen3 and Qwen2.5."""
    for pair in load_pairs().values():
        newer = {"Qwen3.5" in one or "Qwen3.6" in one or "Qwen3.8" in one for one in _models(pair)}
        assert len(newer) == 1, pair.name


def _models(pair):
    return (pair.target, *pair.models)


def test_the_demo_pair_is_inside_the_package():
    demo = find_pair("demo")
    for location in (demo.target, demo.draft):
        assert (package_folder(location) / "config.json").is_file()


def test_a_table_changes_single_keys_of_a_pair(table):
    models = table("[demo]\ndraft_tokens = 7\n")
    shipped = find_pair("demo")
    changed = find_pair("demo", models)
    assert changed == replace(shipped, draft_tokens=7)
    assert list(load_pairs(models)) == SHIPPED


def test_a_table_takes_the_draft_of_a_pair_away(table):
    shipped = find_pair("demo")
    changed = find_pair("demo", table('[demo]\ndraft = "none"\n'))
    assert changed == replace(shipped, draft=None)


def test_a_table_adds_pairs(table):
    models = table('[mine]\ntarget = "org/big"\n["a.b"]\ntarget = "org/t"\ndraft = "org/d"\n')
    pairs = load_pairs(models)
    assert list(pairs) == [*SHIPPED, "mine", "a.b"]
    assert pairs["mine"] == Pair("mine", "org/big", None, DEFAULT_DRAFT_TOKENS, "")
    assert pairs["a.b"].draft == "org/d"


def test_a_pair_may_have_several_drafts(table):
    models = table('[mine]\ntarget = "org/t"\ndraft = ["org/a", "./b", "history", "org/a"]\n')
    pair = find_pair("mine", models)
    assert pair.drafts == ("org/a", str(models.parent / "b"), "history")
    assert pair.models == pair.drafts[:2]
    assert pair.draft_name == f"org/a + {models.parent / 'b'}"
    assert find_pair("mine", table('[mine]\ntarget = "t"\ndraft = "history"\n')).models == ()


def test_the_users_own_table_is_laid_over_the_shipped_one(user_table):
    user_table.write_text('[qwen3-8b]\ndraft_tokens = 5\n[own]\ntarget = "org/own"\n')
    assert find_pair("qwen3-8b").draft_tokens == 5
    assert find_pair("qwen3-8b").target == "mlx-community/Qwen3-8B-4bit"
    assert find_pair("own").target == "org/own"


def test_a_named_table_takes_the_place_of_the_users_own(user_table, table):
    user_table.write_text('[own]\ntarget = "org/own"\n')
    assert "own" not in load_pairs(table(""))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("./models/x", "{table}/models/x"),
        ("../x", "{table}/../x"),
        ("~/models/x", "{home}/models/x"),
        ("/models/x", "/models/x"),
        ("org/x", "org/x"),
        ("package:demo/target", "package:demo/target"),
    ],
)
def test_folders_are_seen_from_the_tables_own(table, tmp_path, written, meant):
    models = table(f'[mine]\ntarget = "{written}"\ndraft = "{written}"\n')
    pair = find_pair("mine", models)
    expected = meant.format(table=models.parent, home=tmp_path / "home")
    if expected.startswith(str(tmp_path)):
        expected = str(Path(expected).resolve())
    assert pair.target == pair.draft == expected


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ('[demo]\ndraft_tokens = "4"\n', "demo.draft_tokens", "a whole number"),
        ("[demo]\ndraft_tokens = 4.0\n", "demo.draft_tokens", "a whole number"),
        ("[demo]\ndraft_tokens = true\n", "demo.draft_tokens", "a whole number"),
        ("[demo]\ndraft_tokens = -1\n", "demo.draft_tokens", "0"),
        ("[demo]\ndraft_tokens = 65\n", "demo.draft_tokens", "64"),
        ("[demo]\ntarget = 1\n", "demo.target", "a string"),
        ('[demo]\ntarget = ["a"]\n', "demo.target", "a string"),
        ("[demo]\ndraft = []\n", "demo.draft", "a list of repositories or folders"),
        ('[demo]\ndraft = ["a", 1]\n', "demo.draft", "a list of repositories or folders"),
        ('[demo]\ndraft = [""]\n', "demo.draft", "a list of repositories or folders"),
        ('[demo]\ntarget = ""\n', "demo.target", "a repository or a folder"),
        ('[demo]\ntarget = "~nobody-of-this-name/x"\n', "demo.target", "a repository or a folder"),
        ("[demo]\nnote = 1\n", "demo.note", "a string"),
        ('[demo]\ntraget = "org/x"\n', "demo.traget", "`target`"),
        ("[demo]\ndraft_token = 3\n", "demo.draft_token", "`draft_tokens`"),
        ("[demo]\nzzzzzz = 3\n", "demo.zzzzzz", "`target`, `draft`, `draft_tokens`, `note`"),
        ("[demo.target]\nx = 1\n", "demo.target", "a string"),
        ('[mine]\ndraft = "org/x"\n', "mine", "a repository or a folder"),
        ("demo = 3\n", "demo", "a section"),
        ('[[demo]]\ntarget = "org/x"\n', "demo", "a section"),
        ('[demo]\nsystem = ""\n', "demo.system", "a text"),
        ("[demo]\nsystem = 1\n", "demo.system", "a string"),
        ("[demo]\ntemplate_args = 1\n", "demo.template_args", "enable_thinking"),
        ("[demo]\ntemplate_args = { day = 2020-01-01 }\n", "demo.template_args", "strings"),
        ("[demo]\ntemplate_args = { x = nan }\n", "demo.template_args", "numbers"),
        ("[demo]\ncontext = 0\n", "demo.context", "at least 1"),
        ("[demo]\ncontext = 4096.0\n", "demo.context", "at least 1"),
        ('[demo]\ntags = "code"\n', "demo.tags", "a list of words"),
        ("[demo]\ntags = [1]\n", "demo.tags", "a list of words"),
        ("[demo]\nsource = 1\n", "demo.source", "a string"),
        ("[demo]\ngb = 0\n", "demo.gb", "gigabytes"),
        ("[demo]\ngb = true\n", "demo.gb", "gigabytes"),
        ("[demo]\ntrust_remote_code = 1\n", "demo.trust_remote_code", "true or false"),
        ("[demo]\ntrust_remote_cod = true\n", "demo.trust_remote_cod", "`trust_remote_code`"),
        ('[dmo]\nnote = "x"\n', "dmo", "the name `demo`"),
        ("default = 1\n", "default", "a string"),
    ],
)
def test_a_bad_table_names_file_and_key_and_what_was_expected(table, text, key, expected):
    models = table(text)
    with pytest.raises(TableError) as caught:
        load_pairs(models)
    assert str(models) in caught.value.message
    assert f"`{key}`" in caught.value.message
    assert expected in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[demo]\ncontext = 0\n", 2),
        ("# a note\n\n[demo]\nnote = 'a'\n\n# another\ncontext = 0\n", 7),
        ('[demo]\nprompt = """\n[demo]\ncontext = 0\n"""\ncontext = 0\n', 6),
        ('[demo]\nnote = "x"\ntags = [\n  "a",\n  1,\n]\n', 3),
        ("[demo]\nnote = 'a'\nsampling = { temperature = 1, tpo_p = 0.9 }\n", 3),
        ("[demo]\nnote = 'a'\n[demo.sampling]\ntemperature = 1\ntpo_p = 0.9\n", 5),
        ("[demo]\nnote = 'a'\n[mine]\nnote = 'b'\n", 3),
        ("[[demo]]\nnote = 'a'\n", 1),
    ],
)
def test_a_bad_table_names_the_line(table, text, line):
    models = table(text)
    with pytest.raises(TableError) as caught:
        load_pairs(models)
    assert f"{models}, line {line}: " in caught.value.message


def test_a_name_that_stands_twice_is_named_with_its_line_and_what_to_do(table):
    for text, line in [
        ("[demo]\nnote = 'a'\n[demo]\n", 3),
        ("[demo]\nnote = 'a'\nnote = 'b'\nx = 1\n", 3),
    ]:
        with pytest.raises(TableError, match=f"at line {line}") as caught:
            load_pairs(table(text))
        assert "has one section" in caught.value.hint


def test_the_keys_of_a_pair_are_what_the_table_says(table):
    path = table(
        '[mine]\ntarget = "x"\nsystem = "be brief"\ntemplate_args = { enable_thinking = false }\n'
        'context = 4096\ntags = ["a", "b", "a"]\nsource = "unmeasured"\ngb = 4\n'
        "trust_remote_code = true\n"
    )
    pair = find_pair("mine", path)
    assert pair.system == "be brief"
    assert pair.template_args == {"enable_thinking": False}
    assert (pair.context, pair.tags, pair.gb) == (4096, ("a", "b"), 4.0)
    assert pair.trust_remote_code
    assert json.loads(json.dumps(pair.as_dict()))["context"] == 4096
    assert "context" not in find_pair("demo", path).as_dict()


def test_the_pair_that_runs_where_none_is_named(user_table, table):
    assert default_pair() == "demo"
    user_table.write_text('default = "qwen3-8b"\n')
    assert default_pair() == "qwen3-8b"
    assert list(load_pairs()) == SHIPPED
    assert default_pair(table("")) == "demo"
    with pytest.raises(TableError, match="line 1: `default` is 'qwen3-8'") as caught:
        default_pair(table('default = "qwen3-8"\n'))
    assert "`qwen3-8b`" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["[demo", "x", "[demo]\nnote = 'a'\nnote = 'b'\n", b"note = '\xff'"]
)
def test_what_is_not_toml_names_the_file(table, text):
    models = table(text)
    with pytest.raises(TableError) as caught:
        load_pairs(models)
    assert str(models) in caught.value.message
    assert "TOML" in caught.value.message


def test_a_table_that_cannot_be_read_names_the_file_and_why(tmp_path):
    for path, why in [(tmp_path / "none.toml", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(TableError, match=why) as caught:
            load_pairs(path)
        assert str(path) in caught.value.message


def test_a_bad_table_of_the_user_is_named_too(user_table):
    user_table.write_text("[demo]\nnote = 1\n")
    with pytest.raises(TableError) as caught:
        load_pairs()
    assert str(user_table) in caught.value.message


@pytest.mark.parametrize(("name", "near"), [("dmo", "demo"), ("qwen3-8", "qwen3-8b")])
def test_an_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(UnknownPair) as caught:
        find_pair(name)
    assert repr(name) in caught.value.message
    assert f"`{near}`" in caught.value.hint


def test_a_name_like_no_other_suggests_none():
    with pytest.raises(UnknownPair) as caught:
        find_pair("xyzzy")
    assert "Did you mean" not in caught.value.hint
    assert "mlxspec pairs list" in caught.value.hint


# --- sampling and prompt --------------------------------------------------------------------


def test_sampling_and_prompt_are_what_the_table_says(table):
    path = table('[mine]\ntarget = "x"\nsampling = { temperature = 1, top_k = 3 }\nprompt = "a"\n')
    pair = find_pair("mine", path)
    assert (pair.sampling, pair.prompt) == ({"temperature": 1, "top_k": 3}, "a")
    assert find_pair("qwen3.5-9b").sampling == {}


@pytest.mark.parametrize(
    ("line", "words", "expected"),
    [
        ("sampling = 1", "`mine.sampling` is 1", "{ temperature = 0.7, top_p = 0.9 }"),
        ("sampling = { temprature = 1 }", "`mine.sampling.temprature` is no", "`temperature`"),
        ('sampling = { top_p = "1" }', "`mine.sampling.top_p` is '1'", "a number"),
        ("sampling = { top_k = 1.5 }", "`mine.sampling.top_k` is 1.5", "a whole number"),
        ("sampling = { top_k = true }", "`mine.sampling.top_k` is True", "a whole number"),
        ("sampling = { top_p = 2 }", "`mine.sampling` cannot be used: top_p is 2", "0 and 1"),
        ('prompt = " "', "`mine.prompt` is empty", "a text"),
        ("prompt = 1", "`mine.prompt` is 1", "a string"),
    ],
)
def test_sampling_and_prompt_that_cannot_be_used(table, line, words, expected):
    with pytest.raises(TableError) as caught:
        load_pairs(table(f'[mine]\ntarget = "x"\n{line}\n'))
    assert words in caught.value.message
    assert expected in caught.value.hint
