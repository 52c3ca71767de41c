"""What a pair's table and a model's authors recommend holds where an option says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from cli_tools import save_model

from mlxspec.pairs.loading import load
from mlxspec.pairs.recommended import recommended
from mlxspec.pairs.table import Pair

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if loud %}loud {% endif %}assistant "
)
SHORT = ("--no-compile", "--max-tokens", "6", "abc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", template=TEMPLATE)


def wants(folder: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"temperature": 0.15}, {"temperature": 0.15}),
        (
            {"do_sample": True, "top_k": 64, "top_p": 0.95},
            {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        ),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"top_p": 0.9, "eos_token_id": 3}, {}),
        (
            {"temperature": 0.7, "repetition_penalty": 1.05},
            {"temperature": 0.7, "repetition_penalty": 1.05},
        ),
        ({"temperature": 0.7, "top_p": 7, "top_k": -1, "min_p": "x"}, {"temperature": 0.7}),
        ({"temperature": True}, {}),
        ({"temperature": -1, "do_sample": True}, {"temperature": 1.0}),
        ('{"temperature": 1e999, "top_k": 1e999}', {}),
        ("{", {}),
        ("[1]", {}),
    ],
)
def test_what_the_authors_recommend(tmp_path, content, expected):
    assert recommended(wants(tmp_path, content)) == expected


def test_a_folder_that_recommends_nothing(tmp_path):
    assert recommended(tmp_path) == {}


@pytest.fixture
def sampled(folder):
    yield wants(folder, {"do_sample": True, "temperature": 0.9, "top_p": 0.8})
    (folder / "generation_config.json").unlink()


def test_options_come_before_the_table_and_the_table_before_the_authors(sampled, tmp_path, invoke):
    table = tmp_path / "models.toml"
    table.write_text(f'[mine]\ntarget = "{sampled}"\nsampling = {{ top_p = 0.7 }}\n')
    mine = ("generate", "--models", str(table), "--pair", "mine", "--seed", "1", *SHORT)

    alone = invoke("generate", "--target", str(sampled), "--seed", "1", *SHORT)
    assert "by the model's generation_config.json: temperature 0.9, top p 0.8" in alone.err
    assert "sampling: temperature 0.9 · top p 0.8 · seed 1" in alone.err
    tabled = invoke(*mine)
    assert "by the model's generation_config.json: temperature 0.9\n" in tabled.err
    assert "sampling: temperature 0.9 · top p 0.7 · seed 1" in tabled.err
    given = invoke(*mine, "--temp", "0.5", "--top-p", "0.6")
    assert "generation_config" not in given.err
    assert "sampling: temperature 0.5 · top p 0.6 · seed 1" in given.err
    greedy = invoke("generate", "--target", str(sampled), "--temp", "0", "--json", *SHORT)
    plain = load(Pair("x", str(sampled)), compiled=False).generate("abc", max_tokens=6)
    assert greedy.json["text"] == plain.text
    assert "generation_config" not in greedy.err


def test_a_batch_is_sampled_as_the_authors_recommend(sampled, tmp_path, invoke):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "abc"}\n{"prompt": "abd", "temperature": 0}\n')
    call = ("--target", str(sampled), "--no-compile", "--max-tokens", "4", "--batch", str(lines))
    run = invoke("generate", *call)
    assert run.code == 0
    assert "by the model's generation_config.json: temperature 0.9, top p 0.8" in run.err


def test_a_pair_has_its_system_message_template_arguments_and_context(folder, tmp_path, invoke):
    table = tmp_path / "models.toml"
    table.write_text(
        f'[mine]\ntarget = "{folder}"\nsystem = "be"\ncontext = 40\n'
        "template_args = { loud = true }\n"
    )
    mine = ("generate", "--models", str(table), "--pair", "mine", "--json", "--no-compile")

    def tokens(*options: str) -> int:
        ended = invoke(*mine, *options, "--max-tokens", "2", "abc")
        return int(ended.json["prompt_tokens"])

    whole = len("system be user abc loud assistant ")
    assert tokens() == whole
    assert tokens("--system", "become") == whole + 4
    assert tokens("--template-arg", "loud=false") == whole - len("loud ")
    assert tokens("--raw") == len("abc")
    long = invoke(*mine, "a" * 40)
    assert long.code == 2
    assert "40" in long.err


def test_code_runs_where_the_table_says_so(folder, tmp_path):
    own = save_model(tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_file": "mine.py"}))
    (own / "mine.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    assert load(Pair("mine", str(own), trust_remote_code=True)).target is not None
    # The same folder is refused where nobody says so.
    with pytest.raises(Exception, match="needs code of its own"):
        load(Pair("mine", str(own)))


def test_what_changes_nothing_is_told(invoke):
    idle = ("--top-p", "0.9", "--xtc-threshold", "0.2", "--presence-context-size", "30", "--wired")
    short = ("--no-compile", "--no-speculation", "--max-tokens", "2", "abc")
    run = invoke("generate", "--temp", "0", *idle, *short)
    told = [line for line in run.err.splitlines() if "changes nothing without" in line]
    assert told == [
        "--top-p changes nothing without --temperature",
        "--xtc-threshold changes nothing without --xtc-probability",
        "--presence-context-size changes nothing without --presence-penalty",
    ]
    wires = mx.metal.is_available()
    assert ("--wired changes nothing" in run.err) == (not wires)
    assert "sampling: greedy;" in run.err
    used = ("--temp", "1", "--top-p", "1", "--xtc-threshold", "0.2", "--xtc-probability", "0.5")
    assert "changes nothing" not in invoke("generate", *used, *short).err
