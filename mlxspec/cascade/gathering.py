"""Collects both answers to each of some prompts: the local model's and an upstream's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlxspec.cascade.answers import Kept, Local, asked_of
from mlxspec.cascade.client import Client, Fault, Question, Reply, turns_of
from mlxspec.cascade.decision import similarity
from mlxspec.metrics import Progress

PATIENCE_S = 60.0  # of an upstream that says when it takes more requests


@dataclass
class Case:
    """A prompt and what is known of its answers; `fault` says why the upstream gave none."""

    prompt: str
    local: Local | None = None
    reply: Reply | None = None
    fault: str | None = None

    @cached_property
    def similarity(self) -> float | None:
        """Of both answers, 0 to 1; None where there are not both. For a case that is complete."""
        if self.local is None or self.reply is None:
            return None
        return similarity(self.local.text, self.reply.text)


class Gathering:
    """An iterator over the collection of answers; `cases` has what is there, also in between.

    An answer that is kept is not asked for again. While the upstream answers one prompt, the local
    model goes on with the next.

    Args:
        about: what local answers depend on, beside the prompt, as plain values.
        system: the system message, for the upstream.
        write: writes the local answer to a prompt.
        client: None asks no upstream.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        kept: Kept,
        about: Mapping[str, Any],
        system: str | None,
        write: Callable[[str], Local],
        client: Client | None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._kept = kept
        self._about = about
        self._system = system
        self._write = write
        self._client = client
        self._sleep = sleep
        self.cases = [Case(prompt) for prompt in dict.fromkeys(prompts)]
        for case in self.cases:
            case.local = kept.local(self._asked(case))
            if client is not None and case.local is not None:
                case.reply = kept.reply(self._asked_far(client, case.local, case))

    @property
    def lacks_local(self) -> bool:
        return any(case.local is None for case in self.cases)

    def __iter__(self) -> Iterator[Progress]:
        far = self._client is not None
        left = [case for case in self.cases if case.local is None or (far and case.reply is None)]
        begun_s = time.monotonic()
        pending: tuple[Case, Future[Reply]] | None = None
        try:
            for done, case in enumerate(left):
                took_s = time.monotonic() - begun_s
                left_s = took_s / done * (len(left) - done) if done else None
                yield Progress("collecting answers", done, len(left), left_s)
                if case.local is None:
                    case.local = self._write(case.prompt)
                    self._kept.add(self._asked(case), case.local)
                before, pending = pending, self._begun(case)
                self._end(before)
            self._end(pending)
            pending = None
        finally:
            if pending is not None and not pending[1].cancel():
                self._end(pending)  # it is there, and was paid for

    def _begun(self, case: Case) -> tuple[Case, Future[Reply]] | None:
        """A question on its way, unless its answer is kept."""
        if self._client is None or case.local is None:
            return None
        case.reply = self._kept.reply(self._asked_far(self._client, case.local, case))
        if case.reply is not None:
            return None
        return case, self._client.begin(self._question(case.local, case))

    def _end(self, pending: tuple[Case, Future[Reply]] | None) -> None:
        """Wait for an answer and keep it; once more, where the upstream says when."""
        if pending is None or self._client is None:
            return
        case, future = pending
        assert case.local is not None, "the local answer comes first"
        try:
            case.reply = future.result()
        except Fault as fault:
            case.fault = fault.why
            if 0 < fault.retry_after_s <= PATIENCE_S:
                self._sleep(fault.retry_after_s)
                try:
                    case.reply = self._client.begin(self._question(case.local, case)).result()
                except Fault as again:
                    case.fault = again.why
        if case.reply is not None:
            case.fault = None
            self._kept.add(self._asked_far(self._client, case.local, case), case.reply)

    def _asked(self, case: Case) -> dict[str, Any]:
        return {"prompt": case.prompt, **self._about}

    def _question(self, local: Local, case: Case) -> Question:
        return Question(
            messages=turns_of(self._system, case.prompt),
            max_tokens=local.limit,
            temperature=local.temperature,
            top_p=local.top_p,
        )

    def _asked_far(self, client: Client, local: Local, case: Case) -> dict[str, Any]:
        upstream = client.upstream
        return asked_of(upstream.base_url, upstream.model, self._question(local, case))
