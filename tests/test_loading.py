"""Model folders and repositories, whole and damaged, and a hub on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from cli_tools import (
    LETTERS,
    Hub,
    as_the_hub,
    assert_one_error,
    environment,
    mlxspec,
    save_model,
    serving,
)
from huggingface_hub import constants
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlxspec.decode.request import GREEDY
from mlxspec.errors import LoadError, UnsupportedModel, VocabularyMismatch
from mlxspec.measure.audit import audit
from mlxspec.pairs.loading import load, setting_of
from mlxspec.pairs.table import Pair
from mlxspec.pairs.tokenizer_files import load_folder_tokenizer
from mlxspec.params import SamplingParams

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant "


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture
def folder(target, tmp_path):
    """A copy of a whole model, to be damaged."""
    return Path(shutil.copytree(target, tmp_path / "model"))


def pair_of(target, draft=None):
    return Pair("mine", str(target), None if draft is None else str(draft))


def refused(kind, target, draft=None):
    with pytest.raises(kind) as caught:
        load(pair_of(target, draft))
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


# --- whole folders ----------------------------------------------------------------------


def test_a_local_pair_loads_and_generates(target):
    engine = load(pair_of(target, target))
    result = engine.generate("abc", max_tokens=12, draft_tokens=3)
    assert len(result.tokens) == len(result.text) == 12
    assert result.speculation.acceptance_rate == 1.0
    assert engine.load_s > 0


def test_a_folder_of_the_working_directory_needs_no_path(target, monkeypatch):
    monkeypatch.chdir(target.parent)
    assert load(pair_of(target.name)).draft is None


def test_without_speculation_the_draft_is_not_even_looked_for(target):
    assert load(pair_of(target, "/nowhere"), speculation=False).draft is None


def test_a_pair_of_the_table_loads_by_name(target, tmp_path):
    models = tmp_path / "models.toml"
    models.write_text(f'[mine]\ntarget = "{target}"\ndraft_tokens = 2\n')
    assert load("mine", models=models).target.model_type == "llama"


def test_sharded_weights_load(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    names = sorted(weights)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for shard, part in shards.items():
        mx.save_safetensors(str(folder / shard), {name: weights[name] for name in part})
    index = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    assert load(pair_of(folder)).target is not None
    second = folder / "model-2.safetensors"
    second.write_bytes(second.read_bytes()[:-8])
    assert f"{second} is damaged" in refused(LoadError, folder).message
    second.unlink()
    assert "has no model-2.safetensors" in refused(LoadError, folder).message


def test_a_chat_template_is_used_unless_raw(target, tmp_path):
    chat = save_model(tmp_path / "chat", template=TEMPLATE)
    engine = load(pair_of(chat))
    decode = engine.tokenizer.decode
    assert decode(engine.encode("hi")) == "user hi assistant "
    assert decode(engine.encode("hi", system="be")) == "system be user hi assistant "
    assert decode(engine.encode("hi", raw=True)) == "hi"
    assert decode(load(pair_of(target)).encode("hi")) == "hi"


@pytest.mark.parametrize(("file", "ends"), [("config.json", 3), ("generation_config.json", [3, 4])])
def test_the_ends_of_text_are_those_that_mlx_lm_knows(folder, file, ends):
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, "eos_token_id": ends}))
    known = load(pair_of(folder)).tokenizer.eos_token_ids
    assert known == {3} if ends == 3 else known == {3, 4}


@pytest.mark.parametrize(
    "ends", ["</s>", 2.5, True, ["</s>"], [3, None], [[3]], {"id": 3}, float("nan")]
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_of_text_that_are_no_ids_are_named_with_their_file(folder, file, ends):
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, "eos_token_id": ends}))
    error = refused(LoadError, folder)
    assert str(path) in error.message
    assert "eos_token_id" in error.message


def test_ends_of_text_may_be_missing_or_whole_numbers_of_any_kind(target):
    for ends, known in [(None, set()), ([], set()), (3.0, {3}), ([3, 4.0], {3, 4})]:
        assert load_folder_tokenizer(target, ends).eos_token_ids == known


# --- damaged folders --------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    for place in (tmp_path / "none", "~nobody-of-this-name/x", "package:none", "./none", "none"):
        error = refused(LoadError, place)
        assert Path(str(place).removeprefix("package:")).name in error.message
        assert "config.json" in error.hint


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(LoadError, tmp_path / "file").message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    error = refused(LoadError, folder)
    assert error.message == f"The model folder {folder} has no {name}."
    assert "again" in error.hint


def test_a_directory_in_place_of_a_file_is_named(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert str(folder / "config.json") in refused(LoadError, folder).message


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model_type": "llama",'])
def test_a_config_that_is_not_a_json_object_is_damaged(folder, content):
    (folder / "config.json").write_text(content)
    assert f"{folder / 'config.json'} is damaged" in refused(LoadError, folder).message


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_shards_is_damaged_where_it_is_needed(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    assert load(pair_of(folder)).notes == ()
    weights = mx.load(str(folder / "model.safetensors"))
    weights.pop("model.norm.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert "model.safetensors.index.json is damaged" in refused(LoadError, folder).message


@pytest.mark.parametrize("size", [0, 4, 100, -100])
def test_truncated_weights_are_named(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"{weights} is damaged" in refused(LoadError, folder).message


def config_with(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, "shape"),
        ({"num_hidden_layers": 3, "layer_types": None}, "parameters"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_size": "many"}, ""),
    ],
)
def test_what_mlx_lm_cannot_build_is_refused_with_its_words(folder, changes, words):
    config_with(folder, **changes)
    error = refused(LoadError, folder)
    assert str(folder) in error.message
    assert words in error.message


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert f"tokenizer in {folder} cannot be loaded" in refused(LoadError, folder).message


# --- models and drafts that cannot be used ----------------------------------------------

GEMMA3 = {
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 27,
        "sliding_window": 16,
    },
    "model_type": "gemma3",
    "vocab_size": 27,
}
MAMBA = {
    "model_type": "mamba",
    "vocab_size": 27,
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 4,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 2,
}


def replace_model(folder, config):
    classes, arguments = _get_classes(config)
    model = classes(arguments.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_with_sliding_windows_loads(folder):
    replace_model(folder, GEMMA3)
    options = {"max_tokens": 40, "draft_tokens": 3}
    speculating = load(pair_of(folder, folder)).generate("abc", **options)
    assert speculating.speculation.acceptance_rate == 1.0
    assert speculating.tokens == load(pair_of(folder)).generate("abc", **options).tokens


def test_a_recurrent_model_loads_and_speculates(folder, target):
    replace_model(folder, MAMBA)
    options = {"max_tokens": 20, "draft_tokens": 3}
    speculating = load(pair_of(folder, folder)).generate("abc", **options)
    assert speculating.speculation.acceptance_rate == 1.0
    assert speculating.tokens == load(pair_of(folder)).generate("abc", **options).tokens
    drafting = load(pair_of(target, folder)).generate("abc", **options)
    assert drafting.tokens == load(pair_of(target)).generate("abc", **options).tokens


@pytest.mark.parametrize(("kept", "percent"), [(24, 88), (13, 48)])
def test_a_draft_of_too_few_of_the_targets_tokens_is_refused(target, tmp_path, kept, percent):
    draft = save_model(tmp_path / "draft", letters=LETTERS[27 - kept :] + "ABCDEFGH")
    error = refused(VocabularyMismatch, target, draft)
    assert error.message == (
        f"The draft speaks too few of the target's tokens: {draft} shares {percent}% of those of "
        f"{target}; it takes 90%."
    )
    assert "--draft history" in error.hint
    notes = []
    assert load(pair_of(target, draft), tell=notes.append).draft is None
    assert notes == [f"no speculation: {error.message}"]


COUPLED = SamplingParams(temperature=1.0, seed=3, verify="coupled")


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("letters", [LETTERS.replace("xyz", "xzy"), LETTERS[::-1]])
def test_a_draft_with_the_tokens_in_another_order_is_translated(
    target, tmp_path, letters, sampling
):
    draft = save_model(tmp_path / "draft", letters=letters)
    weights = mx.load(str(draft / "model.safetensors"))
    order = mx.array([LETTERS.index(letter) for letter in letters])
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][order]
    mx.save_safetensors(str(draft / "model.safetensors"), weights)
    options = {"max_tokens": 40, "draft_tokens": 3, "sampling": sampling}
    engine = load(pair_of(target, draft))
    result = engine.generate("abcxyz", **options)
    # The folder's weights are those of the target, by the tokens that they mean.
    assert result.speculation.acceptance_rate == 1.0
    assert result.tokens == load(pair_of(target, target)).generate("abcxyz", **options).tokens
    assert result.notes == [
        "the draft speaks another tokenizer: 100% of the target's tokens are shared"
    ]
    assert audit(engine, drained(engine, **options)).outcome == "identical"


def drained(engine, **options):
    run = engine.run("abcxyz", **options)
    for _ in run:
        pass
    return run


def test_a_draft_with_some_other_tokens_is_translated(target, tmp_path):
    draft = save_model(tmp_path / "draft", letters=LETTERS.replace("q", "Q").replace("j", "J"))
    engine = load(pair_of(target, draft))
    result = engine.generate("quick jogs", max_tokens=30, draft_tokens=3)
    assert result.tokens == load(pair_of(target)).generate("quick jogs", max_tokens=30).tokens
    assert result.notes[0].endswith("92% of the target's tokens are shared")


def test_a_draft_in_another_spelling_is_translated(target, tmp_path):
    draft = save_model(tmp_path / "draft")
    names = {("▁" if letter == "Ġ" else letter): 26 - i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(draft)
    engine = load(pair_of(target, draft))
    assert engine.shared["model"].percent == 100
    result = engine.generate("a b c", max_tokens=30, draft_tokens=3)
    assert result.tokens == load(pair_of(target)).generate("a b c", max_tokens=30).tokens


def test_added_and_special_tokens_are_found_by_their_names(target, tmp_path):
    folders = []
    for name, added in (("one", ["<a>", "<b>"]), ("two", ["<b>", "<a>"])):
        folder = save_model(tmp_path / name, vocabulary=40)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    one, two = folders
    shared = load(pair_of(one, two)).shared["model"]
    assert (shared.percent, shared.partners[27], shared.partners[28]) == (100, 28, 27)
    # What only one of the two has is a matter of size.
    for pair in (pair_of(target, one), pair_of(one, target)):
        engine = load(pair)
        assert engine.shared == {}
        assert engine.draft is not None


# --- a draft that cannot be used --------------------------------------------------------


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


DAMAGES = {
    "missing": shutil.rmtree,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": cut_weights,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "unknown type": lambda folder: (folder / "config.json").write_text('{"model_type": "none"}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_draft_that_cannot_be_used_is_left_out_where_that_is_allowed(target, folder, damage):
    damage(folder)
    pair, notes = pair_of(target, folder), []
    with pytest.raises(LoadError):
        load(pair)
    engine = load(pair, tell=notes.append)
    assert engine.draft is None
    (note,) = notes
    assert note.startswith("no speculation: ")
    assert "\n" not in note
    plain = load(pair_of(target)).generate("abc", max_tokens=10)
    assert engine.generate("abc", max_tokens=10).tokens == plain.tokens


def test_a_target_that_cannot_be_used_is_always_an_error(target, folder):
    cut_weights(folder)
    notes = []
    with pytest.raises(LoadError):
        load(pair_of(folder, target), tell=notes.append)
    assert notes == []


def test_the_command_leaves_out_the_draft_of_a_table_only(target, folder, tmp_path, invoke):
    cut_weights(folder)
    table = tmp_path / "models.toml"
    table.write_text(f'[mine]\ntarget = "{target}"\ndraft = "{folder}"\n')
    common = ("generate", "abc", "--no-compile", "--max-tokens", "8", "--models", str(table))
    plain = invoke(*common, "--pair", "mine", "--no-speculation")
    left_out = invoke(*common, "--pair", "mine")
    assert (left_out.code, left_out.out) == (0, plain.out)
    (warning,) = (line for line in left_out.err.splitlines() if "no speculation" in line)
    assert str(folder) in warning
    result = invoke(*common, "--pair", "mine", "--json").json
    assert result["notes"] == [warning]
    assert result["draft"] is None
    for refusing in (
        ("--pair", "mine", "--no-fallback"),
        ("--pair", "mine", "--draft", str(folder)),
        ("--target", str(target), "--draft", str(folder)),
    ):
        run = invoke(*common, *refusing)
        assert_one_error(run, 1)


def test_padded_and_longer_vocabularies_are_accepted(target, tmp_path):
    padded = save_model(tmp_path / "padded", vocabulary=32, seed=1)
    longer = save_model(tmp_path / "longer", letters=LETTERS + "ABC", vocabulary=64, seed=2)
    plain = load(pair_of(target)).generate("abc", max_tokens=10).tokens
    for draft in (padded, longer):
        assert load(pair_of(target, draft)).generate("abc", max_tokens=10).tokens == plain
    big = load(pair_of(padded, target)).generate("abc", max_tokens=10).tokens
    assert big == load(pair_of(padded)).generate("abc", max_tokens=10).tokens


# --- repositories -----------------------------------------------------------------------

REFUSED = {"org/gated": (403, "GatedRepo"), "org/broken": (500, ""), "org/cut": (0, "")}


@pytest.fixture
def hub(target, tmp_path, monkeypatch):
    """A hub with one model, and an empty cache; nothing of this process goes anywhere else."""
    hub = Hub({"org/model": target}, REFUSED)
    with as_the_hub(hub, tmp_path / "cache", monkeypatch):
        yield hub


def test_a_repository_is_downloaded_once_and_then_needs_no_hub(target, tmp_path, invoke):
    changes = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    options = ("--no-compile", "--quiet", "--max-tokens", "8", "abc")
    arguments = ("generate", "--target", "org/model", *options)
    with serving(Hub({"org/model": target}, {})) as hub:
        changes["HF_ENDPOINT"] = hub.endpoint
        assert mlxspec("pairs", "pull", "org/model", env=environment(**changes)).returncode == 0
        first = mlxspec(*arguments, env=environment(**changes))
    second = mlxspec(*arguments, env=environment(**changes))
    local = invoke("generate", "--target", str(target), *options)
    for run in (first, second):
        assert (run.returncode, run.stdout.decode(), run.stderr) == (0, local.out, b"")
    assert local.out


def test_a_hub_that_cannot_be_reached_is_one_error_of_the_command(tmp_path):
    table = tmp_path / "models.toml"
    table.write_text('[mine]\ntarget = "org/model"\n')
    closed = environment(
        HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0"
    )
    run = mlxspec("generate", "abc", "--pair", "mine", "--models", str(table), env=closed)
    assert_one_error(run, 1, "org/model (of the pair mine) is not on this machine")


@pytest.mark.parametrize(
    ("repository", "message", "hint"),
    [
        ("org/none", "There is no model org/none (of the pair mine)", "Check the name"),
        ("org/gated", "org/gated (of the pair mine) asks for its licence", "hf auth login"),
        ("org/broken", "org/broken (of the pair mine) is not on this machine", "hf download"),
        ("org/cut", "org/cut (of the pair mine) could not be downloaded", "Try again"),
        ("no good/name!", "There is no model no good/name! (of the pair mine)", "Check the name"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(hub, repository, message, hint):
    error = refused(LoadError, repository)
    assert error.message.startswith(message)
    assert hint in error.hint


def test_a_hub_that_is_away_is_said_in_words(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused(LoadError, "org/model")
    assert "org/model (of the pair mine) is not on this machine" in error.message
    assert "hf download org/model" in error.hint


def test_a_draft_of_the_hub_with_other_tokens_is_named_by_its_repository(hub, target, tmp_path):
    hub.models["org/other"] = save_model(tmp_path / "other", letters=LETTERS.upper())
    error = refused(VocabularyMismatch, "org/model", "org/other")
    assert "org/other shares 3% of those of org/model;" in error.message


def test_a_repository_without_weights_is_incomplete(hub, tmp_path):
    bare = hub.models["org/bare"] = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert "has no tokenizer.json" in refused(LoadError, "org/bare").message


# --- several drafts, and none -----------------------------------------------------------


def test_several_drafts_go_by_their_folders_names(target, tmp_path):
    one, two = (save_model(tmp_path / name) for name in ("small", "smaller"))
    engine = load(Pair("mine", str(target), (str(one), str(two))), compiled=False)
    assert list(engine.drafts) == ["small", "smaller"]
    same = save_model(tmp_path / "other" / "small")
    engine = load(Pair("mine", str(target), (str(one), str(same))), compiled=False)
    assert list(engine.drafts) == [str(one), str(same)]


def test_of_several_drafts_the_others_stay_where_one_is_not_to_be_had(target, tmp_path):
    one = save_model(tmp_path / "small")
    pair = Pair("mine", str(target), (str(tmp_path / "gone"), str(one)))
    with pytest.raises(LoadError, match="no model folder"):
        load(pair)
    said = []
    engine = load(pair, compiled=False, tell=said.append)
    assert list(engine.drafts) == ["small"]
    assert "gone" in said[0]
    assert setting_of(pair, engine).draft == "small"


def test_a_model_alone_repeats_what_it_wrote(target):
    for draft in (None, "history"):
        engine = load(Pair("mine", str(target), draft), compiled=False)
        assert (engine.drafts, len(engine.texts)) == ({}, 1)
    assert load(Pair("mine", str(target)), speculation=False).texts == ()


def test_a_target_that_cannot_speculate_decodes_plainly_unless_it_is_asked_to(target, monkeypatch):
    def refuse(cached):
        raise UnsupportedModel("llama says something else.", hint="Use another.")

    monkeypatch.setattr("mlxspec.decode.engine.require_exact", refuse)
    said = []
    assert load(Pair("mine", str(target)), tell=said.append).texts == ()
    assert said == ["no speculation: llama says something else."]
    with pytest.raises(UnsupportedModel):
        load(Pair("mine", str(target), "history"), tell=said.append)
