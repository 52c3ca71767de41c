"""What draft models have read of a lane's texts, and what they read between its rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mlxspec.control.policy import Permit, Plan, Policy, planned
from mlxspec.decode.in_flight import CaughtUp, InFlight
from mlxspec.decode.reader import BETWEEN_S
from mlxspec.decode.slots import Slots
from mlxspec.decode.track import Track
from mlxspec.drafters.proposals import PLAIN, Choice


class CatchingUp:
    """Lets draft models read what they have missed of the texts that they are to draft for.

    `policy` says what pays, and changes with the number of rows. `first_s` is the time of the
    first round, which stands for a plain one until one was timed.

    Args:
        slots: the rows. in_flight: the rounds that are in flight, the oldest first.
        policy: see above. shared: whether it is that of other texts too, which may join later.
    """

    def __init__(
        self, slots: Slots, in_flight: list[InFlight], policy: Policy, *, shared: bool
    ) -> None:
        self.policy = policy
        self._shared = shared
        self.first_s = 0.0
        self._slots = slots
        self._in_flight = in_flight

    def behind(self, plan: Plan, rows: Sequence[Track | None]) -> list[Track]:
        """The texts that a model is to draft for, and of which it has not read all."""
        name = plan.whole.drafter
        both = zip(rows, plan.rows, strict=True)
        wanted = [track for track, one in both if track is not None and one.drafter == name]
        return [track for track in wanted if name and self._is_behind(track, name)]

    def syncs(self, track: Track, name: str) -> bool:
        """Whether the draft model of a round that is dispatched reads a text along with it."""
        return name in track.drafts.read and not self._is_behind(track, name)

    def permit(self, track: Track, name: str) -> Permit:
        """Whether a model that is behind may read on; one that never will is left out."""
        left_s = self._left_s(track)
        permit = track.drafts.permit(name, track.text, self.policy, left_s, self._texts)
        self.forget_if_left_out(name)
        return permit

    def read(self, permits: dict[Track, Permit], name: str) -> CaughtUp:
        """Let a draft model read on, for as long as the other texts may wait."""
        begun_s = time.perf_counter()
        tokens = texts = 0
        for track, permit in permits.items():
            spent_s = time.perf_counter() - begun_s
            if permit is Permit.ALL or (permit is Permit.PIECE and spent_s < BETWEEN_S):
                missed = track.drafts.missed(name, track.text)
                past = self._slots.past(track, name)
                after = track.drafts.caught_up(
                    past, name, track.text, self.policy, self._left_s(track), self._texts
                )
                if after is not None and after is not past:
                    self._slots.put(track, name, after)
                if name in track.drafts.names:
                    tokens += missed - track.drafts.missed(name, track.text)
                    texts += 1
        self.forget_if_left_out(name)
        return CaughtUp(name, tokens, texts, begun_s)

    def took(self, one: InFlight, read_s: float) -> None:
        """Learn what a reading took, from the round behind it, which was read at `read_s`."""
        caught, round_s = one.caught_up, self.policy.seconds(one.plan.whole)
        if caught is not None and caught.texts and one.fair and round_s is not None:
            pace = self._slots.rounds.model(caught.name).cached.pace
            pace.caught_up(caught.tokens, caught.texts, read_s - caught.begun_s - round_s)

    def forget_if_left_out(self, name: str) -> None:
        """Let the policy never choose a drafter again that its text has no more."""
        if not (self._shared or self._is_left(name)):
            self.policy.leave_out(name)

    def ready(self, plan: Plan, rows: Sequence[Track | None]) -> Plan:
        """The plan, in which texts propose nothing whose drafter has not caught up with them.

        The model drafts for none of them where it would for too few.
        """
        name = plan.whole.drafter

        def choice(track: Track | None, one: Choice) -> Choice:
            if one.drafter != name or track is None:
                return one
            has = name in track.drafts.names and not self._is_behind(track, name)
            return one if has else PLAIN

        ready = [choice(track, one) for track, one in zip(rows, plan.rows, strict=True)]
        drafted = sum(one.drafter == name for one in ready)
        moving = sum(track is not None for track in rows)
        if drafted and self.policy.pays(plan.whole, drafted, moving):
            return planned(plan.whole, ready)
        if self._shared or self._is_left(name):
            self.policy.postponed(plan.whole)
        return planned(PLAIN, [PLAIN if one.drafter == name else one for one in ready])

    def _is_behind(self, track: Track, name: str) -> bool:
        latest = next((one for one in reversed(self._in_flight) if track in one.tracks), None)
        before = None
        if latest is not None:
            before = latest.plan.whole.drafter if track in latest.synced else ""
        return track.drafts.is_behind(name, track.text, before)

    def _is_left(self, name: str) -> bool:
        return any(name in track.drafts.names for track in self._slots.tracks if track is not None)

    @property
    def _texts(self) -> int:
        return sum(track is not None for track in self._slots.tracks)

    def _left_s(self, track: Track) -> float:
        """The seconds that the rest of a text would take without a draft."""
        return track.left * (self.policy.seconds(PLAIN) or self.first_s)
