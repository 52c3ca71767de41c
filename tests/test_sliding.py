"""Sliding windows: rings that forget, and that a rejected proposal does not harm.

The oracle is mlx-lm's plain decoding, one token at a time on its own rotating caches.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import SLIDING, WINDOW, draft_for, model, plain, prompt_of
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlxspec.decode.engine import Engine
from mlxspec.defaults import MAX_DRAFT_TOKENS
from mlxspec.measure.audit import audit
from mlxspec.models.cached_model import FusedModel
from mlxspec.models.caches.layers import adopt, capacity_of, grow, stack, unknown
from mlxspec.models.caches.positional import SPARE, UNBOUNDED, FullLayer, Places, RingLayer
from mlxspec.params import SamplingParams

LONG = 300


@cache
def oracle(name: str, length: int) -> list[int]:
    return plain(model(name), prompt_of(length), LONG)


def engine_of(name: str, kind: str, *, compiled: bool = False) -> Engine:
    return Engine(model(name), draft_for(model(name), kind), compiled=compiled)


@pytest.mark.parametrize("name", SLIDING)
def test_greedy_text_past_the_window(name: str) -> None:
    text = oracle(name, 5)
    assert len(set(text[WINDOW:])) > 5
    result = engine_of(name, "half").generate(prompt_of(5), max_tokens=LONG, draft_tokens=3)
    assert result.tokens == text


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 100, 600])
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_prompts_around_and_beyond_the_window(name: str, length: int) -> None:
    engine = engine_of(name, "half")
    for draft_tokens in (0, 3):
        result = engine.generate(prompt_of(length), max_tokens=40, draft_tokens=draft_tokens)
        assert result.tokens == plain(model(name), prompt_of(length), 40)


@pytest.mark.parametrize("draft_tokens", [3, MAX_DRAFT_TOKENS])
def test_compiled_and_with_the_most_proposals(draft_tokens: int) -> None:
    # The ring is one slot larger than the window and the most rows together need it to be.
    engine = engine_of("gemma3_text", "half", compiled=True)
    result = engine.generate(prompt_of(5), max_tokens=200, draft_tokens=draft_tokens)
    assert result.tokens == oracle("gemma3_text", 5)[:200]


def test_a_sliding_draft_of_a_full_target_and_the_reverse() -> None:
    full, sliding = model("llama"), model("olmo3")
    for target, draft in ((full, sliding), (sliding, full)):
        result = Engine(target, draft, compiled=False).generate(
            prompt_of(5), max_tokens=80, draft_tokens=3
        )
        assert result.tokens == plain(target, prompt_of(5), 80)


def test_sampled_text_is_the_seeds_alone_and_passes_an_audit() -> None:
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=5, verify="coupled")
    texts = []
    for count in (0, 3, 6):
        engine = engine_of("gpt_oss", "half")
        run = engine.run(prompt_of(5), max_tokens=80, draft_tokens=count, sampling=sampling)
        for _ in run:
            pass
        texts.append(run.generation.tokens)
        assert audit(engine, run).outcome == "identical"
    assert texts[0] == texts[1] == texts[2]


# --- the storage ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, MAX_DRAFT_TOKENS + 1])
@pytest.mark.parametrize("window_size", [None, 3, 100])
def test_masks_and_entries_are_those_of_a_window(rows: int, window_size: int | None) -> None:
    # Entry p holds the number p, so what is seen can be read off.
    size = WINDOW + SPARE
    offsets = [0, 7, WINDOW, 75, 80, 81, 400]
    keys = np.full((len(offsets), 1, size, 1), -1.0, np.float32)
    for row, offset in enumerate(offsets):
        # What rejected proposals left after the offset, as far as a round reaches.
        for position in range(max(offset + SPARE - 1 - size + 1, 0), offset + SPARE):
            keys[row, 0, position % size, 0] = position if position < offset else 1000 + position
    ring = RingLayer(mx.array(keys), mx.array(keys))
    opened = ring.opened(Places(mx.array(offsets)), 10**6)
    new = mx.array([[o + i for i in range(rows)] for o in offsets], mx.float32)
    got, _ = opened.update_and_fetch(new[:, None, :, None], new[:, None, :, None])
    mask = np.array(opened.make_mask(rows, window_size=window_size))
    window = min(window_size or WINDOW, WINDOW)
    for row, offset in enumerate(offsets):
        for i in range(rows):
            seen = sorted(np.array(got)[row, 0, mask[row, 0, i], 0].tolist())
            reach = offset + i
            assert seen == list(range(max(reach - window + 1, 0), reach + 1))


def test_a_short_text_attends_over_no_more_than_it_has() -> None:
    ring = RingLayer(mx.zeros((1, 1, 512 + SPARE, 4)), mx.zeros((1, 1, 512 + SPARE, 4)))
    opened = ring.opened(Places(mx.array([10])), 64)
    keys, values = opened.update_and_fetch(mx.ones((1, 1, 3, 4)), mx.ones((1, 1, 3, 4)))
    assert keys.shape == values.shape == (1, 1, 64, 4)
    assert opened.make_mask(3).shape == (1, 1, 3, 64)


def test_rings_neither_grow_nor_bound_a_text() -> None:
    target = model("gemma3_text")
    caches = make_prompt_cache(target)
    target(mx.array([prompt_of(50)]), cache=caches)
    layers = adopt(caches, 256)
    assert [type(layer) for layer in layers] == [RingLayer, FullLayer]
    assert capacity_of(layers) == 256
    assert capacity_of(layers[:1]) == UNBOUNDED
    wider = grow(layers, 512)
    assert wider[0].keys.shape[2] == WINDOW + SPARE
    assert capacity_of(wider) == 512
    both = stack([layers, layers])
    assert [type(layer) for layer in both] == [RingLayer, FullLayer]
    assert both[0].keys.shape[0] == 2


def test_caches_in_a_list_are_opened_one_by_one() -> None:
    caches = [CacheList(KVCache(), RotatingKVCache(max_size=8)), KVCache()]
    assert not unknown(caches)
    flat = [caches[0][0], caches[0][1], caches[1]]
    for one in flat:
        for _ in range(3):
            one.update_and_fetch(mx.ones((1, 1, 5, 2)), mx.ones((1, 1, 5, 2)))
    layers = adopt(caches, 64)

    class Model(nn.Module):
        def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
            new = mx.ones((1, 1, tokens.shape[1], 2))
            for one in (cache[0][0], cache[0][1], cache[1]):
                one.update_and_fetch(new, new)
            return mx.zeros((*tokens.shape, 3))

        def make_cache(self) -> list[Any]:
            return [CacheList(KVCache(), RotatingKVCache(max_size=8)), KVCache()]

    cached = FusedModel(Model())
    _, after = cached.forward(mx.zeros((1, 2), mx.int32), layers, mx.array([15]), 64)
    assert [type(layer) for layer in after[0]] == [FullLayer, RingLayer]
    assert float(after[1].keys.sum().item()) == 2 * 17
    assert capacity_of(grow(layers, 128)) == 128


def test_a_window_with_kept_entries_is_not_known() -> None:
    assert unknown([KVCache(), RotatingKVCache(max_size=8, keep=4)]) == [
        "RotatingKVCache with 4 entries kept"
    ]
