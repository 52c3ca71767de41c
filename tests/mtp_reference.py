"""The MTP layer of Qwen3-Next and Qwen3.5 from its formulas, in numpy and without a cache.

Weights have the names of the original checkpoints without `mtp.`, and those of norms are stored
minus one, as there. Numbers are float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Rows(NamedTuple):
    """What the rows of the layer give: row t has read token t + 1 and the feature of token t.

    hidden: [N, D], after the last norm. keys, values: [heads, N, d], the keys rotated.
    """

    hidden: Array
    keys: Array
    values: Array


class Step(NamedTuple):
    """A proposed token, and the scores that it was picked by."""

    token: int
    logits: Array


@dataclass
class Reference:
    """One layer.

    weights: by name. config: of the text. embedding: [V, D]. output: [V, D], of the target.
    """

    weights: Mapping[str, Array]
    config: Mapping[str, Any]
    embedding: Array
    output: Array
    text: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        self.text = {name: np.asarray(one, np.float64) for name, one in self.weights.items()}

    def rows(self, tokens: Sequence[int], features: Array) -> Rows:
        """The rows of a text: N `tokens`, from its second on, and N features, from its first on."""
        embedded = np.asarray(self.embedding, np.float64)[list(tokens)]
        both = [
            self.norm(embedded, "pre_fc_norm_embedding"),
            self.norm(np.asarray(features, np.float64), "pre_fc_norm_hidden"),
        ]
        x = np.concatenate(both, axis=-1) @ self.text["fc.weight"].T
        read, keys, values = self.attention(self.norm(x, "layers.0.input_layernorm"))
        x = x + read
        x = x + self.mlp(self.norm(x, "layers.0.post_attention_layernorm"))
        return Rows(self.norm(x, "norm"), keys, values)

    def propose(
        self, tokens: Sequence[int], features: Array, count: int, picked: Sequence[int] = ()
    ) -> list[Step]:
        """The proposals after a text: N + 1 `tokens`, and the features of all but the last.

        The next depth reads the layer's own output in place of a feature, and the token that was
        `picked`, or else the likeliest.
        """
        text, known = list(tokens), np.asarray(features, np.float64)
        steps: list[Step] = []
        for depth in range(count):
            last = self.rows(text[1:], known).hidden[-1]
            logits = last @ np.asarray(self.output, np.float64).T
            token = picked[depth] if picked else int(np.argmax(logits))
            steps.append(Step(token, logits))
            text.append(steps[-1].token)
            known = np.concatenate([known, last[None]])
        return steps

    def norm(self, x: Array, name: str) -> Array:
        scaled = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return np.asarray(scaled * (1 + self.text[f"{name}.weight"]))

    def attention(self, x: Array) -> tuple[Array, Array, Array]:
        size, count = self.config["head_dim"], len(x)
        heads, shared = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        both = self.linear(x, "self_attn.q_proj").reshape(count, heads, 2 * size)
        queries, gate = both[..., :size], both[..., size:]
        keys = self.linear(x, "self_attn.k_proj").reshape(count, shared, size)
        values = self.linear(x, "self_attn.v_proj").reshape(count, shared, size).swapaxes(0, 1)
        queries = self.rotated(self.norm(queries, "layers.0.self_attn.q_norm").swapaxes(0, 1))
        keys = self.rotated(self.norm(keys, "layers.0.self_attn.k_norm").swapaxes(0, 1))
        found = []
        for head in range(heads):
            of = head // (heads // shared)
            scores = queries[head] @ keys[of].T / np.sqrt(size)
            scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
            found.append(softmax(scores) @ values[of])
        read = np.stack(found, axis=1) * sigmoid(gate)
        return self.linear(read.reshape(count, -1), "self_attn.o_proj"), keys, values

    def rotated(self, x: Array) -> Array:
        """The first part of each head, turned by the row's number: [heads, N, d].

        Rows are counted from 1 here; scores depend on differences alone.
        """
        rope = self.config.get("rope_parameters") or self.config
        width = int(x.shape[-1] * rope["partial_rotary_factor"])
        angles = np.outer(
            1 + np.arange(x.shape[1]), rope["rope_theta"] ** (-np.arange(0, width, 2) / width)
        )
        first, second, rest = np.split(x, [width // 2, width], axis=-1)
        turned = [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ]
        return np.concatenate([*turned, rest], axis=-1)

    def mlp(self, x: Array) -> Array:
        if "layers.0.mlp.gate.weight" not in self.text:
            return self.dense(x, "mlp")
        weights = softmax(self.linear(x, "mlp.gate"))
        rows = []
        for row, chances in zip(x, weights, strict=True):
            best = np.argsort(-chances)[: self.config["num_experts_per_tok"]]
            shares = chances[best]
            if self.config.get("norm_topk_prob", True):
                shares = shares / shares.sum()
            rows.append(
                sum(s * self.expert(row, int(e)) for s, e in zip(shares, best, strict=True))
            )
        beside = sigmoid(self.linear(x, "mlp.shared_expert_gate"))
        return np.stack(rows) + beside * self.dense(x, "mlp.shared_expert")

    def expert(self, x: Array, number: int) -> Array:
        fused = self.text.get("layers.0.mlp.experts.gate_up_proj")
        if fused is None:
            return self.dense(x, f"mlp.experts.{number}")
        gate, up = np.split(fused[number] @ x, 2)
        down: Array = self.text["layers.0.mlp.experts.down_proj"][number]
        return down @ (silu(gate) * up)

    def dense(self, x: Array, name: str) -> Array:
        between = silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")
        return self.linear(between, f"{name}.down_proj")

    def linear(self, x: Array, name: str) -> Array:
        return np.asarray(x @ self.text[f"layers.0.{name}.weight"].T)


def softmax(x: Array) -> Array:
    powers = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def silu(x: Array) -> Array:
    return np.asarray(x * sigmoid(x))
