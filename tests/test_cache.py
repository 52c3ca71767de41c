"""Storage whose length is a number on the device shows what mlx-lm's caches show."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import model, prompt_of
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.models.cached_model import FusedModel
from mlxspec.models.caches.layers import adopt, capacity_of, grow, stack
from mlxspec.models.caches.positional import FullCache, FullLayer, Places


def layer_of(batch: int, capacity: int = 12) -> FullLayer:
    shape = (batch, 2, capacity, 3)
    values = np.random.default_rng(batch).normal(size=shape)
    return FullLayer(mx.array(values, mx.float32), mx.array(-values, mx.float32))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("rows", [1, 4])
def test_masks_are_those_of_mlx_lm(rows: int, window: int | None) -> None:
    offsets = [1, 5, 8]
    cache = FullCache(layer_of(3), Places(mx.array(offsets)), length=12)
    mask = np.array(cache.make_mask(rows, window_size=window))
    assert mask.shape == (3, 1, rows, 12)
    for row, offset in enumerate(offsets):
        expected = np.array(create_causal_mask(rows, offset, window_size=window))
        np.testing.assert_array_equal(mask[row, 0, :, : offset + rows], expected)
        assert not mask[row, 0, :, offset + rows :].any()


@pytest.mark.parametrize("offsets", [[4], [0, 9], [7, 2, 5]])
def test_rows_are_written_where_they_belong(offsets: list[int]) -> None:
    old = layer_of(len(offsets))
    cache = FullCache(old, Places(mx.array(offsets)), length=11)
    before = np.array(old.keys)
    new = mx.arange(len(offsets) * 2 * 3 * 3, dtype=mx.float32).reshape(len(offsets), 2, 3, 3)
    keys, values = cache.update_and_fetch(new, new + 100)
    expected = before.copy(), -before
    for row, offset in enumerate(offsets):
        expected[0][row, :, offset : offset + 3] = np.array(new)[row]
        expected[1][row, :, offset : offset + 3] = np.array(new)[row] + 100
    for got, wanted, stored in zip((keys, values), expected, cache.layer, strict=True):
        np.testing.assert_array_equal(np.array(got), wanted[:, :, :11])
        np.testing.assert_array_equal(np.array(stored), wanted)
    np.testing.assert_array_equal(np.array(old.keys), before)


def test_prefilled_caches_are_taken_over() -> None:
    target = model("llama")
    tokens = prompt_of(300)
    caches = make_prompt_cache(target)
    target(mx.array([tokens[:290]]), cache=caches)
    layers = adopt(caches, 320)
    assert capacity_of(layers) == 320
    wider = grow(layers, 512)
    assert capacity_of(wider) == capacity_of(grow(wider, 256)) == 512
    expected = target(mx.array([tokens]))[:, 290:]
    for some in (layers, wider):
        logits, after = FusedModel(target).forward(
            mx.array([tokens[290:]]), some, mx.array([290]), length=301
        )
        np.testing.assert_allclose(np.array(logits), np.array(expected), atol=1e-4)
        assert capacity_of(after) == capacity_of(some)


def test_stacked_rows_keep_their_order() -> None:
    rows = [[layer_of(1)], [FullLayer(*(array + 1 for array in layer_of(1)))]]
    [stacked] = stack(rows)
    for row, [layer] in enumerate(rows):
        for together, alone in zip(stacked, layer, strict=True):
            np.testing.assert_array_equal(np.array(together[row]), np.array(alone[0]))
