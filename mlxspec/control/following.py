"""What texts that share rounds take of their own offers, and what it costs to wait for these.

A round in which any text follows what it wrote before can be dispatched only once the round before
is read, while other rounds are dispatched ahead. So all texts together must gain more by it than
the wait takes, and offers that are gone by then were waited for in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mlxspec.control.controller import HYSTERESIS
from mlxspec.control.estimates import SIZES, Costs
from mlxspec.control.offers import Graded, TextOffers
from mlxspec.control.policy import Plan, planned
from mlxspec.drafters.proposals import PLAIN, Choice, Offer

# What a wait is taken for before one was timed, in plain rounds; the share of offers that are still
# there after it; and how much of both the latest wait decides.
FIRST_WAIT, FIRST_SHARE, LATEST = 0.3, 0.7, 0.15
# Rounds between two in which the texts are asked in vain: asking takes the host its time.
LONGEST_PAUSE = 15
# The share of an expected gain that may be spent on building a round that follows the texts.
SURE = 0.5


class Expected(NamedTuple):
    """A round without the texts' offers: the tokens that it brings a text, and its cost.

    price: of building a round. is_new: whether a round would have to be built. All times are in
    plain rounds.
    """

    choice: Choice
    tokens: float
    cost: float
    price: float
    is_new: Callable[[Choice], bool]


class Following:
    """Decides which offers of their own the texts of a round take.

    Args:
        graded: what others have counted of offers, and are to count with these.
    """

    def __init__(self, graded: Graded) -> None:
        self._offers = TextOffers(graded, hope=1.0)  # finding out costs more than a round
        self._wait, self._share = FIRST_WAIT, FIRST_SHARE
        self._is_awaited = False
        self._pause = self._rest = 0  # rounds in which the texts are not asked
        self._missed = dict.fromkeys(SIZES, 0.0)  # gains, for lack of a graph

    def rank(self, costs: Costs) -> None:
        """Reckon with the costs as they are known now."""
        self._offers.rank(costs, self._wait)

    def kept(self, choice: Choice, accepted: int) -> None:
        """Record that a round kept, or would have kept, `accepted` of a text's proposals."""
        self._offers.add(choice, accepted)

    def waited(self, cost: float, expected: float) -> None:
        """Record a round that waited, and what it costs where it is dispatched ahead."""
        self._wait += LATEST * (min(max(cost - expected, 0.0), 1.0) - self._wait)

    @property
    def wait(self) -> float:
        """What a wait is expected to take, in plain rounds."""
        return self._wait

    def listens(self) -> bool:
        """Whether the texts are to be asked in this round: less often while that is in vain."""
        self._rest -= 1
        return self._rest < 0

    def wants(self, model: Expected, offers: Sequence[Sequence[Offer]]) -> bool:
        """Whether it pays to wait for what these offers will be, text by text."""
        followed = self._followed(model, offers)
        gain = followed[1] if followed else self._taken(model, offers)[1] - self._wait
        self._is_awaited = self._share * gain > (1 - self._share) * self._wait
        self._pause = 0 if self._is_awaited else min(2 * self._pause + 1, LONGEST_PAUSE)
        self._rest = self._pause
        return self._is_awaited

    def plan(self, model: Expected, offers: Sequence[Sequence[Offer]]) -> Plan:
        """The round that the texts take part in: the model's, their own, or one of both."""
        followed = self._followed(model, offers, miss=True)
        plan = followed[0] if followed else self._taken(model, offers)[0]
        if self._is_awaited:
            takes = any(one not in (model.choice, PLAIN) for one in plan.rows)
            self._share += LATEST * (takes - self._share)
            self._is_awaited = False
        return plan

    def _taken(self, model: Expected, offers: Sequence[Sequence[Offer]]) -> tuple[Plan, float]:
        """A round of the model in which texts take their own offers, and the time that saves."""
        count, rows, saves = model.choice.draft_tokens, [model.choice] * len(offers), 0.0
        if count and any(offers):
            taken = [self._offers.best(of_row, count) for of_row in offers]
            brings = sum(max(tokens, model.tokens) for _, tokens in taken)
            saves = (brings / (model.tokens * len(offers)) - 1) * model.cost
            if saves > self._wait:
                rows = [one if tokens > model.tokens else model.choice for one, tokens in taken]
        return planned(model.choice, rows), saves

    def _followed(
        self, model: Expected, offers: Sequence[Sequence[Offer]], *, miss: bool = False
    ) -> tuple[Plan, float] | None:
        """A round that follows the texts alone, and the time that saves; None if it saves none.

        Args:
            miss: note what is missed where its graph would have to be built first. It is built
                once as much was missed as that takes.
        """
        if not any(offers):
            return None
        most = model.choice.draft_tokens
        rate = sum(max(self._offers.best(one, most)[1], model.tokens) for one in offers)
        rate /= model.cost
        following = self._offers.following(offers, rate * HYSTERESIS)
        if following is None:
            return None
        plan = planned(PLAIN, following)
        # Each K is a graph: shorter proposals are filled up.
        size = next(size for size in SIZES if size >= plan.whole.draft_tokens)
        whole = replace(plan.whole, draft_tokens=size)
        saves = sum(map(self._offers.brings, plan.rows)) / rate - self._offers.cost(size)
        if model.is_new(whole) and self._missed[size] < model.price:
            self._missed[size] += SURE * max(saves, 0.0) * miss
            return None
        return plan._replace(whole=whole), saves
