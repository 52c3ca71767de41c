"""Decoding with MTP layers: the plain text, whatever is accepted; and everything, where it should.

The certain target writes a cycle of tokens, each of which follows from the feature of the one
before. Two layers know the cycle, one by the embedding of the token that it is told, one by the
feature of the token before that. Whatever is wrong by one place leaves them nothing that is right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from architectures import TABLE, build
from conftest import plain
from mlx.utils import tree_flatten, tree_unflatten
from mtp_makers import KINDS, head_for, raw_weights, target_of
from mtp_reference import Array

from mlxspec.decode.engine import Engine
from mlxspec.drafters.heads.mtp import Mtp

PROMPTS = ([5], [3, 1, 4, 1, 5, 9, 2, 6], [(7 * i) % 61 for i in range(40)])
HALVES = ("embedding", "feature")
SIZE = 64  # tokens, and as many dimensions


@cache
def cycle() -> Array:
    """Which token follows each: all of them in one circle."""
    order = np.random.default_rng(0).permutation(SIZE)
    following = np.empty(SIZE, np.int64)
    following[order] = np.roll(order, -1)
    return following


SIGNS = np.where(np.random.default_rng(1).integers(0, 2, SIZE) > 0, 1.0, -1.0).astype(np.float32)


@cache
def certain() -> Any:
    """A target whose final norm turns the signs of some dimensions, and whose layers do nothing."""
    config = TABLE["qwen3_5"]["config"]["text_config"]
    target = build("qwen3_5", vocabulary=SIZE, text_config={**config, "hidden_size": SIZE})
    weights = dict(tree_flatten(target.parameters()))
    for name, array in weights.items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(array)
    inner = "language_model"
    weights[f"{inner}.model.embed_tokens.weight"] = mx.eye(SIZE)
    weights[f"{inner}.model.norm.weight"] = mx.array(SIGNS)
    output = np.zeros((SIZE, SIZE), np.float32)
    output[cycle(), np.arange(SIZE)] = SIGNS
    weights[f"{inner}.lm_head.weight"] = mx.array(output)
    target.update(tree_unflatten(list(weights.items())))
    return target


def knowing(half: str) -> dict[str, Array]:
    """The weights of a layer that knows the cycle by one half of what it reads."""
    weights = raw_weights(certain(), "qwen3_5")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.0.{name}.weight"] = np.zeros_like(weights[f"layers.0.{name}.weight"])
    step = np.zeros((SIZE, SIZE), np.float32)
    step[cycle(), np.arange(SIZE)] = SIGNS
    halves = {"embedding": np.eye(SIZE, dtype=np.float32), "feature": step}
    both = [halves[one] if one == half else np.zeros_like(step) for one in halves]
    weights["fc.weight"] = np.concatenate(both, axis=1)
    weights["norm.weight"] = SIGNS - 1
    weights["pre_fc_norm_embedding.weight"] = np.full(SIZE, -0.5, np.float32)
    weights["pre_fc_norm_hidden.weight"] = np.full(SIZE, -0.5, np.float32)
    return weights


def accepted(head: Mtp, count: int = 3) -> list[float]:
    """The share of the proposals that the certain target takes, by their place in a round."""
    engine = Engine(certain(), heads={"mtp": head})
    found = engine.generate([int(cycle()[0])], max_tokens=SIZE, draft_tokens=count).speculation
    both = zip(found.accepted_by_position, found.drafted_by_position, strict=True)
    return [kept / drafted for kept, drafted in both]


@pytest.mark.parametrize("half", HALVES)
def test_everything_is_accepted_of_a_layer_that_knows(half: str) -> None:
    rates = accepted(head_for(certain(), knowing(half)))
    assert min(rates) > 0.9  # the first round of a prompt of one token has no feature
    assert accepted(head_for(certain(), knowing(half)), 1)[0] > 0.9


class Early(Mtp):
    """Takes each feature for that of the token after it."""

    def commit(
        self, past: Any, tokens: mx.array, features: Any, position: mx.array, kept: Any
    ) -> Any:
        (tap,) = self.taps
        before = mx.concatenate([past.feature, features[tap]], axis=1)[:, :-1]
        return super().commit(past, tokens, {tap: before}, position, kept)


def test_what_is_off_by_one_leaves_nothing() -> None:
    layer = head_for(certain(), knowing("feature"))
    assert max(accepted(Early(layer._layer, layer._trunk))) < 0.1
    early = head_for(certain(), knowing("feature"))
    early.taps = (early.taps[0].replace("norm", "layers.3"),)
    assert max(accepted(early)) < 0.7  # the signs are wrong of half of the tokens
    for half in HALVES:
        weights = knowing(half)
        weights["fc.weight"] = np.roll(weights["fc.weight"], SIZE, axis=1)
        assert max(accepted(head_for(certain(), weights))) < 0.1


@cache
def made(kind: str) -> tuple[Any, Engine]:
    target = target_of(kind)
    return target, Engine(target, heads={"mtp": head_for(target, raw_weights(target, kind))})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, "auto"])
def test_a_random_layer_leaves_the_text_as_it_is(kind: str, count: Any) -> None:
    target, engine = made(kind)
    for prompt in PROMPTS:
        found = engine.generate(prompt, max_tokens=24, draft_tokens=count)
        assert list(found.tokens) == plain(target, prompt, 24)
