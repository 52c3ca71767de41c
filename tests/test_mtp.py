"""MTP layers against their formulas in numpy, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from architectures import VOCABULARY
from mtp_makers import KINDS, features_of, head_for, raw_weights, reference_for, target_of
from mtp_reference import Array, Reference

from mlxspec.drafters.heads.mtp import Mtp, MtpPast

CAPACITY = 128


class Listening:
    """Picks the best token, and remembers what it was picked from."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.logits: list[Array] = []

    def pick(self, logits: mx.array) -> mx.array:
        self.logits.append(np.array(logits[:, 0]))
        token = mx.argmax(logits, axis=-1).astype(mx.int32)
        self.tokens.append(np.array(token)[:, 0].tolist())
        return token


class Made(NamedTuple):
    target: Any
    weights: dict[str, Array]
    head: Mtp
    reference: Reference


@cache
def made(kind: str) -> Made:
    target = target_of(kind)
    weights = raw_weights(target, kind)
    return Made(target, weights, head_for(target, weights), reference_for(target, weights))


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return [int(token) for token in rng.integers(0, VOCABULARY, size=count)]


def row(tokens: Sequence[int]) -> mx.array:
    return mx.array([list(tokens)], mx.int32)


def read(head: Mtp, past: MtpPast, target: Any, text: Sequence[int], pieces: Sequence[int]) -> Any:
    """The past after a prompt that is read in pieces of such lengths."""
    features, at = mx.array(features_of(target, list(text)))[None], 0
    for size in pieces:
        seen = {head.taps[0]: features[:, at : at + size]}
        past = head.commit(past, row(text[at : at + size]), seen, mx.array([at]), None)
        at += size
    return past


def differs(found: Any, expected: Array) -> float:
    """The distance of two arrays, as a part of the second's length."""
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "pieces"), [(1, [1]), (2, [2]), (9, [4, 1, 4]), (40, [40])])
def test_rounds_are_those_of_the_formulas(kind: str, prompt: int, pieces: list[int]) -> None:
    made_ = made(kind)
    error = worst(made_.head, made_.target, made_.reference, prompt, pieces)
    assert error < 1e-5


def worst(
    head: Mtp,
    target: Any,
    reference: Reference,
    prompt: int,
    pieces: list[int],
    rounds: int = 6,
) -> float:
    """The largest difference of proposals and pasts in the rounds of a text."""
    rng = np.random.default_rng(prompt)
    text = random_tokens(rng, prompt + 1)
    past = read(head, head.begin(CAPACITY), target, text[:-1], pieces)
    errors = []
    for number in range(rounds):
        count, at = 1 + number % 3, mx.array([len(text) - 1], mx.int32)
        features = features_of(target, text[:-1])
        errors.append(_past_differs(past, reference, text, features))
        picks: Any = Listening()
        past = head.propose(past, row(text[-2:]), at, picks, count, CAPACITY)
        steps = reference.propose(text, features, count)
        for logits, step in zip(picks.logits, steps, strict=True):
            errors.append(differs(logits[0], step.logits))
        # Whoever proposed, some are accepted, and another token follows.
        proposed = random_tokens(rng, count) if number % 2 else [step.token for step in steps]
        kept = int(rng.integers(1, count + 2))
        seen = features_of(target, [*text, *proposed])[len(text) - 1 :]
        tap = {head.taps[0]: mx.array(seen)[None]}
        past = head.commit(past, row([text[-1], *proposed]), tap, at, mx.array([kept]))
        text += [*proposed[: kept - 1], *random_tokens(rng, 1)]
    return max(errors)


def _past_differs(past: Any, reference: Reference, text: list[int], features: Array) -> float:
    feature = differs(past.feature[0, 0], features[-1])
    if len(features) == 1:
        return feature  # there is no row yet
    rows = reference.rows(text[1:-1], features[:-1])
    held = [np.array(one[0, :, 1 : len(features)]) for one in past.layer]
    return max(feature, *(differs(*both) for both in zip(held, rows[1:], strict=True)))


# --- what would be wrong by one ---------------------------------------------------------


class Ahead(Mtp):
    """Proposes from a row too far."""

    def propose(self, past: Any, last_two: Any, position: Any, *others: Any) -> Any:
        return super().propose(past, last_two, position + 1, *others)


class Late(Mtp):
    """Reads each token with the feature of its own place."""

    def commit(
        self, past: Any, tokens: mx.array, features: Any, position: mx.array, kept: Any
    ) -> Any:
        seen = features[self.taps[0]]
        shifted = past._replace(feature=seen[:, :1])
        along = {self.taps[0]: mx.concatenate([seen[:, 1:], seen[:, -1:]], axis=1)}
        after = super().commit(shifted, tokens, along, position, kept)
        return after._replace(feature=super().commit(past, tokens, features, position, kept)[1])


class Stale(Mtp):
    """Keeps the rows of its own proposals."""

    def commit(self, past: Any, *others: Any) -> Any:
        return past._replace(feature=super().commit(past, *others).feature)


def with_layer(change: Any) -> Any:
    def mutant(made_: Made) -> Mtp:
        return head_for(made_.target, change(dict(made_.weights)))

    return mutant


def of_kind(kind: type[Mtp]) -> Any:
    def mutant(made_: Made) -> Mtp:
        return kind(made_.head._layer, made_.head._trunk)

    return mutant


def fc_turned(weights: dict[str, Array]) -> dict[str, Array]:
    return weights | {"fc.weight": np.roll(weights["fc.weight"], weights["fc.weight"].shape[0], 1)}


def norm_shifted(name: str, by: int) -> Any:
    def mutant(made_: Made) -> Mtp:
        head = head_for(made_.target, made_.weights)
        norm = dict(head._layer.named_modules())[name]
        norm.weight = norm.weight + by
        return head

    return mutant


MUTANTS = {
    "the halves of fc change places": with_layer(fc_turned),
    "from a row too far": of_kind(Ahead),
    "the feature of the token itself": of_kind(Late),
    "rows of proposals stay": of_kind(Stale),
} | {
    f"{name} {by:+}": norm_shifted(name, by)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "layers.0.input_layernorm")
    for by in (1, -1)
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_wrong_by_one_shows(mutant: str) -> None:
    made_ = made("qwen3_5")
    error = worst(MUTANTS[mutant](made_), made_.target, made_.reference, 9, [4, 1, 4], 3)
    assert error > 1e-2
