"""Memory sums before a model is loaded, held against MLX's peak memory of real runs."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from architectures import TABLE, build
from conftest import prompt_of
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.decode import reader
from mlxspec.decode.engine import Engine
from mlxspec.device import lengths
from mlxspec.errors import LoadError
from mlxspec.models.footprint import Footprint, footprint
from mlxspec.pairs.loading import load
from mlxspec.pairs.memory import MemorySum, memory_sum
from mlxspec.pairs.stock import memory_of, stock
from mlxspec.pairs.table import find_pair
from mlxspec.params import KVQuantization

WITHIN = 0.1
PROMPT, TEXT, K = 700, 6, 3
# Wide enough that weights and past are most of the memory, as in models that people run.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 100_000,
    "vocabulary": 8192,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, **HEADS, "num_hidden_layers": 4},
    "gemma3_text": {**WIDE, **HEADS, "num_hidden_layers": 4, "sliding_window": 128},
    "qwen3_next": {**WIDE, "vocabulary": 32_768},
    "mamba2": {"hidden_size": 256, "vocabulary": 32_768},
    "deepseek_v3": {**WIDE, "vocabulary": 16_384},
    "llama4": {
        "vocabulary": 32_768,
        "text_config": {
            **TABLE["llama4"]["config"]["text_config"],
            "hidden_size": 256,
            "intermediate_size": 512,
        },
    },
}


def weights_of(model: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def described(name: str, model: Any, **changes: Any) -> Footprint:
    vocabulary = changes.pop("vocabulary", 64)
    config = {"model_type": name, **TABLE[name]["config"], "dtype": "float32", **changes}
    parts = [config, *(one for one in config.values() if isinstance(one, dict))]
    for part in parts:
        part |= {"vocab_size": vocabulary} if "vocab_size" in part else {}
    return footprint(config, weights_of(model))


def peak_of(engine: Engine, **options: Any) -> int:
    """The peak of a run, less what other tests have left behind."""
    own = sum(weights_of(one.model) for one in engine.models)
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory() - own
    mx.reset_peak_memory()
    prompt = [token % 60 for token in prompt_of(PROMPT)]
    engine.generate(prompt, max_tokens=TEXT, ignore_eos=True, **options)
    return int(mx.get_peak_memory()) - others


def require_close(expected: MemorySum, peak: int) -> None:
    assert expected.needed == pytest.approx(peak, rel=WITHIN), dict(expected.rows())


@pytest.fixture(autouse=True)
def whole_pieces(monkeypatch):
    """The prompt is read in pieces of one size, as on a GPU: their time does not decide it."""
    monkeypatch.setattr(reader, "alone_s", lambda: None)


@pytest.mark.parametrize("drafts", [False, True], ids=["alone", "with a draft"])
@pytest.mark.parametrize("name", KINDS)
def test_a_sum_is_within_a_tenth_of_a_real_run(name, drafts):
    target = build(name, **KINDS[name])
    draft = build(name, seed=1, **KINDS[name]) if drafts else None
    one = described(name, target, **KINDS[name])
    found = memory_sum(
        one, {"draft": one} if drafts else {}, 0, context=PROMPT + TEXT, draft_tokens=K
    )
    engine = Engine(target, draft, draft_tokens=K if drafts else 0, compiled=False)
    require_close(found, peak_of(engine))


def test_a_sum_of_the_embedded_pair_is_within_a_tenth_of_a_real_run():
    pair = find_pair("demo")
    engine = load(pair, compiled=False)
    found = memory_of(replace(pair, draft_tokens=K), stock(pair), context=PROMPT + TEXT)
    require_close(found, peak_of(engine, draft_tokens=K))


def test_quantised_keys_and_values_are_counted_in_their_bits():
    config = {"model_type": "llama", **TABLE["llama"]["config"], "head_dim": 32}
    whole = footprint(config | {"dtype": "float32"}, 0).past(1000)["full"]
    small = footprint(config | {"dtype": "float32"}, 0, kv=KVQuantization(8, 32)).past(1000)["full"]
    caches = [cache.to_quantized(32, 8) for cache in _read(build("llama", head_dim=32))]
    held = sum(array.nbytes for cache in caches for array in (*cache.keys, *cache.values))
    entries = caches[0].keys[0].shape[2]
    assert small / whole == pytest.approx(held / entries / (whole / lengths.reserved(1000)))


def _read(model: Any) -> list[Any]:
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 3), mx.int32), cache=caches)
    return caches


def test_a_window_and_a_state_do_not_grow_with_the_text():
    window = described("gemma3_text", build("gemma3_text"))
    state = described("mamba2", build("mamba2"))
    assert window.past(2000)["window"] == window.past(9000)["window"]
    assert window.past(2000)["full"] < window.past(9000)["full"]
    assert state.past(10) == state.past(100_000)
    assert state.states(rows=4) == 3 * state.past(10)["state"]


def test_architectures_of_every_kind_are_known_beforehand_and_nothing_is_computed():
    for name in ("llama4", "qwen3_next", "deepseek_v3", "gpt_oss", "rwkv7", "gemma3n", "jamba"):
        entry = TABLE[name]
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = footprint({"model_type": name, **entry["config"]}, 0)
        assert sum(found.past(500).values()) > 0, name
        assert mx.get_peak_memory() - before < 1e5, name


def test_a_model_of_any_size_takes_no_memory_to_sum_up():
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = footprint(config, 40 * 10**9)
    assert mx.get_peak_memory() - before < 1e6
    assert found.past(8192)["full"] == 2 * 80 * 8 * 128 * 2 * lengths.reserved(8192)


@pytest.mark.parametrize("config", [{"model_type": "nothing"}, {}, {"model_type": "dbrx"}])
def test_a_model_that_is_not_known_is_one_error(config):
    with pytest.raises(LoadError, match="is not known beforehand") as caught:
        footprint(config | TABLE["dbrx"]["config"], 0)
    assert "\n" not in caught.value.message
