"""One text on the host: its tokens, what drafts for it, and what a person is to know of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from mlxspec.control.policy import FixedPolicy, Policy
from mlxspec.decode.drafts import Drafts
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import Request
from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import RoundState
from mlxspec.drafters.proposals import Choice, Offer, TextDrafter
from mlxspec.drafters.text_drafters import TextDrafters
from mlxspec.errors import BrokenOutput
from mlxspec.metrics import Logprob, PrefillProgress, RoundStats

WIDEST = 64  # rows of a pass; offers of texts that share rounds are no longer than fits


@dataclass(frozen=True)
class Committed:
    """One round's part of a text.

    tokens: 1 … K + 1 of them, or none once the limit is reached; `stats` is then None.
    notes: lines for people about anything else that happened.
    error: the reason why the text cannot go on; it then has no tokens.
    logprobs: one for each token, where the request asks for them.
    """

    tokens: list[int]
    stats: RoundStats | None
    notes: tuple[str, ...] = ()
    error: BrokenOutput | None = None
    logprobs: tuple[Logprob, ...] = ()


class Track:
    """A text that is decoded, alone or beside others.

    Args:
        rounds: the rounds that continue it. reader: reads it.
        request: the prompt, its limit, and the largest K.
        policy: is told what each round kept; None is the request's K in every round.
        texts: text drafters, which have read nothing yet.
        notes: lines for the user from before the first round.
    """

    def __init__(
        self,
        rounds: FusedRound,
        reader: Reader,
        request: Request,
        policy: Policy | None = None,
        *,
        texts: Sequence[TextDrafter] = (),
        notes: list[str] | None = None,
    ) -> None:
        self.request = request
        self.policy = policy or FixedPolicy(rounds.drafters, request.draft_tokens)
        self.text = list(request.tokens)
        self.draft_tokens = request.draft_tokens
        self.notes: list[str] = [] if notes is None else notes
        self.drafts = Drafts(
            rounds,
            reader,
            prompt=len(request.tokens),
            most=request.draft_tokens,
            tell=self.notes.append,
        )
        self._models = frozenset(rounds.drafters)
        self.is_first = True  # its next round needs the target alone
        self._texts = TextDrafters(texts, rounds.sampler.vocabulary, self.notes.append)
        self._told = 0  # how many tokens the text drafters have read
        self._reader = reader
        self._writes = reader.writes
        self.is_sound = True  # otherwise nothing of its rounds is kept
        self._cut = 0  # tokens that rounds kept beyond the limit

    @property
    def left(self) -> int:
        """The most tokens that it may still get."""
        return self.request.limit - len(self.text)

    @property
    def reach(self) -> int:
        """The tokens that rounds have kept, those beyond the limit included."""
        return len(self.text) + self._cut

    @property
    def follows(self) -> bool:
        """Whether anything proposes from the text."""
        return bool(self._texts)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not read, because their past was held."""
        return self._reader.cached_tokens

    def read(self, *, beside: bool = False) -> Generator[PrefillProgress, None, RoundState]:
        """Let the target read the text; returns the state of one row before its next round.

        Args:
            beside: others wait for the next piece.

        Raises:
            OutOfMemory: the target's caches do not fit.
        """
        state = yield from self._reader.state(self.text, beside=beside)
        self.is_first, self._cut = True, 0
        self.drafts.forget()
        return state

    def shrink(self) -> None:
        """Go on with half as many proposals, because memory ran out; the text is read again."""
        self.draft_tokens //= 2
        how = f"{self.draft_tokens} draft tokens" if self.draft_tokens else "no draft"
        self.notes.append(f"memory ran out: going on with {how}")

    # --- proposals from the text --------------------------------------------------------------

    def offers(self, rows: int = 1) -> list[Offer]:
        """The offers of the text drafters after the text that is known.

        Args:
            rows: of its rounds, which decide how long an offer may be where K is not fixed.
        """
        # Reading a prompt takes a while, and the first round need not wait for that.
        if self._told == 0 or self.draft_tokens == 0:
            return []
        most = max(WIDEST // rows - 1, 1) if self.request.auto else self.draft_tokens
        return list(self._texts.proposals(min(self.draft_tokens, most)))

    def proposed(self, choice: Choice) -> tuple[int, ...]:
        """The tokens of a choice that a text drafter offers; none if that is a model's."""
        if choice.drafter in self._models or not (choice.draft_tokens and self.offers()):
            return ()
        offered = self._texts.proposals(self.draft_tokens).items()
        found = (tokens for offer, tokens in offered if offer.drafter == choice.drafter)
        return next(found, ())[: choice.draft_tokens]

    def chose(self, choice: Choice) -> None:
        """Note its choice for a round that is under way."""
        self.is_first = False
        self._texts.watch(choice)
        if self._told == 0:
            self._tell_texts()

    # --- what rounds bring --------------------------------------------------------------------

    def commit(
        self,
        tokens: Sequence[int],
        choice: Choice,
        stats: RoundStats,
        logprobs: Sequence[Logprob] = (),
    ) -> Committed:
        """Add a round's tokens, as far as the limit allows.

        Args:
            logprobs: none, or one for each token and perhaps more, which mean nothing.
        """
        committed = list(tokens[: self.left])
        self.text += committed
        self._cut += len(tokens) - len(committed)
        self.policy.kept(choice, stats.accepted)
        self._tell_texts()
        told = tuple(logprobs[: len(committed)])
        return Committed(committed, stats, self.told(), logprobs=told)

    def told(self) -> tuple[str, ...]:
        """The notes since the last call."""
        notes = tuple(self.notes)
        self.notes.clear()
        return notes

    def keeps_now(self) -> bool:
        """Whether all that read the prompt have read it, so that its file can be written."""
        return self._writes and not self.is_first and not (self.draft_tokens and self.drafts.unread)

    def close(self) -> None:
        """Write what was read of the prompt to its file, unless that is done or not wanted."""
        if self._writes and not self.is_first:
            self._writes = False
            self._reader.keep()

    def leave(self, state: RoundState, row: int) -> None:
        """Let the past of the text outlast it.

        Args:
            state: of rounds up to those that are under way, with the text in one row.
        """
        if not (self._reader.keeps and self.is_sound):
            return
        last = min(self._end, len(self.text) - 1)
        self._reader.target_has_written(self.text[:last], state, row)
        for name, past in state.drafts.items():
            start, end = self.drafts.reached.get(name, (0, 0))
            if min(end, last) > start:
                tokens = self.text[start : min(end, last)]
                self._reader.draft_has_written(name, tokens, past.layers, row)

    @property
    def _end(self) -> int:
        """The place behind the first token that ends the text; what follows is of no use."""
        written = range(len(self.request.tokens), len(self.text))
        ends = (at + 1 for at in written if self.text[at] in self.request.ends)
        return next(ends, len(self.text))

    def _tell_texts(self) -> None:
        """Let the text drafters read the new tokens, and count those they would have kept."""
        if not self.request.draft_tokens:
            return
        decided = self._texts.extend(self.text[self._told :])
        self._told = len(self.text)
        for choice, accepted in decided:
            self.policy.kept(choice, accepted)
