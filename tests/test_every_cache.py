"""Whatever keeps a model's past: rounds say what plain decoding says, and leave what it leaves.

Proposals come from a script that knows the text and how many of them are to be kept, so that
every length of acceptance occurs with every kind of cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY, build, draft_for, prompt_of, side_by_side
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlxspec.decode.engine import Engine
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import Request
from mlxspec.decode.round import FusedRound
from mlxspec.decode.session import Session
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Track
from mlxspec.defaults import MODEL
from mlxspec.device import lengths
from mlxspec.drafters.graph import ModelDrafter, Past
from mlxspec.metrics import PrefillProgress
from mlxspec.models.cached_model import HostedModel, cached_model_of
from mlxspec.models.caches.hosted import HostedLayers
from mlxspec.models.caches.layers import flat
from mlxspec.models.caches.original import Model, fresh_cache, quantized
from mlxspec.models.caches.positional import SPARE, UNBOUNDED, FullLayer, QuantizedLayer, RingLayer
from mlxspec.models.caches.recurrent import RecurrentLayer
from mlxspec.models.pace import Pace
from mlxspec.params import KVQuantization, SamplingParams
from mlxspec.sampling.sampler import Sampler

LONG = 150  # past every window many times
PROMPT = prompt_of(9)
BITS = KVQuantization(8, 32)
# What a model keeps, and where mlx-lm keeps it so.
KINDS = {
    "full": "llama",
    "full, 8 bits": "llama",
    "latent": "deepseek_v3",
    "shared": "gemma3n",
    "window": "gemma3_text",
    "sinks": "gpt_oss",
    "convolution": "lfm2",
    "gated delta": "qwen3_next",
    "state space": "mamba2",
    "selective scan": "jamba",
    "delta and shift": "rwkv7",
    "gated recurrence": "recurrent_gemma",
    "chunked": "llama4",
    "list": "deepseek_v32",
}
HOSTED = ("chunked",)  # on mlx-lm's own caches
FUSED = [kind for kind in KINDS if kind not in HOSTED]


def kv_of(kind: str) -> KVQuantization | None:
    return BITS if "8 bits" in kind else None


@cache
def model_of(kind: str) -> Model:
    if kv_of(kind):  # heads as wide as a group
        return build(KINDS[kind], hidden_size=128, head_dim=32)
    return build(KINDS[kind])


@cache
def engine_of(kind: str) -> Engine:
    return Engine(model_of(kind), compiled=False, kv=kv_of(kind))


@cache
def text_of(kind: str) -> list[int]:
    """The prompt and what mlx-lm writes after it, one token at a time."""
    options: dict[str, Any] = {}
    if kv := kv_of(kind):
        options = {"kv_bits": kv.bits, "kv_group_size": kv.group_size, "quantized_kv_start": 0}
    steps = generate_step(mx.array(PROMPT), model_of(kind), max_tokens=LONG + 16, **options)
    return PROMPT + [token for token, _ in steps]


class Nothing(NamedTuple):
    """The past of a script."""

    capacity: int = UNBOUNDED

    def grown(self, capacity: int) -> Nothing:
        return self


class Script:
    """In place of a draft: proposes the text, and from the round's `kept`-th place on another.

    A round calls it once for each proposal.
    """

    fused = True
    obstacle = ""
    kv = None

    def __init__(self, text: Sequence[int], kept: Callable[[], int]) -> None:
        self.model: Any = None
        self.vocabulary = VOCABULARY
        self.pace = Pace()
        self._text = mx.array([*text, *[0] * 80])
        self._kept = kept
        self._left = 0

    def adopt(self, caches: list[Any], read: int, capacity: int) -> list[Any]:
        return [Nothing()]

    def forward(
        self, tokens: mx.array, layers: list[Any], offset: mx.array, length: int
    ) -> tuple[mx.array, list[Any]]:
        rows = tokens.shape[1]
        if rows == 2:  # the first pass of a round
            self._left = self._kept()
        following = self._text[offset[0] + rows]
        wrong = self._left <= 0
        self._left -= 1
        token = (following + wrong) % VOCABULARY
        logits = mx.zeros((*tokens.shape, VOCABULARY))
        return logits + (mx.arange(VOCABULARY) == token), layers

    def commit(self, layers: list[Any], kept: mx.array | None) -> list[Any]:
        return layers


def rounds_of(kind: str, kept: Callable[[], int]) -> FusedRound:
    sampler = Sampler(SamplingParams().method(), VOCABULARY)
    drafter = ModelDrafter(Script(text_of(kind), kept), sampler.vocabulary)
    return FusedRound(engine_of(kind).models[0], {MODEL: drafter}, sampler, compiled=False)


def begun(kind: str, tokens: Sequence[int] = PROMPT) -> RoundState:
    return engine_of(kind).prefilled(tokens).with_draft(MODEL, nothing())


def nothing() -> Past:
    return Past([Nothing()], mx.array([0], mx.int32))


class Scripted(Reader):
    """Reads a text for the target, and for a script."""

    def draft(
        self, name: str, tokens: Sequence[int], start: int, *, at_once: bool = True
    ) -> Generator[PrefillProgress, None, Past]:
        yield from ()
        return nothing()


# --- the text ---------------------------------------------------------------------------


# Every K keeps every number of proposals in turn. The fastest and the slowest growth depend on K
# by their steps alone, so that the least K and the largest stand for the others.
@pytest.mark.parametrize(
    ("agreement", "draft_tokens"),
    [
        *(("varied", draft_tokens) for draft_tokens in range(1, 9)),
        *(("always", draft_tokens) for draft_tokens in (1, 8)),
        *(("never", draft_tokens) for draft_tokens in (1, 8)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_past_windows_and_growths(
    monkeypatch: pytest.MonkeyPatch, kind: str, draft_tokens: int, agreement: str
) -> None:
    for length in ("attended", "reserved"):  # caches grow often
        monkeypatch.setattr(lengths, length, lambda needed: -(-needed // 32) * 32)
    counts = {"always": [draft_tokens], "varied": range(draft_tokens + 1), "never": [0]}[agreement]
    rounds = rounds_of(kind, cycle(reversed(counts)).__next__)
    request = Request(tokens=PROMPT, limit=len(PROMPT) + LONG, draft_tokens=draft_tokens)
    session = Session(rounds, Track(rounds, Scripted(rounds, request), request))
    capacities, accepted = set(), []
    while stats := session.step().stats:
        capacities.add(session.ahead(0)[0].capacity)
        accepted += [stats.accepted] * (stats.full and stats.drafted > 0)
    assert session.text == text_of(kind)[: len(PROMPT) + LONG]
    assert len(capacities) > 2 or capacities == {UNBOUNDED}
    assert set(accepted) == set(counts)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_kept_as_it_is_said_to_be(kind: str) -> None:
    cached = engine_of(kind).models[0]
    assert cached.fused == (kind not in HOSTED)
    assert bool(cached.obstacle) == (kind in HOSTED)


@pytest.mark.parametrize("kind", FUSED)
def test_mlx_lms_own_caches_do_as_well(kind: str) -> None:
    cached = HostedModel(model_of(kind), kv_of(kind))
    sampler = Sampler(SamplingParams().method(), VOCABULARY)
    drafter = ModelDrafter(Script(text_of(kind), cycle((3, 1, 0, 2)).__next__), VOCABULARY)
    rounds = FusedRound(
        cached, {MODEL: drafter}, sampler, compiled=True
    )  # which such a round never is
    request = Request(tokens=PROMPT, limit=len(PROMPT) + 80, draft_tokens=3)
    session = Session(rounds, Track(rounds, Scripted(rounds, request), request))
    while session.step().tokens:
        pass
    assert session.text == text_of(kind)[: len(PROMPT) + 80]


# --- drafts of another kind -------------------------------------------------------------


@pytest.mark.parametrize("draft", KINDS)
def test_any_kind_drafts_for_a_full_one_and_the_reverse(draft: str) -> None:
    if kv_of(draft):
        return
    for target, other in (("full", draft), (draft, "full")):
        engine = Engine(model_of(target), model_of(other), compiled=False)
        for count in (1, 4):
            result = engine.generate(PROMPT, max_tokens=32, draft_tokens=count)
            assert PROMPT + result.tokens == text_of(target)[: len(PROMPT) + 32]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["gated delta", "convolution", "window"])
def test_a_draft_of_its_kind_that_half_agrees(kind: str, compiled: bool) -> None:
    target = model_of(kind)
    engine = Engine(target, draft_for(target, "half"), compiled=compiled)
    result = engine.generate(PROMPT, max_tokens=LONG, draft_tokens=3)
    assert PROMPT + result.tokens == text_of(kind)[: len(PROMPT) + LONG]
    rate = result.speculation.acceptance_rate
    assert rate is not None
    assert 0.2 < rate < 0.9


def test_a_draft_grows_beside_a_target_that_needs_no_room() -> None:
    engine = Engine(model_of("state space"), model_of("full"), compiled=False)
    result = engine.generate(PROMPT, max_tokens=LONG, draft_tokens=2)
    assert PROMPT + result.tokens == text_of("state space")[: len(PROMPT) + LONG]


@pytest.mark.parametrize("name", ["dbrx", "gpt_bigcode"])
def test_a_model_that_asks_for_numbers_while_it_is_built_is_not_fused(name: str) -> None:
    cached = cached_model_of(build(name))
    assert not cached.fused
    assert "asks for numbers" in cached.obstacle


# --- what is kept -----------------------------------------------------------------------


def visible(layers: list[Any], position: int) -> list[np.ndarray]:
    """All that later rows can see, in the order of the positions where there is one."""
    return [np.array(array) for layer in flat(layers) for array in _seen(layer, position)]


def _seen(layer: Any, position: int) -> list[mx.array]:
    if isinstance(layer, RecurrentLayer):
        return list(layer.states)
    if isinstance(layer, HostedLayers):
        return [array for one in flat(layer.caches) for array in _held(one)]
    if isinstance(layer, QuantizedLayer):
        return [
            mx.dequantize(*(part[:, :, :position] for part in parts), group_size=32, bits=8)
            for parts in layer
        ]
    slots = list(range(position))
    if isinstance(layer, RingLayer):
        size = layer.keys.shape[2]
        slots = [place % size for place in range(max(position - (size - SPARE), 0), position)]
    assert isinstance(layer, FullLayer | RingLayer)
    return [array[:, :, slots] for array in layer]


def _held(one: Any) -> list[mx.array]:
    """Of a cache of mlx-lm's: what a pass would still see."""
    if isinstance(one, KVCache | RotatingKVCache):
        return list(one.keys_and_values())
    keys, values = one.keys_and_values()
    seen = min(one.offset, one.chunk_size)
    return [keys[:, :, -seen:], values[:, :, -seen:]]


def expected(kind: str, tokens: list[int]) -> list[Any]:
    """The layers after mlx-lm's own reading: at once, or as it would have quantised."""
    cached = engine_of(kind).models[0]
    read = len(tokens) - 1
    at_once = read if cached.kv is None else len(PROMPT) - 1
    caches = fresh_cache(cached.model, None)
    cached.model(mx.array([tokens[:at_once]]), cache=caches)
    caches = quantized(caches, cached.kv)
    for token in tokens[at_once:read]:
        cached.model(mx.array([[token]]), cache=caches)
    return cached.adopt(caches, read, 512)


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_equals_a_fresh_prefill_whatever_was_kept(kind: str) -> None:
    count = 4
    lengths = list(islice(cycle((0, 4, 2, 1, 3, 4, 0, 0, 3, 1)), 50))
    rounds = rounds_of(kind, iter(lengths).__next__)
    state, tokens = rounds.grown(begun(kind), 512), list(PROMPT)
    for i, length in enumerate(lengths):
        state, result = rounds(state, draft_tokens=count, length=512)
        *committed, accepted = result.tolist()[0]
        assert accepted == length
        tokens += committed[: accepted + 1]
        if i < 12 or i > 45:
            _assert_close(
                visible(state.target, len(tokens) - 1),
                visible(expected(kind, tokens), len(tokens) - 1),
                # A number may be rounded to the next of 255 where it lies between two.
                1e-2 if kv_of(kind) else 1e-5,
            )


def _assert_close(some: list[np.ndarray], others: list[np.ndarray], tolerance: float) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert one.shape == other.shape
        largest = max(np.abs(other).max(initial=0), 1)
        np.testing.assert_allclose(one, other, atol=tolerance * largest, rtol=0)


# --- rows side by side ------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUSED)
def test_rows_that_keep_different_lengths_are_the_rows_alone(kind: str) -> None:
    target = model_of(kind)
    engine = Engine(target, draft_for(target, "half"), compiled=False, kv=kv_of(kind))
    sampler = Sampler(SamplingParams().method(), VOCABULARY)
    rounds = FusedRound(
        engine.models[0],
        {MODEL: ModelDrafter(engine.models[1], sampler.vocabulary)},
        sampler,
        compiled=False,
    )
    prompts = [prompt_of(length) for length in (4, 31, 9)]
    state = side_by_side([engine.prefilled(prompt) for prompt in prompts])
    texts: list[list[int]] = [[], [], []]
    differed = False
    for _ in range(12):
        state, result = rounds(state, draft_tokens=3, length=128)
        rows = result.tolist()
        differed |= len({row[-1] for row in rows}) > 1
        for text, row in zip(texts, rows, strict=True):
            text += row[: row[-1] + 1]
    assert differed
    for prompt, text in zip(prompts, texts, strict=True):
        alone = engine.generate(prompt, max_tokens=len(text), draft_tokens=3).tokens
        assert text == alone
