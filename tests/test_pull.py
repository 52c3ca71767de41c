"""Downloading pairs with the real client from a hub on loopback: cut, slow, wrong, gated, full."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from architectures import build
from cli_tools import (
    LETTERS,
    Hub,
    TerminalRun,
    as_the_hub,
    assert_one_error,
    command,
    environment,
    letters_tokenizer,
    save_model,
    wait_for,
)
from huggingface_hub import constants
from mtp_makers import original, raw_weights

from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import LoadError
from mlxspec.pairs import pull as pulling
from mlxspec.pairs.check import check
from mlxspec.pairs.hub import Repository
from mlxspec.pairs.loading import load
from mlxspec.pairs.pull import cache_folder, cached_size, plan, pull, require_space
from mlxspec.pairs.stock import held, stock
from mlxspec.pairs.table import Pair, load_pairs

MODEL = Repository("org/model")
WEIGHTS = "model.safetensors"
REFUSED = {
    "org/gated": (403, "GatedRepo"),
    "org/private": (401, ""),
    "org/forbidden": (403, ""),
    "org/busy": (429, ""),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "target", hidden_size=64)


@pytest.fixture
def hub(target, tmp_path, monkeypatch):
    """A hub with one model, and an empty cache; nothing of this process goes anywhere else."""
    monkeypatch.setattr(pulling, "WAIT_S", 0.01)
    hub = Hub({"org/model": target}, dict(REFUSED))
    with as_the_hub(hub, tmp_path / "cache", monkeypatch):
        yield hub


def size_of(folder: Path) -> int:
    return (folder / WEIGHTS).stat().st_size


def unfinished(repository: Repository) -> list[Path]:
    return list((cache_folder(repository) / "blobs").glob("*.incomplete"))


def text_of(location: str | Path) -> str:
    return load(Pair("mine", str(location)), compiled=False).generate("abc", max_tokens=8).text


# --- whole, and cut ---------------------------------------------------------------------


def test_a_repository_is_pulled_whole_and_then_needs_no_hub(hub, target, monkeypatch):
    todo = plan(MODEL, "mine")
    assert todo.missing == todo.size == sum(path.stat().st_size for path in target.iterdir())
    told = []
    folder = pull(todo, lambda file, done: told.append((file.path, done)))
    assert (folder / WEIGHTS).read_bytes() == (target / WEIGHTS).read_bytes()
    assert (WEIGHTS, size_of(target)) in told
    assert plan(MODEL, "mine").missing == 0
    assert held("target", "org/model").state == "here"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert text_of("org/model") == text_of(target)


def test_a_connection_that_is_cut_goes_on_where_it_ended(hub, target):
    hub.cuts = [1000, 5000]
    folder = pull(plan(MODEL, "mine"))
    assert (folder / WEIGHTS).read_bytes() == (target / WEIGHTS).read_bytes()
    assert hub.asked == ["", "bytes=1000-", "bytes=6000-"]


def test_a_connection_that_is_cut_again_and_again_is_one_error_and_what_came_is_kept(hub, target):
    hub.cuts = [1000] * pulling.TRIES
    with pytest.raises(LoadError, match="could not be downloaded") as caught:
        pull(plan(MODEL, "mine"))
    assert "is kept" in caught.value.hint
    assert held("target", "org/model").state == "in part"
    assert plan(MODEL, "mine").missing == plan(MODEL, "mine").size - 1000 * pulling.TRIES
    pull(plan(MODEL, "mine"))
    assert hub.asked[-1] == f"bytes={1000 * pulling.TRIES}-"
    assert text_of("org/model") == text_of(target)


def test_a_busy_hub_is_asked_again(hub, target):
    hub.busy = 2
    assert (pull(plan(MODEL, "mine")) / WEIGHTS).stat().st_size == size_of(target)
    assert len(hub.asked) == 3


def test_wrong_bytes_are_never_taken_for_the_file(hub, target):
    content = bytearray((target / WEIGHTS).read_bytes())
    content[-1] ^= 1
    hub.lies[WEIGHTS] = bytes(content)
    with pytest.raises(LoadError, match="checksum is wrong"):
        pull(plan(MODEL, "mine"))
    assert held("target", "org/model").state != "here"
    hub.lies.clear()
    assert (pull(plan(MODEL, "mine")) / WEIGHTS).read_bytes() == (target / WEIGHTS).read_bytes()


def test_a_part_that_is_too_long_or_damaged_is_downloaded_anew(hub, target):
    todo = plan(MODEL, "mine")
    (file,) = (file for file in todo.files if file.path == WEIGHTS)
    file.part.parent.mkdir(parents=True)
    file.part.write_bytes(bytes(size_of(target) + 5))
    pull(todo)
    assert hub.asked == [""]
    file.blob.unlink()
    file.part.write_bytes(bytes(100))
    with pytest.raises(LoadError, match="checksum is wrong"):
        pull(plan(MODEL, "mine"))
    pull(plan(MODEL, "mine"))
    assert text_of("org/model") == text_of(target)


# --- refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "message", "hint"),
    [
        ("org/none", "There is no model org/none", "Check the name"),
        ("org/gated", "asks for its licence", "hf auth login"),
        ("org/private", "", "hf auth login"),
        ("org/forbidden", "login may not read", "Ask its owners"),
        ("org/model@v9", "has no revision v9", "branch, a tag or a commit"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(hub, repository, message, hint):
    name, _, revision = repository.partition("@")
    with pytest.raises(LoadError) as caught:
        plan(Repository(name, revision or None), "mine")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_hub_that_stays_busy_says_so(hub):
    with pytest.raises(LoadError, match="too many requests") as caught:
        pulling.plan(Repository("org/busy"), "mine")
    assert "Wait" in caught.value.hint


def test_a_hub_that_must_not_be_asked_is_said_in_words(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="HF_HUB_OFFLINE"):
        plan(MODEL, "mine")


# --- the disk ---------------------------------------------------------------------------


def test_space_is_checked_before_a_byte_moves(hub, monkeypatch):
    todo = plan(MODEL, "mine")
    monkeypatch.setattr(pulling, "free_space", lambda: todo.size + pulling.SPARE - 1)
    with pytest.raises(LoadError, match="are to be downloaded, and") as caught:
        require_space([todo])
    assert "mlxspec pairs rm" in caught.value.hint
    monkeypatch.setattr(pulling, "free_space", lambda: todo.size + pulling.SPARE)
    assert require_space([todo])[0] == todo.size
    assert hub.asked == []


def test_a_full_disk_is_one_error_and_what_came_is_kept(hub, target, monkeypatch):
    stream = pulling._stream

    def full(file, todo, part, tell):
        def told(one, done):
            part.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        stream(file, todo, part, told)

    monkeypatch.setattr(pulling, "_stream", full)
    with pytest.raises(LoadError, match=r"The disk with .* is full") as caught:
        pull(plan(MODEL, "mine"))
    assert "mlxspec pairs rm" in caught.value.hint
    monkeypatch.setattr(pulling, "_stream", stream)
    assert plan(MODEL, "mine").missing < plan(MODEL, "mine").size
    pull(plan(MODEL, "mine"))
    assert text_of("org/model") == text_of(target)


def test_what_is_removed_is_gone(hub):
    pull(plan(MODEL, "mine"))
    size = cached_size(MODEL)
    assert size > 0
    assert pulling.remove(MODEL) == size
    assert (cached_size(MODEL), held("target", "org/model").state) == (0, "absent")


# --- the command ------------------------------------------------------------------------


@pytest.fixture
def away(hub, tmp_path):
    """The surroundings of a process that knows the hub and an empty cache."""
    return environment(
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_CACHE=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="0",
        XDG_CONFIG_HOME=str(tmp_path / "config"),
    )


def cache_of(env: dict[str, str]) -> Path:
    return Path(env["HF_HUB_CACHE"]) / "models--org--model" / "blobs"


def test_the_command_says_what_is_missing_pulls_it_and_removes_it(hub, tmp_path, invoke):
    dry = invoke("pairs", "pull", "org/model", "--dry-run")
    assert dry.code == 0
    assert f"{WEIGHTS}  " in dry.out
    assert "to download" in dry.err
    assert hub.asked == []
    pulled = invoke("pairs", "pull", "org/model", "--json")
    assert pulled.json["missing_bytes"] == pulled.json["bytes"] > 0
    assert f"{WEIGHTS}: " in pulled.err
    again = invoke("pairs", "pull", "org/model")
    assert (again.code, again.out) == (0, "")
    assert "everything is on this machine\n" in again.err
    table = tmp_path / "mine.toml"
    table.write_text('[one]\ntarget = "org/model"\n[two]\ntarget = "org/model"\n')
    stays = invoke("pairs", "rm", "one", "--models", str(table))
    assert "org/model stays: two needs it\n" in stays.out
    asked = invoke("pairs", "rm", "org/model")
    assert asked.code == 2
    assert "--yes" in asked.err
    assert cached_size(MODEL) > 0
    gone = invoke("pairs", "rm", "org/model", "--yes")
    assert gone.code == 0
    assert "freed" in gone.out
    assert cached_size(MODEL) == 0


def test_a_process_that_is_killed_leaves_what_the_next_goes_on_with(hub, away, target):
    hub.cuts = [100_000]
    hub.slow_s = 30
    with subprocess.Popen(command("pairs", "pull", "org/model"), env=away) as process:
        wait_for(lambda: any(path.stat().st_size for path in cache_of(away).glob("*.incomplete")))
        os.kill(process.pid, signal.SIGKILL)
    (part,) = cache_of(away).glob("*.incomplete")
    kept = part.stat().st_size
    hub.slow_s, hub.cuts = 0, []
    assert held("target", "org/model").state == "in part"
    pull(plan(MODEL, "mine"))
    assert hub.asked[-1] == f"bytes={kept}-"
    assert not unfinished(MODEL)
    assert text_of("org/model") == text_of(target)


def test_ctrl_c_ends_a_download_and_the_next_goes_on(hub, target, invoke):
    hub.slow_s = 0.1

    def interrupt() -> None:
        wait_for(lambda: any(part.stat().st_size for part in unfinished(MODEL)))
        os.kill(os.getpid(), signal.SIGINT)

    person = threading.Thread(target=interrupt)
    person.start()
    ended = invoke("pairs", "pull", "org/model")
    person.join()
    assert ended.code == INTERRUPTED
    assert "Traceback" not in ended.err
    assert held("target", "org/model").state == "in part"
    (part,) = unfinished(MODEL)
    hub.slow_s, kept = 0, part.stat().st_size
    again = invoke("pairs", "pull", "org/model")
    assert again.code == 0
    assert hub.asked[-1] == f"bytes={kept}-"
    assert held("target", "org/model").state == "here"


def test_two_processes_pull_one_file_once(hub, away):
    hub.slow_s = 0.05
    both = [subprocess.Popen(command("pairs", "pull", "org/model"), env=away) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert hub.asked == [""]
    assert not list(cache_of(away).glob("*.incomplete"))


def test_a_pair_that_is_away_is_refused_where_nobody_can_be_asked(hub, invoke):
    run = invoke("generate", "--target", "org/model", "abc")
    assert_one_error(
        run,
        1,
        "org/model (of the pair org/model) is not on this machine",
        "`mlxspec pairs pull org/model`",
    )
    assert hub.asked == []


@pytest.mark.parametrize("answer", [b"y\n", b"n\n"])
def test_a_terminal_is_asked_before_gigabytes_move(hub, away, answer):
    options = ("--no-compile", "--max-tokens", "4", "--temp", "0")
    with TerminalRun("generate", "--target", "org/model", "abc", *options, env=away) as run:
        run.read_until(lambda output: b"download?" in output)
        assert b"MB" in run.output or b"GB" in run.output
        run.write(answer)
        code = run.end()
    assert code == (0 if answer == b"y\n" else 1)
    assert bool(hub.asked) == (answer == b"y\n")


def test_of_an_original_checkpoint_only_the_layer_that_drafts_is_planned(hub, tmp_path, invoke):
    """Its index says which shard has the tensors mtp.*; the others stay where they are."""
    converted = save_model(tmp_path / "converted", name="qwen3_5", seed=0)
    model = build("qwen3_5", vocabulary=len(LETTERS))
    weights = raw_weights(model, "qwen3_5")
    published = original(tmp_path / "published", model, "qwen3_5", weights)
    letters_tokenizer().save_pretrained(published)
    hub.models |= {"org/converted": converted, "org/published": published}
    table = tmp_path / "mine.toml"
    table.write_text('[mine]\ntarget = "org/converted"\ndraft = "org/published"\n')
    mine = ("mine", "--models", str(table))
    checked = check(Pair("mine", "org/converted", "org/published"))
    assert checked.is_usable, checked.findings
    needed = ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    dry = invoke("pairs", "pull", *mine, "--dry-run", "--json").json
    assert [one["path"] for one in dry["models"][1]["files"]] == needed
    size = (published / needed[1]).stat().st_size
    assert checked.memory.weights["draft"] == size
    assert hub.asked == [], "no weights yet"
    invoke("pairs", "pull", *mine)
    assert len(hub.asked) == 2, "one file of each"
    held_now = stock(load_pairs(table)["mine"])
    assert [(one.state, one.head) for one in held_now] == [("here", None), ("here", "mtp")]
    command = ("generate", "--pair", *mine, "--no-compile", "--max-tokens", "4", "--json", "abc")
    assert invoke(*command).json["draft"] == "org/published"
    assert len(hub.asked) == 2, "loading needs no more"


def test_stock_says_what_is_here_of_a_pair(hub, target, tmp_path):
    hub.models["org/draft"] = target
    pair = Pair("mine", "org/model", ("org/draft", str(target)))
    assert [one.state for one in stock(pair)] == ["absent", "absent", "here"]
    pull(plan(Repository("org/draft"), "mine"))
    assert [one.state for one in stock(pair)] == ["absent", "here", "here"]
    assert not unfinished(Repository("org/draft"))
    assert replace(pair, draft=None).models == ()


# --- from the hub to a text -------------------------------------------------------------

ARCHITECTURES = ("llama", "qwen3", "qwen2", "mixtral", "mamba2", "gemma3_text")
PARTS = ("weight", "scales", "biases")
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant "


def quantized(folder: Path, bits: int, mixed: bool = False) -> None:
    """Quantise a Llama's folder, some of its layers with 8 bits where it is mixed."""
    config = json.loads((folder / "config.json").read_text())
    quantization: dict[str, object] = {"group_size": 32, "bits": bits}
    weights = dict(mx.load(str(folder / WEIGHTS)))
    for name in [name for name in weights if name.endswith("proj.weight")]:
        layer = name.removesuffix(".weight")
        width = 8 if mixed and "mlp" in layer else bits
        if width != bits:
            quantization[layer] = {"group_size": 32, "bits": width}
        parts = mx.quantize(weights.pop(name), group_size=32, bits=width)
        weights |= {f"{layer}.{part}": x for part, x in zip(PARTS, parts, strict=True)}
    mx.save_safetensors(str(folder / WEIGHTS), weights)
    (folder / "config.json").write_text(json.dumps({**config, "quantization": quantization}))


def sharded(folder: Path) -> None:
    weights = mx.load(str(folder / WEIGHTS))
    index = {
        name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(weights)
    }
    for file in set(index.values()):
        part = {name: weights[name] for name in weights if index[name] == file}
        mx.save_safetensors(str(folder / file), part)
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    "kind", [*ARCHITECTURES, "4 bits", "8 bits", "mixed", "sharded", "template"]
)
def test_every_kind_of_model_goes_from_the_hub_to_the_same_text(hub, tmp_path, kind):
    name = kind if kind in ARCHITECTURES else "llama"
    wide = {"hidden_size": 64, "intermediate_size": 64} if name == "llama" else {}
    template = TEMPLATE if kind == "template" else None
    folder = save_model(tmp_path / "kind", name=name, template=template, **wide)
    if kind.endswith("bits") or kind == "mixed":
        quantized(folder, 8 if kind == "8 bits" else 4, mixed=kind == "mixed")
    elif kind == "sharded":
        sharded(folder)
    hub.models["org/kind"] = folder
    pull(plan(Repository("org/kind"), "mine"))
    (one,) = stock(Pair("mine", "org/kind"))
    assert one.state == "here"
    assert text_of("org/kind") == text_of(folder)
