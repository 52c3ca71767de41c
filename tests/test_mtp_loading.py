"""MTP layers from folders in the public formats: with the model, beside it, alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from architectures import build
from cli_tools import letters_tokenizer, save_model
from conftest import Ended, plain
from mlx.utils import tree_flatten
from mtp_makers import KINDS, alone, head_for, original, raw_weights

from mlxspec import LoadError, load
from mlxspec.defaults import MTP
from mlxspec.pairs import folders
from mlxspec.pairs.check import check
from mlxspec.pairs.hub import Repository
from mlxspec.pairs.stock import memory_of, stock
from mlxspec.pairs.suggest import suggest
from mlxspec.pairs.table import Pair

TEXT = "abcabc"


class Places(NamedTuple):
    """Folders of one model: as it was published, as it was converted, and of its layer."""

    target: Any
    layer: Any
    published: Path
    converted: Path
    alone: Path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Places]:
    made: dict[str, Places] = {}

    def of(kind: str) -> Places:
        if kind not in made:
            made[kind] = _places(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


def _places(folder: Path, kind: str) -> Places:
    converted = save_model(folder / "converted", name=kind, seed=0)
    tokenizer = letters_tokenizer()
    target = build(kind, vocabulary=len(tokenizer))
    weights = raw_weights(target, kind)
    layer = head_for(target, weights).module
    published = original(folder / "published", target, kind, weights)
    tokenizer.save_pretrained(published)
    return Places(target, layer, published, converted, alone(folder / "a", target, kind, layer))


def is_same(found: Any, expected: Any) -> bool:
    mine, its = (dict(tree_flatten(one.parameters())) for one in (found, expected))
    return mine.keys() == its.keys() and all(
        bool(mx.allclose(array, its[name], atol=1e-6)) for name, array in mine.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_found_wherever_it_is(
    kind: str, places: Callable[[str], Places], tmp_path: Path
) -> None:
    at = places(kind)
    beside, kept = tmp_path / "beside", tmp_path / "kept"
    for folder in (beside, kept):
        folder.mkdir()
        for file in at.converted.iterdir():
            (folder / file.name).symlink_to(file)
    (beside / "mtp.safetensors").symlink_to(at.alone / "model.safetensors")
    (kept / "model.safetensors").rename(kept / "model-1.safetensors")
    layer = {f"mtp.{name}": one for name, one in tree_flatten(at.layer.parameters())}
    mx.save_safetensors(str(kept / "model-2.safetensors"), layer, metadata={"format": "mlx"})
    for target, draft in (
        (at.published, MTP),
        (at.published, str(at.alone)),
        (at.converted, str(at.alone)),
        (at.converted, str(at.published)),
        (beside, MTP),
        (kept, MTP),
    ):
        engine = load(Pair("x", str(target), draft), compiled=False)
        assert list(engine.heads) == [MTP]
        assert not engine.drafts
        assert is_same(engine.heads[MTP].module, at.layer)  # type: ignore[attr-defined]
    found = engine.generate(TEXT, max_tokens=12, draft_tokens=2)
    prompt = engine.tokenizer.encode(TEXT)  # type: ignore[union-attr]
    assert found.tokens == plain(at.target, prompt, 12)
    assert set(found.speculation.by_source) == {MTP}


def test_a_target_without_its_layer_is_refused(places: Callable[[str], Places]) -> None:
    at = places("qwen3_5")
    with pytest.raises(LoadError, match="left out the tensors mtp") as error:
        load(Pair("x", str(at.converted), MTP))
    assert "--draft" in error.value.hint
    said: list[str] = []
    assert not load(Pair("x", str(at.converted), MTP), compiled=False, tell=said.append).heads
    assert len(said) == 1


def test_a_model_of_another_size_is_a_draft(
    places: Callable[[str], Places], tmp_path: Path
) -> None:
    small = places("qwen3_5").published
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 8
    text = {key: value for key, value in config["text_config"].items() if key != "vocab_size"}
    target = save_model(tmp_path / "large", name="qwen3_5", text_config={**text, "vocab_size": 27})
    engine = load(Pair("x", str(target), str(small)), compiled=False)
    assert list(engine.drafts) == ["model"]
    assert not engine.heads


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "layers": ({}, {"num_hidden_layers": 9}, "its number of layers is 9, and this target's 4"),
    "vocabulary": ({}, {"vocab_size": 99}, "its vocabulary is 99, and this target's 27"),
    "hidden size": ({}, {"hidden_size": 40}, "its hidden size is 40, and this target's 32"),
    "two layers": ({}, {"mtp_num_hidden_layers": 2}, "has 2 MTP layers"),
    "another family": ({"model_type": "glm5_next_mtp"}, {}, "The MTP layer of glm5_next is not"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_that_does_not_fit_is_refused(
    name: str, places: Callable[[str], Places], tmp_path: Path
) -> None:
    at = places("qwen3_5")
    change, inner, words = WRONG[name]
    config = json.loads((at.alone / "config.json").read_text())
    config |= {**change, "text_config": {**config["text_config"], **inner}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(at.alone / "model.safetensors")
    pair = Pair("x", str(at.converted), str(tmp_path))
    with pytest.raises(LoadError, match=words):
        load(pair, compiled=False)
    (said,) = [one.words for one in check(pair).findings if one.mark == "✗"]
    assert words in said


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "mimo"])
def test_targets_of_other_families_are_refused_by_name(name: str, tmp_path: Path) -> None:
    target = save_model(tmp_path / "model", name=name)
    with pytest.raises(LoadError, match=f"The MTP layer of {name} is not known"):
        load(Pair("x", str(target), MTP))


def test_a_layer_is_counted_and_checked(places: Callable[[str], Places]) -> None:
    at = places("qwen3_5")
    size = sum(array.nbytes for _, array in tree_flatten(at.layer.parameters()))
    sums = {}
    for target, draft, role in (
        (at.published, MTP, MTP),
        (at.converted, str(at.alone), "draft"),
        (at.converted, str(at.published), "draft"),
    ):
        pair = Pair("x", str(target), draft)
        held = stock(pair)
        assert [one.state for one in held] == ["here", "here"]
        memory = sums[target, draft] = memory_of(pair, held, context=1000)
        assert abs(memory.weights[role] - size) < 4096  # a file's header
        assert memory.past[role, "full"] > 0
        found = check(pair)
        assert found.is_usable, found.findings
        assert any("MTP layer" in one.words for one in found.findings)
    both = sums[at.published, MTP].weights, sums[at.converted, str(at.alone)].weights
    assert abs(both[0]["target"] - both[1]["target"]) < 8192
    lacking = check(Pair("x", str(at.converted), MTP))
    assert not lacking.is_usable


def test_it_is_suggested_where_the_target_has_kept_it(places: Callable[[str], Places]) -> None:
    at = places("qwen3_5")
    assert suggest(str(at.published), [], [])[0].draft == MTP
    assert MTP not in [one.draft for one in suggest(str(at.converted), [], [])]


def test_of_an_original_only_the_files_of_its_layer_are_fetched(
    places: Callable[[str], Places], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = places("qwen3_5")
    asked: list[tuple[str, ...]] = []

    def download(one: Repository, pair: str, patterns: tuple[str, ...]) -> Path:
        asked.append(tuple(patterns))
        return at.published

    monkeypatch.setattr(folders, "download", download)
    found = folders.fetch(Pair("x", str(at.converted), "Qwen/Qwen3.5-4B"))
    assert found.drafts == {"model": at.published}
    assert asked[-1][-1] == "model-00002-of-00002.safetensors"
    assert not any("*" in one for one in asked[-1])


def test_the_command_takes_it_by_name(
    places: Callable[[str], Places], invoke: Callable[..., Ended]
) -> None:
    at = places("qwen3_5")
    command = ("generate", "--target", str(at.published), "--draft", MTP, "--no-compile", "--json")
    found = invoke(*command, "--max-tokens", "6", TEXT).json
    assert found["draft"] == MTP
    ended = invoke("generate", "--target", str(at.converted), "--draft", MTP, TEXT)
    assert ended.code == 1
    assert "--draft" in ended.err
