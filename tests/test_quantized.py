"""Keys and values in fewer bits: the text is that of mlx-lm with the same quantisation."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import KINDS, build, draft_for, model, plain, prompt_of
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache

from mlxspec.decode.engine import Engine
from mlxspec.errors import UsageError
from mlxspec.measure.audit import audit
from mlxspec.models.caches.layers import adopt, capacity_of, grow
from mlxspec.models.caches.positional import Places, QuantizedLayer
from mlxspec.params import KVQuantization, SamplingParams

SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}


@cache
def wide(name: str) -> Any:
    """A model whose heads have as many dimensions as a group."""
    return build(name, **SHAPE)


@cache
def oracle(name: str, bits: int, length: int, count: int) -> list[int]:
    steps = generate_step(
        mx.array(prompt_of(length)),
        wide(name),
        max_tokens=count,
        kv_bits=bits,
        kv_group_size=32,
        quantized_kv_start=0,
    )
    return [token for token, _ in steps]


def engine_of(name: str, kind: str, bits: int = 8, *, compiled: bool = False) -> Engine:
    target = wide(name)
    return Engine(target, draft_for(target, kind), compiled=compiled, kv=KVQuantization(bits, 32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "draft_tokens"),
    [("llama", 1), ("llama", 4), ("llama", 8), ("qwen3", 3), ("mixtral", 3)],
)
def test_greedy_text_is_that_of_mlx_lm(name: str, draft_tokens: int, kind: str, bits: int) -> None:
    engine = engine_of(name, kind, bits)
    result = engine.generate(prompt_of(9), max_tokens=40, draft_tokens=draft_tokens)
    assert result.tokens == oracle(name, bits, 9, 40)


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_text_is_that_of_mlx_lm(bits: int) -> None:
    result = engine_of("llama", "half", bits).generate(prompt_of(9), max_tokens=40, draft_tokens=0)
    assert result.tokens == oracle("llama", bits, 9, 40)


def test_it_is_another_text_than_without() -> None:
    assert oracle("llama", 4, 9, 40) != plain(wide("llama"), prompt_of(9), 40)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_text_that_outgrows_its_caches(compiled: bool) -> None:
    engine = engine_of("llama", "half", compiled=compiled)
    result = engine.generate(prompt_of(220), max_tokens=80, draft_tokens=4)
    assert result.tokens == oracle("llama", 8, 220, 80)


def test_sampled_text_is_the_seeds_alone_and_passes_an_audit() -> None:
    sampling = SamplingParams(temperature=0.8, seed=5, verify="coupled")
    texts = []
    for count in (0, 3, 6):
        engine = engine_of("llama", "half", 4)
        run = engine.run(prompt_of(5), max_tokens=24, draft_tokens=count, sampling=sampling)
        for _ in run:
            pass
        texts.append(run.generation.tokens)
        assert audit(engine, run).outcome == "identical"
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_storage_is_mlx_lms_own_and_grows(bits: int) -> None:
    theirs = QuantizedKVCache(group_size=32, bits=bits)
    rng = np.random.default_rng(bits)
    first, second = (mx.array(rng.normal(size=(1, 2, n, 32)), mx.float32) for n in (5, 3))
    theirs.update_and_fetch(first, -first)
    (layer,) = adopt([theirs], 16)
    assert isinstance(layer, QuantizedLayer)
    opened = layer.opened(Places(mx.array([5])), 8)
    got = opened.update_and_fetch(second, -second)
    assert (opened.bits, opened.group_size) == (bits, 32)
    for mine, other in zip(got, theirs.update_and_fetch(second, -second), strict=True):
        for part, expected in zip(mine, other, strict=True):
            np.testing.assert_array_equal(np.array(part), np.array(expected))
    assert capacity_of([layer]) == 16
    assert capacity_of(grow([opened.layer], 32)) == 32


def test_what_cannot_be_quantised_is_refused() -> None:
    sliding = model("gemma3_text")
    with pytest.raises(UsageError, match="RotatingKVCache cannot be quantised"):
        Engine(sliding, kv=KVQuantization(8))
    with pytest.raises(UsageError, match="RotatingKVCache"):
        Engine(wide("llama"), sliding, kv=KVQuantization(8, 32))
    with pytest.raises(UsageError, match="in groups of 64"):
        Engine(model("llama"), kv=KVQuantization(8, 64))
    with pytest.raises(UsageError, match="without attention cannot be quantised"):
        Engine(model("mamba2"), kv=KVQuantization(8))


@pytest.mark.parametrize("values", [{"bits": 3}, {"bits": 0}, {"bits": 8, "group_size": 16}])
def test_values_out_of_range(values: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="kv_"):
        KVQuantization(**values)


# --- weights in fewer bits --------------------------------------------------------------


@cache
def with_bits(name: str, bits: int | str, *, tied: bool = True) -> Any:
    """A model with its weights quantised: all to so many bits, or every other layer to 8 and 4."""
    model = build(name, tie_word_embeddings=tied, **SHAPE)

    def chosen(path: str, module: Any) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        eight = bits == 8 or (bits == "mixed" and ".0." in path)
        return {"group_size": 32, "bits": 8 if eight else 4}

    nn.quantize(model, class_predicate=chosen)
    return model


@cache
def text_of(name: str, bits: int | str) -> list[int]:
    """What mlx-lm writes with weights of so many bits."""
    return plain(with_bits(name, bits) if bits else wide(name), prompt_of(9), 40)


# The experts of Mixtral are layers of their own kind: one side is enough to see them on.
@pytest.mark.parametrize(
    ("name", "target_bits", "draft_bits"),
    [
        *(("llama", 4, bits) for bits in (4, 8, 0)),
        *(("llama", 8, bits) for bits in (4, "mixed")),
        ("llama", "mixed", 8),
        ("llama", 0, 4),
        ("mixtral", 4, 0),
        ("mixtral", 0, 8),
        ("mixtral", "mixed", 4),
    ],
)
def test_quantised_weights_on_either_side(
    name: str, target_bits: int | str, draft_bits: int | str
) -> None:
    target, draft = (
        with_bits(name, bits, tied=tied) if bits else wide(name)
        for bits, tied in ((target_bits, True), (draft_bits, False))
    )
    engine = Engine(target, draft, compiled=False)
    for count in (1, 4):
        result = engine.generate(prompt_of(9), max_tokens=40, draft_tokens=count)
        assert result.tokens == text_of(name, target_bits)


@pytest.mark.parametrize("bits", [4, 8, "mixed"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_quantised_weights_agree_with_themselves(name: str, bits: int | str) -> None:
    target = with_bits(name, bits)
    engine = Engine(target, target, compiled=False)
    alike = engine.generate(prompt_of(9), max_tokens=40, draft_tokens=3)
    assert alike.speculation.acceptance_rate == 1.0


def test_quantised_weights_in_a_recurrent_model() -> None:
    target = with_bits("qwen3_next", 4)
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    result = engine.generate(prompt_of(9), max_tokens=40, draft_tokens=3)
    assert result.tokens == text_of("qwen3_next", 4)
