"""One sequence, decoded round by round, with the host always one round behind the device."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import mlx.core as mx

from mlxspec.control.policy import FixedPolicy, Policy
from mlxspec.control.stopwatch import Marks, Stopwatch
from mlxspec.decode.drafts import Drafts
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import Request
from mlxspec.decode.round import BROKEN, FusedRound
from mlxspec.decode.state import NOTHING, Given, RoundState
from mlxspec.device import lengths
from mlxspec.device.memory import watched
from mlxspec.drafters.proposals import PLAIN, Choice, TextDrafter
from mlxspec.drafters.text_drafters import Proposals, TextDrafters
from mlxspec.errors import BrokenOutput, OutOfMemory
from mlxspec.metrics import Parked, PrefillProgress, RoundStats
from mlxspec.models.prefill import finished


class InFlight(NamedTuple):
    """A round that was dispatched and not read yet.

    fair: whether its time includes no building that later rounds do not need.
    dispatched_s, dispatching_s: see `Marks`.
    """

    choice: Choice
    result: mx.array
    fair: bool
    parked: Parked | None
    dispatched_s: float
    dispatching_s: float


@dataclass(frozen=True)
class Committed:
    """One round's part of the text.

    tokens: 1 … K + 1 of them, or none once the limit is reached; `stats` is then None.
    notes: lines for people about anything else that happened.
    """

    tokens: list[int]
    stats: RoundStats | None
    notes: tuple[str, ...] = ()


class Session:
    """Decodes one sequence.

    The first round proposes nothing: it needs the target alone, and the drafters read the prompt
    while it runs, or after it.

    Args:
        rounds: the rounds that run.
        reader: reads the prompt, and the whole text again after memory ran out.
        request: the prompt, its limit, and the largest K.
        policy: chooses the drafter and K of every round; None is the request's K in every round.
        texts: text drafters, which have read nothing yet.
        notes: lines for the user from before the first round.
    """

    def __init__(
        self,
        rounds: FusedRound,
        reader: Reader,
        request: Request,
        *,
        policy: Policy | None = None,
        texts: Sequence[TextDrafter] = (),
        notes: list[str] | None = None,
    ) -> None:
        self.rounds = rounds
        self.request = request
        self.policy = policy or FixedPolicy(rounds.drafters, request.draft_tokens)
        self.draft_tokens = request.draft_tokens
        self.text = list(request.tokens)
        self._notes: list[str] = [] if notes is None else notes
        self._texts = TextDrafters(texts, rounds.sampler.vocabulary, self._notes.append)
        self._told = 0  # how many tokens the text drafters have read
        self._reader = reader
        self._in_flight: list[InFlight] = []  # oldest first
        self._chosen: Choice | None = None  # for the next round, where it has to wait
        self._stopwatch = Stopwatch()
        self._drafts = Drafts(
            rounds,
            reader,
            self.policy,
            prompt=len(request.tokens),
            most=request.draft_tokens,
            tell=self._notes.append,
        )
        self._first_s = 0.0  # the time of the first round
        self._keeps = reader.keeps  # whether the prompt is still to be written to a file
        self._is_first = True
        self._is_read = False
        self._state: RoundState

    @property
    def done(self) -> bool:
        """Whether the limit is reached: `step` would commit no token."""
        return len(self.text) >= self.request.limit

    @property
    def drafted(self) -> list[str]:
        """The models that have drafted, by name."""
        return self._drafts.read

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that came from a file."""
        return self._reader.cached_tokens

    def ahead(self, rounds: int, draft_tokens: int | None = None) -> tuple[RoundState, int]:
        """The device's latest state with room for `rounds` more rounds, and their length.

        For measurements: what is computed from it leaves the session as it was. Drafts that have
        read the text so far have room for as many. K is the session's own, unless one is given.
        """
        count = self.draft_tokens if draft_tokens is None else draft_tokens
        length = lengths.attended(self._bound() + rounds * (count + 1))
        room = max(lengths.reserved(length), self._state.capacity)
        state = self.rounds.grown(self._state, room)
        for name in self._drafts.read:
            state = state.with_draft(
                name, self.rounds.drafters[name].grown(state.drafts[name], room)
            )
        return state, length

    def read(self) -> Generator[PrefillProgress, None, None]:
        """Let the target read the prompt, chunk by chunk. `step` does so where nobody has."""
        if self._is_read:
            return
        self._state = yield from self._reader.state(self.text)
        self._is_read = self._is_first = True
        self._drafts.forget()
        self._stopwatch.stop()
        for name in list(self._drafts.names):
            if name not in self._drafts.models and name not in self._state.drafts:
                self._drafts.leave_out(name, "a prompt of one token gives it no features")

    def step(self) -> Committed:
        """Commit one round.

        The next round is dispatched before this one is read. Where memory runs out, the text is
        read again and goes on with half as many proposals.

        Raises:
            OutOfMemory: plain decoding does not fit either. BrokenOutput: the target's output is
                no distribution. In both cases all that was returned before remains valid.
        """
        while True:
            finished(self.read())
            try:
                tokens, stats = self._step()
                break
            except OutOfMemory:
                if self.draft_tokens == 0:
                    raise
            self._shrink()
        notes = tuple(self._notes)
        self._notes.clear()
        return Committed(tokens, stats, notes)

    def close(self) -> None:
        """Write what was read of the prompt to its file, unless that is done or not wanted."""
        if self._keeps and self._is_read:
            self._keeps = False
            self._reader.keep()

    def _step(self) -> tuple[list[int], RoundStats | None]:
        with watched("writing text"):
            depth = 1 if self.rounds.waits else 2
            while len(self._in_flight) < depth and self._wants_more() and self._dispatch():
                pass
            if not self._in_flight:
                return [], None
            one = self._in_flight[0]
            asked_s = time.perf_counter()
            *tokens, accepted = cast(list[list[int]], one.result.tolist())[0]
            read_s = time.perf_counter()
        if accepted == BROKEN:
            raise BrokenOutput(len(self.text))
        del self._in_flight[0]
        self._first_s = self._first_s or read_s - one.dispatched_s + one.dispatching_s
        committed = tokens[: accepted + 1][: self.request.limit - len(self.text)]
        self.text += committed
        self._drafts.wrote(one.choice.drafter, self.text)
        self._report(
            one, accepted, Marks(one.dispatched_s, one.dispatching_s, read_s, read_s - asked_s)
        )
        self._tell_texts()
        full = len(committed) == accepted + 1
        count, drafter = one.choice.draft_tokens, one.choice.drafter
        return committed, RoundStats(count, accepted, full, drafter, one.parked)

    def _report(self, one: InFlight, accepted: int, marks: Marks) -> None:
        """Tell the policy how many proposals a round kept, and its time where that is known."""
        self.policy.kept(one.choice, accepted)
        took = self._stopwatch.took(marks, fair=one.fair)
        if took is not None:
            self.policy.took(one.choice, took)

    def _shrink(self) -> None:
        """Begin again from the committed text, with half as many proposals."""
        self.draft_tokens //= 2
        how = f"{self.draft_tokens} draft tokens" if self.draft_tokens else "no draft"
        self._notes.append(f"memory ran out: going on with {how}")
        del self._state
        self._in_flight.clear()
        self._chosen = None
        self._is_read = False

    def _bound(self) -> int:
        """The most tokens that the text can have once every dispatched round is committed."""
        return len(self.text) + sum(one.choice.draft_tokens + 1 for one in self._in_flight)

    def _wants_more(self) -> bool:
        # Every round in flight brings at least one token.
        return len(self.text) + len(self._in_flight) < self.request.limit

    # --- what the next round does -----------------------------------------------------------

    def _choice(self) -> Choice:
        if self.draft_tokens == 0 or self._is_first:
            return PLAIN
        choice = self.policy.choose(len(self.text), list(self._offered()))
        return replace(choice, draft_tokens=min(choice.draft_tokens, self.draft_tokens))

    def _offered(self) -> Proposals:
        """The proposals of the text drafters after the text that is known."""
        # Reading a prompt takes a while, and the first round need not wait for that.
        if self._told == 0 or self.draft_tokens == 0:
            return {}
        return self._texts.proposals(self.draft_tokens)

    def _wants_text(self) -> bool:
        """Whether the next round is better chosen once the result in flight is known."""
        latest = self._in_flight[-1].choice
        if latest.draft_tokens and latest.drafter not in self._drafts.names:
            return True  # the next round is likely to follow the text too
        return self.policy.wants(list(self._offered()))

    def _given(self, choice: Choice) -> Given:
        """The tokens that are proposed from the text, int32 [1, K]."""
        for offer, tokens in self._offered().items():
            if offer.drafter == choice.drafter:
                return Given(mx.array([tokens[: choice.draft_tokens]], mx.int32))
        return NOTHING

    def _tell_texts(self) -> None:
        """Let the text drafters read the new tokens, and count those they would have kept."""
        if not self.request.draft_tokens:
            return
        decided = self._texts.extend(self.text[self._told :])
        self._told = len(self.text)
        for choice, accepted in decided:
            self.policy.kept(choice, accepted)

    # --- dispatching ------------------------------------------------------------------------

    def _dispatch(self) -> bool:
        """Dispatch the next round; False if what is in flight must be read first."""
        if self._keeps and not self._is_first and not (self.draft_tokens and self._drafts.unread):
            if self._in_flight:
                return False
            self.close()  # all have read the prompt: keep it now, for its memory
        if self._in_flight and self._chosen is None and self._wants_text():
            return False
        choice = self._chosen or self._choice()
        if self._is_behind(choice.drafter):
            if self._drafts.may_read(choice.drafter, self.text, self._left_s()):
                if self._in_flight:
                    self._chosen = choice
                    return False
                self._catch_up(choice.drafter)
            choice = self._ready(choice)
        self._chosen = None
        self._send(choice)
        self._is_first = False
        self._texts.watch(choice)
        if self._told == 0:
            self._tell_texts()
        return True

    def _send(self, choice: Choice) -> None:
        count, given = choice.draft_tokens, self._given(choice)
        bound = self._bound() + count
        length = lengths.attended(bound)
        if length > self._state.capacity:
            self._state = self.rounds.grown(self._state, lengths.reserved(length))
        self._state, draft_length = self._drafts.with_room(self._state, choice.drafter, bound)
        shape = self.rounds.shape(count, length, choice.drafter, draft_length, given)
        fair = not self.rounds.is_new(shape)
        if not fair:
            # The host builds while the device computes, and may be the slower one.
            self._in_flight = [one._replace(fair=False) for one in self._in_flight]
        self._state, result = self.rounds.run(self._state, shape, given)
        built_s = time.perf_counter()
        mx.async_eval(result, self._state)
        now_s = time.perf_counter()
        # The first round is not the policy's choice.
        parked = self.policy.parked() if count == 0 and not self._is_first else None
        self._in_flight.append(InFlight(choice, result, fair, parked, now_s, now_s - built_s))

    # --- what draft models read -------------------------------------------------------------

    def _is_behind(self, name: str) -> bool:
        before = self._in_flight[-1].choice.drafter if self._in_flight else None
        return self._drafts.is_behind(name, self.text, before)

    def _catch_up(self, name: str) -> None:
        """Let a draft model read on."""
        self._stopwatch.stop()
        self._state = self._drafts.caught_up(self._state, name, self.text, self._left_s())

    def _ready(self, choice: Choice) -> Choice:
        """The choice, or a plain round where its drafter has not caught up."""
        if choice.drafter in self._drafts.names:
            if not self._is_behind(choice.drafter):
                return choice
            self.policy.postponed(choice)
        return PLAIN

    def _left_s(self) -> float:
        """The seconds that the rest of the text would take without a draft."""
        plain_s = self.policy.seconds(PLAIN) or self._first_s
        return (self.request.limit - len(self.text)) * plain_s
