"""The choice of the next round's drafter and K, by expected tokens per second.

The controller expects N(K) tokens of a round that costs C(K) (`estimates`) and picks the best
N(K)/C(K). Plain decoding, K = 0, always competes; where it wins, speculation is *parked*. A choice
that is not in use is tried again from time to time, at intervals that double and that keep its
expected loss within a budget; a longer round is tried as soon as its cost, extrapolated from
shorter ones, promises a gain. Proposals from the text cost no drafting, and the tokens that they
would bring are counted whether they are used or not. They are taken in the rounds where they are
offered and expected to be better than the choice that the controller has settled on.

Plain Python without a clock or random numbers: the same reports give the same choices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp

from mlxspec.control.estimates import TEXT, AcceptanceEstimate, Costs, Knowledge
from mlxspec.control.offers import TextOffers
from mlxspec.control.policy import ENDLESS, Need, Outlook, Permit, Plan
from mlxspec.drafters.proposals import PLAIN, Choice, Offer
from mlxspec.parked import Parked

# Rounds of a trial, and plain rounds before the first trial, to know their cost.
TRIAL_ROUNDS, OPENING = 2, 3
# Rounds between trials of one drafter: at first, and at most; so few because texts change.
FIRST_RETRY, LAST_RETRY = 16, 96
# The share of the time that trials of one drafter may lose.
BUDGET = 0.005
# In a trial, a drafter's earlier rounds count for this many at most.
RETRY_WEIGHT = 3.0
# Another choice must be better by this factor, or rounds would flap between equals.
HYSTERESIS, PARKING_HYSTERESIS = 1.03, 1.01
# A drafter that was in use for this many rounds is retried soon.
PROVEN = 32
# Rounds between trials of one proposal more or less, at first; and how many standard deviations
# below its estimate a cost may well lie.
FIRST_NEIGHBOUR, OPTIMISM = 24, 1.5
# The share of the time without a model that it is assumed to save before it is tried.
PROMISE = 0.33
# The share of the time that a draft may read for before it was seen to pay, and the seconds that a
# text is expected to go on for at least.
READING_SHARE, GRACE_S = 0.05, 1.0


@dataclass
class Rest:
    """When something was last left or tried, and for how many rounds it rests from then on."""

    since: int
    distance: int = FIRST_RETRY

    def tried(self, now: int) -> None:
        self.since, self.distance = now, min(2 * self.distance, LAST_RETRY)


class Controller:
    """Picks the drafter and K of every round.

    Args:
        most: the models that draft, each with its largest K.
        known: knowledge of drafters from earlier runs.
        at_once: those of the models of which one pass drafts all tokens, whatever K is.

    Text drafters need not be named: they make offers round by round.
    """

    def __init__(
        self,
        most: Mapping[str, int],
        known: Mapping[str, Knowledge] | None = None,
        at_once: Collection[str] = (),
    ) -> None:
        known = {name: one for name, one in (known or {}).items() if name in (*most, TEXT)}
        self._most = dict(most)
        self._at_once = at_once
        self._costs = Costs(known, at_once=at_once)
        self._acceptance = {
            name: AcceptanceEstimate(count, known[name].acceptance if name in known else ())
            for name, count in most.items()
        }
        self._texts = TextOffers()
        self._round = 0
        self._followed = 0  # rounds in a row that followed the text
        self._current = PLAIN
        self._entered = 0  # the round in which the current drafter came into use
        self._trial, self._left = PLAIN, 0
        self._undo: Rest | None = None  # the rest of the drafter on trial, before it was
        self._neighbours = Rest(0, FIRST_NEIGHBOUR)
        first_trial = (0 if not self._costs.unknown else OPENING) - FIRST_RETRY
        self._rests = {"": Rest(0)} | {
            name: Rest(0 if one.tried else first_trial) for name, one in self._acceptance.items()
        }
        self._rank()

    def choose(self, length: int, offers: Sequence[Offer] = ()) -> Choice:
        """The next round of a text of `length` tokens, given what text drafters offer."""
        self._costs.enter(length)
        taken = self._taken(offers)
        # Costs are known only relative to other rounds, so those must come up now and then.
        self._followed = self._followed + 1 if taken else 0
        choice = taken or self._next_trial() or self._settled()
        self._round += 1
        return choice

    def plan(
        self, length: int, offers: Sequence[Sequence[Offer]], outlook: Outlook = ENDLESS
    ) -> Plan:
        """The next round of one text; see `BatchController` for several."""
        (of_row,) = offers
        choice = self.choose(length, of_row)
        return Plan(choice, (choice,))

    def listens(self) -> bool:
        """True: the offers of one text take little time."""
        return True

    def wants(self, offers: Sequence[Sequence[Offer]]) -> bool:
        """Whether the next round would be one of these offers."""
        return any(self._taken(of_row) is not None for of_row in offers)

    def kept(self, choice: Choice, accepted: int) -> None:
        """Record that a round kept `accepted` proposals, or would have kept those from the text."""
        if choice.drafter in self._most:
            self._acceptance[choice.drafter].add(choice.draft_tokens, accepted)
            self._rank()
        elif choice.drafter:
            self._texts.add(choice, accepted)

    def took(self, choice: Choice, seconds: float, *, waited: bool = False) -> None:
        """Record that a round took `seconds`, more than 0."""
        self._costs.add(self._payer(choice), choice.draft_tokens, seconds)
        self._rank()

    def built(self, seconds: float) -> None:
        """Nothing is learned: a text alone has few shapes of rounds."""

    @property
    def current(self) -> Choice:
        """The choice of all rounds but trials and those that follow the text."""
        return self._current

    def seconds(self, choice: Choice) -> float | None:
        """The time of such a round at the present pace; None before any was timed."""
        plain_s = self._costs.plain_s
        if plain_s is None:
            return None
        return plain_s * self._costs.curve(self._payer(choice), choice.draft_tokens)[-1]

    def permit(self, name: str, need: Need) -> Permit:
        """Whether a draft may read what it needs to.

        A draft that was seen to pay reads whatever it can earn back. Any other one may lose a
        small share of the time: of what has passed, and of as much again, which the text is
        likely to go on for.
        """
        tried = self._acceptance[name].tried
        promise = self._promise(name)
        if not tried:
            promise = min(promise, 1 - need.slowness)
        cost_s = need.cost_s or 0.0
        earns = cost_s < need.left_s * promise
        if need.is_hopeless or not (earns or tried):
            return Permit.NEVER
        if tried and earns:
            return Permit.PIECE
        likely_s = need.run_s + min(need.left_s, max(need.run_s, GRACE_S))
        loss_s = need.spent_s + (need.piece_s if earns else cost_s)
        return Permit.PIECE if loss_s <= READING_SHARE * likely_s else Permit.LATER

    def pays(self, choice: Choice, drafted: int, texts: int) -> bool:
        """True: a text alone is drafted for or not."""
        return True

    def postponed(self, choice: Choice) -> None:
        """Take back a choice whose drafter was not ready: the round proposed nothing."""
        if choice == self._trial and self._undo is not None:
            self._left = 0
            self._rests[choice.drafter] = self._undo

    def leave_out(self, name: str) -> None:
        """Never choose a model again."""
        for about in (self._most, self._acceptance, self._rests, self._rates):
            about.pop(name, None)
        if name in (self._current.drafter, self._trial.drafter):
            self._current, self._trial, self._left = PLAIN, PLAIN, 0

    def parked(self) -> Parked | None:
        """Why nothing is proposed, and when a drafter is tried again; None while one proposes."""
        tried = [name for name, one in self._acceptance.items() if one.tried]
        if self._current != PLAIN or self._left or not tried:
            return None
        loss = 1 - max(self._rate(self._best(name)) for name in tried)
        retry = min(self._next_retry(name) for name in tried)
        return Parked(max(loss, 0.0), max(retry - self._round, 0))

    def knowledge(self) -> dict[str, Knowledge]:
        """The knowledge of the drafters that were tried, for the next run."""
        plain_s = self._costs.plain_s
        if plain_s is None:
            return {}
        rates = {name: one.measured() for name, one in self._acceptance.items() if one.tried}
        # Acceptance of proposals from the text depends on the text alone.
        rates |= {TEXT: []} if self._costs.measured(TEXT) else {}
        return {
            name: Knowledge(self._measured_costs(name, plain_s), tuple(accepted))
            for name, accepted in rates.items()
        }

    def _measured_costs(self, name: str, plain_s: float) -> tuple[float | None, ...]:
        """Seconds of rounds with 0, 1, 2, … proposals; None where none was timed."""
        curve = self._costs.curve(name, self._costs.measured(name))
        return tuple(
            plain_s * cost if k == 0 or self._costs.knows(name, k) else None
            for k, cost in enumerate(curve)
        )

    def _promise(self, name: str) -> float:
        """The share of the time without a model that it is expected to save."""
        if not self._acceptance[name].tried:
            return PROMISE
        return max(1 - 1 / self._rate(self._best(name)), 0.0)

    # --- what is expected -----------------------------------------------------------------

    def _rank(self) -> None:
        """Compute N(K)/C(K) of every drafter, in tokens per plain round, for all K to be tried."""
        self._curves: dict[str, list[float]] = {}
        self._rates: dict[str, list[float]] = {}
        for name, most in self._most.items():
            # What is drafted at once is the same for two more tokens, and so is most of the cost.
            further = 2 if name in self._at_once else 1
            reach = min(most, self._costs.measured(name) + further)
            curve = self._curves[name] = self._costs.curve(name, reach)
            tokens = self._acceptance[name].tokens()[: reach + 1]
            self._rates[name] = [n / c for n, c in zip(tokens, curve, strict=True)]
        self._texts.rank(self._costs)

    def _payer(self, choice: Choice) -> str:
        """The name under which the costs of such rounds are kept."""
        return choice.drafter if choice.drafter in self._most or not choice.drafter else TEXT

    def _rate(self, choice: Choice) -> float:
        return self._rates[choice.drafter][choice.draft_tokens] if choice.draft_tokens else 1.0

    def _best(self, name: str) -> Choice:
        if not name:
            return PLAIN
        rates = self._rates[name]
        return Choice(name, max(range(1, len(rates)), key=rates.__getitem__))

    # --- what is done ---------------------------------------------------------------------

    def _taken(self, offers: Sequence[Offer]) -> Choice | None:
        """The best of the offers, if it is better than what rounds do without them."""
        if self._left or self._costs.plain_s is None or self._followed >= LAST_RETRY:
            return None
        (choice,) = self._texts.following([offers], self._rate(self._current) * HYSTERESIS) or (
            None,
        )
        return choice

    def _settled(self) -> Choice:
        """The best choice, or the current one where that is hardly worse."""
        options = [self._best(name) for name, one in self._acceptance.items() if one.tried]
        best = max([PLAIN, *options], key=self._rate)
        margin = PARKING_HYSTERESIS if best == PLAIN else HYSTERESIS
        if self._rate(best) < self._rate(self._current) * margin:
            return self._current
        if best != self._current:
            self._neighbours = Rest(self._round, FIRST_NEIGHBOUR)
        if best.drafter != self._current.drafter:
            self._leave(self._current.drafter)
        self._current = best
        return best

    def _leave(self, name: str) -> None:
        rest = self._rests[name]
        if self._round - self._entered >= PROVEN:
            rest.distance = FIRST_RETRY
        rest.since = self._entered = self._round

    def _next_trial(self) -> Choice | None:
        """The choice that is on trial, if there is one."""
        if not self._left:
            resting = [name for name in self._rests if name != self._current.drafter]
            due = [name for name in resting if self._round >= self._next_retry(name)]
            neighbour = self._neighbour()
            if due:
                self._begin(due[0])
            elif neighbour is not None:
                self._neighbours.tried(self._round)
                self._trial, self._left, self._undo = neighbour, TRIAL_ROUNDS, None
            else:
                return None
        self._left -= 1
        return self._trial

    def _neighbour(self) -> Choice | None:
        """One proposal more or less than now, if it is due and may well be better."""
        if (
            self._current == PLAIN
            or self._round < self._neighbours.since + self._neighbours.distance
        ):
            return None
        name, count = self._current.drafter, self._current.draft_tokens
        near = [Choice(name, k) for k in (count - 1, count + 1) if self._costs.knows(name, k)]
        best = max(near, key=self._optimistic, default=None)
        if best is None or self._optimistic(best) < self._rate(self._current):
            return None
        return best

    def _optimistic(self, choice: Choice) -> float:
        doubt = self._costs.doubt(choice.drafter, choice.draft_tokens)
        return self._rate(choice) * exp(OPTIMISM * doubt)

    def _next_retry(self, name: str) -> int:
        """The round from which a drafter or plain decoding may be tried, however bad it looks."""
        rest = self._rests[name]
        if name and not self._acceptance[name].tried:
            return rest.since + rest.distance
        best = self._best(name)
        cost = self._curves[name][best.draft_tokens] if name else 1.0
        lost = TRIAL_ROUNDS * cost * (1 - self._rate(best) / self._rate(self._current))
        return rest.since + max(rest.distance, int(lost / BUDGET))

    def _begin(self, name: str) -> None:
        if not name:
            self._trial = PLAIN
        elif self._acceptance[name].tried:
            self._trial = self._best(name)
            self._acceptance[name].soften(RETRY_WEIGHT)
        else:
            self._trial = Choice(name, 1)
        self._left = TRIAL_ROUNDS
        self._undo = replace(self._rests[name])
        self._rests[name].tried(self._round)
