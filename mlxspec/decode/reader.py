"""From a text to the state before its next round: the target reads it, and drafts on demand."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, cast

import mlx.core as mx

from mlxspec.decode.prefixes import Keeper
from mlxspec.decode.request import Request
from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import RoundState
from mlxspec.defaults import MAX_DRAFT_TOKENS
from mlxspec.device import lengths
from mlxspec.device.memory import watched
from mlxspec.drafters.graph import Past
from mlxspec.drafters.heads.head import Heads
from mlxspec.metrics import TARGET, PrefillProgress, Tell, silent
from mlxspec.models.caches.layers import Layers
from mlxspec.models.kept import kept_of_row
from mlxspec.models.prefill import CHUNK, Begin, Marks, Reading, afresh, alone_s, prefill
from mlxspec.sampling.noise import row_key
from mlxspec.sampling.sampler import NO_TOKEN, Sampler, knobs_of

# The seconds that anything is read between two rounds: a text that grows must not seem to stop.
BETWEEN_S = 0.1


class Reader:
    """Reads the text of one session.

    Args:
        rounds: the rounds that continue the text.
        request: says how the text is sampled, and how much room the caches have at least.
        tell: called with notes for the user.
        keeper: what the text begins from, and is kept in.
    """

    def __init__(
        self,
        rounds: FusedRound,
        request: Request,
        *,
        tell: Tell = silent,
        keeper: Keeper | None = None,
    ) -> None:
        self._rounds = rounds
        self._target = rounds.target
        self._request = request
        self._seed = cast(int, request.sampling.with_seed().seed)
        self._tell = tell
        self._keeper = keeper

    def state(
        self, tokens: Sequence[int], *, beside: bool = False
    ) -> Generator[PrefillProgress, None, RoundState]:
        """The state of one sequence before its next round; no draft model has read it yet.

        It has room for what was read, or for as much as the request asks for.

        Yields the progress of reading, after every piece but the last.

        Args:
            beside: others wait for the next piece.

        Raises:
            OutOfMemory: the target's caches do not fit.
        """
        # The next round feeds the target the last token.
        read = tokens[:-1]
        piece_s = BETWEEN_S if beside else alone_s()
        # Rounds make the room that they need, but a head proposes past its text before they do.
        room = lengths.reserved(len(tokens) + MAX_DRAFT_TOKENS) if self._rounds.heads else len(read)
        capacity = max(self._request.capacity, room)
        caches, pasts = yield from self._target_read(self._read_by_target(read, capacity), piece_s)
        state = RoundState(
            position=mx.array([len(tokens) - 1], mx.int32),
            last_two=mx.array([[tokens[max(len(tokens) - 2, 0)], tokens[-1]]], mx.int32),
            recent=_recent(tokens, self._rounds.sampler),
            keys=row_key(self._seed)[None],
            knobs=knobs_of(self._request.sampling, batch=1, vocabulary=self._target.vocabulary),
            target=self._target.adopt(caches, len(read), capacity),
            drafts=pasts,
        )
        with watched("reading the prompt"):
            mx.eval(state)  # it is written beside others sooner than as a part of one graph
        return state

    def draft(
        self, name: str, tokens: Sequence[int], start: int, *, at_once: bool = True
    ) -> Generator[PrefillProgress, None, Past]:
        """The past of a draft model once it has read tokens of a text, from `start` on.

        Yields the progress of reading, after every piece but the last.

        Args:
            at_once: nothing happens between two pieces.

        Raises:
            OutOfMemory: its caches do not fit.
        """
        cached = self._rounds.model(name).cached
        reading = Reading(cached, tokens)
        caches, _ = yield from prefill(
            reading,
            begin=self._begin(name, start),
            marks=self._marks(name, reading),
            tell=self._tell,
            piece_s=alone_s() if at_once else BETWEEN_S,
            first=1,
            strict=not at_once,
        )
        if self._keeper is not None:
            self._keeper.has_read(name, reading, (caches, {}), start)
        room = lengths.reserved(len(tokens) + MAX_DRAFT_TOKENS)
        return Past(cached.adopt(caches, len(tokens), room), mx.array([start], mx.int32))

    @property
    def cached_tokens(self) -> int:
        """Tokens that the target did not read, because its past held them."""
        return self._keeper.taken.get(TARGET, 0) if self._keeper is not None else 0

    @property
    def keeps(self) -> bool:
        """Whether what is read outlasts the text."""
        return self._keeper is not None

    @property
    def writes(self) -> bool:
        """Whether there is a file that `keep` may write."""
        return self._keeper is not None and self._keeper.is_file

    def keep(self) -> None:
        """Write what was read so far to the file, once."""
        if self._keeper is not None:
            self._keeper.keep(self._tell)

    def held(self, name: str, tokens: Sequence[int]) -> int:
        """The number of tokens that a draft model would not have to read."""
        return self._keeper.held(name, tokens) if self._keeper is not None else 0

    def target_has_written(self, tokens: Sequence[int], state: RoundState, row: int) -> None:
        """Let the past of a text with the target and the heads outlast it, where possible.

        Args:
            tokens: those that the target has read for certain.
            state: of a round, with the text in one row of it.
        """
        reading = self._read_by_target(tokens)
        heads = {name: state.drafts[name] for name in self._rounds.heads}
        self._has_written(TARGET, reading, state.target, heads, row)

    def draft_has_written(self, name: str, tokens: Sequence[int], layers: Layers, row: int) -> None:
        """The same with a draft model."""
        self._has_written(name, Reading(self._rounds.model(name).cached, tokens), layers, {}, row)

    def _has_written(
        self, name: str, reading: Reading, layers: Layers, past: Any, row: int
    ) -> None:
        # A prompt attends to its first chunk before that is quantised; what is written does not.
        same = reading.cached.kv is None or len(self._request.tokens) > CHUNK
        if self._keeper is not None and same:
            kept = kept_of_row(reading, layers, past, row)
            if kept is not None:
                self._keeper.has_written(name, reading, kept)

    def _read_by_target(self, tokens: Sequence[int], capacity: int = 1) -> Reading:
        """What the target reads, and the heads along with it."""
        return Reading(self._target, tokens, Heads(self._rounds.heads, capacity))

    def _target_read(
        self, reading: Reading, piece_s: float | None
    ) -> Generator[PrefillProgress, None, tuple[list[Any], Any]]:
        past = yield from prefill(
            reading,
            begin=self._begin(TARGET),
            marks=self._marks(TARGET, reading),
            tell=self._tell,
            piece_s=piece_s,
        )
        if self._keeper is not None:
            self._keeper.has_read(TARGET, reading, past)
        return past

    def _begin(self, name: str, start: int = 0) -> Begin:
        """The `Begin` of a model that reads a text from `start` on."""
        keeper, tell = self._keeper, self._tell
        if keeper is None:
            return afresh
        return lambda reading: keeper.begun(name, reading, tell, start)

    def _marks(self, name: str, reading: Reading) -> Marks:
        return Marks() if self._keeper is None else self._keeper.marks(name, reading)


def _recent(tokens: Sequence[int], sampler: Sampler) -> mx.array:
    """The text, or as much of its end as the rounds look back on: int32 [1, W]."""
    if sampler.sees_whole_text:
        return mx.array([list(tokens)], mx.int32)
    window = sampler.context
    last = list(tokens[max(len(tokens) - window, 0) :])
    return mx.array([[NO_TOKEN] * (window - len(last)) + last], mx.int32).reshape(1, window)
