"""Many texts at once: they wait, are read in pieces between rounds, and are written side by side.

Texts share rounds unless they differ in their verification rule or in how much is proposed. Those
take turns, and so do all texts of a model whose rounds wait for the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from mlxspec.decode.doing import Doing
from mlxspec.decode.lane import Lane
from mlxspec.decode.maker import Maker
from mlxspec.decode.reader import BETWEEN_S
from mlxspec.decode.request import Prompt, Request
from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Committed, Track
from mlxspec.decode.writer import Writer
from mlxspec.errors import MlxspecError, OutOfMemory, UsageError
from mlxspec.metrics import Event, Generation, PrefillProgress

MAX_ROWS = 32
TAKES_TURNS = "this text takes turns with the others: its rounds cannot be shared"
UNLIKE = "this text takes turns with those that are proposed for or verified in another way"
BEGUN = 3  # tokens of a text of which target and drafts have read something


class Row:
    """One text of a batch; `Batch.add` makes it.

    request: the request. generation: the result so far. index: how many were added before it.
    error: the reason why it ended early, or None. rows: of the latest round that wrote it.
    """

    def __init__(self, index: int, writer: Writer) -> None:
        self.index = index
        self.request = writer.request
        self.generation: Generation = writer.generation
        self.error: MlxspecError | None = None
        self.done = False
        self.rows = 0
        self._cancelled = False
        self._writer = writer
        self._rounds: FusedRound | None = None  # of such texts
        self._track: Track | None = None
        self._lane: Lane | None = None
        self._reading: Generator[PrefillProgress, None, RoundState] | None = None
        self._begun_s = 0.0
        self._read_s = 0.0  # the moment at which the prompt was read

    def cancel(self) -> None:
        """End the text where it is. Its row is free before the next round."""
        self._cancelled = True

    def _end(self, error: MlxspecError | None = None) -> None:
        """Let go of what its rounds needed: a program may keep the row for its text."""
        self.error, self.done = error, True
        self._track = self._lane = self._rounds = self._reading = None


class Batch:
    """Writes many texts; for one thread.

    Args:
        maker: makes what a text needs. request: makes a request; see `Engine.request`.
        max_rows: the most texts that are written at a time, 1 … MAX_ROWS.

    Raises:
        UsageError: `max_rows` is out of range.
    """

    def __init__(self, maker: Maker, request: Callable[..., Request], max_rows: int = 8) -> None:
        if not 1 <= max_rows <= MAX_ROWS:
            raise UsageError(
                f"max_rows is {max_rows}.", hint=f"It must be between 1 and {MAX_ROWS}."
            )
        self._maker = maker
        self._request = request
        self._max_rows = max_rows
        self.prefixes = maker.prefixes()
        self._waiting: deque[Row] = deque()
        self._reading: Row | None = None
        self._lanes: dict[Lane, Any] = {}  # with what their texts have in common
        self._rows: dict[Track, Row] = {}  # those that are written
        self._count = 0

    @property
    def running(self) -> int:
        """The number of texts that are written at present."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """The number of texts that are not read yet."""
        return len(self._waiting) + (self._reading is not None)

    @property
    def done(self) -> bool:
        """Whether every text that was added has ended."""
        return not (self.running or self.waiting)

    def add(self, prompt: Prompt | Request | None = None, **options: Any) -> Row:
        """Let a text join; it is read and written by the steps that follow.

        Args:
            prompt: a request; or text or token ids, with the options of `Engine.request`.

        Raises:
            UsageError, PromptError: see `Engine.request`.
        """
        request = prompt if isinstance(prompt, Request) else self._request(prompt, **options)
        row = Row(self._count, self._maker.writer(request))
        row._begun_s = time.perf_counter()
        self._count += 1
        self._waiting.append(row)
        return row

    def step(self) -> list[tuple[Row, Event]]:
        """Commit a round for every text that is written, and read a piece of one that waits.

        Returns:
            What happened, text by text; the last event of each has a `finish_reason`. Nothing once
            all are done.
        """
        events = self._end_cancelled()
        events += self._read()
        for lane in {row._lane: None for row in self._rows.values()}:
            if lane is not None:
                events += self._round(lane)
        return events

    def doing(self) -> list[Doing]:
        """What the texts that are written do, and why; one entry for those that share rounds."""
        return [lane.doing() for lane in self._lanes if lane.tracks]

    def close(self) -> None:
        """End every text where it is."""
        for row in [*self._waiting, *self._rows.values(), *filter(None, [self._reading])]:
            row.cancel()
        self._end_cancelled()
        self._lanes.clear()

    # --- reading --------------------------------------------------------------------------------

    def _read(self) -> list[tuple[Row, Event]]:
        """Let the next texts be read, as long as the others may wait."""
        until = time.perf_counter() + BETWEEN_S / 2  # a piece that begins by then ends in time
        events: list[tuple[Row, Event]] = []
        while self._may_read:
            events += self._read_piece()
            events += self._end_cancelled()  # it may be long until the next step
            for lane in self._lanes:
                lane.interrupted()
            if time.perf_counter() >= until:
                break
        return events

    @property
    def _may_read(self) -> bool:
        return self._reading is not None or bool(self._waiting and self.running < self._max_rows)

    def _read_piece(self) -> list[tuple[Row, Event]]:
        if self._reading is None:
            self._reading = self._begin(self._waiting.popleft())
        row = self._reading
        assert row._reading is not None
        try:
            return [(row, Event(prefill=next(row._reading)))]
        except StopIteration as over:
            state: RoundState = over.value
        except OutOfMemory as error:
            return self._put_back(row, error)
        self._reading = None
        return self._join(row, state)

    def _begin(self, row: Row) -> Row:
        if row._track is None:
            row._rounds = self._maker.rounds_beside(row.request)
            row._track = self._maker.track(row.request, row._rounds, prefixes=self.prefixes)
            if row._rounds.takes_one and self._max_rows > 1:
                row._track.notes.append(TAKES_TURNS)
        row._reading = row._track.read(beside=self.running > 0)
        return row

    def _join(self, row: Row, state: RoundState) -> list[tuple[Row, Event]]:
        rounds, track = row._rounds, row._track
        assert rounds is not None
        assert track is not None
        lane = row._lane = self._lane_for(row, rounds, track)
        generation, now_s = row.generation, time.perf_counter()
        if not row._read_s:
            row._read_s = now_s
            generation.timing.prefill_s = now_s - row._begun_s
            generation.cached_prompt_tokens = track.cached_tokens
        self._rows[track] = row
        events: list[tuple[Row, Event]] = []
        if len(track.text) < BEGUN and not rounds.takes_one:
            # Recurrent states have no shape yet: its first rounds run alone.
            alone = Lane(rounds, lane.policy_of, ahead=False, shared=True)
            alone.join(track, state)
            while len(track.text) < BEGUN and not row.done:
                events += self._round(alone)
            if row.done or not alone.tracks:
                return events
            state = alone.state
        lane.join(track, state)
        return events

    def _put_back(self, row: Row, error: OutOfMemory) -> list[tuple[Row, Event]]:
        """Let a text that did not fit wait until others have left; alone it never will."""
        self._reading = None
        if not self.running:
            return [self._failed(row, error)]
        self._waiting.appendleft(row)
        self._max_rows = self.running
        return []

    # --- writing --------------------------------------------------------------------------------

    def _round(self, lane: Lane) -> list[tuple[Row, Event]]:
        lane.ahead.waiting, lane.ahead.most = self.waiting, self._max_rows
        try:
            committed = lane.step()
        except OutOfMemory as error:
            return self._make_room(lane, error)
        except MlxspecError:
            raise
        except Exception as error:  # a caller's own processor, which may raise anything
            if not lane.rounds.sampler.sees_whole_text:
                raise
            why = MlxspecError(
                f"A logits processor failed: {type(error).__name__}: {error}",
                hint="Mend it, or leave it out.",
            )
            return [self._failed(self._rows.pop(track), why) for track in lane.clear()]
        return [self._written(lane, track, one) for track, one in committed]

    def _written(self, lane: Lane, track: Track, committed: Committed) -> tuple[Row, Event]:
        row = self._rows[track]
        if committed.error is not None:
            track.is_sound = False
            self._leave(lane, track)
            return self._failed(row, committed.error)
        row.rows = lane.rows
        decode_s = time.perf_counter() - row._read_s
        event = row._writer.write(committed, done=track.left <= 0, decode_s=decode_s)
        if event.finish_reason is not None:
            self._leave(lane, track)
            row._end()
        return row, event

    def _make_room(self, lane: Lane, error: OutOfMemory) -> list[tuple[Row, Event]]:
        """Memory ran out in a round: propose less, then write fewer texts at a time."""
        tracks = lane.clear()
        rows = [self._rows.pop(track) for track in tracks]
        if any(track.draft_tokens for track in tracks):
            for track in tracks:
                track.shrink()
        elif len(rows) == 1:
            return [self._failed(rows[0], error)]
        else:
            self._max_rows = max(self.running + len(rows) // 2, 1)
        self._waiting.extendleft(reversed(rows))  # what they have is read again
        return []

    def _leave(self, lane: Lane, track: Track) -> None:
        self._maker.learn(len(track.text), lane.policy, lane.rows)
        lane.leave(track)
        track.close()
        del self._rows[track]

    def _failed(self, row: Row, error: MlxspecError) -> tuple[Row, Event]:
        row._end(error)
        event = Event(finish_reason="error", notes=(error.message,))
        row.generation.add(event)
        return row, event

    def _end_cancelled(self) -> list[tuple[Row, Event]]:
        """Take the texts out that are to end where they are."""
        ended = [row for row in self._waiting if row._cancelled]
        self._waiting = deque(row for row in self._waiting if not row._cancelled)
        if self._reading is not None and self._reading._cancelled:
            ended.append(self._reading)
            self._reading = None
        for track, row in list(self._rows.items()):
            if row._cancelled and row._lane is not None:
                self._leave(row._lane, track)
                ended.append(row)
        events = []
        for row in ended:
            row._end()
            event = Event(finish_reason="interrupted")
            row.generation.add(event)
            events.append((row, event))
        return events

    def _lane_for(self, row: Row, rounds: FusedRound, track: Track) -> Lane:
        """A lane that can take a text; each has its own where rounds wait for the host."""
        request = row.request
        key: Any = row if rounds.takes_one else (request.auto, request.draft_tokens)
        others = [lane for lane in self._lanes if lane.tracks]
        self._lanes = {lane: of for lane, of in self._lanes.items() if lane.tracks or of == key}
        for lane, of in self._lanes.items():
            if of == key and lane.takes(request.method):
                return lane
        if others and not rounds.takes_one:
            track.notes.append(UNLIKE)
        lane = Lane(
            rounds,
            self._maker.policies_beside(request, rounds),
            rounds_for=lambda method: self._maker.rounds_for(method, request),
            shared=True,
        )
        self._lanes[lane] = key
        return lane
