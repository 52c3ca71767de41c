"""The choice of each round's drafter and K: one protocol for a fixed K and for `auto`. No MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from math import inf
from typing import NamedTuple, Protocol

from mlxspec.control.estimates import Knowledge
from mlxspec.drafters.proposals import PLAIN, Choice, Offer
from mlxspec.parked import Parked

# A draft whose pass takes longer than this many plain rounds is given up. One would be enough, but
# a pass that reads is no compiled round.
SLOW = 1.5


class Need(NamedTuple):
    """The reading that a draft needs before it can propose, and what is known of its worth.

    cost_s: the seconds that it is expected to take; None where too little was timed.
    piece_s: the seconds of its next piece, or 0 before one was timed.
    spent_s: the seconds that it has read for already, in this text.
    pass_s: the seconds of its pass over one row, and plain_s of a plain round; None if unknown.
    run_s: the seconds since the text was begun. left_s: the seconds that its rest takes plainly;
        of both, the text's share where others are written beside it and wait while it is read.
    """

    cost_s: float | None
    piece_s: float
    spent_s: float
    pass_s: float | None
    plain_s: float | None
    run_s: float
    left_s: float

    @property
    def slowness(self) -> float:
        """A pass of the draft over a plain round, and 0 where either is unknown.

        Even if all its proposals were right, a draft would save no more than 1 less this share.
        """
        return self.pass_s / self.plain_s if self.pass_s and self.plain_s else 0.0

    @property
    def is_hopeless(self) -> bool:
        return self.slowness > SLOW


class Permit(Enum):
    """The answer to a `Need`: read all of it now, a piece of it, nothing yet, or never."""

    ALL = "all"
    PIECE = "piece"
    LATER = "later"
    NEVER = "never"


class Plan(NamedTuple):
    """A round of several texts: the model's choice, and that of every text beside it.

    whole: the drafter and K that shape the round. rows: the choice of each text, of no more than
        K tokens: the model's, its own text's, or nothing.
    """

    whole: Choice
    rows: tuple[Choice, ...]


class Outlook(NamedTuple):
    """What is ahead of several texts.

    left: the rounds that they may go on for. is_new: whether a round of that drafter and K would
        have to be built first, which takes as long as several rounds. reading_s: the seconds for
        which that drafter would have to read first what others wrote, as far as is known.
    """

    left: float
    is_new: Callable[[Choice], bool]
    reading_s: Callable[[str], float]


ENDLESS = Outlook(inf, lambda _: False, lambda _: 0.0)


class Policy(Protocol):
    """Chooses, and is told how each round went. A session asks; a policy changes nothing itself."""

    @property
    def current(self) -> Choice:
        """The choice of all rounds but trials and those that follow the text."""

    def choose(self, length: int, offers: Sequence[Offer] = ()) -> Choice:
        """The next round of a text of `length` tokens, given what text drafters offer."""

    def plan(
        self, length: int, offers: Sequence[Sequence[Offer]], outlook: Outlook = ENDLESS
    ) -> Plan:
        """The next round of several texts, the longest of `length` tokens, and their offers."""

    def listens(self) -> bool:
        """Whether the texts are to be asked for their offers at all: that takes time."""

    def wants(self, offers: Sequence[Sequence[Offer]]) -> bool:
        """Whether the next round would take one of these offers, text by text."""

    def kept(self, choice: Choice, accepted: int) -> None:
        """Record that a round kept `accepted` proposals, or would have kept those from the text."""

    def took(self, choice: Choice, seconds: float, *, waited: bool = False) -> None:
        """Record that a round took `seconds`, more than 0.

        Args:
            waited: it was dispatched only once the round before it was read.
        """

    def built(self, seconds: float) -> None:
        """Record that a round had to be built first, which took `seconds`."""

    def seconds(self, choice: Choice) -> float | None:
        """The time of such a round at the present pace; None where nothing was timed."""

    def permit(self, name: str, need: Need) -> Permit:
        """Whether a draft may read what it needs to."""

    def pays(self, choice: Choice, drafted: int, texts: int) -> bool:
        """Whether a round is worth it in which a model drafts for that many of the texts alone."""

    def postponed(self, choice: Choice) -> None:
        """Take back a choice whose drafter was not ready: the round proposed nothing."""

    def parked(self) -> Parked | None:
        """Why rounds propose nothing, where the policy decided so."""

    def leave_out(self, name: str) -> None:
        """Never choose a drafter again."""

    def knowledge(self) -> dict[str, Knowledge]:
        """The knowledge that later runs may begin with, by drafter."""


def planned(model: Choice, rows: Sequence[Choice]) -> Plan:
    """The plan in which every text has its choice, and `model` drafts for those that chose it."""
    drafter, most = "", max((one.draft_tokens for one in rows), default=0)
    if any(one.draft_tokens and one.drafter == model.drafter for one in rows):
        drafter, most = model.drafter, min(most, model.draft_tokens)
    fitting = tuple(
        one if one.draft_tokens <= most else replace(one, draft_tokens=most) for one in rows
    )
    whole = max(fitting, key=lambda one: one.draft_tokens, default=PLAIN)
    return Plan(replace(whole, drafter=drafter) if drafter else whole, fitting)


def limited(plan: Plan, most: Sequence[int]) -> Plan:
    """The plan in which no text has more proposals than its own limit."""
    counts = [min(one.draft_tokens, limit) for one, limit in zip(plan.rows, most, strict=True)]
    rows = [
        replace(one, draft_tokens=count) if count else PLAIN
        for one, count in zip(plan.rows, counts, strict=True)
    ]
    return plan if rows == list(plan.rows) else planned(plan.whole, rows)


class FixedPolicy:
    """The same K in every round.

    An offer from the text goes first, unless it is doubtful and something else can draft. The first
    drafter in the graph comes next.

    Args:
        names: drafters in the round's graph, the preferred one first.
        draft_tokens: K.
    """

    def __init__(self, names: Iterable[str], draft_tokens: int) -> None:
        self._names = list(names)
        self._draft_tokens = draft_tokens

    @property
    def current(self) -> Choice:
        if not (self._names and self._draft_tokens):
            return PLAIN
        return Choice(self._names[0], self._draft_tokens)

    def choose(self, length: int, offers: Sequence[Offer] = ()) -> Choice:
        offer = self._taken(offers)
        return self.current if offer is None else Choice(offer.drafter, offer.tokens, offer.grade)

    def plan(
        self, length: int, offers: Sequence[Sequence[Offer]], outlook: Outlook = ENDLESS
    ) -> Plan:
        return planned(self.current, [self.choose(length, of_row) for of_row in offers])

    def listens(self) -> bool:
        return True

    def wants(self, offers: Sequence[Sequence[Offer]]) -> bool:
        return any(self._taken(of_row) is not None for of_row in offers)

    def kept(self, choice: Choice, accepted: int) -> None:
        """Nothing is learned."""

    def took(self, choice: Choice, seconds: float, *, waited: bool = False) -> None:
        """Nothing is learned."""

    def built(self, seconds: float) -> None:
        """Nothing is learned."""

    def seconds(self, choice: Choice) -> float | None:
        return None

    def permit(self, name: str, need: Need) -> Permit:
        return Permit.ALL  # this K was asked for, whatever it costs

    def pays(self, choice: Choice, drafted: int, texts: int) -> bool:
        return True

    def postponed(self, choice: Choice) -> None:
        """Nothing is planned ahead."""

    def parked(self) -> Parked | None:
        return None

    def leave_out(self, name: str) -> None:
        self._names = [one for one in self._names if one != name]

    def knowledge(self) -> dict[str, Knowledge]:
        return {}

    def _taken(self, offers: Sequence[Offer]) -> Offer | None:
        return next((one for one in offers if one.grade or not self._names), None)
