"""A target, perhaps a draft, and everything that decodes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from mlxspec import kernels
from mlxspec.caches.original import Model, require_quantizable
from mlxspec.control import Controller
from mlxspec.drafters import MODEL, ModelDrafter
from mlxspec.errors import PromptError, UsageError
from mlxspec.estimates import Learned
from mlxspec.metrics import Event, Generation, SpeculationStats
from mlxspec.network import Network, kind_of, network_of, require_exact, why_it_waits
from mlxspec.opening import opened
from mlxspec.pairs import (
    AUTO,
    DEFAULT_DRAFT_TOKENS,
    DEFAULT_MAX_TOKENS,
    MAX_AUTO_TOKENS,
    MAX_DRAFT_TOKENS,
    DraftTokens,
)
from mlxspec.params import KVQuantization, Method, SamplingParams
from mlxspec.prefill import Note, Progress
from mlxspec.round import Round, RoundState
from mlxspec.run import Run
from mlxspec.sampling import Processor, Sampler
from mlxspec.session import Session, reserved
from mlxspec.text import TextStream, Tokenizer, encode_prompt, is_raw
from mlxspec.translation import Translated
from mlxspec.vocabulary import Shared

GREEDY = SamplingParams()

Prompt = str | Sequence[int]


class Engine:
    """Decodes with a target model, and speculates with a draft model where there is one.

    Args:
        target: an mlx-lm model in memory.
        draft: a smaller mlx-lm model, or None.
        tokenizer: mlx-lm's TokenizerWrapper; None takes and gives token ids only.
        shared: what `vocabulary.shared_tokens` says of the two tokenizers; None where the draft's
            ids mean the same as the target's.
        draft_tokens: K where a call does not say; "auto" chooses it round by round.
        compiled: whether rounds are compiled. None: on a GPU always; on a CPU once their kernels
            are built, which `build_kernels` does, because it takes seconds.
        kv: keep keys and values in fewer bits. This changes what the target says, with and
            without a draft alike.

    `draft` is then one that speaks the target's tokens, translated where `shared` says so.
    `learned` is what runs with draft_tokens="auto" have found out; a program may keep it, and give
    it to an engine with the same models on the same machine.

    Raises:
        UnsupportedModel: a model cannot speculate exactly.
    """

    def __init__(
        self,
        target: Model,
        draft: Model | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        shared: Shared | None = None,
        draft_tokens: DraftTokens = DEFAULT_DRAFT_TOKENS,
        compiled: bool | None = None,
        kv: KVQuantization | None = None,
    ) -> None:
        self.target = target
        self.shared = shared
        self.tokenizer = tokenizer
        self.kv = kv
        self.learned = Learned()
        self.load_s = 0.0
        self._draft_tokens = draft_tokens
        self._compiled = compiled
        self.networks: list[Network] = []
        self._add(target)
        self._vocabulary = self.networks[0].vocabulary
        if draft is not None and shared is not None:
            draft = Translated(draft, shared, self._vocabulary)
        self.draft = draft
        if draft is not None:
            self._add(draft)
            for network in self.networks:
                require_exact(network)
        self._round = lru_cache(maxsize=16)(self._build_round)

    def _add(self, model: Model) -> None:
        if self.kv is not None:
            require_quantizable(model, self.kv)
        self.networks.append(network_of(model, self.kv))

    @property
    def context(self) -> int | None:
        """Tokens that the target was made for, or None where its configuration does not say."""
        length = getattr(getattr(self.target, "args", None), "max_position_embeddings", None)
        return int(length) if length else None

    @property
    def compiles(self) -> bool:
        """Whether greedy rounds of any K are compiled."""
        return self._is_compiled(GREEDY, AUTO if self.draft is not None else 0)

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
        on_prefill: Progress | None = None,
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
            on_prefill: called with (tokens read, tokens in all).

        Raises:
            UsageError: a value is out of its range. PromptError: empty or too long.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}.", hint="It must be 1 or more.")
        if stop and self.tokenizer is None:
            raise UsageError("Stop strings need a tokenizer.", hint="Give the engine one.")
        tokens = self.encode(prompt, system=system, raw=raw)
        count, auto = self._drafting(draft_tokens)
        sampling = _repeatable(sampling) if auto else sampling
        sampling = sampling.with_seed()

        def begin() -> Session:
            return self._session(
                tokens, max_tokens, draft_tokens, sampling, processors, on_prefill=on_prefill
            )

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
        capacity: int = 0,
        on_prefill: Progress | None = None,
    ) -> Session:
        """Read `prompt` and return its session, for a program that drives decoding itself.

        Args:
            max_tokens: where `step` ends; None goes on to the end of the context.
            capacity: entries that the caches have room for from the start. They grow by
                themselves.
            Others: as for `run`.
        """
        return self._session(
            self.encode(prompt),
            max_tokens,
            draft_tokens,
            sampling,
            processors,
            capacity=capacity,
            on_prefill=on_prefill,
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
        capacity: int = 0,
        on_prefill: Progress | None = None,
    ) -> Session:
        count, auto = self._drafting(draft_tokens)
        sampling = self._completed(sampling)
        limits = [self.context, len(tokens) + max_tokens if max_tokens is not None else None]
        limit = min((limit for limit in limits if limit is not None), default=None)
        method = sampling.method(reserved(limit) if limit is not None else None)
        if processors:
            rounds = self._build_round(method, False, tuple(processors))
        else:
            rounds = self._round(method, self._is_compiled(sampling, draft_tokens))
        notes = [why_it_waits(network) for network in self.networks if not network.fused]
        if self.shared is not None and count:
            notes.append(
                "the draft speaks another tokenizer: "
                f"{self.shared.percent}% of the target's tokens are shared"
            )
        if processors:
            notes.append("logits processors of your own: rounds are not compiled")

        def prefilled(text: Sequence[int], draft: bool) -> RoundState:
            return self.prefilled(
                text,
                sampling,
                sampler=rounds.sampler,
                draft=draft,
                capacity=capacity,
                progress=on_prefill,
                note=notes.append,
            )

        return Session(
            rounds,
            prefilled,
            tokens,
            limit=2**31 - 1 if limit is None else limit,
            draft_tokens=count,
            controller=Controller({MODEL: count}, self.learned.at(len(tokens))) if auto else None,
            notes=notes,
        )

    def prefilled(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        sampler: Sampler | None = None,
        draft: bool = True,
        capacity: int = 0,
        progress: Progress | None = None,
        note: Note | None = None,
    ) -> RoundState:
        """The state of one sequence before its first round.

        Args:
            sampler: says how much of the text the rounds look back on; None is not at all.
            note: called with what a person should know, such as that the draft was left out
                because memory would not hold both.
        """
        return opened(
            self.networks if draft else self.networks[:1],
            tokens,
            sampling,
            sampler=sampler,
            capacity=capacity,
            progress=progress,
            note=note,
        )

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

    def _drafting(self, draft_tokens: DraftTokens | None) -> tuple[int, bool]:
        """K, or the largest, and whether it is chosen round by round; 0 where nothing drafts."""
        asked = self._draft_tokens if draft_tokens is None else draft_tokens
        count = MAX_AUTO_TOKENS if asked == AUTO else asked
        if not (isinstance(count, int) and 0 <= count <= MAX_DRAFT_TOKENS):
            raise UsageError(
                f"draft_tokens is {asked!r}.",
                hint=f'It must be "auto", or between 0 and {MAX_DRAFT_TOKENS}.',
            )
        return (count, asked == AUTO) if self.draft is not None else (0, False)

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
        built = all(map(kernels.are_built, self._kinds(sampling, draft_tokens).values()))
        return self._compiled is None and kernels.can_compile() and not built

    def build_kernels(
        self, sampling: SamplingParams, draft_tokens: DraftTokens | None = None
    ) -> None:
        """Run two compiled rounds of each kind, so that MLX builds every kernel that they need."""
        rounds = self._round(self._completed(sampling).method(_ANY_LENGTH), True)

        def prefilled(text: Sequence[int], draft: bool) -> RoundState:
            return self.prefilled(text, sampling, sampler=rounds.sampler, draft=draft)

        for count, kind in self._kinds(sampling, draft_tokens).items():
            session = Session(rounds, prefilled, [0, 0], limit=64, draft_tokens=count)
            for _ in range(2):
                session.step()
            kernels.mark_built(kind)

    def _is_compiled(self, sampling: SamplingParams, draft_tokens: DraftTokens | None) -> bool:
        if self._compiled is not None:
            return self._compiled
        kinds = self._kinds(sampling, draft_tokens).values()
        return kernels.can_compile() and all(map(kernels.are_built, kinds))

    def _kinds(self, sampling: SamplingParams, draft_tokens: DraftTokens | None) -> dict[int, str]:
        """Names of the operations of all rounds that may be run, each with a K.

        Of K it matters whether there is a draft step, and a second one.
        """
        count, auto = self._drafting(draft_tokens)
        counts = range(min(count, 2) + 1) if auto else [count]
        return {k: self._kind(sampling, k) for k in counts}

    def _kind(self, sampling: SamplingParams, draft_tokens: int) -> str:
        method = self._completed(sampling).method(_ANY_LENGTH)
        return f"{self._models} {method} {min(draft_tokens, 2)}"

    @cached_property
    def _models(self) -> list[Any]:
        """What of the models decides which operations a round has."""
        return [*(kind_of(network.model) for network in self.networks), self.kv]

    def _build_round(
        self, method: Method, compiled: bool, processors: tuple[Processor, ...] = ()
    ) -> Round:
        sampler = Sampler(method, self._vocabulary, processors)
        drafter = None
        if self.draft is not None:
            drafter = ModelDrafter(self.networks[1], sampler)
        return Round(self.networks[0], drafter, sampler, compiled=compiled)


def _repeatable(sampling: SamplingParams) -> SamplingParams:
    """With a rule under which a seed of the caller's own determines the text for any K."""
    if sampling.seed is None or sampling.verify is not None:
        return sampling
    return sampling.auditable()


_ANY_LENGTH = 256  # a text's length shapes a round, but not the kernels that it needs
