"""Folders as they are in the world: indices, series, other formats, adapters, revisions, code."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from cli_tools import (
    COMMIT,
    Hub,
    as_the_hub,
    assert_one_error,
    environment,
    is_one_error,
    mlxspec,
    save_model,
)
from huggingface_hub import constants
from mlx_lm.utils import load_adapters, load_model

from mlxspec.errors import LoadError, UnknownPair, UsageError
from mlxspec.pairs.hub import Repository, repository_of
from mlxspec.pairs.loading import load, setting_of
from mlxspec.pairs.table import Pair, find_pair

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def text_of(folder, **options):
    engine = load(Pair("mine", str(folder)), speculation=False, **options)
    return engine.generate("abc", max_tokens=8).text


def refused(folder, kind=LoadError, **options):
    with pytest.raises(kind) as caught:
        load(Pair("mine", str(folder)), **options)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def weights_of(folder):
    return dict(mx.load(str(folder / "model.safetensors")))


def save(folder, name, arrays):
    mx.save_safetensors(str(folder / name), arrays)


def wrong(arrays):
    return {name: array + 1 for name, array in arrays.items()}


def config_with(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def save_raw(path, tensors):
    """Write safetensors of any dtype: (dtype, shape, bytes) by name."""
    head, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        span = [len(data), len(data) + len(content)]
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        data += content
    header = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


# --- which weights are read -------------------------------------------------------------


def split(folder, index=True, **others):
    """Two shards in place of the one file; `others` are arrays that go into files besides."""
    arrays = weights_of(folder)
    names = sorted(arrays)
    parts = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
    for shard, part in parts.items():
        save(folder, f"{shard}.safetensors", {name: arrays[name] for name in part})
    (folder / "model.safetensors").unlink()
    if index:
        files = {name: f"{shard}.safetensors" for shard, part in parts.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return arrays


@pytest.mark.parametrize("other", ["model.safetensors", "model-old.safetensors"])
def test_the_index_decides_which_of_two_sets_is_read(whole, folder, other):
    arrays = split(folder)
    save(folder, other, wrong(arrays))
    assert text_of(folder) == text_of(whole)
    assert load(Pair("mine", str(folder))).notes == ()
    (folder / other).write_bytes(b"no weights")
    assert text_of(folder) == text_of(whole)


def test_the_index_decides_where_a_tensor_is_in_two_of_its_shards(whole, folder):
    arrays = split(folder)
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    last = folder / "model-00002-of-00002.safetensors"
    own = {name: arrays[name] for name in arrays if files[name] == last.name}
    save(folder, last.name, wrong(arrays) | own)
    assert text_of(folder) == text_of(whole)


def test_without_an_index_the_single_file_is_read_and_the_others_are_named(whole, folder):
    arrays = split(folder, index=False)
    save(folder, "model.safetensors", wrong(arrays))
    expected = text_of(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert text_of(folder) == expected != text_of(whole)
    split(folder, index=False)
    save(folder, "model.safetensors", arrays)
    assert text_of(folder) == text_of(whole)
    (note,) = load(Pair("mine", str(folder))).notes
    assert "model.safetensors is read" in note
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors is not" in note
    assert load(Pair("mine", str(folder))).generate("abc", max_tokens=1).notes == [note]


def test_a_stale_index_keeps_no_whole_folder_from_loading(whole, folder):
    names = sorted(weights_of(folder))
    files = {name: f"model-0000{1 + i % 5}-of-00005.safetensors" for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    assert text_of(folder) == text_of(whole)


def test_an_index_that_lacks_a_tensor_of_its_shards_is_completed(whole, folder):
    split(folder)
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    del files["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    assert text_of(folder) == text_of(whole)


def test_an_index_that_lacks_a_whole_shard_is_completed(whole, folder):
    split(folder)
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {name: file for name, file in files.items() if "00001" in file}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    assert text_of(folder) == text_of(whole)


def test_a_file_that_a_series_lacks_is_named(folder):
    split(folder, index=False)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "has no model-00002-of-00002.safetensors" in refused(folder).message


@pytest.mark.parametrize("name", ["m[1]", "m*?", "m{a,b}", "with space", "mü\u202e", "m%20#x"])
def test_a_folder_may_have_any_name(whole, tmp_path, name):
    there = shutil.copytree(whole, tmp_path / name / "model")
    assert text_of(there) == text_of(whole)


@pytest.mark.skipif(sys.platform == "darwin", reason="names there are UTF-8")
def test_a_folder_may_have_a_name_that_is_not_utf_8(whole, tmp_path):
    name = os.fsdecode(b"m\xff")
    assert text_of(shutil.copytree(whole, tmp_path / name)) == text_of(whole)


def test_a_folder_of_links_loads_and_a_link_to_nothing_is_named(whole, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in whole.iterdir():
        (linked / path.name).symlink_to(path)
    assert text_of(linked) == text_of(whole)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (linked / name).unlink()
        (linked / name).symlink_to(tmp_path / "gone")
        error = refused(linked)
        assert error.message == f"{linked / name} is a link to a file that is gone."
        (linked / name).unlink()
        (linked / name).symlink_to(whole / name)


# --- formats, types and tensors ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.gguf", "GGUF"),
        ("weights.npz", "npz"),
        ("pytorch_model.bin", "PyTorch"),
        ("consolidated.00.pth", "PyTorch"),
        ("consolidated.safetensors", "Mistral"),
        ("weights.00.safetensors", "not named model*.safetensors"),
    ],
)
def test_weights_that_mlx_lm_does_not_load_are_named(folder, name, words):
    (folder / "model.safetensors").rename(folder / name)
    error = refused(folder)
    assert words in error.message
    assert name in error.message
    assert "damaged" not in error.message


def test_a_file_in_place_of_a_folder_is_named_by_its_format(folder):
    file = (folder / "model.safetensors").rename(folder / "m.gguf")
    assert "GGUF file; a model is a folder" in refused(file).message


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F4"])
def test_a_type_that_mlx_lacks_is_named(folder, dtype):
    shape = weights_of(folder)[f"{LAYER}.weight"].shape
    content = bytes(shape[0] * shape[1])
    save_raw(folder / "model.safetensors", {f"{LAYER}.weight": (dtype, shape, content)})
    error = refused(folder)
    assert f"{LAYER}.weight is {dtype}" in error.message
    assert "damaged" not in error.message


def test_eight_bit_numbers_without_their_scales_are_no_weights(folder):
    arrays = weights_of(folder)
    arrays[f"{LAYER}.weight"] = arrays[f"{LAYER}.weight"].astype(mx.uint8)
    save(folder, "model.safetensors", arrays)
    assert f"{LAYER}.weight has numbers of another packing" in refused(folder).message


@pytest.mark.parametrize(("method", "words"), [("awq", "packed by awq"), ("hqq", "does not read")])
def test_a_packing_is_named_where_its_tensors_are_not_there(folder, method, words):
    config_with(folder, quantization_config={"quant_method": method, "bits": 4})
    arrays = weights_of(folder)
    weight = arrays.pop(f"{LAYER}.weight")
    packed = mx.zeros((weight.shape[1], 1), mx.int32)
    save(folder, "model.safetensors", arrays | {f"{LAYER}.qweight": packed})
    error = refused(folder)
    assert words in error.hint
    assert f"{LAYER}." in error.message


def test_a_missing_tensor_is_named(folder):
    arrays = weights_of(folder)
    del arrays["model.norm.weight"]
    save(folder, "model.safetensors", arrays)
    assert "lack 1 parameters, such as model.norm.weight" in refused(folder).message


@pytest.mark.parametrize("name", ["tekken.json", "x.tiktoken", "spiece.model"])
def test_a_tokenizer_that_cannot_be_loaded_is_named(folder, name):
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text("{}")
    error = refused(folder)
    assert name in error.message
    assert "half-written" not in error.hint


# --- code -------------------------------------------------------------------------------

OWN = """
open({ran!r}, "w").close()
from mlx_lm.models.llama import Model, ModelArgs
"""


def test_code_of_a_model_runs_only_for_those_who_trust_it(whole, folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(OWN.format(ran=str(ran)))
    config_with(folder, model_file="own.py")
    error = refused(folder)
    assert "own.py, which is not run" in error.message
    assert "trust" in error.hint
    assert not ran.exists()
    assert text_of(folder, trust_remote_code=True) == text_of(whole)
    assert ran.exists()


def test_code_of_a_tokenizer_is_neither_run_nor_asked_for(whole, folder, tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("a question")

    monkeypatch.setattr("builtins.input", asked)
    ran = tmp_path / "ran"
    for name in ("configuration_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(OWN.format(ran=str(ran)))
    config_with(folder, model_type="minicpm3", auto_map={"AutoConfig": "configuration_own.Own"})
    kind = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    refused(folder)
    config_with(folder, model_type="llama")
    with pytest.raises(LoadError, match="code of its own"):
        load(Pair("mine", str(folder)))
    assert not ran.exists()


# --- adapters ---------------------------------------------------------------------------


@pytest.fixture
def adapter(whole, tmp_path):
    place = tmp_path / "adapter"
    place.mkdir()
    rows, width = weights_of(whole)[f"{LAYER}.weight"].shape
    mx.random.seed(4)
    arrays = {"lora_a": mx.random.normal((width, 2)), "lora_b": mx.random.normal((2, rows))}
    layers = json.loads((whole / "config.json").read_text())["num_hidden_layers"]
    named = {
        LAYER.replace(".0.", f".{i}.") + f".{name}": x
        for i in range(layers)
        for name, x in arrays.items()
    }
    save(place, "adapters.safetensors", named)
    lora = {"rank": 2, "scale": 9.0, "dropout": 0.5, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 99, "lora_parameters": lora}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def test_an_adapter_is_applied_as_mlx_lm_applies_it(whole, adapter):
    expected, _ = load_model(whole)
    load_adapters(expected, str(adapter)).eval()
    tokens = mx.array([[1, 2, 3]])
    for engine in (
        load(Pair("mine", str(whole)), adapter=adapter),
        load(Pair("mine", str(whole), adapter=str(adapter))),
    ):
        assert mx.array_equal(engine.target(tokens), expected(tokens))
        assert engine.notes == ()
    plain = load(Pair("mine", str(whole)))
    assert not mx.array_equal(plain.target(tokens), expected(tokens))


def test_an_adapter_beside_the_weights_is_spoken_of(whole, folder, adapter):
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    (note,) = load(Pair("mine", str(folder))).notes
    assert "adapter" in note
    assert str(folder) in note
    assert text_of(folder) == text_of(whole)
    assert load(Pair("mine", str(folder)), adapter=folder).notes == ()


def test_what_is_learned_with_an_adapter_is_kept_apart(whole, adapter):
    pair = Pair("mine", str(whole))
    tuned = Pair("mine", str(whole), adapter=str(adapter))
    engine = load(pair)
    assert setting_of(pair, engine).target == str(whole)
    assert setting_of(tuned, engine).target == f"{whole} with {adapter}"
    assert Pair("mine", "org/a", revision="v1").target_name == "org/a at v1"


def test_a_table_gives_an_adapter_and_a_revision(tmp_path):
    table = tmp_path / "models.toml"
    table.write_text('[mine]\ntarget = "org/a"\nadapter = "./tuned"\nrevision = "v1"\n')
    pair = find_pair("mine", table)
    assert (pair.adapter, pair.revision) == (str(tmp_path / "tuned"), "v1")
    assert pair.as_dict().keys() - Pair("mine", "org/a").as_dict() == {"adapter", "revision"}


def test_adapters_that_cannot_be_applied_are_named(whole, adapter):
    assert "holds an adapter, and no model" in refused(adapter).message
    assert "none has no adapter" in refused(whole, adapter="none").message
    half = dict(mx.load(str(adapter / "adapters.safetensors")))
    half.pop(f"{LAYER}.lora_a")
    save(adapter, "adapters.safetensors", half)
    assert f"lacks {LAYER}.lora_a" in refused(whole, adapter=adapter).message
    (adapter / "adapters.safetensors").rename(adapter / "adapter_model.safetensors")
    assert "PEFT" in refused(whole, adapter=adapter).message
    assert "no adapter" in refused(whole, adapter=whole).message


def test_the_command_applies_an_adapter_and_runs_code_for_those_who_ask(
    whole, folder, adapter, invoke
):
    arguments = ["generate", "abc", "--no-compile", "-q", "--max-tokens", "8", "--target"]
    done = invoke(*arguments, str(whole), "--adapter", str(adapter))
    assert done.out == text_of(whole, adapter=adapter) != text_of(whole)
    (folder / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs")
    config_with(folder, model_file="own.py")
    done = invoke(*arguments, str(folder), "--trust-remote-code")
    assert done.out == text_of(whole)
    for more in ([], ["--trust-remote-code", "--revision", "v1"]):
        done = invoke(*arguments, str(folder), *more)
        assert done.out == ""
        assert is_one_error(done.err)


# --- repositories -----------------------------------------------------------------------


@pytest.fixture
def hub(whole, tmp_path, monkeypatch):
    hub = Hub({"org/model": whole}, {})
    with as_the_hub(hub, tmp_path / "cache [1]", monkeypatch):
        yield hub


@pytest.mark.parametrize(
    ("location", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name/", "org/name", None),
        (" org/name ", "org/name", None),
        ("https://huggingface.co/org/name", "org/name", None),
        ("http://www.huggingface.co/org/name/", "org/name", None),
        ("huggingface.co/org/name", "org/name", None),
        ("https://hf.co/org/name?library=mlx", "org/name", None),
        ("https://huggingface.co/org/name/tree/v1.0", "org/name", "v1.0"),
        ("https://huggingface.co/org/name/blob/main/config.json", "org/name", "main"),
        ("hf://org/name", "org/name", None),
        ("hf://org/name@v1", "org/name", "v1"),
        ("org/name@v1", "org/name", "v1"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", "org/name", "refs/pr/1"),
    ],
)
def test_a_repository_goes_by_its_name_and_its_address(location, name, revision):
    assert repository_of(location) == Repository(name, revision)


@pytest.mark.parametrize(
    "location", ["./org", "/org/name", "~/name", "name", "a/b/c", "../a/b", "./a/b@c", "a@b/c"]
)
def test_a_path_is_no_repository(location):
    assert repository_of(location) is None


@pytest.mark.parametrize(
    "location",
    ["https://example.com/org/name", "https://huggingface.co/org", "hf.co/datasets/org/name"],
)
def test_other_addresses_are_refused(location):
    assert "not the address of a model" in refused(location).message


def test_a_repository_loads_by_its_address_from_a_cache_with_brackets(hub, whole):
    assert text_of("https://huggingface.co/org/model/") == text_of(whole)
    assert text_of("org/model/", revision=COMMIT) == text_of(whole)


def test_only_the_files_that_matter_need_be_here_offline(hub, whole, tmp_path, monkeypatch):
    extra = hub.models["org/model"] = Path(shutil.copytree(whole, tmp_path / "more"))
    (extra / "extra.json").write_text("{}")
    assert text_of("org/model") == text_of(whole)
    (here,) = (tmp_path / "cache [1]").glob("models--org--model/snapshots/*/extra.json")
    here.unlink()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert text_of("org/model") == text_of(whole)


def other_formats(tmp_path, **contents):
    folder = tmp_path / "elsewhere"
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model-Q4_K_M.gguf", "are GGUF (model-Q4_K_M.gguf)"),
        ("Q8_0/model.gguf", "are GGUF (Q8_0/model.gguf)"),
        ("weights.00.npz", "are MLX's old npz format (weights.00.npz)"),
        ("pytorch_model.bin", "are PyTorch's format (pytorch_model.bin)"),
        ("gptq_model-4bit-128g.safetensors", "are GPTQ's own layout (gptq_model-4bit-128g.safe"),
        ("unet/model.safetensors", "are in folders of their own (unet/model.safetensors)"),
    ],
)
@pytest.mark.parametrize("config", [{}, {"config.json": "{}"}])
def test_a_repository_of_other_formats_is_named(hub, tmp_path, file, said, config):
    hub.models["org/other"] = other_formats(tmp_path, **{file: "x", "README.md": ""}, **config)
    error = refused("org/other")
    assert error.message.startswith(f"The weights in org/other {said}")
    assert "mlx_lm.convert" in error.hint


def test_a_repository_without_a_model_is_named(hub, tmp_path):
    hub.models["org/other"] = other_formats(tmp_path, **{"README.md": ""})
    assert refused("org/other").message == "org/other has no file of a model."


def test_the_command_names_another_format_in_one_error(hub, tmp_path):
    hub.models["org/other"] = other_formats(tmp_path, **{"m.gguf": "x"})
    changes = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    env = environment(**changes, HF_ENDPOINT=hub.endpoint)
    run = mlxspec("pairs", "pull", "org/other", env=env)
    assert_one_error(run, 1, "org/other are GGUF (m.gguf)")


def test_a_hub_that_gives_no_listing_leaves_the_error_as_it_was(hub, tmp_path, monkeypatch):
    hub.models["org/other"] = other_formats(tmp_path, **{"m.gguf": "x", "config.json": "{}"})
    refused("org/other")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "has no tokenizer.json" in refused("org/other").message


def test_a_repository_of_a_peft_adapter_is_named(hub, tmp_path, whole):
    files = {"adapter_config.json": "{}", "adapter_model.safetensors": "x"}
    hub.models["org/peft"] = other_formats(tmp_path, **files)
    assert "in org/peft is one of PEFT" in refused(whole, adapter="org/peft").message
    assert "org/model has no adapter" in refused(whole, adapter="org/model").message


def test_targets_and_drafts_have_revisions_of_their_own(hub, whole, tmp_path, invoke):
    changed = hub.models["org/model@v2"] = save_model(tmp_path / "changed", seed=2)
    assert text_of("org/model@v2") == text_of(changed) != text_of(whole)
    assert text_of("org/model") == text_of(whole)
    assert text_of("org/model@main", revision="v2") == text_of(changed)
    names = "org/model@v2", "https://huggingface.co/org/model/tree/main"
    engine = load(Pair("mine", "org/model", names))
    for name, folder in (("model@v2", changed), ("model@main", whole)):
        weights = engine.drafts[name].model.embed_tokens.weight
        assert mx.array_equal(weights, weights_of(folder)["model.embed_tokens.weight"])
    table = tmp_path / "models.toml"
    table.write_text('[mine]\ntarget = "org/model@v2"\ndraft = "org/model@main"\n')
    arguments = ["generate", "abc", "--no-compile", "-q", "--max-tokens", "8"]
    for more in (
        ["--models", str(table), "--pair", "mine", "--no-fallback"],
        ["--target", "org/model@v2", "--draft", "org/model@main"],
    ):
        assert invoke(*arguments, *more).out == text_of(changed)


@pytest.mark.parametrize("draft", ["org/model@v9", "hf.co/org/model/tree/v9"])
def test_a_revision_that_a_repository_lacks_is_named(hub, whole, draft):
    assert "org/model (of the pair mine) has no revision v9" in refused("org/model@v9").message
    with pytest.raises(LoadError, match="has no revision v9"):
        load(Pair("mine", str(whole), draft))


def test_a_revision_is_one_of_a_repository(whole):
    assert "has no revision v1" in refused(whole, revision="v1").message


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_no_folder(name):
    assert "empty" in refused(name, kind=UsageError).message


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_folder_can_have_is_not_there(name):
    assert "no model folder" in refused(name).message


def test_a_pair_in_place_of_a_folder_is_told_where_it_goes():
    assert "--pair demo" in refused("demo").hint


def test_a_repository_in_place_of_a_pair_is_told_where_it_goes():
    with pytest.raises(UnknownPair) as caught:
        load("org/name")
    assert "--target" in caught.value.hint
