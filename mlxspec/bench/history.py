"""Results of one folder over time, those of the same work together. No MLX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxspec.bench.compare import differences
from mlxspec.bench.results import Results, read
from mlxspec.errors import UsageError
from mlxspec.metrics import Tell

BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Line:
    """Results that can be compared with each other, the oldest first."""

    runs: tuple[tuple[Path, Results], ...]

    @property
    def latest(self) -> Results:
        return self.runs[-1][1]


def lines(folder: Path, tell: Tell) -> list[Line]:
    """The results below a folder, by what was measured and where.

    Args:
        tell: gets a line for each file that is called results.json and cannot be used.

    Raises:
        UsageError: there is no folder, or no results in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder.", hint="Name a folder with results.")
    found = sorted(_results(folder, tell), key=lambda one: one[1].created)
    if not found:
        raise UsageError(
            f"There are no results in {folder}.",
            hint=f"`mlxspec bench --report {folder}/today` writes some.",
        )
    groups: list[list[tuple[Path, Results]]] = []
    for path, results in found:
        same = (group for group in groups if not differences(group[-1][1], results))
        group = next(same, None)
        if group is None:
            groups.append([(path, results)])
        else:
            group.append((path, results))
    return [Line(tuple(group)) for group in groups]


def _results(folder: Path, tell: Tell) -> Iterator[tuple[Path, Results]]:
    for path in sorted(folder.rglob("*.json")):
        try:
            yield path, read(path)
        except (UsageError, OSError) as error:
            if path.name == "results.json":
                tell(f"left out: {error}")


def sparkline(values: Sequence[float | None]) -> str:
    """Values as blocks between the least and the greatest; a gap where none is.

    The blocks span a tenth of the greatest value at least, so that noise looks like noise.
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    least, greatest = min(known), max(known)
    span = max(greatest - least, greatest / 10)
    bottom = (least + greatest - span) / 2
    last = len(BLOCKS) - 1
    return "".join(
        " " if one is None else BLOCKS[round(last * (one - bottom) / span)] for one in values
    )
