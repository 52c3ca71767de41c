"""Decoding with MTP layers: the plain text, whatever is accepted; and everything, where it should.

The certain target writes a cycle of tokens, each of which follows from the feature of the one
before. Two layers know the cycle, one by the embedding of the token that it is told, one by the
feature of the token before that. Whatever is wrong by one place leaves them nothing that is right.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
import pytest
from architectures import TABLE, build
from conftest import plain
from mlx.utils import tree_flatten, tree_unflatten
from mtp_makers import KINDS, features_of, head_for, raw_weights, reference_for, target_of
from mtp_reference import Array, Reference

from mlxspec.decode.engine import Engine
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.defaults import AUTO
from mlxspec.drafters.heads.mtp import Mtp
from mlxspec.drafters.history import History
from mlxspec.params import SamplingParams

pytestmark = pytest.mark.usefixtures("rooms")

PROMPTS = ([5], [3, 1, 4, 1, 5, 9, 2, 6], [(7 * i) % 61 for i in range(40)])
HALVES = ("embedding", "feature")
CHECKED = 24  # rounds of a run at most
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
    engine = Engine(certain(), heads={"mtp": head}, compiled=False)
    found = engine.generate([int(cycle()[0])], max_tokens=24, draft_tokens=count).speculation
    both = zip(found.accepted_by_position, found.drafted_by_position, strict=True)
    return [kept / drafted for kept, drafted in both]


@pytest.mark.parametrize("half", HALVES)
def test_everything_is_accepted_of_a_layer_that_knows(half: str) -> None:
    rates = accepted(head_for(certain(), knowing(half)))
    assert min(rates) > 0.8  # the first round of a prompt of one token has no feature
    assert accepted(head_for(certain(), knowing(half)), 1)[0] > 0.8


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


# --- rounds of an engine, against the formulas ------------------------------------------


class Spy(Mtp):
    """Remembers what was picked from, and where in a text."""

    def __init__(self, head: Mtp) -> None:
        super().__init__(head._layer, head._trunk)
        self.seen: list[tuple[mx.array, mx.array, Overheard]] = []

    def propose(
        self, past: Any, last_two: Any, position: Any, picks: Any, count: int, length: int
    ) -> Any:
        heard = Overheard(picks)
        after = super().propose(past, last_two, position, cast(Any, heard), count, length)
        self.seen.append((last_two, position, heard))
        return after


class Overheard:
    def __init__(self, picks: Any) -> None:
        self.picks = picks
        self.logits: list[mx.array] = []
        self.tokens: list[mx.array] = []

    def pick(self, logits: mx.array) -> mx.array:
        self.logits.append(logits)
        self.tokens.append(self.picks.pick(logits))
        return self.tokens[-1]


class Made(NamedTuple):
    target: Any
    reference: Reference
    head: Mtp

    def engine(self, spy: Spy, **options: Any) -> Engine:
        return Engine(self.target, heads={"mtp": spy}, compiled=False, **options)


@cache
def made(kind: str) -> Made:
    target = target_of(kind)
    weights = raw_weights(target, kind)
    return Made(target, reference_for(target, weights), head_for(target, weights))


def require_formulas(
    spy: Spy, of: Made, texts: list[list[int]], least: int, checked: int = CHECKED
) -> None:
    """Hold rounds that are part of a text against its formulas; there are `least` of them."""
    features = [features_of(of.target, text) for text in texts]
    found: set[tuple[int, int]] = set()
    for last_two, position, heard in spy.seen:
        scores = np.concatenate([np.array(one) for one in heard.logits], axis=1)
        picked = np.concatenate([np.array(one) for one in heard.tokens], axis=1)
        for row, (two, at) in enumerate(zip(last_two.tolist(), position.tolist(), strict=True)):
            for number, text in enumerate(texts):
                # A row whose text has ended stays where it is, and its past does not.
                if (number, at) in found or text[max(at - 1, 0) : at + 1] != two[-at - 1 :]:
                    continue
                found.add((number, at))
                if at == 0 or len(found) > checked:
                    continue  # there is no feature yet; or enough were held against them
                known, tokens = features[number][:at], picked[row].tolist()
                steps = of.reference.propose(text[: at + 1], known, len(tokens), tokens)
                expected = np.stack([step.logits for step in steps])
                error = np.linalg.norm(scores[row] - expected) / np.linalg.norm(expected)
                assert error < 1e-5, (number, at)
    assert len(found) >= least
    spy.seen.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_gives_a_layer_what_the_formulas_ask_for(kind: str) -> None:
    of, spy = made(kind), Spy(made(kind).head)
    engine = of.engine(spy)
    for prompt in PROMPTS if kind == "qwen3_5" else PROMPTS[1:2]:
        found = engine.generate(prompt, max_tokens=12, draft_tokens=3)
        assert list(found.tokens) == plain(of.target, prompt, 12)
        require_formulas(spy, of, [[*prompt, *found.tokens]], 8)


class Likeliest:
    def pick(self, logits: mx.array) -> mx.array:
        return mx.argmax(logits, axis=-1).astype(mx.int32)


def test_after_one_token_a_layer_sees_the_entry_that_is_of_no_row() -> None:
    """It has no other: without it the scores would be no numbers."""
    head, heard = made("qwen3_5").head, Overheard(Likeliest())
    two = mx.array([[5, 5]], mx.int32)
    head.propose(head.begin(64), two, mx.array([0], mx.int32), cast(Any, heard), 2, 64)
    assert mx.all(mx.isfinite(mx.concatenate(heard.logits, axis=1)))


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_it_is_drawn_from_as_the_formulas_say(rule: Any) -> None:
    of, spy = made("qwen3_5_moe"), Spy(made("qwen3_5_moe").head)
    engine, prompt = of.engine(spy), PROMPTS[1]
    options = {"max_tokens": 10, "sampling": SamplingParams(temperature=1.5, seed=4, verify=rule)}
    found = engine.generate(prompt, draft_tokens=3, **options)
    require_formulas(spy, of, [[*prompt, *found.tokens]], 5)
    if rule == "coupled":
        assert found.tokens == engine.generate(prompt, draft_tokens=0, **options).tokens


def test_it_takes_turns_with_the_text() -> None:
    of, spy = made("qwen3_5"), Spy(made("qwen3_5").head)
    engine, prompt = of.engine(spy, texts=[History]), PROMPTS[1] * 3
    found = engine.generate(prompt, max_tokens=24, draft_tokens=AUTO)
    assert found.tokens == plain(of.target, prompt, 24)
    require_formulas(spy, of, [[*prompt, *found.tokens]], 1)


def test_texts_side_by_side_are_each_as_alone() -> None:
    of, spy = made("qwen3_5"), Spy(made("qwen3_5").head)
    prompts = [*PROMPTS, [(11 * i) % 53 for i in range(17)]]
    found = of.engine(spy).generate_many(prompts, max_tokens=12, draft_tokens=2, max_rows=2)
    for prompt, one in zip(prompts, found, strict=True):
        assert list(one.tokens) == plain(of.target, prompt, 12)
    both = zip(prompts, found, strict=True)
    require_formulas(spy, of, [[*prompt, *one.tokens] for prompt, one in both], 30)


def test_a_prefix_cache_carries_the_past() -> None:
    of, spy = made("qwen3_5"), Spy(made("qwen3_5").head)
    engine = of.engine(spy, prefixes=PrefixCache())
    shared = [(7 * i) % 61 for i in range(90)]
    for rest in ([5, 6, 7], [5, 6, 7, 8], [9]):
        found = engine.generate([*shared, *rest], max_tokens=8, draft_tokens=2)
        require_formulas(spy, of, [[*shared, *rest, *found.tokens]], 5)
    stats = engine.prefixes.stats
    assert stats.hits


def test_a_prompt_cache_carries_the_past(tmp_path: Path) -> None:
    of = made("qwen3_5")
    prompt = [(7 * i) % 61 for i in range(514)]
    taken = []
    for _ in range(2):
        spy = Spy(of.head)
        found = of.engine(spy).generate(
            prompt, max_tokens=8, draft_tokens=2, cache=tmp_path / "past"
        )
        require_formulas(spy, of, [[*prompt, *found.tokens]], 5, checked=2)
        taken.append(found.cached_prompt_tokens)
    assert taken == [0, 513]
