"""The table of a run that is under way: what each group has shown, and how long it takes yet."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlxspec.bench.cells import BASELINE
from mlxspec.bench.summing import speed_of, speedup_of
from mlxspec.cli.screen.streams import has_colours, is_capable
from mlxspec.cli.screen.terminal import ASIDE
from mlxspec.metrics import Progress, speed

if TYPE_CHECKING:
    from mlxspec.bench.group_run import GroupRun
    from mlxspec.bench.measuring import Run

_AROUND = 7  # lines of a terminal that are not rows of the table


class Watched:
    """A run on a terminal, shown live on stderr and taken away at its end."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._console = Console(
            stderr=True,
            highlight=False,
            markup=False,
            color_system="auto" if has_colours() else None,
        )
        self._spinner = Spinner("dots")
        self._live = Live(
            console=self._console,
            transient=True,
            refresh_per_second=8,
            redirect_stdout=sys.stdout.isatty(),
        )

    @property
    def is_shown(self) -> bool:
        """Whether stderr can show it."""
        return sys.stderr.isatty() and is_capable()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def follow(self) -> bool:
        """Measure to the end; True where a person ended it."""
        try:
            for progress in self._run:
                self._live.update(self._shown(progress))
        except KeyboardInterrupt:
            return True
        return False

    def _shown(self, progress: Progress) -> RenderableType:
        words = [f"{progress.what}: {progress.detail}" if progress.detail else progress.what]
        words.append(f"{self._run.turns} turns")
        if progress.left_s is not None:
            words.append(f"about {left(progress.left_s)} left")
        words.append("Ctrl-C ends it and keeps what is there")
        self._spinner.update(text=Text(" · ".join(words), ASIDE, no_wrap=True, overflow="ellipsis"))
        return Group(table_of(self._rows(progress.what)), self._spinner)

    def _rows(self, current: str) -> list[GroupRun]:
        """As many groups as fit, with the current one among them."""
        groups = self._run.groups
        room = max(self._console.height - _AROUND, 1)
        at = next((at for at, one in enumerate(groups) if one.group.in_words() == current), 0)
        first = max(0, min(at - room // 2, len(groups) - room))
        return groups[first : first + room]


def left(seconds: float) -> str:
    """A time in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"


def table_of(groups: list[GroupRun]) -> Table:
    """A row for each group: the speed of plain decoding, and the speed-ups."""
    names = list(dict.fromkeys(arm.name for one in groups for arm in one.group.arms))
    table = Table("", "turns", box=SIMPLE_HEAD, padding=(0, 1))
    for name in names:
        table.add_column("tokens/s" if name == BASELINE else name, justify="right", no_wrap=True)
    for one in groups:
        cells = [_cell(one, name) for name in names]
        table.add_row(one.group.in_words(), f"{one.turns}{'✓' if one.finished else ''}", *cells)
    return table


def _cell(one: GroupRun, name: str) -> str:
    series = one.series.get(name)
    if series is None or not series.samples:
        return ""
    if name == BASELINE:
        found = speed_of(series.samples)
        return "" if found is None else speed(found)
    ratio = speedup_of(series.samples, one.series[BASELINE].samples)
    if ratio is None:
        return "…"
    return f"{ratio.median:.2f} ±{min(ratio.precision, 9.99):.0%}"
