"""DFlash and DSpark against a reference that was written from their formulas, in float32.

Three texts stand side by side. Their prompts are read in pieces of unlike lengths, and each round
keeps another number of rows in each of them; what it rejects is random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from architectures import build
from head_reference import Reference, random_head

from mlxspec.drafters.heads import block_layers
from mlxspec.drafters.heads.block import BlockHead, load_block
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.drafters.picks import Picks
from mlxspec.models.caches.layers import stack
from mlxspec.models.caches.positional import FullLayer, Places
from mlxspec.models.followers import grown
from mlxspec.params import SamplingParams
from mlxspec.sampling.sampler import Sampler, knobs_of

V, D, LAYERS = 40, 32, 3
TOLERANCE = 1e-5
PROMPTS = ((5, 12), (1,), (3, 3, 1, 21))  # the pieces of each
ROUNDS = 12

SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": V,
    "max_position_embeddings": 4096,
}
Z_LAB = {
    **SIZES,
    "architectures": ["DFlashDraftModel"],
    "rope_theta": 1e6,
    "block_size": 8,
    "num_target_layers": LAYERS,
    "dflash_config": {"mask_token_id": V - 1, "target_layer_ids": [0, 1]},
}
SLIDING = {
    **SIZES,
    "architectures": ["DFlashDraftModel"],
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
    "dflash_config": {
        "block_size": 8,
        "mask_token_id": 0,
        "target_layer_ids": [-1, 1],
        "output_multiplier": 0.4,
        "final_logit_softcapping": 2.0,
        "input_embedding_scale": 3.0,
    },
}
DFLASH2 = {
    **SLIDING,
    "architectures": ["DFlash2DraftModel"],
    "layer_types": ["sliding_attention"] * 2,
    "is_causal": False,
    "dflash_config": {
        "block_size": 8,
        "mask_token_id": 0,
        "target_layer_ids": [0, 1],
        "conv_kernel_size": 2,
        "conv_group_size": 8,
        "selector_rank": 6,
        "selector_top_k": 5,
    },
}
DEEPSPEC = {
    **SIZES,
    "architectures": ["Qwen3DSparkModel"],
    "rope_theta": 1e6,
    "layer_types": ["full_attention"] * 2,
    "block_size": 7,
    "mask_token_id": 3,
    "target_layer_ids": [0, 1],
    "num_target_layers": LAYERS,
    "num_anchors": 64,
    "markov_rank": 6,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "confidence_threshold": 0.45,
}
SPECULATORS = {
    "architectures": ["DSparkDraftModel"],
    "speculators_model_type": "dspark",
    "speculators_config": {
        "algorithm": "dspark",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 6}],
    },
    "block_size": 7,
    "mask_token_id": 4,
    "draft_vocab_size": 25,
    "markov_rank": 6,
    "aux_hidden_state_layer_ids": [1, 2],  # the states behind layers 0 and 1
    "sliding_window_non_causal": True,
    "transformer_layer_config": {
        **SIZES,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 9,
    },
}


class Format(NamedTuple):
    """A configuration, what such a head has of its own, its taps and its first row.

    Its weights are those of a seed with which no two candidates are as likely as one another.
    """

    config: dict[str, Any]
    own: tuple[str, ...] = ()
    taps: tuple[int, ...] = (0, 1)
    first: int = 1
    seed: int = 0


BOTH = ("embed_tokens", "lm_head")
FORMATS = {
    "DFlash": Format(Z_LAB),
    "DFlash, causal": Format({**Z_LAB, "is_causal": True}),
    "DFlash, a window": Format(SLIDING, taps=(-1, 1)),
    "DFlash, a window both ways": Format({**SLIDING, "is_causal": False}, taps=(-1, 1)),
    "DFlash2": Format(DFLASH2, seed=1),
    "DSpark": Format(DEEPSPEC, BOTH, first=0),
    "DSpark, gated": Format({**DEEPSPEC, "markov_head_type": "gated"}, BOTH, first=0),
    "DSpark, a state": Format({**DEEPSPEC, "markov_head_type": "rnn"}, BOTH, first=0),
    "DSpark, the target's layers": Format(
        {**DEEPSPEC, "confidence_head_with_markov": False}, first=0
    ),
    "speculators": Format(SPECULATORS, BOTH),
    "speculators, DFlash": Format(
        {
            **SPECULATORS,
            "speculators_model_type": "dflash",
            "markov_rank": 0,
            "sliding_window_non_causal": False,
        },
        ("lm_head",),
    ),
}


def target() -> Any:
    return build("llama", vocabulary=V, num_hidden_layers=LAYERS)


def made(form: Format, model: Any) -> tuple[BlockHead, list[Reference]]:
    """A head with random weights, and its reference for each of the texts."""
    weights = random_head(form.config, form.seed, form.own)
    arrays = {name: mx.array(one) for name, one in weights.items()}
    head = load_block(form.config, arrays, Trunk(model), "here", None)
    table = np.array(model.model.embed_tokens.weight, np.float64)
    references = [Reference(form.config, weights, table, table, form.first) for _ in PROMPTS]
    return head, references


class Recorded(Picks):
    """Picks greedily, and keeps the logits."""

    def __init__(self, rows: int) -> None:
        sampler = Sampler(SamplingParams().method(), V)
        knobs = knobs_of(SamplingParams(), rows, V)
        super().__init__(sampler, mx.zeros((rows, 0), mx.int32), knobs, None)
        self.logits: list[mx.array] = []

    def _picked(self, logits: mx.array) -> mx.array:
        self.logits.append(logits)
        return super()._picked(logits)


def difference(form: Format) -> float:
    """The largest error of proposals' logits and of pasts, over many rounds of three texts.

    It is relative to the largest value where that is more than 1, and infinite where another token
    or another number of them is proposed.
    """
    rng = np.random.default_rng(3)
    head, references = made(form, target())
    width = D * len(form.taps)
    pasts = []
    for pieces, reference in zip(PROMPTS, references, strict=True):
        past, at = head.begin(48), 0
        for count in pieces:
            rows = rng.normal(size=(1, count, width))
            reference.read(rows[0])
            past = head.commit(past, mx.zeros((1, count)), split(head, rows), mx.array([at]), None)
            at += count
        pasts.append(past)
    past, worst = stack(pasts), 0.0
    position = np.array([sum(pieces) for pieces in PROMPTS])
    for round_ in range(ROUNDS):
        if round_ == ROUNDS // 2:
            past = grown(past, 160)
        count = int(rng.integers(1, head.most + 1))
        last = rng.integers(V, size=(3, 1))
        picks = Recorded(3)
        two = mx.array(np.repeat(last, 2, axis=1), mx.int32)
        length = 48 if round_ < ROUNDS // 2 else 160
        past = head.propose(past, two, mx.array(position), picks, count, length)
        draft = picks.draft_within(None)
        found = np.array(mx.concatenate(picks.logits, axis=1), np.float64)
        for row, reference in enumerate(references):
            logits, tokens, limit = reference.proposal(int(last[row, 0]), count)
            limits = [limit] if draft.limit is None else [draft.limit[row].item()]
            there = np.isfinite(logits)
            alike = draft.tokens[row].tolist() == tokens and limits == [limit]
            if not alike or (np.isfinite(found[row]) != there).any():
                return np.inf
            worst = max(worst, error(found[row][there], logits[there]))
        features = rng.normal(size=(3, count + 1, width))
        kept = rng.integers(1, min(count + 1, 3) + 1, size=3)
        tokens = mx.zeros((3, count + 1), mx.int32)
        rows = split(head, features)
        past = head.commit(past, tokens, rows, mx.array(position), mx.array(kept))
        for row, reference in enumerate(references):
            reference.read(features[row, : kept[row]])
        position = position + kept
        worst = max(worst, of_pasts(past, references))
    return worst


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(1, np.abs(expected).max()))


def split(head: BlockHead, rows: np.ndarray) -> dict[str, mx.array]:
    """Features by the taps' names, in the order in which the head lists them."""
    parts = np.split(rows, len(head.taps), axis=-1)
    return {tap: mx.array(part, mx.float32) for tap, part in zip(head.taps, parts, strict=True)}


def of_pasts(past: Any, references: list[Reference]) -> float:
    """The largest error of keys and values of the context that a later row may see."""
    worst = 0.0
    for index, layer in enumerate(past):
        for row, reference in enumerate(references):
            both = reference.keys_and_values(index)
            count = len(both[0])
            places = np.arange(count)
            if not isinstance(layer, FullLayer):
                size = layer.keys.shape[2]
                places = places[-(size - block_layers.SPARE) :]
            for array, expected in zip(layer, both, strict=True):
                slots = places % array.shape[2]
                found = np.array(array[row], np.float64)[:, slots].swapaxes(0, 1)
                worst = max(worst, error(found, expected[places]))
    return worst


@pytest.mark.parametrize("name", FORMATS)
def test_proposals_and_pasts_are_those_of_the_formulas(name: str) -> None:
    assert difference(FORMATS[name]) < TOLERANCE


@pytest.mark.parametrize(("name", "rows"), [("DFlash", 8), ("DFlash, causal", 3)])
def test_a_causal_block_has_the_rows_that_propose_and_no_more(name: str, rows: int) -> None:
    head, _ = made(FORMATS[name], target())
    past, two = head.begin(16), mx.zeros((1, 2), mx.int32)
    past = head.propose(past, two, mx.array([0]), Recorded(1), 2, 16)
    for layer in past:
        assert int(mx.any(layer.keys != 0, axis=-1).sum(axis=-1).max()) == rows


@pytest.mark.parametrize("name", ["DFlash", "DFlash, a window", "DFlash, a window both ways"])
def test_a_head_sees_nothing_before_the_text_however_much_it_attends_over(name: str) -> None:
    head, _ = made(FORMATS[name], target())
    rows = np.random.default_rng(4).normal(size=(1, 2, D * len(FORMATS[name].taps)))
    start, tokens, two = mx.array([0]), mx.zeros((1, 2), mx.int32), mx.ones((1, 2), mx.int32)
    past = head.commit(head.begin(160), tokens, split(head, rows), start, None)
    logits = []
    for length in (16, 160):
        picks = Recorded(1)
        head.propose(past, two, mx.array([2]), picks, 3, length)
        logits.append(mx.concatenate(picks.logits, axis=1))
    assert error(*(np.array(one, np.float64) for one in logits)) < TOLERANCE


def test_the_taps_are_the_layers_that_the_format_means() -> None:
    model = target()
    for form in FORMATS.values():
        head, _ = made(form, model)
        names = {-1: "model.layers.0:input", 0: "model.layers.0", 1: "model.layers.1"}
        assert head.taps == tuple(names[layer] for layer in form.taps)
        assert head.most == form.config.get("block_size", 8) - form.first


def patched(path: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    owner, name = path.split(".")
    kind = {"Attention": block_layers.Attention, "Backbone": block_layers.Backbone}[owner]
    return lambda patch: patch.setattr(kind, name, change(getattr(kind, name)))


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a position too late": patched(
        "Attention.keys_and_values", lambda real: lambda self, rows, at: real(self, rows, at + 1)
    ),
    "taps in another order": patched(
        "Backbone.context", lambda real: lambda self, features: real(self, features[::-1])
    ),
    "no norm of the context": patched(
        "Backbone.context",
        lambda real: lambda self, features: self.fc(mx.concatenate(features, axis=-1)),
    ),
    "the context one row later": patched(
        "Attention.taught",
        lambda real: lambda self, layer, rows, at: real(self, layer, rows, Places(at.offset + 1)),
    ),
    "a block that sees no later row": patched(
        "Attention._seen",
        lambda real: (
            lambda self, places, at, count: (
                real(self, places, at, count)
                & (places[:, None, None] <= (at[:, None] + mx.arange(count))[:, None, :, None])
            )
        ),
    ),
    "a block that sees what was rejected": patched(
        "Attention._seen",
        lambda real: lambda self, places, at, count: real(self, places, at + 1, count),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_head_that_computes_something_else_shows(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTANTS[mutant](monkeypatch)
    assert difference(FORMATS["DFlash"]) > 100 * TOLERANCE


def test_another_row_of_the_block_shows() -> None:
    assert difference(Format(Z_LAB, first=0)) > 100 * TOLERANCE
