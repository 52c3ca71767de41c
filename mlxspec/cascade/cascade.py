"""A local answer first, and an upstream's where rules ask for it.

The rules judge the first tokens of the local answer. Where none of them asks for the upstream,
nothing is sent. Otherwise the upstream writes its answer while the local one goes on to its end,
and one of the two is used as a whole. No text is shown before that is decided.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from mlxspec.cascade.answers import drafted
from mlxspec.cascade.client import Client, Fault, Question, Reply
from mlxspec.cascade.decision import Decision, decided, stayed
from mlxspec.cascade.rules import Draft, Finding, Thresholds, judged
from mlxspec.conversations import Message
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import Request
from mlxspec.defaults import MAX_LOGPROBS
from mlxspec.errors import UsageError
from mlxspec.metrics import Event, Generation, Logprob, Piece
from mlxspec.tokens import Tokenizer


@dataclass(frozen=True)
class Policy:
    """An upstream, and when it is asked: the thresholds, and the names of rules that are off."""

    client: Client
    thresholds: Thresholds = field(default_factory=Thresholds)
    off: frozenset[str] = frozenset()


class Deciding:
    """The decision on one answer, in three steps: judge its beginning, ask, compare.

    Args:
        request: of the local answer, made by `judgeable`. model: the local model's name.
        messages: the same question as turns.
    """

    def __init__(
        self,
        policy: Policy,
        request: Request,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        model: str,
    ) -> None:
        self._policy = policy
        self._request = request
        self._messages = messages
        self._tokenizer = tokenizer
        self._model = model
        self._begun_s = time.perf_counter()
        self._draft: Draft | None = None
        self._findings: list[Finding] = []
        self._asked: Future[Reply] | None = None

    @property
    def is_judged(self) -> bool:
        return self._draft is not None

    @property
    def stays(self) -> bool:
        """Whether the rules let the local answer go on, and nothing is sent."""
        return self.is_judged and not self._findings

    def judge(self, generation: Generation, *, ended: bool) -> None:
        """Judge the answer once it is long enough, and ask the upstream if a rule wants that.

        One token more than is judged says whether the answer ended within the draft.
        """
        most = self._policy.thresholds
        written = len(generation.tokens) - generation.reasoning_tokens
        if self.is_judged or (written <= most.max_draft_tokens and not ended):
            return
        limit = self._request.limit - len(self._request.tokens)
        self._draft = draft = drafted(
            generation, self._tokenizer, most.max_draft_tokens, limit, ended=ended
        )
        self._findings = judged(draft, most, self._policy.off)
        if self._findings:
            question = Question(
                messages=self._messages,
                max_tokens=limit,
                temperature=self._request.sampling.temperature,
                draft=draft.text,
            )
            self._asked = self._policy.client.begin(question)

    def decide(self, generation: Generation) -> Decision:
        """Compare both answers, the local one of which is whole. Waits for the upstream."""
        assert self._draft is not None, "an answer that has ended is judged"
        upstream = self._policy.client.upstream
        if self._asked is None:
            took_s = time.perf_counter() - self._begun_s
            return stayed(self._draft, generation, upstream, self._model, took_s)
        reply: Reply | Fault
        try:
            reply = self._asked.result()
        except Fault as fault:
            reply = fault
        return decided(
            self._draft,
            self._findings,
            generation,
            reply,
            upstream,
            self._model,
            self._policy.thresholds,
            time.perf_counter() - self._begun_s,
        )

    def cancel(self) -> None:
        """Nobody waits for the upstream any more."""
        if self._asked is not None:
            self._asked.cancel()


class Cascade:
    """A run, and the decision on its answer: an iterator of events that can be consumed once.

    Events come as the run has them, but their text is held until it is decided that it stays.
    The run's result is the local answer; `decision` is there once the events are over.

    Args:
        messages: the request's prompt as turns. model: the local model's name.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        request: Request,
        messages: Sequence[Message],
        model: str,
    ) -> None:
        if engine.tokenizer is None:
            raise UsageError("An upstream needs text.", hint="Give the engine a tokenizer.")
        self.run = engine.run(judgeable(request))
        self.run.request = request
        self.decision: Decision | None = None
        self._deciding = Deciding(policy, request, messages, engine.tokenizer, model)
        self._held: list[Piece] = []
        self._events = self._decided()

    def __iter__(self) -> Cascade:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        self._events.close()
        self.run.close()

    def _decided(self) -> Generator[Event, None, None]:
        generation = self.run.generation
        try:
            for event in self.run:
                if event.prefill is not None:
                    yield event
                    continue
                ended = event.finish_reason is not None
                self._held += event.pieces
                self._deciding.judge(generation, ended=ended)
                yield replace(event, pieces=self._released() if self._deciding.stays else ())
            self.decision = self._deciding.decide(generation)
        except KeyboardInterrupt:  # whoever ends it gets what is there
            yield Event(pieces=self._released())
            raise
        finally:
            self._deciding.cancel()
            generation.logprobs = _asked_for(generation.logprobs, self.run.request.logprobs)
        if self.decision.author == "upstream":
            # Reasoning that led to another answer goes with it.
            self._held = [Piece(self.decision.text, from_draft=False, upstream=True)]
        yield Event(pieces=self._released())

    def _released(self) -> tuple[Piece, ...]:
        held, self._held = tuple(self._held), []
        return held


def judgeable(request: Request) -> Request:
    """The same request, with the log-probabilities that the rules judge."""
    return replace(request, logprobs=MAX_LOGPROBS)


def _asked_for(logprobs: Sequence[Logprob], top: int | None) -> list[Logprob]:
    """The part of what the rules judged that the request asks for itself."""
    return [] if top is None else [replace(one, top=one.top[:top]) for one in logprobs]
