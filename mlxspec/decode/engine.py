"""A target, perhaps a draft, and everything that decodes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mlxspec.control.controller import Controller
from mlxspec.control.estimates import Learned
from mlxspec.decode.prompt_cache import TARGET, PromptCache
from mlxspec.decode.reader import Reader
from mlxspec.decode.round import FusedRound, RoundState
from mlxspec.decode.run import Run
from mlxspec.decode.session import Session
from mlxspec.defaults import (
    AUTO,
    DEFAULT_DRAFT_TOKENS,
    DEFAULT_MAX_TOKENS,
    MAX_AUTO_TOKENS,
    MAX_DRAFT_TOKENS,
    MODEL,
    DraftTokens,
)
from mlxspec.device import lengths
from mlxspec.device.compiling import Compiling
from mlxspec.drafters.graph import Head, ModelDrafter
from mlxspec.drafters.history import Prediction
from mlxspec.drafters.proposals import MOST, Proposal, TextDrafter
from mlxspec.drafters.text_drafters import TextDrafters
from mlxspec.drafters.translation import Translated
from mlxspec.drafters.vocabulary import Shared
from mlxspec.errors import PromptError, UsageError
from mlxspec.metrics import Event, Generation, SpeculationStats
from mlxspec.models.cached_model import (
    CachedModel,
    cached_model_of,
    kind_of,
    require_exact,
    why_it_waits,
)
from mlxspec.models.caches.layers import grow
from mlxspec.models.caches.original import Model, require_quantizable
from mlxspec.models.identity import Identity, identity_of
from mlxspec.models.prefill import Progress
from mlxspec.params import KVQuantization, Method, SamplingParams
from mlxspec.sampling.sampler import Processor, Sampler
from mlxspec.text import TextStream, Tokenizer, encode_prompt, is_raw

GREEDY = SamplingParams()

Prompt = str | Sequence[int]


class Engine:
    """Decodes with a target model, and speculates with a draft model where there is one.

    Args:
        target: an mlx-lm model in memory.
        draft: a smaller mlx-lm model, or None; or several of them by name, of which the best is
            used.
        tokenizer: mlx-lm's TokenizerWrapper; None takes and gives token ids only.
        shared: what `vocabulary.shared_tokens` says of the two tokenizers, by the name of the draft
            where there are names; None where a draft's ids mean the same as the target's.
        texts: what makes drafters that propose from the text, one for each generation, such as
            `History`. A draft model and a fixed K leave them out.
        heads: drafters on the target's features, by name.
        draft_tokens: K where a call does not say; "auto" chooses what proposes, and K, round by
            round.
        compiled: whether rounds are compiled. None: on a GPU always; on a CPU once their kernels
            are built, which `build_kernels` does, because it takes seconds.
        kv: keep keys and values in fewer bits. This changes what the target says, with and
            without a draft alike.

    `learned` is what runs with draft_tokens="auto" have found out; a program may keep it, and give
    it to an engine with the same models on the same machine.

    Raises:
        UnsupportedModel: a model cannot speculate exactly.
    """

    def __init__(
        self,
        target: Model,
        draft: Model | Mapping[str, Model] | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        shared: Shared | Mapping[str, Shared] | None = None,
        texts: Sequence[Callable[[], TextDrafter]] = (),
        heads: Mapping[str, Head] | None = None,
        draft_tokens: DraftTokens = DEFAULT_DRAFT_TOKENS,
        compiled: bool | None = None,
        kv: KVQuantization | None = None,
    ) -> None:
        self.target = target
        self.texts = tuple(texts)
        self.heads = dict(heads or {})
        self.tokenizer = tokenizer
        self.kv = kv
        self.learned = Learned()
        self.load_s = 0.0
        self._draft_tokens = draft_tokens
        self.models = [self._cached(target)]  # the drafts' behind the target's
        self._vocabulary = self.models[0].vocabulary
        self.shared = _by_name(shared)
        self.drafts = {
            name: Translated(model, self.shared[name], self._vocabulary)
            if name in self.shared
            else model
            for name, model in _by_name(draft).items()
        }
        self.models += [self._cached(model) for model in self.drafts.values()]
        if self.drafts or texts or heads:
            for cached in self.models:
                require_exact(cached)
        self._compiling = Compiling(
            [*(kind_of(cached.model) for cached in self.models), kv],
            models_draft=bool(self.drafts or self.heads),
            text_drafts=bool(self.texts),
            asked=compiled,
        )
        self._round = lru_cache(maxsize=16)(self._build_round)

    def _cached(self, model: Model) -> CachedModel:
        if self.kv is not None:
            require_quantizable(model, self.kv)
        return cached_model_of(model, self.kv)

    @property
    def draft(self) -> Model | None:
        """The first of the drafts, as one that speaks the target's tokens; None without any."""
        return next(iter(self.drafts.values()), None)

    @property
    def context(self) -> int | None:
        """Tokens that the target was made for, or None where its configuration does not say."""
        length = getattr(getattr(self.target, "args", None), "max_position_embeddings", None)
        return int(length) if length else None

    @property
    def compiles(self) -> bool:
        """Whether greedy rounds of any K are compiled."""
        return self._is_compiled(GREEDY, AUTO)

    # --- generating -----------------------------------------------------------------------

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """The whole result of `run`, with the same arguments."""
        run = self.run(prompt, **options)
        for _ in run:
            pass
        return run.generation

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Event]:
        """An event for every round, with the arguments of `run`."""
        return iter(self.run(prompt, **options))

    def run(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        draft_tokens: DraftTokens | None = None,
        sampling: SamplingParams = GREEDY,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        processors: Sequence[Processor] = (),
        prediction: Prompt | None = None,
        on_prefill: Progress | None = None,
        cache: Path | None = None,
    ) -> Run:
        """Prepare a generation: an iterator of events with the result so far beside it.

        Args:
            prompt: text, or token ids that are taken as they are.
            max_tokens: at least 1; the text also ends where the context does.
            draft_tokens: K; None takes the engine's own, 0 decodes plainly, "auto" chooses it
                round by round and never proposes for long what does not pay.
            sampling: greedy unless given. With a seed of your own, `auto` verifies with the
                coupled rule unless another is named: the text is then the seed's alone, whatever
                was proposed.
            stop: the text ends before the first of these strings.
            ignore_eos: go on after the end of the text, for measurements.
            system, raw: see `encode_prompt`.
            processors: a caller's own logits processors, as mlx-lm takes them. They see every
                proposal's place, kept or not, so they must depend on their arguments alone; and
                they run on the host, which makes rounds slower. Nothing constrains output to a
                grammar or a JSON schema but what is given here.
            prediction: what the text is expected to be, in parts at least: text that it repeats
                with changes. It is proposed wherever the text follows it.
            on_prefill: called with (tokens read, tokens in all).
            cache: a file that the prompt's past is kept in: what it has of the prompt need not be
                read. Where it cannot be used or written, a note says so.

        Raises:
            UsageError: a value is out of its range, or `cache` is a folder. PromptError: the prompt
            is empty or too long.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}.", hint="It must be 1 or more.")
        if stop and self.tokenizer is None:
            raise UsageError("Stop strings need a tokenizer.", hint="Give the engine one.")
        tokens = self.encode(prompt, system=system, raw=raw)
        expected = self.tokens_of(prediction)
        count, auto = self._drafting(draft_tokens, predicted=bool(expected))
        sampling = _repeatable(sampling) if auto else sampling
        sampling = sampling.with_seed()
        held = self._prompt_cache(cache, tokens)

        def begin() -> Session:
            session = self._session(
                tokens,
                max_tokens,
                draft_tokens,
                sampling,
                processors,
                expected=expected,
                on_prefill=on_prefill,
                cache=held,
            )
            if held is not None:
                generation.cached_prompt_tokens = held.taken.get(TARGET, 0)  # none with heads
            return session

        assert sampling.seed is not None
        generation = Generation(
            len(tokens),
            SpeculationStats(count, enabled=count > 0, rule=sampling.rule, auto=auto),
            sampling.seed,
        )
        generation.timing.load_s = self.load_s
        text, ends = None, set()
        if self.tokenizer is not None:
            continues = isinstance(prompt, str) and is_raw(self.tokenizer, raw)
            text = TextStream(self.tokenizer, continues=continues, stop=stop)
            ends = set() if ignore_eos else set(self.tokenizer.eos_token_ids)
        return Run(begin, generation, text, ends, self.learn_from)

    def session(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        draft_tokens: DraftTokens | None = None,
        sampling: SamplingParams = GREEDY,
        processors: Sequence[Processor] = (),
        prediction: Prompt | None = None,
        capacity: int = 0,
        on_prefill: Progress | None = None,
        cache: Path | None = None,
    ) -> Session:
        """Read `prompt` and return its session, for a program that drives decoding itself.

        Args:
            max_tokens: where `step` ends; None goes on to the end of the context.
            capacity: entries that the caches have room for from the start. They grow by
                themselves.
            Others: as for `run`.
        """
        tokens = self.encode(prompt)
        return self._session(
            tokens,
            max_tokens,
            draft_tokens,
            sampling,
            processors,
            expected=self.tokens_of(prediction),
            capacity=capacity,
            on_prefill=on_prefill,
            cache=self._prompt_cache(cache, tokens),
        )

    def learn_from(self, session: Session) -> None:
        """Let later sessions begin with what this one found out about its rounds."""
        if session.controller is not None:
            self.learned.learn(len(session.text), session.controller.knowledge())

    def _session(
        self,
        tokens: list[int],
        max_tokens: int | None,
        draft_tokens: DraftTokens | None,
        sampling: SamplingParams,
        processors: Sequence[Processor],
        *,
        expected: Sequence[int] = (),
        capacity: int = 0,
        on_prefill: Progress | None = None,
        cache: PromptCache | None = None,
    ) -> Session:
        count, auto = self._drafting(draft_tokens, predicted=bool(expected))
        sampling = self._completed(sampling)
        limits = [self.context, len(tokens) + max_tokens if max_tokens is not None else None]
        limit = min((limit for limit in limits if limit is not None), default=None)
        method = sampling.method(lengths.reserved(limit) if limit is not None else None)
        if processors:
            rounds = self._build_round(method, False, tuple(processors))
        else:
            rounds = self._round(method, self._is_compiled(sampling, draft_tokens))
        notes = [why_it_waits(cached) for cached in self.models if not cached.fused]
        if count:
            notes += [
                f"the draft{'' if name == MODEL else f' {name}'} speaks another tokenizer: "
                f"{shared.percent}% of the target's tokens are shared"
                for name, shared in self.shared.items()
            ]
        if processors:
            notes.append("logits processors of your own: rounds are not compiled")

        reader = self.opening(
            sampling,
            sampler=rounds.sampler,
            capacity=capacity,
            progress=on_prefill,
            note=notes.append,
            cache=cache,
        )
        chain = TextDrafters(self._proposing(expected, auto=auto), self._vocabulary, notes)
        models = dict.fromkeys(self.drafts, MAX_AUTO_TOKENS)
        models |= {name: head.most for name, head in self.heads.items()}
        return Session(
            rounds,
            reader,
            tokens,
            limit=2**31 - 1 if limit is None else limit,
            draft_tokens=count,
            chain=chain if count else None,
            controller=Controller(models, self.learned.at(len(tokens))) if auto else None,
            notes=notes,
        )

    def _proposing(self, expected: Sequence[int], *, auto: bool) -> list[TextDrafter]:
        """What proposes from the text of one sequence."""
        predicting: list[TextDrafter] = [Prediction(expected)] if expected else []
        # With a fixed K a model is asked where nothing is predicted; `history` where there is none.
        asked = self.texts if auto or not (self.drafts or self.heads) else ()
        return predicting + [make() for make in asked]

    def tokens_of(self, text: Prompt | None) -> list[int]:
        """Token ids of a text as it stands inside another, without a beginning of its own."""
        if not isinstance(text, str):
            return list(text or ())
        if self.tokenizer is None:
            raise UsageError("A text needs a tokenizer.", hint="Give the engine one, or token ids.")
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def prefilled(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        sampler: Sampler | None = None,
        draft: bool = True,
        capacity: int = 0,
    ) -> RoundState:
        """The state of one sequence before its first round, for a program that drives rounds.

        Args:
            sampler: says how much of the text the rounds look back on; None is not at all.
            draft: whether the draft models have read the text too.
            capacity: entries that all caches have room for, at least.
        """
        reader = self.opening(sampling, sampler=sampler, capacity=capacity)
        state = reader.state(tokens)
        for name in self.drafts if draft else ():
            past = reader.draft(name, tokens, 0)
            layers = grow(past.layers, state.capacity)
            state = state.with_draft(name, past._replace(layers=layers))
        return state

    def opening(self, sampling: SamplingParams, **options: Any) -> Reader:
        """What reads a text for a session, with the options of `Reader`."""
        drafts = dict(zip(self.drafts, self.models[1:], strict=True))
        return Reader(self.models[0], drafts, sampling, heads=self.heads, **options)

    def _prompt_cache(self, path: Path | None, tokens: Sequence[int]) -> PromptCache | None:
        if path is None:
            return None
        return PromptCache(path, self._identity, prompt_tokens=len(tokens))

    @cached_property
    def _identity(self) -> Identity:
        cached_models = dict(zip([TARGET, *self.drafts], self.models, strict=True))
        return identity_of(cached_models, self.tokenizer)

    def encode(self, prompt: Prompt, *, system: str | None = None, raw: bool = False) -> list[int]:
        """Token ids of a prompt that fits the context.

        Raises:
            PromptError: it is empty, too long, or has a token that the model does not.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError(
                    "A text prompt needs a tokenizer.", hint="Give the engine one, or token ids."
                )
            tokens = encode_prompt(self.tokenizer, prompt, system=system, raw=raw)
        else:
            tokens = list(prompt)
        if not tokens:
            raise PromptError("The prompt is empty.", hint="Give at least one token.")
        if not all(0 <= token < self._vocabulary for token in tokens):
            raise PromptError(
                f"A token of the prompt is not one of the model's {self._vocabulary:,}.",
                hint="Encode it with the model's own tokenizer.",
            )
        if self.context is not None and len(tokens) >= self.context:
            raise PromptError(
                f"The prompt has {len(tokens):,} tokens; the model's context is {self.context:,}.",
                hint="Shorten it, or take a model with a longer context.",
            )
        return tokens

    def _drafting(
        self, draft_tokens: DraftTokens | None, *, predicted: bool = False
    ) -> tuple[int, bool]:
        """K, or the largest, and whether it is chosen round by round; 0 where nothing drafts."""
        asked = self._draft_tokens if draft_tokens is None else draft_tokens
        from_text = bool(self.texts) or predicted
        count = asked if asked != AUTO else MOST if from_text else MAX_AUTO_TOKENS
        if not (isinstance(count, int) and 0 <= count <= MAX_DRAFT_TOKENS):
            raise UsageError(
                f"draft_tokens is {asked!r}.",
                hint=f'It must be "auto", or between 0 and {MAX_DRAFT_TOKENS}.',
            )
        drafts = bool(self.drafts or self.heads) or from_text
        return (count, asked == AUTO) if drafts else (0, False)

    def _completed(self, sampling: SamplingParams) -> SamplingParams:
        """With a seed, and with what XTC spares where a call does not say."""
        sampling = sampling.with_seed()
        if sampling.xtc_special_tokens is not None or self.tokenizer is None:
            return sampling
        line_end = self.tokenizer.encode("\n", add_special_tokens=False)
        spared = (*line_end, *sorted(self.tokenizer.eos_token_ids))
        return replace(sampling, xtc_special_tokens=spared)

    # --- compiling ------------------------------------------------------------------------

    def kernels_missing(
        self, sampling: SamplingParams, draft_tokens: DraftTokens | None = None
    ) -> bool:
        """Whether `build_kernels` would make such rounds faster from now on."""
        count, auto = self._drafting(draft_tokens)
        return self._compiling.would_hold(self._method(sampling), count, auto=auto)

    def build_kernels(
        self, sampling: SamplingParams, draft_tokens: DraftTokens | None = None
    ) -> None:
        """Run two compiled rounds of each kind, so that MLX builds every kernel that they need."""
        method = self._method(sampling)
        rounds = self._round(method, True)
        most, auto = self._drafting(draft_tokens)
        for kind in self._compiling.kinds(most, auto=auto):
            chain = TextDrafters([_Zeros()], self._vocabulary, []) if kind.from_text else None
            reader = self.opening(sampling, sampler=rounds.sampler)
            session = Session(
                rounds, reader, [0, 0], limit=64, draft_tokens=kind.draft_tokens, chain=chain
            )
            for _ in range(3):
                session.step()
            self._compiling.built(method, kind)

    def _is_compiled(self, sampling: SamplingParams, draft_tokens: DraftTokens | None) -> bool:
        count, auto = self._drafting(draft_tokens)
        return self._compiling.holds(self._method(sampling), count, auto=auto)

    def _method(self, sampling: SamplingParams) -> Method:
        """Of the operations that a way of sampling needs, for a text of any length."""
        return self._completed(sampling).method(_ANY_LENGTH)

    def _build_round(
        self, method: Method, compiled: bool, processors: tuple[Processor, ...] = ()
    ) -> FusedRound:
        sampler = Sampler(method, self._vocabulary, processors)
        target, *drafts = self.models
        drafters = {
            name: ModelDrafter(cached, self._vocabulary)
            for name, cached in zip(self.drafts, drafts, strict=True)
        }
        return FusedRound(target, drafters, sampler, compiled=compiled, heads=self.heads)


def _by_name(one: Any) -> dict[str, Any]:
    """A mapping as it is; what stands alone under the name of the one draft model."""
    if isinstance(one, Mapping) and not callable(one):  # MLX's modules are mappings too
        return dict(one)
    return {} if one is None else {MODEL: one}


def _repeatable(sampling: SamplingParams) -> SamplingParams:
    """With a rule under which a seed of the caller's own determines the text for any K."""
    if sampling.seed is None or sampling.verify is not None:
        return sampling
    return sampling.auditable()


class _Zeros:
    """Proposes, whatever the text."""

    name, most = "zeros", 1

    def extend(self, tokens: Sequence[int]) -> None: ...

    def propose(self, limit: int) -> Proposal:
        return Proposal((0,) * limit, 1)


_ANY_LENGTH = 256  # a text's length shapes a round, but not the kernels that it needs
