"""MTP: the layer with which Qwen3-Next and Qwen3.5 were trained to predict one more token.

Row t of the layer reads the embedding of token t + 1 and the target's feature of token t, which is
what its final norm gives, and the target's output layer turns the result into the scores of token
t + 2. The next token of a proposal comes from the next row: it reads the token just picked, and the
layer's own result in place of a feature. After DeepSeek-V3 (arXiv 2412.19437), section 2.2, with
the names of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.drafters.picks import Picks
from mlxspec.models.caches.original import Model
from mlxspec.models.caches.positional import FullCache, FullLayer, Places
from mlxspec.models.identity import digest_of
from mlxspec.models.taps import Features

MOST = 3  # tokens of a proposal: the further from a true feature, the fewer are accepted


class MtpLayer(nn.Module):
    """The layer, with its modules as the published checkpoints name them.

    Args:
        inner: a layer of the target's kind with full attention. hidden: D. eps: of norms.
    """

    def __init__(self, inner: nn.Module, hidden: int, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pre_fc_norm_embedding = nn.RMSNorm(hidden, eps=eps)
        self.pre_fc_norm_hidden = nn.RMSNorm(hidden, eps=eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = [inner]
        self.norm = nn.RMSNorm(hidden, eps=eps)

    def __call__(
        self, embedded: mx.array, features: mx.array, mask: mx.array, cache: FullCache
    ) -> mx.array:
        """What rows give, [B, N, D], of as many embeddings and features."""
        rows = self._joined(embedded, features)
        read: mx.array = self.norm(self.layers[0](rows, mask=mask, cache=cache))
        return read

    def read(self, embedded: mx.array, features: mx.array, cache: FullCache) -> None:
        """Write the keys and values of rows, and compute nothing else of them."""
        layer: Any = self.layers[0]
        attention = layer.self_attn
        rows = layer.input_layernorm(self._joined(embedded, features))
        shape = (*rows.shape[:2], attention.num_key_value_heads, -1)
        keys = attention.k_norm(attention.k_proj(rows).reshape(shape)).transpose(0, 2, 1, 3)
        values = attention.v_proj(rows).reshape(shape).transpose(0, 2, 1, 3)
        cache.update_and_fetch(attention.rope(keys, offset=cache.offset), values)

    def _joined(self, embedded: mx.array, features: mx.array) -> mx.array:
        both = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(features)]
        joined: mx.array = self.fc(mx.concatenate(both, axis=-1))
        return joined


def layer_of(target: Model, *, sparse: bool) -> MtpLayer:
    """The layer that a target was trained with, with random weights: of experts, or of one network.

    Args:
        target: an mlx-lm model that has layers with full attention among others.
    """
    text: Any = getattr(target, "language_model", target)
    changes: dict[str, Any] = {"full_attention_interval": 1}
    changes["num_experts"] = text.args.num_experts if sparse else 0
    if hasattr(text.args, "mlp_only_layers"):
        changes |= {"mlp_only_layers": [], "decoder_sparse_step": 1}
    inner = type(text.model.layers[0])(replace(text.args, **changes), layer_idx=0)
    return MtpLayer(inner, text.args.hidden_size, text.args.rms_norm_eps)


class MtpPast(NamedTuple):
    """What the layer has read of a text of which the target has read N tokens.

    layer: keys and values. Entry p is of row p − 1, which depends on tokens up to p alone; entry 0
        is of no row, and is not seen. feature: [B, 1, D], the target's, of the last of the N
        tokens: the row N − 1 waits for the token after it.
    """

    layer: FullLayer
    feature: mx.array


class Mtp:
    """An MTP layer as a `Head`.

    Args:
        layer: with its weights. trunk: of the target that it was trained with.
    """

    most = MOST

    def __init__(self, layer: MtpLayer, trunk: Trunk) -> None:
        self.module: nn.Module = layer
        self.taps: Sequence[str] = (trunk.norm_tap,)
        self.identity = digest_of(layer)
        self._layer = layer
        self._trunk = trunk

    def begin(self, capacity: int) -> MtpPast:
        attention = cast(Any, self._layer.layers[0]).self_attn
        shape = (1, attention.num_key_value_heads, capacity, attention.head_dim)
        layer = FullLayer(*(mx.zeros(shape, self._trunk.dtype) for _ in range(2)))
        return MtpPast(layer, mx.zeros((1, 1, self._trunk.hidden_size), self._trunk.dtype))

    def propose(
        self,
        past: MtpPast,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        count: int,
        length: int,
    ) -> MtpPast:
        layer, hidden, token = past.layer, past.feature, last_two[:, 1:]
        # Positions are data: a constant per step would need a kernel per step.
        at = position[:, None] + mx.arange(count)
        for step in range(count):
            cache = layer.opened(Places(at[:, step]), length)
            mask = cache.make_mask(1) & _is_row(at[:, step], length)
            hidden = self._layer(self._trunk.raw(token), hidden, mask, cache)
            layer = cache.layer
            token = picks.pick(self._trunk.logits(hidden))
        # `commit` writes over these rows, with true features for those of the tokens that stay.
        return past._replace(layer=layer)

    def commit(
        self,
        past: MtpPast,
        tokens: mx.array,
        features: Features,
        position: mx.array,
        kept: mx.array | None,
    ) -> MtpPast:
        (tap,) = self.taps
        seen = features[tap]
        before = mx.concatenate([past.feature, seen[:, :-1]], axis=1)
        cache = past.layer.opened(Places(position), past.layer.capacity)
        self._layer.read(self._trunk.raw(tokens), before, cache)
        if kept is None:
            return MtpPast(cache.layer, seen[:, -1:])
        return MtpPast(cache.layer, mx.take_along_axis(seen, kept[:, None, None] - 1, axis=1))


def _is_row(position: mx.array, length: int) -> mx.array:
    """Whether an entry is of a row, [B, 1, 1, length]: the first is none.

    Where there is no other yet, after a prompt of one token, it is seen nevertheless.
    """
    return (mx.arange(length) > 0) | (position == 0)[:, None, None, None]
