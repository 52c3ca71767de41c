"""Figures of cells, and how they are written: one way for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from mlxspec.bench.cells import BASELINE, Cell, Sample
from mlxspec.bench.results import Peer
from mlxspec.bench.statistics import Interval
from mlxspec.metrics import speed

MISSING = "–"


def typical(samples: Sequence[Sample], of: Callable[[Sample], float | None]) -> float | None:
    """The median of what was measured of samples; None where nothing was."""
    values = [value for one in samples if (value := of(one)) is not None]
    return median(values) if values else None


def first_token_s(cell: Cell) -> float | None:
    return typical(cell.samples, lambda one: one.ttft_s)


def gain(cell: Cell) -> float | None:
    """The speed-up over the baseline."""
    return None if cell.speedup is None else cell.speedup.median


def brought(one: Cell | Peer) -> float | None:
    """Tokens per round, the target's own included; plain decoding's is 1."""
    if (one.configuration if isinstance(one, Peer) else one.configuration.name) == BASELINE:
        return 1.0
    return None if one.acceptance is None else one.acceptance.tokens_per_round


def rate(one: Cell | Peer) -> float | None:
    return None if one.acceptance is None else one.acceptance.rate


def in_speed(value: float | None) -> str:
    return MISSING if value is None else speed(value)


def in_ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def in_share(value: float | None) -> str:
    """A share in percent; 0% and 100% are exactly that."""
    if value is None:
        return MISSING
    said = f"{value:.0%}"
    if said in ("0%", "100%") and value not in (0, 1):
        said = f"{min(max(value, 0.001), 0.999):.1%}" if 0 < value < 1 else said
    return said


def in_time(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds >= 1:
        return f"{seconds:.{2 if seconds < 10 else 1 if seconds < 100 else 0}f} s"
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f} ms"


def in_bytes(value: float | None) -> str:
    """Bytes in words, in powers of ten."""
    if value is None:
        return MISSING
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def in_interval(found: Interval | None) -> str:
    """The limits of an interval, unless they tell nothing."""
    if found is None or found.precision > 1:
        return MISSING
    return f"{found.low:.2f}–{found.high:.2f}"


def duration(seconds: float) -> str:
    """A length of time for people: 8 min 40 s."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (0 if hours else left, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"
