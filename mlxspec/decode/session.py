"""One sequence, decoded round by round, with the host always one round behind the device."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import mlx.core as mx

from mlxspec.control.controller import Controller
from mlxspec.control.stopwatch import Marks, Stopwatch
from mlxspec.decode.drafts import Drafts, Reader
from mlxspec.decode.round import BROKEN, FusedRound, RoundState
from mlxspec.device import lengths
from mlxspec.device.memory import watched
from mlxspec.drafters.proposals import PLAIN, Choice, Offer
from mlxspec.drafters.text_drafters import Proposals, TextDrafters
from mlxspec.errors import BrokenOutput, OutOfMemory
from mlxspec.metrics import Parked, RoundStats
from mlxspec.models.caches.layers import grow

CHEAP = 512  # tokens that a draft reads without asking whether that pays


class InFlight(NamedTuple):
    """A round that was dispatched and not read.

    fair: nothing was built on the way that later rounds need not build.
    dispatched_s, dispatching_s: see `Marks`.
    """

    choice: Choice
    result: mx.array
    fair: bool
    parked: Parked | None
    dispatched_s: float
    dispatching_s: float


class Session:
    """Decodes one sequence.

    The first round proposes nothing: it needs the target alone, and the drafters read the prompt
    while it runs, or after it.

    Args:
        rounds: what runs.
        reader: reads the prompt, and the whole text again after memory ran out.
        prompt: token ids, at least one.
        limit: how many tokens there may ever be, the prompt's included.
        draft_tokens: K, the most that is proposed in a round; 0 decodes plainly.
        chain: proposes from the text. It has seen nothing yet.
        controller: chooses what proposes and how many; None is always the most, from the text
            where that has something to say.
        notes: of what a person should know; the session adds to them.
    """

    def __init__(
        self,
        rounds: FusedRound,
        reader: Reader,
        prompt: Sequence[int],
        *,
        limit: int,
        draft_tokens: int,
        chain: TextDrafters | None = None,
        controller: Controller | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.draft_tokens = draft_tokens
        self.controller = controller
        self.stats: RoundStats | None = None
        self.notes: list[str] = [] if notes is None else notes
        self.text = list(prompt)
        self._chain = chain
        self._chained = 0  # how much of the text the chain has seen
        self._round = rounds
        self._reader = reader
        self._limit = limit
        self._in_flight: list[InFlight] = []  # oldest first
        self._chosen: Choice | None = None  # for the next round, where it has to wait
        self._stopwatch = Stopwatch()
        self._models = Drafts(rounds, reader)
        self._first_s = 0.0  # what the first round took
        self._keeps = reader.keeps  # whether the prompt is to be written to a file yet
        self._state: RoundState
        self._begin()

    @property
    def done(self) -> bool:
        """Whether the limit is reached: `step` would return no token."""
        return len(self.text) >= self._limit

    @property
    def drafted(self) -> Collection[str]:
        """The models that have drafted, by name."""
        return self._models.read

    @property
    def rounds(self) -> FusedRound:
        return self._round

    def ahead(self, rounds: int, draft_tokens: int | None = None) -> tuple[RoundState, int]:
        """The device's latest state with room for so many more rounds, and their length.

        For measurements: what is computed from it leaves the session as it was. Drafts that have
        read the text so far have room for as many. K is the session's own, unless one is given.
        """
        count = self.draft_tokens if draft_tokens is None else draft_tokens
        length = lengths.attended(self._bound() + rounds * (count + 1))
        room = max(lengths.reserved(length), self._state.capacity)
        state = self._round.grown(self._state, room)
        for name, past in state.drafts.items():
            state = state.with_draft(name, past._replace(layers=grow(past.layers, room)))
        return state, length

    def step(self) -> list[int]:
        """Commit one round and return its tokens: 1 … K + 1 of them, or none when done.

        The next round is dispatched before this one is read. Where memory runs out, the text is
        read again and goes on with half as many proposals.

        Raises:
            OutOfMemory: plain decoding does not fit either. BrokenOutput: the target's output is
                no distribution. What was returned before stays as it is in both.
        """
        while True:
            try:
                return self._step()
            except OutOfMemory:
                if self.draft_tokens == 0:
                    raise
            self._shrink()

    def _step(self) -> list[int]:
        with watched("writing text"):
            depth = 1 if self._round.waits else 2
            while len(self._in_flight) < depth and self._wants_more() and self._dispatch():
                pass
            if not self._in_flight:
                return []
            one = self._in_flight[0]
            asked_s = time.perf_counter()
            *tokens, accepted = cast(list[list[int]], one.result.tolist())[0]
            read_s = time.perf_counter()
        if accepted == BROKEN:
            raise BrokenOutput(len(self.text))
        del self._in_flight[0]
        self._first_s = self._first_s or read_s - one.dispatched_s + one.dispatching_s
        committed = tokens[: accepted + 1][: self._limit - len(self.text)]
        self.text += committed
        self.stats = RoundStats(
            one.choice.draft_tokens,
            accepted,
            full=len(committed) == accepted + 1,
            drafter=one.choice.drafter,
            parked=one.parked,
        )
        if one.choice.drafter in self._models.names:
            self._models.wrote(one.choice.drafter, self.text)
        marks = Marks(one.dispatched_s, one.dispatching_s, read_s, read_s - asked_s)
        took = self._stopwatch.took(marks, fair=one.fair)
        if self.controller is not None:
            self.controller.kept(one.choice, accepted)
            if took is not None:
                self.controller.took(one.choice, took)
        self._tell_chain()
        return committed

    def close(self) -> None:
        """Keep of the prompt what was read, where it is to be kept and is not yet."""
        if self._keeps:
            self._keeps = False
            self._reader.keep()

    def _shrink(self) -> None:
        """Begin again from what is committed, proposing half as much."""
        self.draft_tokens //= 2
        how = f"{self.draft_tokens} draft tokens" if self.draft_tokens else "no draft"
        self.notes.append(f"memory ran out: going on with {how}")
        del self._state
        self._in_flight.clear()
        self._chosen = None
        self._begin()

    def _begin(self) -> None:
        self._state = self._reader.state(self.text)
        self._models.forget()
        self._stopwatch.stop()
        self._is_first = True

    def _bound(self) -> int:
        """How many tokens are committed at most once every dispatched round is."""
        return len(self.text) + sum(one.choice.draft_tokens + 1 for one in self._in_flight)

    def _wants_more(self) -> bool:
        # Every round in flight brings at least one token.
        return len(self.text) + len(self._in_flight) < self._limit

    def _choice(self) -> Choice:
        if self.draft_tokens == 0 or self._is_first:
            return PLAIN
        offers = list(self._offered())
        if self.controller is not None:
            choice = self.controller.choose(len(self.text), offers)
        elif (offer := self._first(offers)) is not None:
            choice = Choice(offer.drafter, offer.tokens, offer.grade)
        else:
            choice = next((Choice(name, self.draft_tokens) for name in self._drafting), PLAIN)
        return replace(choice, draft_tokens=min(choice.draft_tokens, self.draft_tokens))

    def _offered(self) -> Proposals:
        """What the chain proposes after the text as it is known."""
        # Reading a prompt takes a while, and the first round need not wait for that.
        if self._chain is None or self._chained == 0:
            return {}
        return self._chain.proposals(self.draft_tokens)

    def _wants_text(self) -> bool:
        """Whether the next round is better chosen when what is in flight is known."""
        latest = self._in_flight[-1].choice
        if latest.draft_tokens and latest.drafter not in self._drafting:
            return True  # a text that is followed is likely to be followed on
        offers = list(self._offered())
        if self.controller is not None:
            return self.controller.wants(offers)
        return self._first(offers) is not None

    def _first(self, offers: list[Offer]) -> Offer | None:
        """The offer that is taken with a fixed K: a doubtful one only where nothing else drafts."""
        return next((one for one in offers if one.grade or not self._drafting), None)

    def _dispatch(self) -> bool:
        """Dispatch the next round; False if what is in flight must be read first."""
        if self._keeps and not self._is_first:
            if self._in_flight:
                return False
            self._keep()
        if self._in_flight and self._chosen is None and self._wants_text():
            return False
        choice = self._chosen or self._choice()
        if choice.drafter in self._models.names and self._is_behind(choice.drafter):
            if self._in_flight:
                self._chosen = choice
                return False
            choice = choice if self._catch_up(choice.drafter) else PLAIN
        self._chosen = None
        self._send(choice)
        self._is_first = False
        if self._chain is not None:
            self._chain.watch(choice)
            if self._chained == 0:
                self._tell_chain()
        return True

    def _keep(self) -> None:
        """Let every draft read the prompt, and keep it: the first token is out by now."""
        for name in list(self._models.names) if self.draft_tokens else ():
            if self._is_behind(name):
                self._catch_up(name)
        self.close()

    def _send(self, choice: Choice) -> None:
        count, given = choice.draft_tokens, self._given(choice)
        bound = self._bound() + count
        length = draft_length = lengths.attended(bound)
        if length > self._state.capacity:
            self._state = self._round.grown(self._state, lengths.reserved(length))
        if choice.drafter in self._models.names:
            self._state, draft_length = self._models.with_room(self._state, choice.drafter, bound)
        shape = self._round.shape(
            count, length, choice.drafter, draft_length, given=given is not None
        )
        fair = not self._round.is_new(shape)
        if not fair:
            # The host builds while the device computes, and may be the slower one.
            self._in_flight = [one._replace(fair=False) for one in self._in_flight]
        self._state, result = self._round.run(self._state, shape, given)
        built_s = time.perf_counter()
        mx.async_eval(result, self._state)
        now_s = time.perf_counter()
        parked = self._parked() if count == 0 else None
        self._in_flight.append(InFlight(choice, result, fair, parked, now_s, now_s - built_s))

    def _parked(self) -> Parked | None:
        """Why a controller let a round propose nothing; the first round is not its choice."""
        return None if self.controller is None or self._is_first else self.controller.parked()

    def _given(self, choice: Choice) -> mx.array | None:
        """The tokens that are proposed from the text, int32 [1, K]."""
        for offer, tokens in self._offered().items():
            if offer.drafter == choice.drafter:
                return mx.array([tokens[: choice.draft_tokens]], mx.int32)
        return None

    def _tell_chain(self) -> None:
        """Let the chain read what is new, and count what it would have been good for."""
        if self._chain is None:
            return
        decided = self._chain.extend(self.text[self._chained :])
        self._chained = len(self.text)
        if self.controller is not None:
            for choice, accepted in decided:
                self.controller.kept(choice, accepted)

    @property
    def _drafting(self) -> Collection[str]:
        """What may draft in a round's graph, draft models and heads."""
        return [*self._models.names, *self._state.heads]

    def _is_behind(self, name: str) -> bool:
        """Whether a draft model has not read all that it has to before its next round."""
        if self._models.must_read(name, self.text):
            return True
        if self._in_flight:
            return self._in_flight[-1].choice.drafter != name
        return self._models.has_missed(name, self.text)

    def _catch_up(self, name: str) -> bool:
        """Let a draft model read what it has missed; False where it is left out instead."""
        self._stopwatch.stop()
        if not (name in self._models.read or self._is_worth_reading(name)):
            self._leave_out(name, "reading the prompt would cost it more than it can win")
            return False
        try:
            self._state = self._models.caught_up(self._state, name, self.text)
        except OutOfMemory:
            self._leave_out(name, "memory does not hold its cache")
            return False
        return True

    def _is_worth_reading(self, name: str) -> bool:
        """Whether a draft may win more in what is left to write than reading the text costs it."""
        if self.controller is None or len(self.text) <= CHEAP:
            return True
        won = (self._limit - len(self.text)) * self._first_s * self.controller.promise(name)
        return won > self._reader.draft_seconds(name)

    def _leave_out(self, name: str, why: str) -> None:
        self._models.leave_out(name)
        self.notes.append(f"going on without the draft {name}: {why}")
        if self.controller is not None:
            self.controller.leave_out(name)
