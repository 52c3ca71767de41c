"""Whether models belong together, which drafts are suggested, and what the doctor says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_tools import LETTERS, Hub, as_the_hub, save_model, serving
from huggingface_hub import constants

from mlxspec.cli.screen.display import Display
from mlxspec.control import places, records
from mlxspec.control.estimates import Knowledge, Learned
from mlxspec.control.places import Place
from mlxspec.control.records import Record, Setting
from mlxspec.decode.rounds import Rounds
from mlxspec.defaults import INTERRUPTED
from mlxspec.device import memory, power
from mlxspec.metrics import Progress
from mlxspec.pairs import diagnosis, servers, stock
from mlxspec.pairs.check import check
from mlxspec.pairs.diagnosis import Line
from mlxspec.pairs.suggest import family, suggest
from mlxspec.pairs.table import Pair

THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "num_hidden_layers": 4}
    return {
        "target": save_model(place / "target", template=THINKS, **sizes),
        "draft": save_model(place / "draft", template=PLAIN),
        "large": save_model(place / "large", template=THINKS, **sizes),
        "other": save_model(place / "other", letters=LETTERS.upper()),
        "turned": save_model(place / "turned", letters=LETTERS[::-1], template=THINKS),
        "hosted": save_model(place / "hosted", name="llama4_text", template=PLAIN),
    }


def found(models, target: str, *drafts: str) -> dict[tuple[str, str], list[str]]:
    """The words of a check by mark and by what they are about."""
    pair = Pair("mine", str(models[target]), tuple(str(models[one]) for one in drafts))
    result: dict[tuple[str, str], list[str]] = {}
    for one in check(pair).findings:
        result.setdefault((one.mark, one.what), []).append(one.words)
    return result


def test_a_draft_of_the_same_tokens_fits(models):
    lines = found(models, "target", "draft")
    assert any("its ids mean the same" in words for words in lines["✓", "draft"])
    assert any("not trained to reason" in words for words in lines["!", "draft"])
    assert any("of the target's bytes" in words for words in lines["✓", "draft"])
    assert any("reasons before it answers" in words for words in lines["✓", "template"])
    assert ("✗", "draft") not in lines


def test_a_draft_of_other_tokens_does_not(models):
    lines = found(models, "target", "other")
    assert any("shares 3% of the target's tokens" in words for words in lines["✗", "draft"])
    pair = Pair("mine", str(models["target"]), str(models["other"]))
    assert check(pair).verdict == "these cannot be used together here"


def test_a_draft_of_other_ids_is_translated(models):
    lines = found(models, "target", "turned")
    assert any("they are translated" in words for words in lines["!", "draft"])


def test_a_draft_that_is_as_large_will_hardly_pay(models):
    lines = found(models, "target", "large")
    assert any("will hardly pay" in words for words in lines["!", "draft"])


def test_sizes_of_vocabularies_decide_nothing(models, tmp_path):
    """Rows of padding behind the last token are no difference."""
    padded = save_model(tmp_path / "padded", vocabulary=len(LETTERS) + 5)
    pair = Pair("mine", str(models["target"]), str(padded))
    assert all(one.mark != "✗" for one in check(pair).findings)


def test_what_does_not_fit_is_no_pair_for_this_machine(models, monkeypatch, invoke):
    monkeypatch.setattr(stock, "limit", lambda: 10_000)
    run = invoke("pairs", "check", "--target", str(models["target"]))
    assert run.code == 1
    assert "✗ memory" in run.out
    assert "it does not fit" in run.out
    assert run.out.rstrip().endswith("these cannot be used together here")


def test_a_damaged_draft_is_a_line_and_no_traceback(models, tmp_path):
    broken = Path(shutil.copytree(models["draft"], tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{")
    result = check(Pair("mine", str(models["target"]), str(broken)))
    assert not result.is_usable
    assert all("\n" not in one.words for one in result.findings)


def test_the_command_prints_one_object(models, invoke):
    options = ("--target", str(models["target"]), "--draft", str(models["draft"]))
    shown = invoke("pairs", "check", *options, "--json").json
    assert shown["usable"]
    assert {one["mark"] for one in shown["findings"]} == {"✓", "!"}
    assert shown["memory"]["fits"]
    for call in ((), ("demo", "--target", "x")):
        wrong = invoke("pairs", "check", *call)
        assert (wrong.code, wrong.out) == (2, "")


def test_a_check_fetches_no_weights(models, tmp_path, monkeypatch):
    hub = Hub({"org/target": models["target"], "org/draft": models["draft"]}, {})
    with as_the_hub(hub, tmp_path / "cache", monkeypatch):
        away = check(Pair("mine", "org/target", "org/draft"))
        assert hub.asked == []
    here = check(Pair("mine", str(models["target"]), str(models["draft"])))
    assert away.memory is not None
    assert here.memory is not None
    assert away.memory.weights == here.memory.weights
    assert away.findings == here.findings


# --- suggestions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlx-community/Qwen3-8B-4bit", "qwen3"),
        ("mlx-community/Qwen2.5-7B-Instruct-4bit", "qwen2.5"),
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "llama3.1"),
        ("mlx-community/gemma-3-27b-it-qat-4bit", "gemma3"),
        ("mlx-community/phi-4-4bit", "phi4"),
        ("./model", "model"),
    ],
)
def test_families_by_name(name, expected):
    assert family(name) == expected


def test_suggestions_rank_what_was_measured_and_leave_out_what_cannot_be(models):
    target = str(models["target"])
    names = ("draft", "large", "other", "turned")
    pairs = [Pair(name, target, str(models[name])) for name in names]
    best = suggest(target, pairs, [])
    assert [one.draft for one in best] == [
        *(str(models[n]) for n in ("draft", "turned")),
        "history",
    ]
    learned = Learned({0: {"model": Knowledge((1.0, 1.2), (0.9,))}})
    setting = dict.fromkeys(("quantisation", "chip", "backend", "mlx", "mlx_lm"), "x")
    turned = Record(Setting(target=target, draft=str(models["turned"]), **setting), learned)
    best = suggest(target, pairs, [turned])
    assert (best[0].draft, best[0].accepted) == (str(models["turned"]), 0.9)


def test_a_pair_shows_what_was_learned_and_no_table_without_rows(invoke):
    setting = dict.fromkeys(("quantisation", "chip", "backend", "mlx", "mlx_lm"), "x")
    one = Setting(target="package:demo/target", draft="package:demo/draft", **setting)
    for costs, shown in (((1.0,), False), ((1.0, 1.2), True)):
        learned = Learned({0: {"model": Knowledge(costs, (0.9,))}})
        records.remember(Record(one, learned), pytest.fail)
        assert ("learned on x" in invoke("pairs", "show", "demo").out) == shown


def test_bits_for_heads_are_no_secret_where_no_head_drafts(models, invoke):
    call = ("generate", "--target", str(models["target"]), "--draft", str(models["draft"]), "abc")
    options = ("--draft-bits", "8", "--max-tokens", "2", "--no-compile", "--raw")
    ended = invoke(*call, *options)
    assert ended.code == 0
    assert "--draft-bits 8 changes nothing: no trained head drafts here" in ended.err


def test_the_command_prints_the_lines_of_a_table(models, tmp_path, invoke):
    table = tmp_path / "mine.toml"
    table.write_text(f'[mine]\ntarget = "{models["target"]}"\ndraft = "{models["draft"]}"\n')
    run = invoke("pairs", "suggest", "mine", "--models", str(table))
    assert run.code == 0
    assert f'target = "{models["target"]}"\ndraft = "{models["draft"]}"\n' in run.out
    shown = invoke("pairs", "suggest", "mine", "--models", str(table), "--json").json
    assert [one["draft"] for one in shown["drafts"]] == [str(models["draft"]), "history"]
    embedded = invoke("pairs", "suggest", "demo", "--json").json["drafts"]
    assert [one["draft"] for one in embedded] == [
        "package:demo/draft",
        "package:demo/head",
        "history",
    ]


def test_ctrl_c_ends_a_suggestion_that_measures_and_shows_what_is_known(
    models, tmp_path, invoke, monkeypatch
):
    def measuring(self: Display, progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "measuring", measuring)
    table = tmp_path / "mine.toml"
    table.write_text(f'[mine]\ntarget = "{models["target"]}"\ndraft = "{models["draft"]}"\n')
    monkeypatch.setattr(Rounds, "kernels_missing", lambda *_, **__: False)
    ended = invoke("pairs", "suggest", "mine", "--probe", "--models", str(table))
    assert ended.code == INTERRUPTED
    assert "Traceback" not in ended.err
    assert f'draft = "{models["draft"]}"\n' in ended.out, "what was suggested stays"


# --- the doctor -------------------------------------------------------------------------


def test_the_doctor_finds_this_machine_sound(invoke):
    run = invoke("doctor")
    assert run.code == 0, run.out
    for what in ("machine", "memory", "mlx-lm", "disk", "table", "tuning"):
        assert f" {what} " in run.out
    shown = invoke("doctor", "--json").json
    assert shown["sound"]
    assert all(line["mark"] in "✓!" for line in shown["lines"])


def test_the_doctor_never_prints_a_token(monkeypatch, invoke):
    monkeypatch.setattr(diagnosis, "get_token", lambda: "hf_secret")
    run = invoke("doctor", "--json")
    assert "there is one" in run.out
    assert "hf_secret" not in run.out + run.err


def lines(check) -> list[Line]:
    return list(diagnosis._guarded("x", check))


def test_the_doctor_says_what_is_wrong_and_what_to_do(monkeypatch, tmp_path, invoke):
    monkeypatch.setattr(memory, "limit", lambda: 10**9)
    monkeypatch.setattr(power, "wired_limit_mb", lambda: 60_000)
    marks = {line.what: line for line in lines(diagnosis._memory)}
    assert marks["memory"].mark == marks["wired limit"].mark == "!"
    assert "iogpu.wired_limit_mb=0" in marks["wired limit"].hint
    monkeypatch.setattr(power, "low_power_mode", lambda: True)
    assert lines(diagnosis._power)[0].mark == "!"
    monkeypatch.setattr(diagnosis, "free_space", lambda: 10**9)
    assert lines(diagnosis._disk)[0].mark == "!"
    monkeypatch.setitem(diagnosis.TESTED, "mlx", "0.1")
    assert [one.mark for one in lines(diagnosis._software)][:2] == ["✓", "!"]
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    assert lines(diagnosis._compiler)[0].mark == "✗"
    blobs = tmp_path / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"12")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert any("not complete" in line.words for line in lines(diagnosis._hub))
    run = invoke("doctor")
    assert run.code == 1
    assert "✗ compiler" in run.out


def test_the_doctor_names_a_table_and_records_that_cannot_be_used(monkeypatch, tmp_path, invoke):
    table = tmp_path / "config" / "mlxspec" / "models.toml"
    table.parent.mkdir(parents=True)
    table.write_text("[demo]\nno = 1\n")
    monkeypatch.setattr(diagnosis, "user_table", lambda: table)
    run = invoke("doctor")
    assert run.code == 1
    assert "✗ table" in run.out
    table.unlink()
    state = records.file()
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text("{")
    run = invoke("doctor")
    assert run.code == 0
    assert "! tuning" in run.out


def test_the_library_that_multiplies_is_the_one_that_is_loaded():
    mapped = "7f0-7f1 r-xp 00000000 fe:00 42   /venv/lib/"
    wheels = f"7ffd-7ffe rw-p 0 00:00 0\n{mapped}mlx_cpu.libs/libblas-bd8a.so.3\n"
    wheels += f"{mapped}numpy.libs/libscipy_openblas64_-fdde.so\n{mapped}mlx/lib/libmlx.so\n"
    assert diagnosis._blas(wheels) == "the reference library of MLX's wheel"
    preloaded = "7f0-7f1 r-xp 0 fe:00 7 /usr/lib/openblas/libopenblasp-r0.3.21.so\n"
    assert diagnosis._blas(wheels + preloaded) == "libopenblasp-r0.3.21.so"


def test_a_server_is_named_by_its_models(models, monkeypatch):
    monkeypatch.setattr(servers, "KNOWN", {1: "nothing"})
    assert lines(diagnosis._servers) == []
    with serving(Hub({}, {})) as hub:
        port = int(hub.endpoint.rpartition(":")[2])
        monkeypatch.setattr(servers, "KNOWN", {port: "a hub"})
        (line,) = lines(diagnosis._servers)
    assert line.words == "a hub: failed, it has nothing at /v1/models (404)"
    assert json.dumps(line.as_dict())


def test_the_doctor_shows_the_prefix_caches_on_disk(tmp_path, invoke):
    assert "prefix cache" not in invoke("doctor").out
    folder, gone, told = tmp_path / "kept", tmp_path / "gone", []
    (folder / "digest").mkdir(parents=True)
    (folder / "digest" / "a.past").write_bytes(bytes(3 * 10**6))
    for place in (Place(gone, 10), Place(folder, 1), Place(folder, 2 * 10**9)):
        places.note(place, told.append)
    (line,) = lines(diagnosis._prefixes)
    assert (line.mark, line.what) == ("✓", "prefix cache")
    assert line.words == f"3.0 MB of at most 2.0 GB in {folder}"
    places.note(Place(folder, 10**6), told.append)
    (line,) = lines(diagnosis._prefixes)
    assert line.mark == "!"
    places.file().write_text("[")
    assert lines(diagnosis._prefixes) == told == []
    places.file().unlink()
    places.file().mkdir()
    places.note(Place(folder, 1), told.append)
    assert "cannot be written" in told[0]


def test_no_more_memory_is_wired_than_is_needed_and_it_is_given_back(monkeypatch):
    limits, at_exit = [], []
    monkeypatch.setattr(memory.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(memory.mx, "set_wired_limit", lambda size: limits.append(size) or 7)
    monkeypatch.setattr(memory.atexit, "register", lambda *call: at_exit.append(call))
    monkeypatch.setattr(memory, "limit", lambda: 10 * 2**30)
    memory.wire(5 * 2**30)
    memory.wire(9 * 2**30)
    assert limits == [7 * 2**30, 10 * 2**30]
    assert [call[1] for call in at_exit] == [7, 7]
