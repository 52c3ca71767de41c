"""A local answer first, and an upstream's where rules ask for it.

The rules judge the first tokens of the local answer. Where none of them asks for the upstream,
nothing is sent. Otherwise the upstream writes its answer while the local one goes on to its end,
and one of the two is used as a whole. No text is shown before that is decided.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from mlxspec.cascade.answers import drafted
from mlxspec.cascade.client import Client, Fault, Question, Reply
from mlxspec.cascade.decision import Decision, decided, stayed
from mlxspec.cascade.rules import Draft, Finding, Thresholds, judged
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
        question: what the upstream is asked.
    """

    def __init__(
        self,
        policy: Policy,
        request: Request,
        question: Question,
        tokenizer: Tokenizer,
        model: str,
    ) -> None:
        self.asked: Future[Reply] | None = None  # the upstream, once a rule asks for it
        self._policy = policy
        self._request = request
        self._question = question
        self._tokenizer = tokenizer
        self._model = model
        self._begun_s = time.perf_counter()
        self._draft: Draft | None = None
        self._findings: list[Finding] = []

    @property
    def stays(self) -> bool:
        """Whether the rules let the local answer go on, and nothing is sent."""
        return self._draft is not None and not self._findings

    def is_due(self, generation: Generation, *, ended: bool) -> bool:
        """Whether the answer is to be judged now: it is long enough, or whole.

        One token more than is judged says whether the answer ended within the draft.
        """
        written = len(generation.logprobs) - generation.reasoning_tokens
        is_long = written > self._policy.thresholds.max_draft_tokens
        return self._draft is None and (is_long or ended)

    def judge(self, generation: Generation, *, ended: bool) -> None:
        """Judge the beginning of the answer, and ask the upstream if a rule wants that."""
        most, request = self._policy.thresholds, self._request
        self._draft = draft = drafted(
            generation,
            self._tokenizer,
            most.max_draft_tokens,
            request.limit - len(request.tokens),
            ended=ended,
        )
        self._findings = judged(draft, most, self._policy.off)
        if self._findings:
            self.asked = self._policy.client.begin(replace(self._question, draft=draft.text))

    def decide(self, generation: Generation, reply: Reply | Fault | None) -> Decision:
        """Compare both answers, the local one of which is whole.

        Args:
            reply: the upstream's answer, or why there is none; None where it was not asked.
        """
        assert self._draft is not None, "an answer that has ended is judged"
        upstream = self._policy.client.upstream
        took_s = time.perf_counter() - self._begun_s
        if reply is None:
            return stayed(self._draft, generation, upstream, self._model, took_s)
        return decided(
            self._draft,
            self._findings,
            generation,
            reply,
            upstream,
            self._model,
            self._policy.thresholds,
            took_s,
        )

    def cancel(self) -> None:
        """Nobody waits for the upstream any more."""
        if self.asked is not None:
            self.asked.cancel()


class Cascade(Iterator[Event]):
    """A run, and the decision on its answer: an iterator of events that can be consumed once.

    Events come as the run has them, but their text is held until it is decided that it stays.
    The run's result is the local answer; `decision` is there once the events are over.

    Args:
        question: the request's prompt, as the upstream gets it. model: the local model's name.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        request: Request,
        question: Question,
        model: str,
    ) -> None:
        if engine.tokenizer is None:
            raise UsageError("An upstream needs text.", hint="Give the engine a tokenizer.")
        self.run = engine.run(judgeable(request))
        self.run.request = request
        self.decision: Decision | None = None
        self._deciding = Deciding(policy, request, question, engine.tokenizer, model)
        self._held: list[Piece] = []
        self._events = self._decided()

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
                if self._deciding.is_due(generation, ended=ended):
                    self._deciding.judge(generation, ended=ended)
                yield replace(event, pieces=self._released() if self._deciding.stays else ())
            self.decision = self._deciding.decide(generation, self._reply())
        except KeyboardInterrupt:  # whoever ends it gets what is there
            yield Event(pieces=self._released())
            raise
        finally:
            self._deciding.cancel()
            generation.logprobs = asked_for(generation.logprobs, self.run.request.logprobs)
        if self.decision.author == "upstream":
            # Reasoning that led to another answer goes with it.
            self._held = [Piece(self.decision.text, from_draft=False, upstream=True)]
        yield Event(pieces=self._released())

    def _reply(self) -> Reply | Fault | None:
        """Wait for the upstream, if it was asked."""
        try:
            return None if self._deciding.asked is None else self._deciding.asked.result()
        except Fault as fault:
            return fault

    def _released(self) -> tuple[Piece, ...]:
        held, self._held = tuple(self._held), []
        return held


def judgeable(request: Request) -> Request:
    """The same request, with the log-probabilities that the rules judge."""
    return replace(request, logprobs=MAX_LOGPROBS)


def asked_for(logprobs: Sequence[Logprob], top: int | None) -> list[Logprob]:
    """The part of what the rules judged that the request asks for itself."""
    return [] if top is None else [replace(one, top=one.top[:top]) for one in logprobs]
