"""DFlash and DSpark: heads that propose a block of tokens in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.drafters.heads.block_config import BlockConfig
from mlxspec.drafters.heads.block_layers import Backbone
from mlxspec.drafters.heads.parameters import give
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.drafters.picks import Picks
from mlxspec.errors import LoadError
from mlxspec.models.caches.positional import FullLayer, Places, RingLayer
from mlxspec.models.identity import digest_of
from mlxspec.models.taps import Features

Past = list[FullLayer | RingLayer]  # of each layer: keys and values of the context

OWN = ("embed_tokens", "lm_head")  # what a head may have of its own
_UNUSED = ("t2d", "verifier_norm.weight", "verifier_lm_head.weight")
_MAP = "d2t"  # what is added to an id of a smaller vocabulary to get the target's


class BlockHead:
    """A block-diffusion head on a target.

    Args:
        config, backbone: of the head. trunk: of its target.
        ids: int32 [V'], the target's id of each token that the head's output layer has; None where
            they are the target's.
    """

    def __init__(
        self, config: BlockConfig, backbone: Backbone, trunk: Trunk, ids: mx.array | None = None
    ) -> None:
        self._config = config
        self.module: nn.Module = backbone
        self._backbone = backbone
        self._trunk = trunk
        self._places = None if ids is None else _inverse(ids, config.vocabulary)
        if not hasattr(backbone, "embed_tokens"):
            trunk.scale  # noqa: B018 (it takes a pass, for which there is no time in a round)
        self._names = [trunk.tap(layer) for layer in config.taps]
        self.taps: Sequence[str] = tuple(self._names)
        self.most = config.most
        self.block = config.block_size
        self.identity = digest_of(backbone) + repr(config)

    def begin(self, capacity: int) -> Past:
        dtype = self._backbone.hidden_norm.weight.dtype
        return [layer.self_attn.unread(capacity, dtype) for layer in self._backbone.layers]

    def commit(
        self,
        past: Past,
        tokens: mx.array,
        features: Features,
        position: mx.array,
        kept: mx.array | None,
    ) -> Past:
        context = self._backbone.context([features[name] for name in self._names])
        places, both = Places(position), zip(self._backbone.layers, past, strict=True)
        return [layer.self_attn.taught(one, context, places) for layer, one in both]

    def propose(
        self,
        past: Past,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        count: int,
        length: int,
    ) -> Past:
        first, last = self._config.first, last_two[:, 1:]
        # Where rows see those behind them, a shorter block is not what was trained.
        size = first + count if all(self._config.causal) else self.block
        masks = mx.full((last.shape[0], size - 1), self._config.mask, mx.int32)
        rows = self._embedded(mx.concatenate([last, masks], axis=1))
        after: Past = []
        places = Places(position)
        for layer, one in zip(self._backbone.layers, past, strict=True):
            rows, one = layer(rows, one, places, length)
            after.append(one)
        rows = self._backbone.norm(rows[:, first : first + count])
        self._pick(rows, last, picks)
        return after

    def _pick(self, rows: mx.array, last: mx.array, picks: Picks) -> None:
        """Pick a token for each of the rows [B, K, D], the first after `last`, int32 [B, 1]."""
        logits = self._logits(rows)
        if not (self._config.rank or self._config.codes):
            self._stop(rows, None, picks)
            picks.pick_all(self._widened(logits))
            return
        before, state = [last], None
        for i in range(rows.shape[1]):
            row, of_row = rows[:, i : i + 1], logits[:, i : i + 1]
            if self._config.rank:
                added, state = self._backbone.markov_head(before[-1], row, state)
                of_row = of_row + added
            if self._config.codes:
                of_row = self._backbone.candidate_selector(before[-1], row, of_row)
            before.append(picks.pick(self._widened(of_row)))
        self._stop(rows, mx.concatenate(before[:-1], axis=1), picks)

    def _stop(self, rows: mx.array, before: mx.array | None, picks: Picks) -> None:
        """Propose no more tokens than the head is confident of.

        Whether a token is proposed depends on those before it alone, so that every rule stays
        exact.
        """
        config = self._config
        if not config.confidence or config.threshold <= 0:
            return
        if config.confidence_reads and before is not None:
            known = self._backbone.markov_head.markov_w1(before)
            rows = mx.concatenate([rows, known.astype(rows.dtype)], axis=-1)
        sure = mx.sigmoid(self._backbone.confidence_head(rows)) >= config.threshold
        picks.limit(mx.sum(mx.cumprod(sure.astype(mx.int32), axis=-1), axis=-1).astype(mx.int32))

    def _embedded(self, tokens: mx.array) -> mx.array:
        own = getattr(self._backbone, "embed_tokens", None)
        rows = self._trunk.embedded(tokens) if own is None else own(tokens)
        rows = rows.astype(self._backbone.hidden_norm.weight.dtype)
        return rows if self._config.scale == 1 else rows * self._config.scale

    def _logits(self, rows: mx.array) -> mx.array:
        own = getattr(self._backbone, "lm_head", None)
        logits = self._trunk.logits(rows.astype(self._trunk.dtype)) if own is None else own(rows)
        if self._config.multiplier != 1:
            logits = logits * self._config.multiplier
        cap = self._config.softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def _widened(self, logits: mx.array) -> mx.array:
        """Logits of all of the target's tokens, where the head has fewer."""
        if self._places is None:
            return logits
        none = mx.full((*logits.shape[:-1], 1), -mx.inf, logits.dtype)
        return mx.take(mx.concatenate([logits, none], axis=-1), self._places, axis=-1)


def load_block(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    trunk: Trunk,
    place: str,
    bits: int | None,
) -> BlockHead:
    """A head of DFlash or DSpark.

    Args:
        config, weights: as they are public. place: where they are from, for errors.
        bits: see `give`.

    Raises:
        LoadError: it does not fit the target, or its weights are not those of its configuration.
    """
    read = BlockConfig.read(config, place)
    weights = {name: one for name, one in weights.items() if name not in _UNUSED}
    ids = weights.pop(_MAP, None)
    own = frozenset(name for name in OWN if f"{name}.weight" in weights)
    _require_fit(read, trunk, own, ids is not None, place)
    backbone = Backbone(read, own)
    give(backbone, weights, config, place, bits)
    if ids is not None:
        ids = (ids.astype(mx.int32) + mx.arange(read.proposes)).astype(mx.int32)
    return BlockHead(read, backbone, trunk, ids)


def _require_fit(
    config: BlockConfig, trunk: Trunk, own: frozenset[str], maps: bool, place: str
) -> None:
    """Raise LoadError where a head is for another target, with both numbers."""
    shares = len(own) < len(OWN)
    sizes = [("hidden size", config.target_hidden_size, trunk.hidden_size)]
    sizes += [("hidden size", config.hidden_size, trunk.hidden_size)] if shares else []
    if config.target_layers is not None:
        sizes.append(("number of layers", config.target_layers, trunk.layers))
    if config.vocabulary != trunk.vocabulary:
        sizes.append(("vocabulary", config.vocabulary, trunk.vocabulary))
    for what, its, targets in sizes:
        if its != targets:
            raise unfit(place, what, its, targets)
    beyond = [layer for layer in config.taps if not -1 <= layer < trunk.layers]
    if beyond:
        raise unfit(place, "highest layer", max(beyond), trunk.layers - 1)
    if config.mask >= config.vocabulary:
        raise unfit(place, "mask token", config.mask, config.vocabulary - 1)
    if config.proposes != config.vocabulary and not (maps and "lm_head" in own):
        raise unfit(place, "vocabulary", config.proposes, config.vocabulary)


def unfit(place: str, what: str, its: int, targets: int) -> LoadError:
    """The error of a head whose target is another."""
    return LoadError(
        f"The head in {place} is for another target: its {what} is {its:,}, and this target's "
        f"{targets:,}.",
        hint="Use the head that was trained for this target, or leave it out.",
    )


def _inverse(ids: mx.array, vocabulary: int) -> mx.array:
    """Of each of the target's tokens its place among the head's, V' where it has none: [V]."""
    count = ids.shape[0]
    places = mx.full((vocabulary,), count, mx.int32)
    return mx.put_along_axis(places, ids, mx.arange(count, dtype=mx.int32), axis=0)
