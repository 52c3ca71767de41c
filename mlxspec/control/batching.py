"""The choice of rounds of several texts, by the tokens of all of them together.

Every number of rows, B, has costs of its own, and no gain at one B promises any at another: what a
pass costs may rise in steps. A round that was never run has to be built, which takes as long as
several rounds, and texts are short. So a K is tried only where what it is expected to bring over
the rest of the texts pays for that, or where a small share of the time pays for finding out. What
is expected of its cost comes from rounds of other B and K over as many rows (`surface`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt

from mlxspec.control.common import Common
from mlxspec.control.controller import (
    FIRST_RETRY,
    HYSTERESIS,
    OPENING,
    PARKING_HYSTERESIS,
    RETRY_WEIGHT,
    TRIAL_ROUNDS,
    Controller,
    Rest,
)
from mlxspec.control.estimates import TEXT, Knowledge
from mlxspec.control.following import SURE, Expected, Following
from mlxspec.control.policy import ENDLESS, Outlook, Plan
from mlxspec.control.surface import Surface
from mlxspec.drafters.proposals import PLAIN, Choice, Offer
from mlxspec.parked import Parked

# Numbers of proposals that models are asked for: each is a graph to build, and beside these none
# is much better. Where B is a power of two, 1, 3 and 7 fill tiles of kernels.
COUNTS = (1, 2, 3, 5, 7)
# Rows that kernels for quantised weights take at once: more of them take a second pass.
TILE = 32
# The price of building a round, in plain rounds, before any was timed.
FIRST_PRICE = 6.0
# Rounds that texts are expected to go on for where little has passed, if their limits allow that.
GRACE_ROUNDS = 64
# The share of an expected gain that may be spent on trying it; and the share of the time that may
# be spent on trying what is not expected to gain, while nothing gains and while something does;
# where nothing was tried yet, this many plain rounds may be besides.
SURER, EXPLORING, EXPLORING_ON, FIRST_STAKE = 0.7, 0.005, 0.02, 6.5
# The share of a trial's time that is taken to be lost; and rounds after one, until it is read.
RISK, PAUSE = 0.5, 2


class BatchController(Controller):
    """Picks the drafter and K of rounds of several texts.

    Args:
        rows: B. most: the models that draft, each with its largest K.
        known: what is known of every drafter, by number of rows.
        common: what is shared with the controllers of other numbers of rows.
        at_once: see `Controller`.
    """

    def __init__(
        self,
        rows: int,
        most: Mapping[str, int],
        known: Mapping[int, Mapping[str, Knowledge]],
        common: Common,
        at_once: Collection[str] = (),
    ) -> None:
        self._rows = rows
        self._common = common
        self._outlook = ENDLESS
        self._elapsed = 0.0  # at this number of rows, in plain rounds
        self._plain = 0  # rounds without proposals that were timed
        self._pause = 0  # the round before which no other trial begins
        self._tries = False  # whether the round that was planned last is on trial
        self._following = Following(common.graded)
        self._surface = Surface(known, at_once)
        self._rounds = {
            name: [Choice(name, k) for k in COUNTS if k <= count] for name, count in most.items()
        }
        super().__init__(most, known.get(rows), at_once)
        self._acceptance = {name: common.acceptance[name] for name in self._most}
        self._rests = {name: Rest(0) for name in ("", *most)}
        self.reckon_with(known)

    def reckon_with(self, known: Mapping[int, Mapping[str, Knowledge]]) -> None:
        """Expect costs as rounds of any number of rows tell them by now."""
        self._surface = Surface(known, self._at_once)
        self._costs.expected = partial(self._surface.curve, self._rows)
        self._rank()

    # --- what is asked ------------------------------------------------------------------------

    def plan(
        self, length: int, offers: Sequence[Sequence[Offer]], outlook: Outlook = ENDLESS
    ) -> Plan:
        """The next round of several texts, the longest of `length` tokens, and their offers.

        The better of two: rounds in which a model drafts and texts take their own offers where
        those promise more; and rounds that follow the texts alone.
        """
        self._outlook = outlook
        self._rank()
        model = self.choose(length)
        plan = self._following.plan(self._expected(model), self._asked(offers))
        self._elapsed += self._cost(model)
        self._common.elapsed += self._cost(model)
        return plan

    def listens(self) -> bool:
        """Whether the texts are to be asked for their offers: less and less often while in vain."""
        return self._following.listens()

    def wants(self, offers: Sequence[Sequence[Offer]]) -> bool:
        """Whether it pays to wait for what these offers will be, text by text."""
        return self._following.wants(self._expected(self._current), self._asked(offers))

    def _asked(self, offers: Sequence[Sequence[Offer]]) -> Sequence[Sequence[Offer]]:
        """The offers that a round may take: none on trial, or before a plain one was timed."""
        on_trial = self._tries or self._left
        return [[] for _ in offers] if on_trial or self._costs.plain_s is None else offers

    def kept(self, choice: Choice, accepted: int) -> None:
        if choice.drafter in self._most:
            count = choice.draft_tokens
            self._acceptance[choice.drafter].add(count, accepted, beside=self._rows)
        elif choice.drafter:
            self._following.kept(choice, accepted)

    def pays(self, choice: Choice, drafted: int, texts: int) -> bool:
        if self._tries or not self._knows(choice):  # its cost is what is to be found out
            return True
        brings = (self._tokens(choice) - 1) * drafted / texts
        return 1 + brings > self._cost(choice)

    def built(self, seconds: float) -> None:
        """Record that a round had to be built first, which took `seconds`."""
        before = self._common.building_s or seconds
        self._common.building_s = (before + seconds) / 2

    def parked(self) -> Parked | None:
        """Why nothing is proposed; None while something is, or nothing can be."""
        best = max(self._options(), key=self._rate, default=None)
        if self._current != PLAIN or self._left or best is None:
            return None
        brings = self._acceptance[best.drafter].tokens()[best.draft_tokens]
        cost = self._cost(best)
        if brings > cost:  # it would pay, if there were rounds enough to build it for
            return None
        tried = [name for name in self._acceptance if self._tried(name)]
        retry = min((self._next_retry(name) for name in tried), default=self._round)
        return Parked(
            1 - brings / cost,
            max(retry - self._round, 0),
            texts=self._rows,
            draft_tokens=best.draft_tokens,
            cost=cost,
            brings=brings,
        )

    # --- what is expected ---------------------------------------------------------------------

    @property
    def _price(self) -> float:
        """The expected price of building a round, in plain rounds."""
        plain_s = self._costs.plain_s
        building_s = self._common.building_s
        return building_s / plain_s if building_s and plain_s else FIRST_PRICE

    @property
    def _ahead(self) -> float:
        """The plain rounds that texts are expected to go on for."""
        return min(self._outlook.left, max(self._elapsed, GRACE_ROUNDS))

    def _rank(self) -> None:
        self._curves, self._rates = {}, {}
        for name, most in self._most.items():
            curve = self._curves[name] = self._costs.curve(name, most)
            tokens = self._acceptance[name].tokens()
            self._rates[name] = [n / c for n, c in zip(tokens, curve, strict=True)]
        self._following.rank(self._costs)

    def _expected(self, choice: Choice) -> Expected:
        tokens, cost = self._tokens(choice), self._cost(choice)
        return Expected(choice, tokens, cost, self._price, self._outlook.is_new)

    def took(self, choice: Choice, seconds: float, *, waited: bool = False) -> None:
        self._plain += not choice.draft_tokens
        payer, plain_s = self._payer(choice), self._costs.plain_s
        if waited and payer != TEXT and plain_s is not None:
            # Its cost is that of rounds that are dispatched ahead, as it is as a rule.
            if self._costs.knows(payer, choice.draft_tokens) or choice == PLAIN:
                self._following.waited(seconds / plain_s, self._cost(choice))
                return
            seconds = max(seconds - self._following.wait * plain_s, plain_s)
        self._costs.add(payer, choice.draft_tokens, seconds)

    def _cost(self, choice: Choice) -> float:
        return self._curves[choice.drafter][choice.draft_tokens] if choice.draft_tokens else 1.0

    def _tokens(self, choice: Choice) -> float:
        return self._rate(choice) * self._cost(choice)

    def _options(self, name: str = "") -> Iterator[Choice]:
        """All rounds in which that model drafts, or any."""
        for one in [name] if name else self._most:
            yield from self._rounds[one]

    def _knows(self, choice: Choice) -> bool:
        return self._costs.knows(choice.drafter, choice.draft_tokens)

    def _tried(self, name: str) -> bool:
        """Whether rounds of the model have a cost at this number of rows."""
        return any(map(self._knows, self._options(name)))

    def _best(self, name: str) -> Choice:
        """The best round of a model whose cost is known, or of all."""
        options = [one for one in self._options(name) if self._knows(one)] if name else [PLAIN]
        return max(options or self._options(name), key=self._rate)

    def _time(self, choice: Choice) -> float:
        """The time of all that is ahead, in plain rounds."""
        return self._ahead / self._rate(choice) + self._entry(choice)

    def _entry(self, choice: Choice) -> float:
        """What comes before such a round, in plain rounds: building it, and its draft's reading."""
        plain_s = self._costs.plain_s
        reading_s = self._outlook.reading_s(choice.drafter) if choice.drafter else 0.0
        reading = reading_s / plain_s if plain_s else 0.0
        return self._price * self._outlook.is_new(choice) + reading

    # --- what is done -------------------------------------------------------------------------

    def _settled(self) -> Choice:
        if not self._outlook.left:  # another number of rows is next
            return PLAIN if self._outlook.is_new(self._current) else self._current
        known = [one for one in self._options() if self._knows(one)]
        best = min([PLAIN, *known], key=self._time)
        margin = PARKING_HYSTERESIS if best == PLAIN else HYSTERESIS
        if self._time(self._current) < self._time(best) * margin:
            return self._current
        if best.drafter != self._current.drafter:
            self._leave(self._current.drafter)
        self._current = best
        return best

    def _next_trial(self) -> Choice | None:
        self._tries = False
        if not self._left:
            if self._round < self._pause or not self._outlook.left:
                return None
            self._settled()  # what the last trial has shown
            trial = self._promising() or self._due()
            if trial is None:
                return None
            self._trial = trial
            self._left = TRIAL_ROUNDS + self._outlook.is_new(trial)
            self._pause = self._round + self._left + PAUSE
            self._undo = replace(self._rests[trial.drafter])
            self._rests[trial.drafter].tried(self._round)
        self._left -= 1
        self._tries = True
        return self._trial

    def _promising(self) -> Choice | None:
        """The best round that was never tried and is worth it."""
        if self._plain < OPENING:
            return None
        unknown = [one for one in self._options() if not self._knows(one)]
        if worth := [one for one in unknown if self._pays(one)]:
            best = max(worth, key=self._rate)
        elif worth := [one for one in unknown if self._is_affordable(one)]:
            best = max(worth, key=self._hopeful)
        else:
            return None
        self._common.spent += self._stake(best)
        return best

    def _stake(self, choice: Choice) -> float:
        """What a trial takes and may lose, in plain rounds."""
        rounds = TRIAL_ROUNDS * self._cost(choice)
        return self._entry(choice) + RISK * rounds

    def _pays(self, choice: Choice) -> bool:
        """Whether a round's expected gain over what is ahead pays for trying it."""
        if not self._is_foreseen(choice):
            return False
        gain = self._ahead * (1 / self._rate(self._current) - 1 / self._rate(choice))
        return (SURER if self._tried(choice.drafter) else SURE) * gain > self._stake(choice)

    def _is_foreseen(self, choice: Choice) -> bool:
        """Whether its cost and its worth were measured in other rounds, of half as many rows."""
        rows = self._rows * (choice.draft_tokens + 1)
        known = [one.draft_tokens for one in self._options(choice.drafter) if self._knows(one)]
        near = bool(known) and 2 * max(known) >= choice.draft_tokens - 1
        return self._acceptance[choice.drafter].tried and (near or self._surface.reaches(rows))

    def _is_affordable(self, choice: Choice) -> bool:
        """Whether it may be better than what is done now, and a little time pays for trying it."""
        rows = self._rows * (choice.draft_tokens + 1)
        if choice.draft_tokens > 1 and rows > TILE:
            return False
        may_gain = self._hopeful(choice) > self._rate(self._current) * HYSTERESIS
        return may_gain and self._has_budget(self._stake(choice))

    def _hopeful(self, choice: Choice) -> float:
        """The rate of a round that was never run, if it costs no more than it must."""
        shorter = [k for k in range(1, choice.draft_tokens) if self._costs.knows(choice.drafter, k)]
        # A longer round costs no less than a shorter one.
        least = self._cost(replace(choice, draft_tokens=shorter[-1])) if shorter else 1.0
        return self._tokens(choice) / max(least, sqrt(self._cost(choice)))

    def _has_budget(self, stake: float) -> bool:
        share = EXPLORING if self._current == PLAIN else EXPLORING_ON
        first = 0.0 if any(map(self._tried, self._acceptance)) else FIRST_STAKE
        budget = first + share * (self._common.elapsed + self._ahead)
        return self._common.spent + stake < budget

    def _due(self) -> Choice | None:
        """A drafter that was left, or plain rounds, if they are to be tried again."""
        for name in self._rests:
            if name == self._current.drafter or (name and not self._tried(name)):
                continue
            best = self._best(name)
            price = self._entry(best)
            # What an earlier run has kept may be wrong, and many batches end before a retry.
            unseen = not name and self._plain < TRIAL_ROUNDS and self._round >= FIRST_RETRY
            due = unseen or self._round >= self._next_retry(name)
            if due and (not price or self._has_budget(price)):
                self._common.spent += price
                if name:
                    self._acceptance[name].soften(RETRY_WEIGHT * self._rows)
                return best
        return None
