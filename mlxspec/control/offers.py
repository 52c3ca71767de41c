"""The worth of what texts propose: the tokens that it brings, and the time of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from mlxspec.control.estimates import PRIOR_WEIGHT, SIZES, TEXT, AcceptanceEstimate, Costs
from mlxspec.drafters.proposals import PLAIN, PRIORS, Choice, Offer

# The most tokens that are proposed from the text before such rounds are measured.
FIRST_TEXT = 3
# The assumed share of the extrapolated extra cost of still more of them: a pass of many rows often
# costs no more than one of some, and finding out costs one round.
HOPE = 0.5

Graded = dict[tuple[str, int], AcceptanceEstimate]  # by drafter and grade


class TextOffers:
    """Expects tokens of proposals by drafter and grade, and costs by their number alone.

    Args:
        graded: what others have counted, and are to count with these.
        hope: see HOPE.
    """

    def __init__(self, graded: Graded | None = None, hope: float = HOPE) -> None:
        self._hope = hope
        self._graded: Graded = {} if graded is None else graded
        self._curve = [1.0]  # costs of a round with 0, 1, 2, … such proposals, in plain rounds

    def add(self, choice: Choice, accepted: int) -> None:
        """Record that a round kept, or would have kept, `accepted` of a text's proposals."""
        self._of_grade(choice.drafter, choice.grade).add(choice.draft_tokens, accepted)

    def rank(self, costs: Costs, wait: float = 0.0) -> None:
        """Reckon with the costs as they are known now.

        Args:
            wait: what such a round takes beside its pass, in plain rounds, before any was timed.
        """
        known = costs.measured(TEXT)
        reach = next((size for size in SIZES if size >= max(known + 1, FIRST_TEXT)), SIZES[-1])
        curve = costs.curve(TEXT, reach)
        if known:
            curve[known:] = [
                curve[known] + self._hope * (cost - curve[known]) for cost in curve[known:]
            ]
        else:
            curve[1:] = [cost + wait for cost in curve[1:]]
        self._curve = curve

    def best(self, offers: Sequence[Offer], most: int) -> tuple[Choice, float]:
        """The best of one text's offers with at most `most` tokens, and the tokens it brings."""
        best, tokens = PLAIN, 1.0
        for offer in offers:
            size = min(offer.tokens, most)
            brings = self._of_grade(offer.drafter, offer.grade).tokens()[size]
            if brings > tokens:
                best, tokens = Choice(offer.drafter, size, offer.grade), brings
        return best, tokens

    def brings(self, choice: Choice) -> float:
        """The tokens that a round of such proposals is expected to bring a text."""
        if not choice.draft_tokens:
            return 1.0
        return self._of_grade(choice.drafter, choice.grade).tokens()[choice.draft_tokens]

    def cost(self, size: int) -> float:
        """The cost of a round of so many, in plain rounds."""
        return self._curve[size]

    def following(self, offers: Sequence[Sequence[Offer]], least: float) -> list[Choice] | None:
        """What each text takes of its offers in a round that follows the texts alone.

        Args:
            least: the tokens per plain round, of all texts together, that it must exceed.

        Returns:
            A choice for each text; None where no such round exceeds `least`.
        """
        following = None
        for size in SIZES:
            if size >= len(self._curve):
                break
            if not any(offer.tokens >= size for of_row in offers for offer in of_row):
                break
            taken = [self.best(of_row, size) for of_row in offers]
            if len(offers) == 1:  # the round's K is the choice's own, and each K is a graph
                taken = [self.best([one for one in offers[0] if one.tokens >= size], size)]
            rate = sum(tokens for _, tokens in taken) / self._curve[size]
            if rate > least:
                following, least = [one for one, _ in taken], rate
        return following

    def _of_grade(self, name: str, grade: int) -> AcceptanceEstimate:
        if (name, grade) not in self._graded:
            # Where one token is accepted, the next ones are likelier to be.
            rates = [1 - (1 - PRIORS[grade]) / sqrt(j) for j in range(1, SIZES[-1] + 1)]
            self._graded[name, grade] = AcceptanceEstimate(SIZES[-1], rates, PRIOR_WEIGHT)
        return self._graded[name, grade]
