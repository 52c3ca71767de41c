"""What texts that share rounds do at present, and why, for a program that watches a batch."""

from __future__ import annotations

from typing import NamedTuple

from mlxspec.control.policy import Policy
from mlxspec.parked import Parked


class Doing(NamedTuple):
    """What texts that share rounds do at present, and what is known of their rounds.

    texts: their number. rows: the number of rows, B, that costs are known by. drafter,
    draft_tokens: the choice of all rounds but trials and those that follow the texts; "" and 0
    where nothing is proposed. parked: why nothing is, where that was decided. costs: of rounds of
    each drafter by their K, in plain rounds, as far as they were measured.
    """

    texts: int
    rows: int
    drafter: str
    draft_tokens: int
    parked: Parked | None
    costs: dict[str, dict[int, float]]

    @classmethod
    def of(cls, policy: Policy, *, texts: int, rows: int) -> Doing:
        """What a policy lets texts do."""
        choice = policy.current
        costs = {
            name: {
                k: cost / one.costs[0]
                for k, cost in enumerate(one.costs)
                if k and cost and one.costs[0]
            }
            for name, one in policy.knowledge().items()
        }
        parked = None if choice.draft_tokens else policy.parked()
        return cls(texts, rows, choice.drafter, choice.draft_tokens, parked, costs)
