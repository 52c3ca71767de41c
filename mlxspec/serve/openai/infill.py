"""Filling in: the text between what stands before a place and what stands behind it."""

from __future__ import annotations

import re
from typing import NamedTuple

from mlxspec.serve.core.refusal import Refusal
from mlxspec.tokens import Tokenizer

# The prompts that models were trained to fill in; each name in them is one of their tokens.
_FORMS = (
    "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",  # Qwen, CodeGemma, Granite 4
    "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",  # StarCoder, Granite before that
    "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",  # DeepSeek
    "<|code_prefix|>{prefix}<|code_suffix|>{suffix}<|code_middle|>",  # GLM
    "[SUFFIX]{suffix}[PREFIX]{prefix}",  # Codestral
)
# What such models write behind the text; a model for chats ends its turns with another token.
_ENDS = (
    "<|endoftext|>",
    "<|fim_pad|>",
    "<fim_pad>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<file_sep>",
)
_PLACES = re.compile(r"\{\w+\}")


class Infill(NamedTuple):
    """A form of prompts, and the names of the tokens that end what is filled in."""

    form: str
    ends: tuple[str, ...]

    def prompt(self, prefix: str, suffix: str) -> str:
        return self.form.format(prefix=prefix, suffix=suffix)


def infill_of(tokenizer: Tokenizer | None) -> Infill:
    """How a model fills in, by the tokens that it has.

    Raises:
        Refusal: it has none.
    """
    known = tokenizer.get_vocab() if tokenizer is not None else {}
    for form in _FORMS:
        marks = tuple(filter(None, _PLACES.split(form)))
        if known.keys() >= set(marks):
            return Infill(form, tuple(name for name in (*marks, *_ENDS) if name in known))
    raise Refusal(
        400,
        "suffix: this model has no tokens that mark the place between two texts. Leave it out, "
        "or serve a model that fills in, such as Qwen2.5-Coder.",
        param="suffix",
    )
