"""A target, perhaps drafts, and everything that decodes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from mlxspec.control.estimates import Learned
from mlxspec.decode.batch import Batch
from mlxspec.decode.maker import Maker
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import GREEDY, Prompt, Request
from mlxspec.decode.requests import Requests
from mlxspec.decode.rounds import Built, Rounds
from mlxspec.decode.run import Run
from mlxspec.decode.session import Session
from mlxspec.decode.state import RoundState
from mlxspec.defaults import (
    AUTO,
    DEFAULT_DRAFT_TOKENS,
    MAX_DRAFT_TOKENS,
    MODEL,
    DraftTokens,
)
from mlxspec.device import lengths
from mlxspec.drafters.graph import GraphDrafter, ModelDrafter
from mlxspec.drafters.heads.head import Head, HeadDrafter
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.drafters.translation import Translated
from mlxspec.drafters.vocabulary import Shared
from mlxspec.metrics import Generation
from mlxspec.models.cached_model import CachedModel, cached_model_of, require_exact
from mlxspec.models.caches.original import Model, require_quantizable
from mlxspec.models.context import context_of
from mlxspec.models.prefill import finished
from mlxspec.params import KVQuantization, Method, SamplingParams
from mlxspec.sampling.sampler import Sampler
from mlxspec.tokens import Tokenizer


class Engine:
    """Decodes with a target model, and speculates with whatever drafts for it.

    Args:
        target: an mlx-lm model in memory.
        draft: a smaller mlx-lm model, or None; or several of them by name, of which the best is
            used.
        tokenizer: mlx-lm's TokenizerWrapper; None takes and gives token ids only.
        shared: the result of `vocabulary.shared_tokens` for the two tokenizers, by the name of the
            draft where there are names; None where a draft's ids mean the same as the target's.
        texts: callables that make a text drafter, one for each generation, such as `History`. With
            a draft model or head and a fixed K they are not used.
        heads: drafters on the target's features, by name.
        draft_tokens: K where a call gives none; "auto" chooses the drafter and K round by round.
        compiled: whether rounds are compiled. None: on a GPU always; on a CPU once their kernels
            are built, which `build_kernels` does, because it takes seconds.
        kv: quantises keys and values. This changes the target's text, with and without a draft
            alike.
        context: tokens that the target can read; None takes the length that its arguments give.
        draft_contexts: the same of draft models, by name.
        prefixes: what texts begin from, all of them: runs, sessions and batches. None: runs and
            sessions read for themselves, and each batch has one of its own, which ends with it.

    `learned` holds the findings of runs with draft_tokens="auto"; a program may keep it, and give
    it to an engine with the same models on the same machine. `notes` are told in every run: how the
    models were loaded. `recommended` is what its pair or its authors recommend for sampling.

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
        context: int | None = None,
        draft_contexts: Mapping[str, int | None] | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.target = target
        self._context = context
        self._draft_contexts = dict(draft_contexts or {})
        self.texts = tuple(texts)
        self.heads = dict(heads or {})
        self.tokenizer = tokenizer
        self.kv = kv
        self.learned = Learned()
        self.load_s = 0.0
        self.notes: tuple[str, ...] = ()
        self.prefixes = prefixes
        self.recommended: Mapping[str, float] = {}
        drafts = bool(_by_name(draft) or self.heads)
        self._speculates = bool(drafts or texts)
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
        if self._speculates:
            for cached in self.models:
                require_exact(cached)
        self._requests = Requests(
            tokenizer,
            self._vocabulary,
            self.context,
            draft_tokens=draft_tokens,
            drafts=drafts,
            texts=bool(texts),
        )
        drafters: dict[str, GraphDrafter] = {
            name: ModelDrafter(cached, self._vocabulary, self._draft_contexts.get(name))
            for name, cached in zip(self.drafts, self.models[1:], strict=True)
        }
        drafters |= {name: HeadDrafter(head) for name, head in self.heads.items()}
        self._maker = Maker(self)
        self.rounds = Rounds(self.models, drafters, from_text=bool(self.texts), compiled=compiled)

    def _cached(self, model: Model) -> CachedModel:
        if self.kv is not None:
            require_quantizable(model, self.kv)
        return cached_model_of(model, self.kv, speculates=self._speculates)

    @property
    def draft(self) -> Model | None:
        """The first of the drafts, as a model over the target's tokens; None without any."""
        return next(iter(self.drafts.values()), None)

    @property
    def context(self) -> int | None:
        """The target's context in tokens, or None where nothing gives one."""
        return self._context or context_of(self.target)

    @property
    def compiles(self) -> bool:
        """Whether greedy rounds of any K are compiled."""
        return self.rounds.are_compiled(self.request([0], draft_tokens=AUTO))

    # --- generating -----------------------------------------------------------------------

    def request(self, prompt: Prompt | None = None, **options: Any) -> Request:
        """Resolve everything that a text depends on, once.

        Args:
            prompt: text, or token ids that are taken as they are.
            messages: in place of a prompt, a conversation as OpenAI's API writes it. A last turn of
                the assistant is gone on with.
            tools: functions that the model may call, as OpenAI's API writes them.
            parallel_calls: False ends the text behind its first call of a tool.
            max_tokens: at least 1, 256 unless given; None goes on to the end of the context, where
                the text ends in any case.
            draft_tokens: K; None takes the engine's own, 0 decodes plainly, "auto" chooses it
                round by round, and soon stops proposals that do not pay.
            sampling: `SamplingParams`, greedy unless given. "auto" verifies with the coupled rule
                unless another is named: the seed alone then decides the text, whatever is
                proposed.
            stop: the text ends before the first of these strings, or of one; in the reasoning too.
            ignore_eos: go on after the end of the text, for measurements.
            system, raw, template_args: see `encode_prompt`. `raw` also leaves the marks of
                a reasoning in the text.
            eos: names of tokens that end the text too.
            processors: a caller's own logits processors, as mlx-lm takes them. They see every
                proposal, kept or not, so they must depend on their arguments alone; and they run
                on the host, which makes rounds slower. Nothing else constrains output to
                a grammar or a JSON schema.
            prediction: text or ids that the output is expected to repeat, at least in parts. It is
                proposed wherever the output follows it.
            capacity: entries that the caches have room for from the start. They grow by themselves.
            cache: a file that the prompt's past is kept in: the part of the prompt that it holds is
                not read again. Where it cannot be used or written, a note says so.
            logprobs: tell how likely the target found each token, and this many of the likeliest
                ones in its place, 0 to 20; None tells nothing.

        Raises:
            UsageError: a value is out of its range, or `cache` is a folder. PromptError: the prompt
            is empty or too long. UnsupportedModel: there is a prediction, and the model cannot
            speculate exactly.
        """
        request = self._requests.make(prompt, **options)
        if request.prediction:  # an engine without drafters has not tried its model yet
            require_exact(self.models[0])
        return request

    def generate(self, prompt: Prompt | Request | None = None, **options: Any) -> Generation:
        """Run to the end and return the whole result, with the arguments of `run`."""
        run = self.run(prompt, **options)
        for _ in run:
            pass
        return run.generation

    def stream(self, prompt: Prompt | Request | None = None, **options: Any) -> Run:
        """An event for every round, with the arguments of `run`."""
        return self.run(prompt, **options)

    def run(self, prompt: Prompt | Request | None = None, **options: Any) -> Run:
        """Prepare a generation: an iterator of events with the result so far beside it.

        Args:
            prompt: a request; or text or token ids, with the options of `request`.
        """
        request = prompt if isinstance(prompt, Request) else self.request(prompt, **options)
        writer = self._maker.writer(request)
        run = Run(writer, lambda: self._maker.session(request), self.learn_from)
        run.generation.timing.load_s = self.load_s
        return run

    def session(self, prompt: Prompt | Request | None = None, **options: Any) -> Session:
        """Read `prompt` and return its session, for a program that drives decoding itself.

        Args:
            prompt: a request; or text or token ids, with the options of `request`. Without
                `max_tokens` it goes on to the end of the context.
        """
        if not isinstance(prompt, Request):
            prompt = self.request(prompt, **({"max_tokens": None} | options))
        session = self._maker.session(prompt)
        finished(session.read())
        return session

    def learn_from(self, session: Session) -> None:
        """Let later sessions begin with what this one learned about its rounds."""
        self._maker.learn(len(session.text), session.policy)

    def generate_many(
        self, prompts: Iterable[Prompt | Request], *, max_rows: int = 8, **options: Any
    ) -> list[Generation]:
        """Write many texts, up to `max_rows` of them at a time; their results, in order.

        Args:
            prompts: requests; or texts or token ids, with the options of `request`. Each text is
                the one that `generate` would write.

        Raises:
            MlxspecError: a text could not be written. The others are not written to their ends.
        """
        batch = self.batch(max_rows)
        rows = [batch.add(prompt, **options) for prompt in prompts]
        with closing(batch):
            while not batch.done:
                for row, _ in batch.step():
                    if row.error is not None:
                        raise row.error
        return [row.generation for row in rows]

    def batch(self, max_rows: int = 8) -> Batch:
        """Many texts side by side, for a program that adds and ends them as it likes.

        Args:
            max_rows: the most texts that are written at a time.

        Raises:
            UsageError: `max_rows` is not between 1 and 32.
        """
        return Batch(self._maker, self.request, max_rows)

    def encode(self, prompt: Prompt | None = None, **options: Any) -> list[int]:
        """Token ids of a prompt that fits the context.

        Args:
            options: messages, tools, system, raw and template_args, as `request` takes them.

        Raises:
            PromptError: it is empty, too long, or has a token that the model lacks.
            UsageError: it is a text, and there is no tokenizer; or there are messages too.
        """
        return self._requests.encode(prompt, **options)

    # --- rounds ---------------------------------------------------------------------------

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
            sampler: tells how much of the text the rounds look back on; None is nothing.
            draft: whether the draft models have read the text too.
            capacity: entries that all caches have room for, at least.
        """
        rounds = self.rounds.with_sampler(sampler or Sampler(Method(), self._vocabulary))
        request = Request(tokens=tuple(tokens), sampling=sampling, capacity=capacity)
        reader = Reader(rounds, request)
        state = finished(reader.state(tokens))
        state = rounds.grown(state, lengths.reserved(len(tokens) + MAX_DRAFT_TOKENS))
        for name in self.drafts if draft else ():
            past = finished(reader.draft(name, tokens[:-2], 0))
            state = state.with_draft(name, rounds.drafters[name].grown(past, state.capacity))
        return state

    def kernels_missing(
        self,
        sampling: SamplingParams = GREEDY,
        draft_tokens: DraftTokens | None = None,
        *,
        beside: bool = False,
    ) -> bool:
        """Whether `build_kernels` would make such rounds faster from now on."""
        request = self.request([0], sampling=sampling, draft_tokens=draft_tokens)
        return self.rounds.kernels_missing(request, beside=beside)

    def build_kernels(
        self,
        sampling: SamplingParams = GREEDY,
        draft_tokens: DraftTokens | None = None,
        *,
        beside: bool = False,
    ) -> Built:
        """Build the kernels that such rounds need once compiled: seconds on a CPU.

        Args:
            beside: also those of rounds of several texts, for a batch.
        """
        request = self.request([0], sampling=sampling, draft_tokens=draft_tokens)
        return self.rounds.build_kernels(request, beside=beside)


def _by_name(one: Any) -> dict[str, Any]:
    """A mapping as it is; a single value under the name MODEL."""
    if isinstance(one, Mapping) and not callable(one):  # MLX's modules are mappings too
        return dict(one)
    return {} if one is None else {MODEL: one}
