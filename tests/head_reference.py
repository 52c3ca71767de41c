"""Block-diffusion heads by their formulas, in NumPy and float64: slow, and nothing of it is shared.

Every proposal is computed from the features of all tokens that were kept: there is no cache, and
nothing to take back. A head is a configuration in a public format and weights by their names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


def random_head(config: dict[str, Any], seed: int = 0, own: tuple[str, ...] = ()) -> dict[str, Any]:
    """Weights of a head, float32 by name, as its format has them.

    Args:
        own: "embed_tokens" and "lm_head", where the head brings them.
    """
    rng = np.random.default_rng(seed)
    layers = config.get("transformer_layer_config", config)
    get = {**layers, **config, **config.get("dflash_config", {})}.get
    size, inner, vocabulary = get("hidden_size"), get("intermediate_size"), get("vocab_size")
    head, rank = get("head_dim"), get("markov_rank", 0)
    queries, shared = get("num_attention_heads") * head, get("num_key_value_heads") * head
    taps = len(get("target_layer_ids") or get("aux_hidden_state_layer_ids"))
    proposes = get("draft_vocab_size") or vocabulary
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, taps * size),
        "hidden_norm.weight": (size,),
        "norm.weight": (size,),
    }
    for i in range(get("num_hidden_layers")):
        shapes |= {
            f"layers.{i}.input_layernorm.weight": (size,),
            f"layers.{i}.post_attention_layernorm.weight": (size,),
            f"layers.{i}.self_attn.q_proj.weight": (queries, size),
            f"layers.{i}.self_attn.k_proj.weight": (shared, size),
            f"layers.{i}.self_attn.v_proj.weight": (shared, size),
            f"layers.{i}.self_attn.o_proj.weight": (size, queries),
            f"layers.{i}.self_attn.q_norm.weight": (head,),
            f"layers.{i}.self_attn.k_norm.weight": (head,),
            f"layers.{i}.mlp.gate_proj.weight": (inner, size),
            f"layers.{i}.mlp.up_proj.weight": (inner, size),
            f"layers.{i}.mlp.down_proj.weight": (size, inner),
        }
        if taps_back := get("conv_kernel_size"):
            for name in ("attention_conv", "mlp_conv"):
                width = 2 * taps_back * (size // get("conv_group_size"))
                shapes[f"layers.{i}.{name}.base_kernel"] = (2, taps_back, size)
                shapes[f"layers.{i}.{name}.kernel_projection.weight"] = (width, size)
    if codes := get("selector_rank"):
        for name in ("predecessor_codebook", "successor_codebook"):
            shapes[f"candidate_selector.{name}"] = (vocabulary, codes)
        shapes["candidate_selector.hidden_projection.weight"] = (codes, size)
    if "embed_tokens" in own:
        shapes["embed_tokens.weight"] = (vocabulary, size)
    if "lm_head" in own:
        shapes["lm_head.weight"] = (proposes, size)
    if rank:
        shapes["markov_head.markov_w1.weight"] = (vocabulary, rank)
        shapes["markov_head.markov_w2.weight"] = (proposes, rank)
        kind = get("markov_head_type", "vanilla")
        if kind == "gated":
            shapes["markov_head.gate_proj.weight"] = (rank, size + rank)
            shapes["markov_head.gate_proj.bias"] = (rank,)
        if kind == "rnn":
            shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + size)
            shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if get("enable_confidence_head"):
        width = size + (rank if get("confidence_head_with_markov") else 0)
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    weights = {name: _random(rng, shape) for name, shape in shapes.items()}
    if proposes != vocabulary:
        ids = np.sort(rng.permutation(vocabulary)[:proposes])
        weights["d2t"] = ids - np.arange(proposes)
        weights["t2d"] = np.isin(np.arange(vocabulary), ids)
    return weights


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    if len(shape) == 1:  # a norm, near 1
        return (1 + 0.3 * rng.normal(size=shape)).astype(np.float32)
    return (rng.normal(size=shape) * 1.5 / np.sqrt(shape[-1])).astype(np.float32)


def rms(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotated(x: Array, places: Array, theta: float) -> Array:
    """[N, heads, D] by the angle of its place: the first half of the dimensions with the second."""
    half = x.shape[-1] // 2
    angles = places[:, None, None] * theta ** (-np.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class Reference:
    """A head, and the features of the text that it has been told of.

    Args:
        embedding, output: of the target, [V, D] each, for what the head has not of its own.
        first: the row of a block that proposes the first token.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, Array],
        embedding: Array,
        output: Array,
        first: int,
    ) -> None:
        layers = config.get("transformer_layer_config", config)
        self.get = {**layers, **config, **config.get("dflash_config", {})}.get
        self.speaks = "speculators_model_type" in config
        self.weights = {name: np.asarray(one, np.float64) for name, one in weights.items()}
        self.embedding = self.weights.get("embed_tokens.weight", embedding)
        self.output = self.weights.get("lm_head.weight", output)
        self.first = first
        self.eps = self.get("rms_norm_eps")
        rope = self.get("rope_parameters") or {}
        self.theta = rope.get("rope_theta") or self.get("rope_theta")
        self.context = np.zeros((0, self.get("hidden_size")))

    def read(self, features: Array) -> None:
        """Features [N, taps · D] of the tokens that come next."""
        projected = features @ self.weights["fc.weight"].T
        rows = rms(projected, self.weights["hidden_norm.weight"], self.eps)
        self.context = np.concatenate([self.context, rows])

    def keys_and_values(self, layer: int) -> tuple[Array, Array]:
        """Of the context, [N, heads, D] each."""
        return self._keys_and_values(layer, self.context, np.arange(len(self.context)))

    def rows(self, last: int, count: int) -> Array:
        """The final norm's output in the rows that propose, [K, D]."""
        start = len(self.context)
        tokens = [last] + [self.get("mask_token_id")] * (self.get("block_size") - 1)
        x = self.embedding[tokens] * self.get("input_embedding_scale", 1.0)
        for i in range(self.get("num_hidden_layers")):
            h = self._norm(x, f"layers.{i}.input_layernorm")
            h, then = self._convolved(f"layers.{i}.attention_conv", h)
            x = x + then(self._attention(i, h, start))
            h = self._norm(x, f"layers.{i}.post_attention_layernorm")
            h, then = self._convolved(f"layers.{i}.mlp_conv", h)
            gate = h @ self._weight(f"layers.{i}.mlp.gate_proj").T
            up = h @ self._weight(f"layers.{i}.mlp.up_proj").T
            x = x + then((gate * sigmoid(gate) * up) @ self._weight(f"layers.{i}.mlp.down_proj").T)
        return self._norm(x, "norm")[self.first : self.first + count]

    def proposal(self, last: int, count: int) -> tuple[Array, list[int], int]:
        """Logits [K, V], the likeliest tokens, and how many of them the head is confident of."""
        rows = self.rows(last, count)
        logits = rows @ self.output.T * self.get("output_multiplier", 1.0)
        if cap := self.get("final_logit_softcapping"):
            logits = np.tanh(logits / cap) * cap
        tokens, found, state, sure = [last], [], None, []
        for row, of_row in zip(rows, logits, strict=True):
            before = tokens[-1]
            if self.get("markov_rank"):
                added, state = self._markov(before, row, state)
                of_row = of_row + added
            if self.get("selector_rank"):
                of_row = self._selected(before, row, of_row)
            if self.get("enable_confidence_head"):
                sure.append(self._confidence(before, row))
            found.append(self._widened(of_row))
            tokens.append(int(found[-1].argmax()))
        least = self.get("confidence_threshold", 0)
        unsure = [i for i, one in enumerate(sure) if least and one < least]
        return np.stack(found), tokens[1:], unsure[0] if unsure else count

    def _attention(self, i: int, x: Array, start: int) -> Array:
        heads, groups = self.get("num_attention_heads"), self.get("num_key_value_heads")
        places = start + np.arange(len(x))
        queries = (x @ self._weight(f"layers.{i}.self_attn.q_proj").T).reshape(len(x), heads, -1)
        queries = self._norm(queries, f"layers.{i}.self_attn.q_norm")
        queries = rotated(queries, places, self.theta)
        context, block = self.keys_and_values(i), self._keys_and_values(i, x, places)
        keys, values = (np.concatenate(both) for both in zip(context, block, strict=True))
        ages = places[:, None] - np.arange(start + len(x))  # of each entry, to each row
        seen = np.ones(ages.shape, bool)
        slides = (self.get("layer_types") or ["full_attention"] * 99)[i] == "sliding_attention"
        causal = self.get("is_causal")
        if self.speaks:
            causal = slides and not self.get("sliding_window_non_causal", False)
        if slides if causal is None else causal:
            seen &= ages >= 0
        if slides:
            seen &= np.abs(ages) < self.get("sliding_window")
        mixed = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = queries[:, head] @ keys[:, group].T / np.sqrt(keys.shape[-1])
            mixed.append(softmax(np.where(seen, scores, -np.inf)) @ values[:, group])
        return np.concatenate(mixed, axis=-1) @ self._weight(f"layers.{i}.self_attn.o_proj").T

    def _keys_and_values(self, i: int, x: Array, places: Array) -> tuple[Array, Array]:
        groups = self.get("num_key_value_heads")
        keys = (x @ self._weight(f"layers.{i}.self_attn.k_proj").T).reshape(len(x), groups, -1)
        values = (x @ self._weight(f"layers.{i}.self_attn.v_proj").T).reshape(len(x), groups, -1)
        keys = self._norm(keys, f"layers.{i}.self_attn.k_norm")
        return rotated(keys, places, self.theta), values

    def _convolved(self, name: str, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """The rows of a block through a convolution, and the one for what becomes of them."""
        if f"{name}.base_kernel" not in self.weights:
            return x, lambda one: one
        base, group = self.weights[f"{name}.base_kernel"], self.get("conv_group_size")
        rows, taps, size = len(x), base.shape[1], x.shape[1]
        added = (x @ self._weight(f"{name}.kernel_projection").T).reshape(rows, 2, taps, -1)

        def over(values: Array, which: int) -> Array:
            result = np.zeros_like(values)
            for row, back in itertools.product(range(rows), range(taps)):
                for channel in range(size if row >= back else 0):
                    weight = base[which, back, channel] + added[row, which, back, channel // group]
                    result[row, channel] += weight * values[row - back, channel]
            return result

        return over(x, 0), lambda one: over(one, 1)

    def _selected(self, before: int, row: Array, logits: Array) -> Array:
        """Logits of the likeliest tokens, with what the token before adds to each."""
        code = self.weights["candidate_selector.predecessor_codebook"][before]
        code = code * (self._weight("candidate_selector.hidden_projection") @ row)
        best = np.argsort(logits)[-self.get("selector_top_k") :]
        found = np.full(len(logits), -np.inf)
        successors = self.weights["candidate_selector.successor_codebook"][best]
        found[best] = logits[best] + successors @ code
        return found

    def _markov(self, before: int, row: Array, state: Array | None) -> tuple[Array, Array | None]:
        known = self._weight("markov_head.markov_w1")[before]
        kind = self.get("markov_head_type", "vanilla")
        if kind == "gated":
            known = known * sigmoid(self._linear("markov_head.gate_proj", [row, known]))
        if kind == "rnn":
            state = np.zeros_like(known) if state is None else state
            joint = self._linear("markov_head.joint_proj", [state, known, row])
            gate, candidate, output = np.split(joint, 3)
            state = sigmoid(gate) * state + (1 - sigmoid(gate)) * np.tanh(candidate)
            known = np.tanh(output)
        return self._weight("markov_head.markov_w2") @ known, state

    def _confidence(self, before: int, row: Array) -> float:
        known = [self._weight("markov_head.markov_w1")[before]]
        parts = [row, *(known if self.get("confidence_head_with_markov") else [])]
        return float(sigmoid(self._linear("confidence_head.proj", parts))[0])

    def _widened(self, logits: Array) -> Array:
        if "d2t" not in self.weights:
            return logits
        wide = np.full(self.get("vocab_size"), -np.inf)
        wide[(np.arange(len(logits)) + self.weights["d2t"]).astype(int)] = logits
        return wide

    def _linear(self, name: str, parts: list[Array]) -> Array:
        return self._weight(name) @ np.concatenate(parts) + self.weights[f"{name}.bias"]

    def _norm(self, x: Array, name: str) -> Array:
        return rms(x, self.weights[f"{name}.weight"], self.eps)

    def _weight(self, name: str) -> Array:
        return self.weights[f"{name}.weight"]
