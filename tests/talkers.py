"""A tiny chat model that says what it is told to say: reasoning, calls of tools, anything.

Its caches hold the tokens themselves. So it knows where its answer began, whatever the prompt is,
in a batch, after a rollback, and behind a prompt that was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxspec import Engine

NAMES = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
HEADER = "assistant\n"
# In the manner of ChatML; calls as Hermes and Qwen write them.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:"
    "{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "deep": {"type": "object"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln 🌧"}}\n</tool_call>'
# What a server's tests are told: a thought, a call behind one, two calls, and text behind a call.
REPLIES = (
    "<think>hm</think>so it is",
    f"<think>hm</think>Let me look.\n{CALL}",
    f"{CALL}\n{CALL}",
    f"{CALL}and more",
)


def talking_tokenizer(names: Sequence[str] = NAMES, template: str = TEMPLATE) -> TokenizerWrapper:
    """A token for each byte and for each of the names; <|im_end|> ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: token for token, name in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    fast.add_tokens([AddedToken(name, normalized=False) for name in names])
    fast.eos_token = "<|im_end|>"
    fast.chat_template = template
    return TokenizerWrapper(
        fast,
        tool_parser=json_tools.parse_tool_call,
        tool_call_start=json_tools.tool_call_start,
        tool_call_end=json_tools.tool_call_end,
    )


class Talker(nn.Module):
    """A model whose answers are given: the last digit in its prompt says which, or it is the first.

    Args:
        replies: the token ids of each answer; an end of the text follows.
    """

    def __init__(self, tokenizer: TokenizerWrapper, replies: Sequence[Sequence[int]]) -> None:
        super().__init__()
        end = tokenizer.eos_token_id
        longest = max(map(len, replies)) + 1
        self.replies = mx.array([[*one, *[end] * (longest - len(one))] for one in replies])
        self.size = len(tokenizer)
        self.begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.zero = tokenizer.convert_tokens_to_ids("0")
        self.header = len(tokenizer.encode(HEADER, add_special_tokens=False))

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Logits [B, N, V] of int32 [B, N] tokens."""
        rows, count = tokens.shape
        offset, past = mx.zeros((rows,), mx.int32), tokens
        if cache is not None:
            offset = offset + cache[0].offset
            written = tokens.astype(mx.float32)[:, None, :, None]
            past = cache[0].update_and_fetch(written, written)[0][:, 0, :, 0].astype(mx.int32)
        at = offset[:, None] + mx.arange(count)  # [B, N]
        places = mx.arange(past.shape[1])
        seen = places <= at[..., None]  # [B, N, T]
        begun = mx.where(seen & (past == self.begin)[:, None], places, -1).max(axis=-1)
        digits = (past >= self.zero) & (past < self.zero + 10)
        asked = (places < begun[..., None]) & digits[:, None]
        last = mx.where(asked, places, -1).max(axis=-1)
        digit = mx.take_along_axis(past, mx.maximum(last, 0), axis=1) - self.zero
        reply = mx.where(last < 0, 0, mx.clip(digit, 0, len(self.replies) - 1))
        place = mx.clip(at - begun - self.header, 0, self.replies.shape[1] - 1)
        return (self.replies[reply, place][..., None] == mx.arange(self.size)).astype(mx.float32)

    @property
    def layers(self) -> list[None]:
        return [None]


def talker(
    *replies: str, around: Callable[[Talker], nn.Module] | None = None, **options: Any
) -> Engine:
    """An engine that answers with one of these texts, in which names of tokens are tokens.

    Args:
        around: makes the target, and then the draft, of the model.
        options: of `Engine`. It drafts with itself unless told otherwise.
    """
    tokenizer = talking_tokenizer()
    tokens = [tokenizer.encode(one, add_special_tokens=False) for one in replies]
    model = Talker(tokenizer, tokens)
    target, draft = (model, model) if around is None else (around(model), around(model))
    return Engine(target, **{"draft": draft, "compiled": False, "tokenizer": tokenizer} | options)


class Sure(nn.Module):
    """A talker that has no doubt of any token."""

    def __init__(self, model: Talker) -> None:
        super().__init__()
        self.model = model

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return 50 * self.model(tokens, cache)

    @property
    def layers(self) -> list[None]:
        return [None]


def saying(*replies: str) -> Engine:
    """An engine that answers with one of these texts, and has no doubt of any token."""
    return talker(*replies, around=Sure)


def talks() -> Engine:
    """An engine that answers with one of REPLIES."""
    return talker(*REPLIES)
