"""Tiny random models, drafts that agree with them more or less, and the oracles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxspec.caches.layers import stack
from mlxspec.params import Penalties, SamplingParams
from mlxspec.round import RoundState
from mlxspec.sampling import Knobs, Processor

VOCABULARY = 64
MODELS = ("llama", "qwen2", "qwen3", "gemma2", "mixtral")
WINDOW = 16
# Layers that see a window beside layers that see all; gpt_oss with attention sinks.
SLIDING = ("gemma3_text", "cohere2", "gpt_oss", "olmo3", "exaone4", "ministral3")
KINDS = ("agrees", "half", "never")

_SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1000.0},
    "qwen2": {"rope_theta": 1000.0},
    "qwen3": {
        "rope_theta": 1000.0,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8.0, "rope_theta": 1000.0},
    "mixtral": {"num_local_experts": 4, "rope_theta": 1000.0},
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": (0.0, 100.0),
        "time_step_rank": "auto",
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8.0,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
    },
    "cohere2": {
        "head_dim": 8,
        "rope_theta": 1000.0,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "layer_norm_eps": 1e-5,
        "logit_scale": 1.0,
    },
    "gpt_oss": {
        "head_dim": 8,
        "rope_theta": 1000,
        "rope_scaling": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo3": {
        "num_hidden_layers": 4,
        "rope_theta": 1000.0,
        "max_position_embeddings": 4096,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "exaone4": {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "rope_theta": 1000.0,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "sliding_window_pattern": "LLLG",
    },
    "ministral3": {
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_theta": 1000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def build(name: str, *, vocabulary: int = VOCABULARY, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of mlx-lm, its weights large enough for a text without loops."""
    module = import_module(f"mlx_lm.models.{name}")
    values = {**_SHARED, **_OWN[name], "vocab_size": vocabulary, **changes}
    known = {field.name for field in fields(module.ModelArgs)}
    values = {key: value for key, value in values.items() if key in known}
    model = module.Model(module.ModelArgs(model_type=name, **values))
    rng = np.random.default_rng(seed)
    weights = []
    for path, array in tree_flatten(model.parameters()):
        # Gemma scales its embeddings up, and EXAONE norms only what layers add: a text would be
        # the embeddings' echo.
        scale = 2.0 * array.shape[-1] ** -0.5
        if "embed" in path:
            scale = 0.1 if name.startswith(("gemma", "exaone")) else 1.0
        noise = rng.normal(size=array.shape) * (0.2 if "norm" in path else scale)
        mean = 1.0 if "norm" in path and not name.startswith("gemma") else 0.0
        weights.append((path, mx.array(mean + noise, mx.float32)))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


@cache
def model(name: str) -> Any:
    return build(name)


class Contrary(nn.Module):
    """A model whose logits are negated after some of its input tokens."""

    def __init__(self, inner: Any, every: int) -> None:
        super().__init__()
        self.inner = inner
        self.every = every

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits = self.inner(tokens, cache=cache)
        return mx.where((tokens % self.every == 0)[..., None], -logits, logits)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


def draft_for(target: Any, kind: str) -> Any:
    """A draft that agrees with a greedy target always, after two of three tokens, or never."""
    return {"agrees": target, "half": Contrary(target, 3), "never": Contrary(target, 1)}[kind]


def with_vocabulary(source: Any, vocabulary: int) -> Any:
    """The Llama `source` with fewer tokens, or with more of them."""
    resized = build("llama", vocabulary=vocabulary)
    weights = dict(tree_flatten(source.parameters()))
    name = "model.embed_tokens.weight"
    missing = max(vocabulary - weights[name].shape[0], 0)
    weights[name] = mx.pad(weights[name][:vocabulary], [(0, missing), (0, 0)])
    resized.update(tree_unflatten(list(weights.items())))
    return resized


def prompt_of(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, vocabulary, length).tolist()


def plain(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding by mlx-lm, the oracle."""
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


@cache
def plain_of(name: str, length: int, count: int) -> list[int]:
    return plain(model(name), prompt_of(length), count)


def side_by_side(states: list[RoundState]) -> RoundState:
    """Sequences of equal capacity as the rows of one state."""
    return RoundState(
        position=mx.concatenate([state.position for state in states]),
        last_two=mx.concatenate([state.last_two for state in states]),
        recent=mx.concatenate([state.recent for state in states]),
        keys=mx.concatenate([state.keys for state in states]),
        knobs=Knobs(*map(mx.concatenate, zip(*(state.knobs for state in states), strict=True))),
        target=stack([state.target for state in states]),
        draft=stack([state.draft for state in states]),
    )


def processors_of_mlx_lm(
    penalties: Penalties, bias: Mapping[int, float] | None = None
) -> list[Processor]:
    """What mlx-lm does to logits for the same penalties and biases."""
    processors: list[Processor] = make_logits_processors(
        dict(bias or {}),
        penalties.repetition,
        penalties.repetition_context,
        penalties.presence,
        penalties.presence_context,
        penalties.frequency,
        penalties.frequency_context,
    )
    return processors


def reference_p(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What mlx-lm's sampler draws from, in float64, for logits [V] without ties."""
    p = _softmax(np.asarray(logits, np.float64))
    order = np.argsort(-p)
    kept = np.ones(len(p), bool)
    if 0 < params.top_p < 1:
        above = np.cumsum(p[order]) - p[order]
        kept[order[above >= params.top_p]] = False
    kept &= p >= p.max() * params.min_p
    if params.top_k:
        kept[order[params.top_k :]] = False
    return _softmax(np.where(kept, np.log(p), -np.inf) / params.temperature)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
MERGES = [("a", "b"), ("ab", "ab"), ("Ġ", "a"), ("b", "c"), ("Ã", "©"), ("Ġ", "Ġ")]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def wrapped(
    template: str | None = None, detokenizer: Callable[..., Any] = BPEStreamingDetokenizer
) -> TokenizerWrapper:
    """Byte-level BPE: a token for each byte, <bos> and <eos>, and one for each merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<bos>", "<eos>", *(left + right for left, right in MERGES)]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = BYTE_LEVEL
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return TokenizerWrapper(fast, detokenizer)


TOKENIZER = wrapped()
CHAT_TOKENIZER = wrapped(TEMPLATE)


def tokens_of(text: str) -> list[int]:
    """A token for each byte, whatever merges there are."""
    names = [name for word, _ in BYTE_LEVEL.pre_tokenize_str(text) for name in word]
    return [TOKENIZER.convert_tokens_to_ids(name) for name in names]


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the stop string that is the first to be complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(one) for one in stop if one and text[:end].endswith(one)]
        if starts:
            return text[: min(starts)]
    return text
