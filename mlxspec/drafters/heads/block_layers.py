"""The layers of a block-diffusion head (DFlash, arXiv 2602.06036), and what follows them.

A block is a known token and masks in place of those to come. Each row of it attends to the context
and to the block, and both give keys and values by the same projections. The context is not a text
of the head's own: it is what the target's layers made of every token that was kept, projected once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.qwen3 import MLP
from mlx_lm.models.rope_utils import initialize_rope

from mlxspec.drafters.heads.block_config import BlockConfig
from mlxspec.models.caches.positional import SPARE, FullLayer, Places, RingLayer


class Attention(nn.Module):
    """One layer's attention. Its past is a `FullLayer`, and a `RingLayer` where it has a window."""

    def __init__(self, config: BlockConfig, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config
        self._window = config.windows[index]
        self._is_causal = config.causal[index]
        size, heads = config.hidden_size, config.heads * config.head_dim
        shared = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(size, heads, bias=config.bias)
        self.k_proj = nn.Linear(size, shared, bias=config.bias)
        self.v_proj = nn.Linear(size, shared, bias=config.bias)
        self.o_proj = nn.Linear(heads, size, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.eps)
        self._rope = initialize_rope(
            config.head_dim,
            config.rope["rope_theta"],
            bool(config.rope.get("rope_interleave", False)),
            dict(config.rope),
            config.positions,
        )

    def unread(self, capacity: int, dtype: mx.Dtype) -> FullLayer | RingLayer:
        """A past of one text without entries."""
        entries = capacity if self._window is None else self._window + SPARE
        shape = (1, self._config.kv_heads, entries, self._config.head_dim)
        kind = FullLayer if self._window is None else RingLayer
        return kind(mx.zeros(shape, dtype), mx.zeros(shape, dtype))

    def keys_and_values(self, rows: mx.array, position: mx.array) -> tuple[mx.array, mx.array]:
        """Of rows [B, N, D] from `position`, int32 [B], on: [B, heads, N, dimension] each."""
        keys = self.k_norm(self._by_head(self.k_proj(rows)))
        return self._rope(keys, offset=position), self._by_head(self.v_proj(rows))

    def taught(
        self, layer: FullLayer | RingLayer, context: mx.array, places: Places
    ) -> FullLayer | RingLayer:
        """The past with rows of context [B, N, D] at their places."""
        extra = context.shape[1] - layer.keys.shape[2] if isinstance(layer, RingLayer) else 0
        if extra > 0:  # others would overwrite the first ones
            context, places = context[:, extra:], Places(places.offset + extra)
        opened = layer.opened(places, layer.keys.shape[2])
        opened.update_and_fetch(*self.keys_and_values(context, places.offset))
        return opened.layer

    def __call__(
        self, rows: mx.array, layer: FullLayer | RingLayer, places: Places, length: int
    ) -> tuple[mx.array, FullLayer | RingLayer]:
        """The block's rows [B, N, D], and the past with its keys and values behind the context.

        They stay there unseen: nothing from `position` on is context, and the round's own rows are
        written over them.
        """
        position = places.offset
        queries = self.q_norm(self._by_head(self.q_proj(rows)))
        queries = self._rope(queries, offset=position)
        opened = layer.opened(places, length)
        keys, values = opened.update_and_fetch(*self.keys_and_values(rows, position))
        held = _held(opened.layer, keys.shape[2], position + rows.shape[1] - 1)
        mixed = mx.fast.scaled_dot_product_attention(
            queries,
            keys,
            values,
            scale=self._config.head_dim**-0.5,
            mask=self._seen(held, position, rows.shape[1]),
        )
        batch, _, count, _ = mixed.shape
        return self.o_proj(mixed.swapaxes(1, 2).reshape(batch, count, -1)), opened.layer

    def _seen(self, held: mx.array, position: mx.array, count: int) -> mx.array:
        """Boolean [B, 1, 1 or N, entries]: which entries each row of a block sees.

        Args:
            held: int32 [B or 1, entries], the position of each entry.
        """
        last = (position + count - 1)[:, None, None, None]
        held = held[:, None, None]
        seen = (held >= 0) & (held <= last)
        if self._window is None and not self._is_causal:
            return seen
        own = (position[:, None] + mx.arange(count))[:, None, :, None]
        if self._is_causal:
            seen = seen & (held <= own)
        if self._window is not None:
            seen = seen & (mx.abs(own - held) < self._window)
        return seen

    def _by_head(self, rows: mx.array) -> mx.array:
        """[B, N, heads · dimension] as [B, heads, N, dimension]."""
        batch, count, _ = rows.shape
        return rows.reshape(batch, count, -1, self._config.head_dim).swapaxes(1, 2)


class Convolution(nn.Module):
    """DFlash2's convolutions over the last rows of a block, round what lies between them.

    Each row's weights are the layer's own plus what the row itself adds for a group of channels;
    both convolutions' are made of the rows that go into the first.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._group = config.group
        self.base_kernel = mx.zeros((2, config.kernel, config.hidden_size))
        groups = config.hidden_size // config.group
        self.kernel_projection = nn.Linear(
            config.hidden_size, 2 * config.kernel * groups, bias=False
        )

    def __call__(self, rows: mx.array, between: Callable[[mx.array], mx.array]) -> mx.array:
        """Rows [B, N, D] through the first, what lies between, and the second."""
        batch, count, _ = rows.shape
        added = self.kernel_projection(rows).reshape(
            batch, count, 2, -1, rows.shape[2] // self._group
        )
        added = mx.repeat(added, self._group, axis=-1)  # [B, N, 2, taps, D]
        weights = self.base_kernel.astype(rows.dtype) + added
        return self._over(between(self._over(rows, weights[:, :, 0])), weights[:, :, 1])

    def _over(self, rows: mx.array, weights: mx.array) -> mx.array:
        mixed = weights[:, :, 0] * rows
        for back in range(1, min(weights.shape[2], rows.shape[1])):
            earlier = mx.pad(rows[:, :-back], [(0, 0), (back, 0), (0, 0)])
            mixed = mixed + weights[:, :, back] * earlier
        return mixed


class Layer(nn.Module):
    def __init__(self, config: BlockConfig, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if config.kernel:
            self.attention_conv = Convolution(config)
            self.mlp_conv = Convolution(config)
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.eps)

    def __call__(
        self, rows: mx.array, past: FullLayer | RingLayer, places: Places, length: int
    ) -> tuple[mx.array, FullLayer | RingLayer]:
        after = past

        def attended(block: mx.array) -> mx.array:
            nonlocal after
            mixed, after = self.self_attn(block, past, places, length)
            return mixed

        rows = rows + self._within("attention_conv", self.input_layernorm(rows), attended)
        return rows + self._within("mlp_conv", self.post_attention_layernorm(rows), self.mlp), after

    def _within(self, name: str, rows: mx.array, part: Callable[[mx.array], mx.array]) -> mx.array:
        """A part of the layer, within its convolutions where it has any."""
        around = getattr(self, name, None)
        return part(rows) if around is None else around(rows, part)


class Markov(nn.Module):
    """What the token before adds to a row's logits (DSpark): of low rank, perhaps gated by the row.

    The kinds are those of DeepSpec: "vanilla" reads the token alone, "gated" weighs its embedding
    by the row, and "rnn" keeps a state over the rows of a block.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        rank, size = config.rank, config.hidden_size
        self._kind = config.markov
        self.markov_w1 = nn.Embedding(config.vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, config.proposes, bias=False)
        if self._kind == "gated":
            self.gate_proj = nn.Linear(size + rank, rank)
        if self._kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + size, 3 * rank)

    def __call__(
        self, before: mx.array, row: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """What is added to the logits, [B, 1, V'], and the state for the next row.

        Args:
            before: int32 [B, 1]. row: the final norm's output, [B, 1, D]. state: [B, 1, rank];
                None before the first row.
        """
        known = self.markov_w1(before)
        if self._kind == "gated":
            gate = mx.sigmoid(self.gate_proj(mx.concatenate([row, known], axis=-1)))
            known = gate.astype(known.dtype) * known
        if self._kind == "rnn":
            state = mx.zeros_like(known) if state is None else state
            joint = self.joint_proj(mx.concatenate([state, known, row], axis=-1))
            gate, candidate, output = mx.split(joint, 3, axis=-1)
            gate = mx.sigmoid(gate)
            state = gate * state + (1 - gate) * mx.tanh(candidate)
            known = mx.tanh(output)
        return self.markov_w2(known), state


class Selector(nn.Module):
    """Which of the likeliest tokens of a row follows the token before (DFlash2)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = config.selects
        self.predecessor_codebook = mx.zeros((config.vocabulary, config.codes))
        self.successor_codebook = mx.zeros((config.vocabulary, config.codes))
        self.hidden_projection = nn.Linear(config.hidden_size, config.codes, bias=False)

    def __call__(self, before: mx.array, row: mx.array, logits: mx.array) -> mx.array:
        """The logits [B, 1, V] of the candidates with what the token before adds, -inf of others.

        Args:
            before: int32 [B, 1]. row: the final norm's output, [B, 1, D].
        """
        likely = mx.argpartition(logits, -self._most, axis=-1)[..., -self._most :]
        code = self.predecessor_codebook[before] * self.hidden_projection(row)
        added = mx.sum(code[..., None, :] * self.successor_codebook[likely], axis=-1)
        scores = mx.take_along_axis(logits, likely, axis=-1) + added.astype(logits.dtype)
        return mx.put_along_axis(mx.full(logits.shape, -mx.inf, logits.dtype), likely, scores, -1)


class Confidence(nn.Module):
    """How likely a row's token is to be kept, as a logit (DSpark)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.proj = nn.Linear(
            config.hidden_size + (config.rank if config.confidence_reads else 0), 1
        )

    def __call__(self, rows: mx.array) -> mx.array:
        """[B, N] from [B, N, D]."""
        return self.proj(rows)[..., 0]


class Backbone(nn.Module):
    """All modules of a head, by the names that its weights have.

    Args:
        own: the names of those that a head may lack, and then takes from its target.
    """

    def __init__(self, config: BlockConfig, own: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        size = config.hidden_size
        self.fc = nn.Linear(len(config.taps) * config.target_hidden_size, size, bias=False)
        self.hidden_norm = nn.RMSNorm(size, eps=config.eps)
        self.layers = [Layer(config, index) for index in range(config.layers)]
        self.norm = nn.RMSNorm(size, eps=config.eps)
        if "embed_tokens" in own:
            self.embed_tokens = nn.Embedding(config.vocabulary, size)
        if "lm_head" in own:
            self.lm_head = nn.Linear(size, config.proposes, bias=False)
        if config.rank:
            self.markov_head = Markov(config)
        if config.codes:
            self.candidate_selector = Selector(config)
        if config.confidence:
            self.confidence_head = Confidence(config)

    def context(self, features: list[mx.array]) -> mx.array:
        """Rows of context, [B, N, D], from the taps' features in order."""
        joined = mx.concatenate(features, axis=-1).astype(self.hidden_norm.weight.dtype)
        return self.hidden_norm(self.fc(joined))  # type: ignore[no-any-return]


def _held(layer: Any, entries: int, last: mx.array) -> mx.array:
    """The position of each entry of a past whose last is `last`, int32 [B]: int32 [B or 1, n]."""
    slots = mx.arange(entries)[None]
    if isinstance(layer, FullLayer):
        return slots
    size = int(layer.keys.shape[2])
    return last[:, None] - (last[:, None] - slots) % size
