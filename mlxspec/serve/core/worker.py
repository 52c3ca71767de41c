"""The thread that owns the device: it loads the models, and steps the batch."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxspec.decode.batch import Batch, Row
from mlxspec.decode.doing import Doing
from mlxspec.decode.engine import Engine
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Event, Tell
from mlxspec.serve.core.measured import Measured, measure
from mlxspec.serve.core.store import Store
from mlxspec.serve.core.ticket import Ticket


class Load(NamedTuple):
    """Texts that are written, and texts that wait."""

    running: int
    waiting: int


class Step(NamedTuple):
    """What happened to texts at one time: a round of each that is written, a piece that was read.

    running: the number of texts that are written from now on.
    """

    events: Sequence[tuple[Ticket, Event]]
    running: int


Watcher = Callable[[Step], None]

LOOKS_EVERY_S = 0.5
IDLE_S = 10.0  # without a text, after which pasts are written to the store


class Worker:
    """Writes the texts of tickets, on a thread of its own.

    MLX is used from that thread alone, because two of them end a process on Metal. All methods
    may be called from any thread.

    Args:
        prepare: makes the engine, on the worker's thread.
        max_rows: texts that are written at a time.
        tell: called with a line for the log.
        measures: whether rounds are timed before the first text, whose kernels that builds too.
        settled: called on the worker's thread once there is an engine, or a `failure`.
        store: where the pasts of prompts outlast the process.
    """

    def __init__(
        self,
        prepare: Callable[[], Engine],
        max_rows: int,
        tell: Tell,
        *,
        measures: bool = True,
        settled: Callable[[], None] | None = None,
        store: Store | None = None,
    ) -> None:
        self.engine: Engine | None = None
        self.measured: Measured | None = None
        self.failure: BaseException | None = None  # why there is no engine
        self.prefixes: PrefixCache | None = None  # what texts begin from
        self.doing: Sequence[Doing] = ()  # the latest choices for texts
        self.watchers: list[Watcher] = []  # called on the worker's thread; they must be quick
        self.tell = tell
        self._prepare = prepare
        self._measures = measures
        self._when_settled = settled
        self._store = store
        self._max_rows = max_rows
        self._tickets: dict[Row, Ticket] = {}
        self._asked: deque[Ticket] = deque()
        self._left: list[Ticket] = []  # by their clients
        self._load = Load(0, 0)
        self._stops = False
        self._turn = threading.Condition()  # guards what is above, from `_asked` on
        self._ready = threading.Event()
        self._stepping_since_s: float | None = None
        self._looked_s = 0.0  # when the batch was asked what its texts do
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    # --- for everybody ------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load; `wait` returns once that is over."""
        self._thread.start()

    def wait(self) -> Engine:
        """The engine, once it is loaded.

        Raises:
            BaseException: what prevented it.
        """
        self._ready.wait()
        if self.failure is not None:
            raise self.failure
        assert self.engine is not None
        return self.engine

    @property
    def settled(self) -> bool:
        """Whether loading is over, well or not."""
        return self._ready.is_set()

    @property
    def load(self) -> Load:
        """How many texts are written, and how many wait."""
        with self._turn:
            return Load(self._load.running, self._load.waiting + len(self._asked))

    @property
    def still_s(self) -> float:
        """Seconds since the round that runs now was begun; 0 where none runs."""
        since_s = self._stepping_since_s
        return time.monotonic() - since_s if since_s is not None else 0.0

    def ask(self, ticket: Ticket) -> None:
        """Let a text be written as soon as there is room."""
        with self._turn:
            self._asked.append(ticket)
            self._turn.notify()

    def cancel(self, ticket: Ticket) -> None:
        """End a text before the next round."""
        with self._turn:
            self._left.append(ticket)
            self._turn.notify()

    def stop(self) -> None:
        """End every text where it is, and the thread."""
        with self._turn:
            self._stops = True
            self._turn.notify()
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._prepare()
            self.measured = self._measure(engine)
            self.engine = engine
        except BaseException as error:
            self.failure = error
        self._ready.set()
        if self._when_settled is not None:
            self._when_settled()
        if self.engine is not None:
            self._serve(self.engine)
        mx.synchronize()
        mx.clear_streams()

    def _measure(self, engine: Engine) -> Measured | None:
        try:
            return measure(engine) if self._measures else None
        except MlxspecError as error:
            self.tell(f"the rounds of this machine could not be timed: {error.message}")
            return None

    def _serve(self, engine: Engine) -> None:
        batch = self._batch(engine)
        while self._take_in(batch):
            self._stepping_since_s = time.monotonic()
            try:
                events = batch.step()
            except Exception as error:
                self._failed(error)
                batch = self._batch(engine)
                continue
            finally:
                self._stepping_since_s = None
            told = [(self._tickets[row], event) for row, event in events]
            self._told(Step(told, batch.running))
            self._look(batch)
        self._end(batch)

    def _look(self, batch: Batch) -> None:
        """Ask what the texts do, and why, now and then."""
        now_s = time.monotonic()
        if batch.running and now_s > self._looked_s + LOOKS_EVERY_S:
            self.doing, self._looked_s = batch.doing(), now_s

    def _batch(self, engine: Engine) -> Batch:
        batch = engine.batch(self._max_rows)
        self.prefixes = batch.prefixes
        if self._store is not None:
            self._store.open(engine, batch.prefixes)
        return batch

    def _take_in(self, batch: Batch) -> bool:
        """Let new texts join, and wait while there are none; False once the thread is to end."""
        with self._turn:
            self._load = Load(batch.running, batch.waiting)
            while batch.done and not (self._asked or self._stops):
                if not self._turn.wait(IDLE_S) and self._store is not None:
                    self._store.save()  # nobody waits for the device
            asked, self._asked = self._asked, deque()
            left, self._left = self._left, []
            self._load = Load(batch.running, batch.waiting + len(asked))
            stops = self._stops
        for ticket in asked:
            ticket.row = batch.add(ticket.request)
            self._tickets[ticket.row] = ticket
        for ticket in left:
            if ticket.row is not None:
                ticket.row.cancel()
        return not stops

    def _told(self, step: Step) -> None:
        for ticket, event in step.events:
            ticket.tell(event)
            if event.finish_reason is not None and ticket.row is not None:
                del self._tickets[ticket.row]
        if step.events:
            for watcher in self.watchers:
                watcher(step)

    def _failed(self, error: Exception) -> None:
        """Something broke that is no single text's fault: end the texts, and go on with others."""
        for line in traceback.format_exception(error):
            self.tell(line.rstrip())
        why = MlxspecError(
            f"The server failed while writing: {type(error).__name__}: {error}",
            hint="Send the request again; if it fails again, report the server's log.",
        )
        self._end_all(error if isinstance(error, MlxspecError) else why)

    def _end(self, batch: Batch) -> None:
        batch.close()
        if self._store is not None:
            self._store.save()
        self._end_all(MlxspecError("The server was stopped.", hint="Send the request again."))

    def _end_all(self, why: MlxspecError) -> None:
        with self._turn:
            tickets = [*self._tickets.values(), *(self._asked if self._stops else ())]
        self._tickets.clear()
        for ticket in tickets:
            ticket.tell(why)
        failed = Event(finish_reason="error", notes=(why.message,))
        for watcher in self.watchers:
            watcher(Step([(ticket, failed) for ticket in tickets], 0))
