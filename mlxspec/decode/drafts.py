"""The drafters of one text in a round's graph: how far each has read, and what it reads next.

A draft model reads the text for itself, in pieces between rounds, and only as far as the policy
thinks that it pays. Until it has caught up, rounds do without it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxspec.control.policy import Need, Permit, Policy
from mlxspec.decode.reader import BETWEEN_S, Reader
from mlxspec.decode.round import FusedRound
from mlxspec.device import lengths
from mlxspec.drafters.graph import ROWS, Past
from mlxspec.drafters.proposals import PLAIN
from mlxspec.errors import OutOfMemory
from mlxspec.metrics import Tell
from mlxspec.models.caches.layers import capacity_of

# The least number of last tokens that a draft reads when it reads anew. It reads anew once it has
# read more than twice as many, which bounds the cost of a round and of a long prompt.
WINDOW = 4096
# Rounds that a draft may be ahead of the text: two in flight, and the one that is proposed.
ROUNDS = 3


@dataclass
class _Reach:
    """The stretch of the text that a draft model has read, as positions."""

    start: int
    end: int


@dataclass
class _Reading:
    """A draft model that reads a stretch of the text anew, of which it has read up to `at`."""

    steps: Generator[Any, None, Past]
    start: int
    at: int
    end: int


class Drafts:
    """Draft models and heads by name, and how far each has read the text.

    A draft model's next round feeds it the last two tokens of the text, so it has to have read all
    but those. The session reports each write. A head follows every round, and is never behind.

    Args:
        rounds: the rounds that they draft in. reader: reads a text for them.
        prompt: the number of tokens of the text that are the prompt. most: the largest K.
        tell: called with notes for the user.
    """

    def __init__(
        self,
        rounds: FusedRound,
        reader: Reader,
        *,
        prompt: int,
        most: int,
        tell: Tell,
    ) -> None:
        self.names = list(rounds.drafters)
        self._rounds = rounds
        self._reader = reader
        self._prompt = prompt
        self._most = most
        self._tell = tell
        self._reached: dict[str, _Reach] = {}
        self._holds: dict[tuple[str, int], int] = {}
        self._readings: dict[str, _Reading] = {}
        self._spent_s = dict.fromkeys(self.names, 0.0)
        self._begun_s = time.perf_counter()

    @property
    def read(self) -> list[str]:
        """The draft models that have read the text, up to some place."""
        return list(self._reached)

    @property
    def reached(self) -> dict[str, tuple[int, int]]:
        """The stretch of the text that each draft model has read for certain."""
        return {name: (reach.start, reach.end) for name, reach in self._reached.items()}

    @property
    def reading_s(self) -> float:
        """The seconds that draft models have read for, while the text waited."""
        return sum(self._spent_s.values())

    @property
    def models(self) -> list[str]:
        """The draft models, which read the text for themselves."""
        return [name for name in self.names if not self._rounds.drafters[name].follows]

    @property
    def unread(self) -> bool:
        """Whether a draft model may still have to read the prompt."""
        return any(name not in self._reached for name in self.models)

    def forget(self) -> None:
        """Note that the state was built anew: no model has read anything."""
        self._reached.clear()
        self._readings.clear()
        self._holds.clear()

    def leave_out(self, name: str, why: str) -> None:
        """Do without a drafter from now on."""
        self.names.remove(name)
        self._readings.pop(name, None)
        self._tell(f"going on without the draft {name}: {why}")

    def wrote(self, name: str, text: Sequence[int]) -> None:
        """Note that a round of this drafter was the last to add to the text."""
        if name in self._reached:
            self._reached[name].end = len(text) - 2

    def is_behind(self, name: str, text: Sequence[int], before: str | None) -> bool:
        """Whether a drafter has to read before its next round.

        Args:
            before: the drafter of the round that is in flight; None where none is.
        """
        if name not in self.models:
            return False
        if self._must_read(name, text):
            return True
        return before != name if before is not None else self._has_missed(name, text)

    def lag_s(self, name: str, text: Sequence[int]) -> float:
        """The seconds for which a drafter would have to read what it missed."""
        if name not in self.models:
            return 0.0
        tokens = self.missed(name, text)
        return self._rounds.model(name).cached.pace.lag_s(tokens) if tokens else 0.0

    def permit(
        self, name: str, text: Sequence[int], policy: Policy, left_s: float, texts: int
    ) -> Permit:
        """Whether a draft model that is behind may read on; one that never will is left out.

        Args:
            policy: says what pays.
            left_s: the seconds that the rest of the text would take without it.
            texts: how many wait while it reads. Each has its share alone of a round's time, and
                so of what the reading may bring and of what it may take.
        """
        need = self._need(name, text, policy, left_s, texts)
        permit = policy.permit(name, need)
        if permit is Permit.NEVER:
            self.leave_out(name, _why(need))
        return permit

    def caught_up(
        self,
        past: Past | None,
        name: str,
        text: Sequence[int],
        policy: Policy,
        left_s: float,
        texts: int,
    ) -> Past | None:
        """The past of a model after it has read on: a piece, or all if the policy says so.

        A model whose cache memory does not hold is left out.

        Args:
            past: what it had, of one row; None before it has read anything.
            policy, left_s, texts: see `permit`.
        """
        until = time.perf_counter() + BETWEEN_S
        need = self._need(name, text, policy, left_s, texts)
        at_once = policy.permit(name, need) is Permit.ALL
        try:
            past = self._read_on(past, name, text, at_once)
            while self._is_left(name, text):
                need = self._need(name, text, policy, left_s, texts)
                permit = policy.permit(name, need)
                fits = time.perf_counter() + need.piece_s < until
                if permit is not Permit.ALL and not (permit is Permit.PIECE and fits):
                    break
                past = self._read_on(past, name, text, at_once)
        except OutOfMemory:
            self.leave_out(name, "memory does not hold its cache")
        return past

    def entries(self, name: str, bound: int) -> int:
        """The number of entries that a text of `bound` tokens has in a drafter's caches."""
        return bound - self._reached[name].start if name in self._reached else bound

    def _read_on(
        self, past: Past | None, name: str, text: Sequence[int], at_once: bool
    ) -> Past | None:
        started = time.perf_counter()
        if past is None or name in self._readings or self._must_read(name, text):
            past = self._read_anew(past, name, text, at_once)
        else:
            past = self._read_missed(past, name, text)
        self._spent_s[name] += time.perf_counter() - started
        return past

    def _read_anew(
        self, past: Past | None, name: str, text: Sequence[int], at_once: bool
    ) -> Past | None:
        if name not in self._readings:
            self._readings[name] = self._begun(name, text, at_once)
        reading = self._readings[name]
        try:
            reading.at = reading.start + next(reading.steps).read
            return past
        except StopIteration as over:
            past = over.value
        del self._readings[name]
        self._reached[name] = _Reach(reading.start, reading.end)
        return past

    def _begun(self, name: str, text: Sequence[int], at_once: bool) -> _Reading:
        end, window = len(text) - 2, self._window(name)
        # Start at whole windows, so that a text that grew a little has the same start.
        start = max(end // window - 1, 0) * window
        if self._reader.keeps and start == 0:
            end = min(end, self._prompt - 1)  # where the next text may begin
        steps = self._reader.draft(name, text[start:end], start, at_once=at_once)
        return _Reading(steps, start, start, end)

    def _read_missed(self, past: Past, name: str, text: Sequence[int]) -> Past:
        """Read what others wrote: little at once and unseen, much in pieces that are waited for."""
        drafter, reach = self._rounds.model(name), self._reached[name]
        missed = text[reach.end : -2]
        if len(missed) > ROWS:
            missed = missed[: max(drafter.cached.pace.rows(BETWEEN_S, ROWS), ROWS)]
        at = reach.end - reach.start
        length = lengths.attended(at + len(missed))
        if length > capacity_of(past.layers):
            past = drafter.grown(past, lengths.reserved(length))
        past = drafter.read(past, missed, at, length)
        if len(missed) >= ROWS:
            mx.eval(past)
        reach.end += len(missed)
        return past

    def _is_left(self, name: str, text: Sequence[int]) -> bool:
        """Whether a model still has anything to read."""
        return self._must_read(name, text) or self._has_missed(name, text)

    def _need(
        self, name: str, text: Sequence[int], policy: Policy, left_s: float, texts: int
    ) -> Need:
        pace, tokens = self._rounds.model(name).cached.pace, self.missed(name, text)
        return Need(
            cost_s=pace.reading_s(tokens, BETWEEN_S),
            piece_s=pace.piece_s(tokens, BETWEEN_S),
            spent_s=self._spent_s[name],
            pass_s=pace.pass_s,
            plain_s=policy.seconds(PLAIN),
            run_s=(time.perf_counter() - self._begun_s) / texts,
            left_s=left_s / texts,
        )

    def missed(self, name: str, text: Sequence[int]) -> int:
        """How many tokens a model has to read before its next round."""
        end = len(text) - 2
        if name in self._readings:
            return max(end - self._readings[name].at, 0)
        if self._must_read(name, text):
            window = self._window(name)
            start = max(end // window - 1, 0) * window
            return end - start - self._held(name, text[start:end], start)
        return end - self._reached[name].end

    def _held(self, name: str, tokens: Sequence[int], start: int) -> int:
        """How many tokens from `start` on a model need not read; it is looked up once."""
        if (name, start) not in self._holds:
            self._holds[name, start] = self._reader.held(name, tokens)
        return self._holds[name, start]

    def _must_read(self, name: str, text: Sequence[int]) -> bool:
        """Whether it has to read anew: it has read nothing, or its past spans two windows."""
        reach = self._reached.get(name)
        return reach is None or len(text) - 2 - reach.start > 2 * self._window(name)

    def _window(self, name: str) -> int:
        """Tokens that a draft reads back on at least: its context has room for two, and rounds."""
        context = self._rounds.model(name).context
        if context is None:
            return WINDOW
        return min(WINDOW, max((context - ROUNDS * (self._most + 1)) // 2, context // 4, 1))

    def _has_missed(self, name: str, text: Sequence[int]) -> bool:
        """Whether others wrote something since its last round."""
        return self._reached[name].end < len(text) - 2


def _why(need: Need) -> str:
    """Why a model never reads."""
    if need.slowness > 1 and need.pass_s is not None and need.plain_s is not None:
        return (
            f"one pass of it takes {need.pass_s * 1e3:.1f} ms, "
            f"and a token of the target {need.plain_s * 1e3:.1f} ms"
        )
    return "reading the text would cost it more than it can win"
