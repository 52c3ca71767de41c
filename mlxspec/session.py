"""One sequence, decoded round by round, with the host always one round behind the device."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import mlx.core as mx

from mlxspec.caches.layers import capacity_of, grow
from mlxspec.chain import Chain, Proposals
from mlxspec.control import PLAIN, Choice, Controller
from mlxspec.drafters import Past
from mlxspec.errors import BrokenOutput, OutOfMemory
from mlxspec.memory import watched
from mlxspec.metrics import Parked, RoundStats
from mlxspec.round import BROKEN, Round, RoundState
from mlxspec.stopwatch import Marks, Stopwatch

# Tokens that a draft reads back on when it reads anew, at least; and it reads anew once it has read
# twice as many, so that neither a round nor a long prompt costs it more than that.
WINDOW = 4096
CHEAP = 512  # tokens that a draft reads without asking whether that pays


class Reader(Protocol):
    """Reads a text anew. See `opening.Opening`."""

    def state(self, tokens: Sequence[int]) -> RoundState: ...

    def draft(self, name: str, tokens: Sequence[int], start: int) -> Past: ...

    def draft_seconds(self, name: str) -> float: ...

    @property
    def keeps(self) -> bool: ...

    def keep(self) -> None: ...


def attended(length: int) -> int:
    """Entries to attend over for `length` that are needed.

    A new number is a new graph to trace, for every K in use, and a larger one is work on entries
    that nobody sees: so it grows by an eighth, in multiples of 128.
    """
    if length <= 64:
        return 64
    step = max(128, length // 8 // 128 * 128)
    return -(-length // step) * step


def reserved(length: int) -> int:
    """Entries to store for `length` that are needed: by a quarter, in multiples of 256."""
    step = max(256, length // 4 // 256 * 256)
    return -(-length // step) * step


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


@dataclass
class _Reach:
    """Which stretch of the text a draft model has read, as positions."""

    start: int
    end: int


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
        rounds: Round,
        reader: Reader,
        prompt: Sequence[int],
        *,
        limit: int,
        draft_tokens: int,
        chain: Chain | None = None,
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
        self._left_out: set[str] = set()  # models that are not to be asked
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
        return self._reached.keys()

    @property
    def rounds(self) -> Round:
        return self._round

    def ahead(self, rounds: int) -> tuple[RoundState, int]:
        """The device's latest state with room for so many more rounds, and their length.

        For measurements: what is computed from it leaves the session as it was. Drafts that have
        read the text so far have room for as many.
        """
        length = attended(self._bound() + rounds * (self.draft_tokens + 1))
        room = max(reserved(length), self._state.capacity)
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
        if one.choice.drafter in self._reached:
            self._reached[one.choice.drafter].end = len(self.text) - 2
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
        self._reached: dict[str, _Reach] = {}  # by the names of models that have read
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
        elif offers:
            choice = Choice(offers[0].drafter, offers[0].tokens, offers[0].grade)
        else:
            choice = next((Choice(name, self.draft_tokens) for name in self._models), PLAIN)
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
        if latest.draft_tokens and latest.drafter not in self._models:
            return True  # a text that is followed is likely to be followed on
        offers = list(self._offered())
        return self.controller.wants(offers) if self.controller is not None else bool(offers)

    def _dispatch(self) -> bool:
        """Dispatch the next round; False if what is in flight must be read first."""
        if self._keeps and not self._is_first:
            if self._in_flight:
                return False
            self._keep()
        if self._in_flight and self._chosen is None and self._wants_text():
            return False
        choice = self._chosen or self._choice()
        if choice.drafter in self._models and self._is_behind(choice.drafter):
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
        for name in self._models if self.draft_tokens else ():
            if self._is_behind(name):
                self._catch_up(name)
        self.close()

    def _send(self, choice: Choice) -> None:
        count, given = choice.draft_tokens, self._given(choice)
        length = attended(self._bound() + count)
        if length > self._state.capacity:
            self._state = self._round.grown(self._state, reserved(length))
        draft_length = self._draft_length(choice)
        shape = self._round.shape(
            count, length, choice.drafter, draft_length, given=given is not None
        )
        fair = not self._round.is_new(shape)
        if not fair:
            # The host builds while the device computes, and may be the slower one.
            self._in_flight = [one._replace(fair=False) for one in self._in_flight]
        self._state, result = self._round(
            self._state,
            draft_tokens=count,
            length=length,
            drafter=choice.drafter,
            draft_length=draft_length,
            given=given,
        )
        built_s = time.perf_counter()
        mx.async_eval(result, self._state)
        now_s = time.perf_counter()
        chosen = self.controller is not None and not self._is_first
        parked = self.controller.parked() if self.controller and chosen and not count else None
        self._in_flight.append(InFlight(choice, result, fair, parked, now_s, now_s - built_s))

    def _draft_length(self, choice: Choice) -> int:
        """How far the caches of a choice's model are attended, which it is given room for."""
        name = choice.drafter
        if name not in self._reached:
            return 0
        length = attended(self._bound() + choice.draft_tokens - self._reached[name].start)
        past = self._state.drafts[name]
        if length > capacity_of(past.layers):
            grown = past._replace(layers=grow(past.layers, reserved(length)))
            self._state = self._state.with_draft(name, grown)
        return length

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
    def _models(self) -> Collection[str]:
        """What may draft in a round's graph, draft models and heads."""
        drafting = [name for name in self._round.drafters if name not in self._left_out]
        return [*drafting, *self._state.heads]

    def _is_behind(self, name: str) -> bool:
        """Whether a draft model has not read all that it has to before its next round."""
        if name in self._state.heads:
            return False  # every round tells a head of what it wrote
        reach, end = self._reached.get(name), len(self.text) - 2
        if reach is None or end - reach.start > 2 * WINDOW:
            return True
        if self._in_flight:
            return self._in_flight[-1].choice.drafter != name
        return reach.end < end

    def _catch_up(self, name: str) -> bool:
        """Let a draft model read what it has missed; False where it is left out instead."""
        end = len(self.text) - 2
        reach = self._reached.get(name)
        self._stopwatch.stop()
        if reach is None and not self._is_worth_reading(name):
            self._leave_out(name, "reading the prompt would cost it more than it can win")
            return False
        if reach is None or end - reach.start > 2 * WINDOW:
            # At whole windows, so that a text that grew a little is read from the same place.
            start = max(end // WINDOW - 1, 0) * WINDOW
            try:
                past = self._reader.draft(name, self.text, start)
            except OutOfMemory:
                self._leave_out(name, "memory does not hold its cache")
                return False
            self._reached[name] = _Reach(start, end)
        else:
            past = self._read_on(name, reach)
            reach.end = end
        self._state = self._state.with_draft(name, past)
        return True

    def _is_worth_reading(self, name: str) -> bool:
        """Whether a draft may win more in what is left to write than reading the text costs it."""
        if self.controller is None or len(self.text) <= CHEAP:
            return True
        won = (self._limit - len(self.text)) * self._first_s * self.controller.promise(name)
        return won > self._reader.draft_seconds(name)

    def _leave_out(self, name: str, why: str) -> None:
        self._left_out.add(name)
        self.notes.append(f"going on without the draft {name}: {why}")
        if self.controller is not None:
            self.controller.leave_out(name)

    def _read_on(self, name: str, reach: _Reach) -> Past:
        past, missed = self._state.drafts[name], self.text[reach.end : -2]
        length = attended(reach.end - reach.start + len(missed))
        if length > capacity_of(past.layers):
            past = past._replace(layers=grow(past.layers, reserved(length)))
        return self._round.drafters[name].read(past, missed, reach.end - reach.start, length)
