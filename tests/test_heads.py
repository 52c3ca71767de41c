"""Trained heads in engines: exact, on every kind of cache, in batches, and out of their folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from architectures import VOCABULARY, build
from cli_tools import save_model
from conftest import Ended, draft_for, plain, prompt_of
from head_reference import random_head
from mlx.utils import tree_flatten
from test_heads_parity import BOTH, DEEPSPEC, DFLASH2, SIZES, SLIDING, SPECULATORS, Z_LAB, error

from mlxspec import Penalties, PrefixCache, load
from mlxspec.decode.engine import Engine
from mlxspec.defaults import AUTO
from mlxspec.drafters.heads.block import BlockHead, load_block
from mlxspec.drafters.heads.recognition import kind_of
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.drafters.history import History
from mlxspec.errors import LoadError
from mlxspec.models.prefill import CHUNK
from mlxspec.models.taps import Taps
from mlxspec.pairs.check import check
from mlxspec.pairs.table import Pair
from mlxspec.params import SamplingParams

pytestmark = pytest.mark.usefixtures("rooms")

COUNT = 24
# Of full attention, windows, a recurrence beside attention and alone, and on mlx-lm's own caches.
KINDS = ("llama", "gemma3_text", "qwen3_next", "mamba2", "llama4")
CONFIGS = {
    "DFlash": Z_LAB,
    "a window": SLIDING,
    "DFlash2": DFLASH2,
    "DSpark": DEEPSPEC,
    "speculators": SPECULATORS,
}
HOT = SamplingParams(temperature=1.5, seed=4, verify="coupled")


@cache
def target(name: str = "llama") -> Any:
    return build(name)


def head_on(model: Any, config: dict[str, Any] = Z_LAB, seed: int = 0) -> BlockHead:
    """A head with random weights on a target of any kind."""
    trunk = Trunk(model)
    config = fitted(config, trunk)
    own = BOTH if "markov_rank" in config else ()
    weights = random_head(config, seed, own)
    arrays = {name: mx.array(one) for name, one in weights.items()}
    return load_block(config, arrays, trunk, "here", None)


def fitted(config: dict[str, Any], trunk: Trunk) -> dict[str, Any]:
    """A configuration for a target, by its sizes."""
    sizes = {"hidden_size": trunk.hidden_size, "vocab_size": trunk.vocabulary}
    if "transformer_layer_config" in config:
        return {**config, "transformer_layer_config": config["transformer_layer_config"] | sizes}
    return {**config, **sizes, "num_target_layers": trunk.layers}


def engine_of(name: str = "llama", config: dict[str, Any] = Z_LAB, **options: Any) -> Engine:
    model = target(name)
    return Engine(model, heads={"head": head_on(model, config)}, **{"compiled": False} | options)


# --- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["DFlash", "DSpark"])
def test_a_text_is_the_targets_whatever_the_caches(name: str, kind: str) -> None:
    engine, prompt = engine_of(name, CONFIGS[kind]), prompt_of(19)
    result = engine.generate(prompt, max_tokens=COUNT, draft_tokens=3)
    assert result.tokens == plain(target(name), prompt, COUNT)
    assert set(result.speculation.by_source) == {"head"}
    texts = [
        engine.generate(prompt, max_tokens=COUNT, draft_tokens=count, sampling=HOT)
        for count in (0, 4)
    ]
    assert texts[0].tokens == texts[1].tokens


@pytest.mark.parametrize("config", CONFIGS)
def test_its_past_is_that_of_the_whole_text_however_it_was_written(config: str) -> None:
    model = build("llama", vocabulary=8)  # random proposals are kept now and then
    head = head_on(model, CONFIGS[config] | _among_eight(CONFIGS[config]))
    engine = Engine(model, heads={"head": head}, compiled=False)
    sampling = SamplingParams(temperature=1.0, seed=1, verify="token")
    prompt = prompt_of(11, vocabulary=8)
    session = engine.session(prompt, sampling=sampling, draft_tokens=3, max_tokens=90)
    kept = []
    while (stats := session.step().stats) is not None:
        kept.append(stats.accepted)
    assert len(set(kept)) > 1
    past = session.ahead(0)[0].drafts["head"]
    read = session.text[: len(session.text) - 1]
    with Taps(model, head.taps).watching() as features:
        model(mx.array([read]))
    expected = head.commit(
        head.begin(256), mx.array([read]), features, mx.array([0]), mx.array([len(read)])
    )
    for layer, other in zip(past, expected, strict=True):
        for found, array in zip(layer, other, strict=True):
            size = array.shape[2]
            slots = np.arange(max(0, len(read) - 6), len(read)) % min(size, found.shape[2])
            pair = (np.array(one)[:, :, slots] for one in (found, array))
            assert error(*pair) < 1e-4


def _among_eight(config: dict[str, Any]) -> dict[str, Any]:
    """What a head on a target of eight tokens has in place of its own."""
    if "dflash_config" in config:
        return {"dflash_config": {**config["dflash_config"], "mask_token_id": 7}}
    return {"mask_token_id": 7} | ({"draft_vocab_size": 7} if "draft_vocab_size" in config else {})


def test_penalties_look_back_on_each_token_of_a_block() -> None:
    sampling = SamplingParams(
        temperature=1.0, seed=3, verify="coupled", penalties=Penalties(repetition=1.5, frequency=1)
    )
    engine = engine_of()
    texts = [
        engine.generate(prompt_of(9), max_tokens=COUNT, draft_tokens=k, sampling=sampling).tokens
        for k in (0, 5)
    ]
    assert texts[0] == texts[1]


def test_compiled_rounds_write_the_same() -> None:
    model, prompt = target(), prompt_of(9)
    engine = engine_of(config=SLIDING, compiled=True)
    result = engine.generate(prompt, max_tokens=COUNT, draft_tokens=2)
    assert result.tokens == plain(model, prompt, COUNT)


def test_it_takes_turns_with_a_model_and_the_text() -> None:
    model, prompt = target(), prompt_of(4) * 3
    engine = Engine(
        model,
        {"small": draft_for(model, "half")},
        heads={"head": head_on(model), "other": head_on(model, SLIDING)},
        texts=(History,),
        compiled=False,
    )
    result = engine.generate(prompt, max_tokens=60, draft_tokens=AUTO)
    assert result.tokens == plain(model, prompt, 60)


class Knowing:
    """A head that knows the text, and how many rows it was ever told of at once."""

    taps, most = ("model.norm",), 6

    def __init__(self, text: list[int]) -> None:
        self._text = mx.array(text + [0] * 16, mx.int32)
        self.rows: list[int] = []

    def begin(self, capacity: int) -> mx.array:
        return mx.zeros((1, 1))

    def propose(
        self, past: Any, last_two: Any, position: Any, picks: Any, count: int, length: int
    ) -> Any:
        following = mx.take(self._text, position[:, None] + 1 + mx.arange(count))
        picks.pick_all(9.0 * (mx.arange(VOCABULARY) == following[..., None]))
        return past

    def commit(self, past: Any, tokens: Any, features: Any, position: Any, kept: Any) -> Any:
        assert features["model.norm"].shape[:2] == tokens.shape
        self.rows.append(tokens.shape[1])
        return past


def test_the_best_of_models_heads_and_the_text_drafts() -> None:
    model, prompt = target(), prompt_of(9)
    text = plain(model, prompt, 120)
    engine = Engine(
        model,
        {"bad": draft_for(model, "never")},
        heads={"bad head": head_on(model), "good head": Knowing(prompt + text)},
        texts=(History,),
        compiled=False,
    )
    result = engine.generate(prompt, max_tokens=120, draft_tokens=AUTO)
    assert result.tokens == text
    rounds = {name: one.rounds for name, one in result.speculation.by_source.items()}
    assert max(rounds, key=lambda name: rounds[name]) == "good head"


def test_a_prompt_is_taken_piece_by_piece() -> None:
    model, head = target(), Knowing([0])
    session = Engine(model, heads={"head": head}, compiled=False).session(prompt_of(2 * CHUNK + 9))
    assert sum(head.rows) == len(session.text) - 1
    assert len(head.rows) > 2
    assert max(head.rows) <= CHUNK


@pytest.mark.parametrize("config", CONFIGS)
def test_texts_side_by_side_are_those_alone(config: str) -> None:
    engine = engine_of(config=CONFIGS[config])
    prompts = [prompt_of(length, length) for length in (30, 1, 9, 4)]
    for sampling in (SamplingParams(), HOT):
        options: Any = {"max_tokens": 12, "draft_tokens": 3, "sampling": sampling}
        alone = [engine.generate(one, **options) for one in prompts]
        beside = engine.generate_many(prompts, max_rows=3, **options)
        assert [one.tokens for one in beside] == [one.tokens for one in alone]
        for one, other in zip(beside, alone, strict=True):
            assert one.speculation.accepted == other.speculation.accepted


# --- what outlasts a text -----------------------------------------------------------------------


@pytest.mark.parametrize("config", ["DFlash", "a window"])
def test_a_prefix_cache_has_its_past(config: str) -> None:
    engine = engine_of(config=CONFIGS[config], prefixes=PrefixCache())
    alone = engine_of(config=CONFIGS[config])
    options: Any = {"max_tokens": COUNT, "draft_tokens": 3, "sampling": HOT}
    prompt = prompt_of(40)
    first = engine.generate(prompt, **options)
    turns = [(prompt, 39), (prompt[:30] + [1, 2], 30)]
    if config == "DFlash":  # a window's past is that of one place, as a model's
        turns.append((prompt + first.tokens + [1, 2], 39 + len(first.tokens)))
    for turn, read in turns:
        found, expected = engine.generate(turn, **options), alone.generate(turn, **options)
        assert found.tokens == expected.tokens
        assert found.cached_prompt_tokens == read
        assert found.speculation.accepted == expected.speculation.accepted


def test_a_file_has_its_past_for_the_same_weights_alone(tmp_path: Path) -> None:
    options: Any = {"max_tokens": COUNT, "draft_tokens": 3, "cache": tmp_path / "prompt.cache"}
    prompt, model, read = prompt_of(40), target(), []
    for seed in (0, 0, 1):
        engine = Engine(model, heads={"head": head_on(model, SLIDING, seed)}, compiled=False)
        result = engine.generate(prompt, **options)
        assert result.tokens == plain(model, prompt, COUNT)
        read.append(result.cached_prompt_tokens)
    assert read == [0, 39, 0]


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target on disk, with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("models") / "letters")


def saved(folder: Path, config: dict[str, Any], weights: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: mx.array(one) for name, one in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return str(folder)


def sizes_of(letters: Path) -> dict[str, Any]:
    config = json.loads((letters / "config.json").read_text())
    return {
        **Z_LAB,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_target_layers": config["num_hidden_layers"],
        "dflash_config": {"mask_token_id": 5, "target_layer_ids": [0, 1]},
    }


def test_a_head_is_named_as_a_draft(
    letters: Path, tmp_path: Path, invoke: Callable[..., Ended]
) -> None:
    config = sizes_of(letters)
    weights = random_head(config)
    expected = load(Pair("x", str(letters)), speculation=False).generate("abcabc", max_tokens=20)
    plain_folder = saved(tmp_path / "plain", config, weights)
    head = load(Pair("x", str(letters), plain_folder), compiled=False).heads["dflash"]
    # As mlx-lm would have quantised it.
    halves = load(Pair("x", str(letters), plain_folder, draft_bits=8), compiled=False)
    quantised: Any = dict(tree_flatten(halves.heads["dflash"].module.parameters()))  # type: ignore[attr-defined]
    told = {"quantization": {"group_size": 64, "bits": 8}}
    folder = saved(tmp_path / "quantised", {**config, **told}, quantised)
    assert any(one.dtype == mx.uint32 for one in quantised.values())
    for location in (plain_folder, folder):
        engine = load(Pair("x", str(letters), (location, "history")), compiled=False)
        result = engine.generate("abcabc", max_tokens=20, draft_tokens=3)
        assert result.tokens == expected.tokens
        assert set(result.speculation.by_source) == {"dflash"}
    assert engine.heads["dflash"].identity != head.identity  # type: ignore[attr-defined]
    command = ("generate", "--target", str(letters), "--draft", folder, "--draft", str(letters))
    options = ("--no-compile", "--temp", "0", "--max-tokens", "9", "--json", "abcabc")
    assert invoke(*command, *options).json["tokens"] == expected.tokens[:9]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "hidden size": ({"hidden_size": 40}, "its hidden size is 40, and this target's 32"),
    "layers": ({"num_target_layers": 9}, "its number of layers is 9, and this target's 2"),
    "vocabulary": ({"vocab_size": 99}, "its vocabulary is 99, and this target's 27"),
    "taps": (
        {"dflash_config": {"mask_token_id": 5, "target_layer_ids": [0, 7]}},
        "its highest layer is 7, and this target's 1",
    ),
    "mask": (
        {"dflash_config": {"mask_token_id": 27, "target_layer_ids": [0, 1]}},
        "its mask token is 27, and this target's 26",
    ),
    "no mask": ({"dflash_config": {"target_layer_ids": [0, 1]}}, "has no 'mask_token_id'"),
    "other weights": ({"intermediate_size": 47}, "mlp.gate_proj.weight .* is"),
    "missing weights": ({"num_hidden_layers": 3}, "lack layers.2"),
    "layer types": ({"layer_types": ["linear_attention"] * 2}, "linear_attention"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_head_that_does_not_fit_is_refused(name: str, letters: Path, tmp_path: Path) -> None:
    config = sizes_of(letters)
    change, words = WRONG[name]
    location = saved(tmp_path / "head", {**config, **change}, random_head(config))
    with pytest.raises(LoadError, match=words) as caught:
        load(Pair("x", str(letters), location), compiled=False)
    assert caught.value.hint
    said: list[str] = []
    engine = load(Pair("x", str(letters), location), compiled=False, tell=said.append)
    assert not engine.heads
    assert len(said) == 1


def test_a_head_of_another_kind_is_told_by_name(letters: Path, tmp_path: Path) -> None:
    config = {**SIZES, "speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"]}
    location = saved(tmp_path / "eagle", config, {"fc.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(LoadError, match="is a head of EAGLE-3"):
        load(Pair("x", str(letters), location), compiled=False)


def test_a_check_knows_heads(letters: Path, tmp_path: Path) -> None:
    config = sizes_of(letters)
    for change, usable in (({}, True), ({"hidden_size": 40}, False)):
        location = saved(tmp_path / str(usable), {**config, **change}, random_head(config))
        found = check(Pair("x", str(letters), location))
        of_draft = [one for one in found.findings if one.what == "draft"]
        assert found.is_usable == usable
        assert ("7 tokens in one pass" in of_draft[0].words) == usable


RECOGNISED: list[tuple[dict[str, Any], str | None]] = [
    (Z_LAB, "dflash"),
    (SLIDING, "dflash"),
    (DFLASH2, "dflash"),
    (DEEPSPEC, "dspark"),
    (SPECULATORS, "dspark"),
    ({**SPECULATORS, "speculators_model_type": "dflash", "markov_rank": 0}, "dspark"),
    ({**Z_LAB, "dflash_config": {**Z_LAB["dflash_config"], "markov_rank": 4}}, "dspark"),
    (SIZES, None),
    ({**SIZES, "architectures": ["Qwen3ForCausalLM"]}, None),
    ({**SIZES, "dspark_target_layer_ids": [1], "architectures": ["DeepseekV4DSpark"]}, None),
]


@pytest.mark.parametrize(("config", "kind"), RECOGNISED)
def test_a_head_is_known_by_its_configuration(config: dict[str, Any], kind: str | None) -> None:
    assert kind_of(config) == kind


def test_a_trunk_is_found_whatever_its_target_calls_it() -> None:
    for name, prefix in (
        ("llama", "model"),
        ("gemma3_text", "model"),
        ("qwen3_5", "language_model.model"),
    ):
        model = build(name)
        trunk = Trunk(model)
        assert trunk.tap(1) == f"{prefix}.layers.1"
        assert trunk.norm_tap == f"{prefix}.norm"
        tokens = mx.array([[3, 5]])
        with Taps(model, [trunk.tap(-1), trunk.norm_tap]).watching() as seen:
            logits = model(tokens)
        assert error(np.array(trunk.embedded(tokens)), np.array(seen[trunk.tap(-1)])) < 1e-5
        assert trunk.vocabulary == logits.shape[-1] == VOCABULARY
        order = np.argsort(np.array(trunk.logits(seen[trunk.norm_tap]))[0], axis=-1)
        assert (order == np.argsort(np.array(logits)[0], axis=-1)).all()  # but for a soft cap
