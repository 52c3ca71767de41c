"""Where weights lie in memory, and angles that layers share: the same numbers to the last bit."""

from __future__ import annotations

import platform
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import model, prompt_of

from mlxspec import load
from mlxspec.models.layout import as_stored, lay_out
from mlxspec.models.rotary import shared_angles

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="another BLAS library")


def strides(array: mx.array) -> tuple[int, ...]:
    return memoryview(array).strides  # type: ignore[arg-type, return-value]


@LINUX
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_of_laid_out_weights_have_the_same_bits(rows: int) -> None:
    layer, x = nn.Linear(48, 80, bias=False), mx.random.normal((rows, 48))
    before, weight = layer(x), mx.array(layer.weight)
    lay_out(layer)
    assert strides(layer.weight) == (4, 4 * 80)
    assert mx.array_equal(layer.weight, weight)
    assert mx.array_equal(layer(x), before)


@LINUX
def test_a_model_says_the_same_with_its_weights_laid_out() -> None:
    target, tokens = model("llama"), mx.array([prompt_of(9)])
    before = target(tokens)
    lay_out(target)
    embedding = next(one for one in target.modules() if isinstance(one, nn.Embedding))
    assert strides(embedding.weight)[0] == 4
    assert mx.array_equal(target(tokens), before)


@LINUX
def test_weights_lie_as_they_are_stored_for_a_while() -> None:
    target, tokens = model("llama"), mx.array([prompt_of(9)])
    lay_out(target)
    layers = [one for one in target.modules() if isinstance(one, nn.Linear | nn.Embedding)]
    before, laid_out = target(tokens), [layer.weight for layer in layers]
    with as_stored(target):
        assert all(strides(layer.weight)[-1] == 4 for layer in layers)
        assert mx.array_equal(target(tokens), before)
    assert all(layer.weight is one for layer, one in zip(layers, laid_out, strict=True))


@LINUX
def test_a_head_is_laid_out_as_it_is_loaded() -> None:
    engine = load("demo-head", compiled=False)
    layer = engine.heads["head"].module.layers[0]  # type: ignore[attr-defined]
    for product in (layer.self_attn.q_proj, layer.mlp.down_proj):
        assert strides(product.weight)[0] == 4


@LINUX
def test_weights_that_gain_nothing_or_would_round_otherwise_stay_as_they_are() -> None:
    short, biased = nn.Linear(48, 80, bias=False), nn.Linear(48, 80)
    short.set_dtype(mx.float16)
    for layer in (short, biased):
        lay_out(layer)
        assert strides(layer.weight)[0] == 48 * layer.weight.dtype.size


def turned(x: mx.array, dims: int, offset: int | mx.array, freqs: mx.array | None) -> mx.array:
    base = 10_000.0 if freqs is None else None
    return mx.fast.rope(
        x, dims, traditional=False, base=base, scale=0.25, offset=offset, freqs=freqs
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_shared_angles_turn_as_mlx_does(dtype: mx.Dtype, batch: int, rows: int) -> None:
    x = mx.random.normal((batch, 2, rows, 32)).astype(dtype)
    offset = mx.array([300 * i + 3 for i in range(batch)], mx.int32)
    other = offset + 1
    freqs = mx.random.uniform(shape=(16,)) + 1
    ways = [
        (32, offset, None),
        (32, other, None),
        (16, 7, None),
        (16, 8, None),
        (32, offset, freqs),
    ]
    expected = [turned(x, *way) for way in ways]
    with shared_angles():
        found = [turned(x, *way) for way in ways * 2]
    for one, another in zip(found, expected * 2, strict=True):
        assert one.dtype == another.dtype
        assert mx.array_equal(one, another)


def test_only_the_thread_that_builds_shares_angles() -> None:
    original, seen = mx.fast.rope, []

    def turn() -> None:
        seen.append(np.array(turned(mx.ones((1, 1, 1, 8)), 8, 5, None)))

    turn()
    with shared_angles():
        shared = mx.fast.rope
        thread = threading.Thread(target=turn)
        thread.start()
        thread.join()
        assert not shared._angles  # type: ignore[attr-defined]
    assert mx.fast.rope is original
    np.testing.assert_array_equal(seen[0], seen[1])
