"""Texts that share rounds, side by side, with the host always one round behind the device.

A text has a row of its own. There are a power of two of them, each number a graph of its own, so
that texts may join and leave while the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import reduce
from typing import cast

import mlx.core as mx

from mlxspec.control.policy import Permit, Plan, Policy, limited
from mlxspec.control.stopwatch import Marks, Stopwatch
from mlxspec.decode.ahead import Ahead
from mlxspec.decode.catching_up import CatchingUp
from mlxspec.decode.doing import Doing
from mlxspec.decode.given import given_of
from mlxspec.decode.in_flight import CaughtUp, InFlight
from mlxspec.decode.round import BROKEN, FusedRound
from mlxspec.decode.slots import Slots
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Committed, Track
from mlxspec.device.memory import watched
from mlxspec.drafters.proposals import PLAIN
from mlxspec.errors import BrokenOutput
from mlxspec.metrics import RoundStats
from mlxspec.params import Method
from mlxspec.sampling.logprobs import logprobs_in
from mlxspec.sampling.union import union

PATIENCE = 64  # rounds: other texts may be about to join, and other steps are graphs to trace


class Lane:
    """Decodes the texts that have joined it, one round for all of them at a time.

    Args:
        rounds: the rounds that run; of one row only where they wait for the host.
        policy_of: the policy for a number of rows: chooses the drafter and K of every round.
        ahead: whether a round is dispatched before the one before it is read.
        rounds_for: the rounds for other steps, so that texts may differ in those that they need;
            None where they never do.
        shared: whether the policies are those of other texts too, which may join later.
    """

    def __init__(
        self,
        rounds: FusedRound,
        policy_of: Callable[[int], Policy],
        *,
        ahead: bool = True,
        rounds_for: Callable[[Method], FusedRound] | None = None,
        shared: bool = False,
    ) -> None:
        self._depth = 2 if ahead and not rounds.waits else 1
        self.policy_of = policy_of
        self.policy = policy_of(1)
        self._slots = Slots(rounds)
        self.ahead = Ahead(self._slots)
        self._rounds_for = rounds_for
        self._method = rounds.sampler.method  # the steps that its texts need
        self._spare = 0  # rounds in a row that took more steps than that
        self._count = 1  # of rows, for which the policy decides
        self._in_flight: list[InFlight] = []  # oldest first
        self._chosen: Plan | None = None  # for the next round, where it has to wait
        self._catching_up = CatchingUp(self._slots, self._in_flight, self.policy, shared=shared)
        self._stopwatch = Stopwatch()

    @property
    def rounds(self) -> FusedRound:
        """The rounds that run: their steps are those of all texts, and some that went."""
        return self._slots.rounds

    @property
    def tracks(self) -> list[Track]:
        """The texts that are decoded, by row."""
        return [track for track in self._slots.tracks if track is not None]

    @property
    def rows(self) -> int:
        """The number of rows, B, for which the policy decides."""
        return self._count

    def doing(self) -> Doing:
        """What the texts do at present, and why."""
        return Doing.of(self.policy, texts=len(self.tracks), rows=self.rows)

    @property
    def state(self) -> RoundState:
        """The device's latest state."""
        return self._slots.state

    # --- joining and leaving ------------------------------------------------------------------

    def takes(self, method: Method) -> bool:
        """Whether a text that needs those steps may join."""
        return not self.tracks or union(self._method, method) is not None

    def join(self, track: Track, state: RoundState) -> None:
        """Take in a text that was read, with its state of one row."""
        method = track.request.method
        if self.tracks:
            # What others needed a while ago stays, unless it stands in the way.
            method = union(self.rounds.sampler.method, method) or _united(self._method, method)
        self._use(method)
        self._slots.join(track, state)
        self._changed()

    def keep(self, track: Track) -> None:
        """Let the past of a text outlast it; the text stays."""
        self._slots.keep(track)

    def leave(self, track: Track) -> None:
        """Let a text go; its row is free at once."""
        self._slots.leave(track)
        self._changed()

    def interrupted(self) -> None:
        """Note that something else took time since the last round."""
        self._stopwatch.stop()

    def clear(self) -> list[Track]:
        """Let all texts go, and drop the state; returns them."""
        tracks = self.tracks
        self._slots.clear()
        self._in_flight.clear()
        self._changed()
        return tracks

    def _changed(self) -> None:
        """Note that other texts take part from now on."""
        self._stopwatch.stop()
        self._chosen = None
        if self._slots.count not in (0, self._count):
            self._count = self._slots.count
            self.policy = self._catching_up.policy = self.policy_of(self._count)
        for track in self.tracks:
            track.policy = self.policy
        if self.tracks:
            methods = [track.request.method for track in self.tracks]
            self._method = reduce(_united, methods)
            for name in self.rounds.drafters:
                self._catching_up.forget_if_left_out(name)

    def _shrink(self) -> None:
        """Do with fewer rows, and with fewer steps, once some were not needed for a while."""
        if self._slots.shrink():
            self._changed()
        is_spare = self._method != self.rounds.sampler.method
        self._spare = self._spare + 1 if is_spare else 0
        if self._spare > PATIENCE:
            self._use(self._method)

    def _use(self, method: Method) -> None:
        """Let rounds take these steps from now on."""
        if self._rounds_for is not None and method != self.rounds.sampler.method:
            self._slots.use(self._rounds_for(method))

    # --- a round ------------------------------------------------------------------------------

    def step(self) -> list[tuple[Track, Committed]]:
        """Commit one round: for every text that takes part in it, what it got.

        The next round is dispatched before this one is read.

        Raises:
            OutOfMemory: its arrays do not fit. All that was returned before remains valid, and
                the texts have to be read again.
        """
        with watched("writing text"):
            while len(self._in_flight) < self._depth and self._wants_more() and self._dispatch():
                pass
            if not self._in_flight:
                return []
            one = self._in_flight[0]
            asked_s = time.perf_counter()
            results = cast(list[list[int]], one.result.tolist())
            read_s = time.perf_counter()
        del self._in_flight[0]
        self._catching_up.took(one, read_s)
        took_s = read_s - one.dispatched_s + one.dispatching_s
        self._catching_up.first_s = self._catching_up.first_s or took_s
        committed = [
            (track, self._commit(track, one, row, results[row]))
            for row, track in enumerate(one.tracks)
            if track is not None and track in self._slots.tracks
        ]
        marks = Marks(one.dispatched_s, one.dispatching_s, read_s, read_s - asked_s, one.waited)
        took = self._stopwatch.took(marks, fair=one.fair)
        if took is not None:
            self.policy.took(one.plan.whole, took, waited=one.waited)
        return committed

    def _commit(self, track: Track, one: InFlight, row: int, result: list[int]) -> Committed:
        count = one.plan.whole.draft_tokens
        *tokens, accepted = result[: count + 2]
        if accepted == BROKEN:
            return Committed([], None, track.told(), BrokenOutput(len(track.text)))
        choice, full = one.plan.rows[row], accepted + 1 <= track.left
        stats = RoundStats(choice.draft_tokens, accepted, full, choice.drafter, one.parked)
        logprobs = logprobs_in(result, count, track.request.logprobs)
        committed = track.commit(tokens[: accepted + 1], choice, stats, logprobs)
        if track in one.synced:
            track.drafts.wrote(one.plan.whole.drafter, track.text)
        return committed

    def _wants_more(self) -> bool:
        return any(self._moves(track) for track in self.tracks)

    def _moves(self, track: Track) -> bool:
        """Whether a text takes part in the next round."""
        # Every round in flight brings at least one token.
        return track.left > sum(track in one.tracks for one in self._in_flight)

    def bound(self, track: Track) -> int:
        """The most tokens of a text that every dispatched round together can have kept."""
        return track.reach + sum(
            one.plan.rows[one.tracks.index(track)].draft_tokens + 1
            for one in self._in_flight
            if track in one.tracks
        )

    # --- what the next round does -------------------------------------------------------------

    def _dispatch(self) -> bool:
        """Dispatch the next round; False if what is in flight must be read first."""
        if keeping := [track for track in self.tracks if track.keeps_now()]:
            if self._in_flight:
                return False
            for track in keeping:
                track.close()  # all have read its prompt: keep it now, for its memory
        if self._in_flight and self._chosen is None and self._wants_text():
            return False
        if self._chosen is None:
            self._shrink()
        rows = [one if one is not None and self._moves(one) else None for one in self._slots.tracks]
        plan = self._chosen or self._planned(rows)
        name, caught_up = plan.whole.drafter, None
        if behind := self._catching_up.behind(plan, rows):
            permits = {track: self._catching_up.permit(track, name) for track in behind}
            if any(one in (Permit.ALL, Permit.PIECE) for one in permits.values()):
                if self._in_flight:
                    self._chosen = plan
                    return False
                self._stopwatch.stop()
                caught_up = self._catching_up.read(permits, name)
        self._chosen = None
        ready = self._catching_up.ready(plan, rows) if name in self.rounds.drafters else plan
        self._send(ready, rows, caught_up)
        return True

    def _planned(self, rows: Sequence[Track | None]) -> Plan:
        def may(track: Track | None) -> bool:
            return track is not None and not track.is_first and track.draft_tokens > 0

        if not any(may(track) for track in rows):
            return Plan(PLAIN, (PLAIN,) * len(rows))
        moving = [track for track in rows if track is not None]
        # What the texts offer follows what is known of them.
        offers = [[] if self._in_flight else track.offers(len(rows)) for track in moving]
        length = max(len(track.text) for track in moving)
        if len(rows) == 1:
            choice = self.policy.choose(length, offers[0])
            plan = Plan(choice, (choice,))
        else:
            bound = max(map(self.bound, self.tracks))
            plan = self.policy.plan(length, offers, self.ahead.outlook(bound))
            chosen = iter(plan.rows)
            plan = plan._replace(
                rows=tuple(PLAIN if track is None else next(chosen) for track in rows)
            )
        most = [track.draft_tokens if track is not None and may(track) else 0 for track in rows]
        return limited(plan, most)

    def _wants_text(self) -> bool:
        """Whether the next round is better chosen once the result in flight is known."""
        latest = self._in_flight[-1]
        follows = any(
            one.draft_tokens and one.drafter not in self.rounds.drafters for one in latest.plan.rows
        )
        rows = len(self._slots.tracks)
        return follows or (
            self.policy.listens()
            and self.policy.wants([track.offers(rows) for track in self.tracks])
        )

    # --- dispatching --------------------------------------------------------------------------

    def _send(self, plan: Plan, rows: Sequence[Track | None], caught_up: CaughtUp | None) -> None:
        name, count = plan.whole.drafter, plan.whole.draft_tokens
        bounds = {track: self.bound(track) + count for track in self.tracks}
        length = self._slots.room_for(bounds)
        draft_length = self._slots.draft_room_for(name, bounds)
        given = given_of(plan, rows, drafts=name in self.rounds.drafters)
        shape = self.rounds.shape(count, length, name, draft_length, given, rows=len(rows))
        shape = shape._replace(logprobs=self._slots.top is not None)
        fair = not self.rounds.is_new(shape)
        if not fair:
            # The host builds while the device computes, and may be the slower one.
            self._in_flight[:] = [one._replace(fair=False) for one in self._in_flight]
        moving = [track for track in rows if track is not None]
        synced = tuple(track for track in moving if self._catching_up.syncs(track, name))
        waited = self._depth > 1 and not self._in_flight
        begun_s = time.perf_counter()
        result = self._slots.run(shape, given)
        built_s = time.perf_counter()
        mx.async_eval(result, self.state)
        now_s = time.perf_counter()
        if not fair:
            self.policy.built(built_s - begun_s)
        # First rounds are not the policy's choice.
        chose = count == 0 and not all(track.is_first for track in moving)
        parked = self.policy.parked() if chose else None
        self._in_flight.append(
            InFlight(
                tuple(rows),
                plan,
                synced,
                result,
                fair,
                waited,
                parked,
                now_s,
                now_s - built_s,
                caught_up,
            )
        )
        for track, one in zip(rows, plan.rows, strict=True):
            if track is not None:
                track.chose(one)


def _united(one: Method, other: Method) -> Method:
    """The steps of texts that share rounds."""
    method = union(one, other)
    assert method is not None, "a text joined that the lane does not take"
    return method
