"""`mlxspec generate --batch`: many texts at a time, a JSON object on a line of stdout for each."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from mlxspec.cli.arguments.entries import Entry, read_entries, written_in
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.screen.output import Output
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Progress, RoundStats, speed
from mlxspec.spelling import Spelling

if TYPE_CHECKING:
    from mlxspec.cli.batching import BatchOptions
    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.batch import Batch, Row
    from mlxspec.decode.engine import Engine

SHOWN_EVERY_S = 0.2


class Work(NamedTuple):
    """The lines of a batch, and the indices of those that have a result already."""

    entries: list[Entry]
    written: Collection[int]


def work_of(chosen: BatchOptions) -> Work:
    """Read the lines, and the results that are to be gone on with.

    Raises:
        PromptError, UsageError: a file cannot be read.
    """
    written = written_in(chosen.resume) if chosen.resume is not None else ()
    return Work(read_entries(chosen.file), written)


class Many:
    """Writes the lines of a batch.

    Args:
        engine: writes. usual: the options of `Engine.request` where a line has none.
        work: the lines, and those of them that have a result already.
        chosen: what the person asked for. out: where results go.
        about: what every result tells of the models.
    """

    def __init__(
        self,
        engine: Engine,
        usual: Mapping[str, Any],
        work: Work,
        chosen: BatchOptions,
        out: Output,
        about: Mapping[str, Any],
    ) -> None:
        self._usual = usual
        self._chosen = chosen
        self._out = out
        self._about = about
        self._engine = engine
        self._spelling = Spelling(engine.tokenizer)
        self.entries = work.entries
        self._left = deque(one for one in work.entries if one.index not in work.written)
        self.done = len(self.entries) - len(self._left)
        self.failed = 0
        self._resumed = self.done
        self._rows: dict[Row, Entry] = {}
        self._held: dict[int, dict[str, Any]] = {}  # results that wait for those before them
        self._order = deque(one.index for one in self._left)
        self._tokens = self._drafted = self._accepted = self._rounds = 0
        # Rounds in which nothing was proposed, by the reason.
        self._parked: Counter[str] = Counter()
        self._is_parked = False

    def write(self) -> Iterator[Progress]:
        """Write all texts; yields how far they are, a few times a second."""
        if self._chosen.cache_gb is not None:
            from mlxspec.decode.prefixes import PrefixCache

            self._engine.prefixes = PrefixCache(int(self._chosen.cache_gb * 1e9))
        batch = self._engine.batch(self._chosen.rows)
        started_s = shown_s = time.monotonic()
        while self._left or not batch.done:
            self._feed(batch)
            for row, event in batch.step():
                self._tokens += len(event.tokens)
                if event.round is not None:
                    self._count(event.round)
                if event.finish_reason is not None:
                    self._ended(row)
            now_s = time.monotonic()
            if now_s - shown_s >= SHOWN_EVERY_S:
                shown_s = now_s
                yield self._progress(batch, now_s - started_s)

    def _count(self, stats: RoundStats) -> None:
        if stats.full:
            self._drafted += stats.drafted
            self._accepted += stats.accepted
        self._is_parked = stats.parked is not None
        self._rounds += 1
        if stats.parked is not None:
            self._parked[stats.parked.why] += 1

    def why_parked(self) -> str | None:
        """Why nothing was proposed in most rounds, or None where something was."""
        if 2 * self._parked.total() <= self._rounds:
            return None
        (why, _), *_ = self._parked.most_common(1)
        return why

    def _feed(self, batch: Batch) -> None:
        """Keep a few texts waiting; a prompt becomes tokens only then."""
        while self._left and batch.waiting < 2:
            entry = self._left.popleft()
            try:
                row = batch.add(**entry.options(self._usual))
            except MlxspecError as error:
                self._failed(entry, error)
            else:
                self._rows[row] = entry

    def _ended(self, row: Row) -> None:
        entry = self._rows.pop(row)
        if row.error is not None:
            self._failed(entry, row.error)
            return
        result = {**self._about, **row.generation.as_dict()}
        if row.request.logprobs is not None:
            result["logprobs"] = self._spelling.as_dicts(row.generation.logprobs)
        self._told(entry, result)

    def _failed(self, entry: Entry, error: MlxspecError) -> None:
        self.failed += 1
        self._told(entry, {"error": error.message, "hint": error.hint})

    def _told(self, entry: Entry, result: dict[str, Any]) -> None:
        """Print a result, or hold it back until its turn."""
        self.done += 1
        result = entry.name | result
        if not self._chosen.ordered:
            self._out.object(result)
            return
        self._held[entry.index] = result
        while self._order and self._order[0] in self._held:
            self._out.object(self._held.pop(self._order.popleft()))

    def _progress(self, batch: Batch, elapsed_s: float) -> Progress:
        parts = [f"{batch.running} at a time", f"{speed(self._tokens / elapsed_s)} tok/s"]
        if self._drafted:
            parts.append(f"acceptance {self._accepted / self._drafted:.0%}")
        if self._is_parked:
            parts.append("parked")
        new, count = self.done - self._resumed, len(self.entries)
        left_s = elapsed_s / new * (count - self.done) if new else None
        return Progress("writing", self.done, count, left_s, " · ".join(parts))


def write_many(many: Many, display: Display, out: Output) -> None:
    """Write a batch to its end, and exit with 1 where a line could not be used."""
    count = len(many.entries)

    def say_how_to_go_on() -> None:
        out.tell(
            f"interrupted: {many.done} of {count} texts are written. To go on, add "
            "--resume FILE with the file of these results, and append to it: >> FILE"
        )

    with leaving(say_how_to_go_on):
        interrupted = display.follow(many.write())
    if interrupted:
        say_how_to_go_on()
        raise typer.Exit(INTERRUPTED)
    failed = f", {many.failed} of them errors" if many.failed else ""
    out.tell(f"{count} results{failed}")
    if why := many.why_parked():
        out.tell(f"parked: {why}")
    if many.failed:
        raise typer.Exit(MlxspecError.exit_code)
