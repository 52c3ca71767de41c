"""From what a caller says to the request for one text: every default is filled in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

from mlxspec.calling import calling_of
from mlxspec.conversations import Message, Tool, messages_of, tools_of
from mlxspec.decode.request import GREEDY, UNLIMITED, Prompt, Request
from mlxspec.defaults import (
    AUTO,
    DEFAULT_DRAFT_TOKENS,
    DEFAULT_MAX_TOKENS,
    MAX_AUTO_TOKENS,
    MAX_DRAFT_TOKENS,
    MAX_LOGPROBS,
    DraftTokens,
)
from mlxspec.drafters.proposals import MOST
from mlxspec.errors import PromptError, UsageError
from mlxspec.files import require_no_folder
from mlxspec.markup import Markup, begun, markup_of
from mlxspec.metrics import Tell, silent
from mlxspec.params import SamplingParams
from mlxspec.reasoning import Reasoning
from mlxspec.sampling.sampler import Processor
from mlxspec.templates import less_reasoning, source_of
from mlxspec.text import encode_prompt, ends_of, is_raw
from mlxspec.tokens import Tokenizer


class Requests:
    """Makes requests for one engine: text becomes tokens, and every default is filled in.

    Args:
        tokenizer: None takes token ids only.
        vocabulary: V of the target. context: its context in tokens, None where unknown.
        draft_tokens: K where a call gives none.
        drafts: whether a model or head drafts. texts: whether anything drafts from the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocabulary: int,
        context: int | None,
        *,
        draft_tokens: DraftTokens = DEFAULT_DRAFT_TOKENS,
        drafts: bool = False,
        texts: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context = context
        self._draft_tokens = draft_tokens
        self._drafts = drafts
        self._texts = texts

    def make(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Tool] | None = None,
        parallel_calls: bool = True,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        draft_tokens: DraftTokens | None = None,
        sampling: SamplingParams = GREEDY,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        template_args: Mapping[str, Any] | None = None,
        eos: str | Sequence[str] | None = (),
        processors: Sequence[Processor] = (),
        prediction: Prompt | None = None,
        capacity: int = 0,
        cache: str | Path | None = None,
        logprobs: int | None = None,
    ) -> Request:
        """See `Engine.request`."""
        _require_range(max_tokens, logprobs)
        file = _file_of(cache)
        notes: list[str] = []
        tokens = self.encode(
            prompt,
            messages=messages,
            tools=tools,
            system=system,
            raw=raw,
            template_args=template_args,
            tell=notes.append,
        )
        expected = self.tokens_of(prediction)
        count, auto = self._drafting(draft_tokens, predicted=bool(expected))
        reasoning = None if raw else self._reasoning(tokens, max_tokens, calls=bool(tools))
        calling = calling_of(
            self._tokenizer, tools_of(tools), reasoning, notes.append, several=parallel_calls
        )
        return Request(
            tokens=tuple(tokens),
            limit=self._limit(len(tokens), max_tokens),
            draft_tokens=count,
            auto=auto,
            sampling=self._completed(sampling, auto=auto),
            stop=self._stops(stop),
            ends=frozenset() if ignore_eos else self._ends | self._named(eos),
            continues=self._continues(prompt, messages, raw),
            prediction=tuple(expected),
            processors=tuple(processors),
            capacity=capacity,
            cache=file,
            notes=tuple(notes),
            reasoning=reasoning,
            calling=calling,
            logprobs=logprobs,
        )

    def encode(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Tool] | None = None,
        system: str | None = None,
        raw: bool = False,
        template_args: Mapping[str, Any] | None = None,
        tell: Tell = silent,
    ) -> list[int]:
        """Token ids of a prompt that fits the context.

        Raises:
            PromptError: it is empty, too long, or has a token that the model lacks.
            UsageError: it is a text, and there is no tokenizer; or there are messages too.
        """
        if (prompt is None) == (messages is None):
            what = "no prompt" if prompt is None else "a prompt and messages"
            raise UsageError(f"There is {what}.", hint="Give a prompt, or else messages.")
        if isinstance(prompt, str) or prompt is None:
            tokens = encode_prompt(
                self._required("A text prompt"),
                messages_of(messages) if prompt is None else prompt,
                tools=tools_of(tools),
                system=system,
                raw=raw,
                template_args=template_args,
                tell=tell,
            )
        else:
            tokens = list(prompt)
        if not tokens:
            raise PromptError("The prompt is empty.", hint="Give at least one token.")
        if not all(_is_below(token, self._vocabulary) for token in tokens):
            raise PromptError(
                f"A token of the prompt is not one of the model's {self._vocabulary:,}.",
                hint="Encode it with the model's own tokenizer.",
            )
        if self._context is not None and len(tokens) >= self._context:
            raise PromptError(
                f"The prompt has {len(tokens):,} tokens; the model's context is {self._context:,}.",
                hint="Shorten it, or take a model with a longer context.",
            )
        return tokens

    def tokens_of(self, text: Prompt | None) -> list[int]:
        """Token ids of a text as a part of another, without special tokens of its own."""
        if not isinstance(text, str):
            return list(text or ())
        return list(self._required("A text").encode(text, add_special_tokens=False))

    @cached_property
    def _ends(self) -> frozenset[int]:
        return ends_of(self._tokenizer) if self._tokenizer is not None else frozenset()

    @cached_property
    def _markup(self) -> Markup | None:
        if self._tokenizer is None or is_raw(self._tokenizer, False):
            return None
        return markup_of(self._tokenizer, source_of(self._tokenizer))

    def _reasoning(
        self, tokens: Sequence[int], max_tokens: int | None, *, calls: bool
    ) -> Reasoning | None:
        if self._markup is None or self._tokenizer is None:
            return None
        markup = self._markup if calls else self._markup.without_calls
        limit = f"the limit of {max_tokens} tokens: raise it with --max-tokens, or max_tokens"
        if max_tokens is None or self._limit(len(tokens), max_tokens) < len(tokens) + max_tokens:
            limit = f"the end of the model's context of {self._context} tokens"
        begins = begun(markup, self._tokenizer, tokens)
        return Reasoning(markup, begins, limit, less_reasoning(source_of(self._tokenizer)))

    def _continues(self, prompt: Prompt | None, messages: Any, raw: bool) -> bool:
        """Whether a text goes on where the prompt ends: a raw one, or a turn that is begun."""
        if self._tokenizer is None or not (isinstance(prompt, str) or messages):
            return False
        begun_turn = bool(messages) and messages[-1]["role"] == "assistant"
        return begun_turn or is_raw(self._tokenizer, raw)

    def _stops(self, stop: str | Sequence[str] | None) -> tuple[str, ...]:
        if stop and self._tokenizer is None:
            raise UsageError("Stop strings need a tokenizer.", hint="Give the engine one.")
        return _texts(stop)

    def _named(self, given: str | Sequence[str] | None) -> frozenset[int]:
        """Ids of tokens by their names."""
        names = _texts(given)
        known = self._required("A token's name").get_vocab() if names else {}
        for name in names:
            if name not in known:
                raise UsageError(
                    f"The tokenizer has no token {name!r} that could end a text.",
                    hint="Name a token as the tokenizer spells it, or give a text as stop string.",
                )
        return frozenset(known[name] for name in names)

    def _required(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"{what} needs a tokenizer.", hint="Give the engine one, or token ids."
            )
        return self._tokenizer

    def _limit(self, prompt_tokens: int, max_tokens: int | None) -> int:
        written = UNLIMITED if max_tokens is None else prompt_tokens + max_tokens
        return min(written, self._context or UNLIMITED)

    def _drafting(self, draft_tokens: DraftTokens | None, *, predicted: bool) -> tuple[int, bool]:
        """K, or the largest, and whether it is chosen round by round; 0 where nothing drafts."""
        asked = self._draft_tokens if draft_tokens is None else draft_tokens
        from_text = self._texts or predicted
        count = asked if asked != AUTO else MOST if from_text else MAX_AUTO_TOKENS
        if not (isinstance(count, int) and 0 <= count <= MAX_DRAFT_TOKENS):
            raise UsageError(
                f"draft_tokens is {asked!r}.",
                hint=f'It must be "auto", or between 0 and {MAX_DRAFT_TOKENS}.',
            )
        return (count, asked == AUTO) if self._drafts or from_text else (0, False)

    def _completed(self, sampling: SamplingParams, *, auto: bool) -> SamplingParams:
        """The parameters with a seed, and with the tokens that XTC spares.

        With `auto` and no rule named, they get a rule under which the seed decides the text.
        """
        lacking = [token for token in sampling.logit_bias if token >= self._vocabulary]
        if lacking:
            raise UsageError(
                f"logit_bias is given for {lacking[0]}, and the model has no token {lacking[0]}.",
                hint=f"The ids of its tokens are 0 to {self._vocabulary - 1}.",
            )
        if auto and sampling.verify is None:
            sampling = sampling.auditable()
        sampling = sampling.with_seed()
        if sampling.xtc_special_tokens is not None or self._tokenizer is None:
            return sampling
        line_end = self._tokenizer.encode("\n", add_special_tokens=False)
        spared = (*line_end, *sorted(self._ends))
        return replace(sampling, xtc_special_tokens=spared)


def _texts(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Several texts, of which one may come alone."""
    return (given,) if isinstance(given, str) else tuple(given or ())


def _require_range(max_tokens: int | None, logprobs: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}.", hint="It must be 1 or more.")
    if logprobs is not None and not _is_below(logprobs, MAX_LOGPROBS + 1):
        raise UsageError(
            f"logprobs is {logprobs!r}.",
            hint=f"It must be None, or a whole number between 0 and {MAX_LOGPROBS}.",
        )


def _file_of(cache: str | Path | None) -> Path | None:
    if cache is None:
        return None
    require_no_folder(Path(cache))
    return Path(cache)


def _is_below(number: object, end: int) -> bool:
    """Whether it is a whole number from 0 on, which a truth value is not."""
    if isinstance(number, bool) or not isinstance(number, Integral):
        return False
    return 0 <= int(number) < end
