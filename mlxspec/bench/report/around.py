"""What a run is held against: other programs, and the machine's own drift. No MLX."""

from __future__ import annotations

from collections.abc import Sequence

from mlxspec.bench.judging import times
from mlxspec.bench.report import tables
from mlxspec.bench.report.chapter import Chapter
from mlxspec.bench.report.figures import MISSING
from mlxspec.bench.report.plots import Forest, Lines, Point, Spot
from mlxspec.bench.report.tables import Table
from mlxspec.bench.results import Peer, Results
from mlxspec.bench.targets import chosen, targets


def others(peers: Sequence[Peer]) -> Chapter | None:
    if not peers:
        return None
    measured = [(peer, peer.over) for peer in peers if peer.over is not None]
    ours = [(peer, peer.ours_over) for peer in peers if peer.ours_over is not None]
    if ours:
        finding = "On the same prompts, mlxspec is " + ", and ".join(
            f"{times(found)} as fast as {tables.titled(peer)}" for peer, found in ours
        )
        finding += "."
    else:
        counted = f"{len(measured)} of {len(peers)}" if measured else "None"
        finding = f"{counted} of the other programs could be measured on the same prompts."
    rows = [
        (tables.titled(peer), [Point(place, found.median, found.low, found.high)])
        for place, (peer, found) in enumerate(measured)
    ]
    plot = Forest(
        rows,
        [name for name, _ in rows],
        "x our plain decoding",
        "our plain decoding",
        has_legend=False,
    )
    both = (tables.of_peers(peers), tables.of_ours(peers))
    shown = tuple(one for one in both if one is not None)
    return Chapter("peers", "Other programs", finding, shown, plot if rows else None)


def aims(results: Results) -> Chapter | None:
    """The targets of speculation, each held against its measurement."""
    cell = chosen(results)
    if cell is None:
        return None
    found = targets(results)
    met = sum(bool(one.is_met) for one in found)
    finding = f"{cell.configuration.name} meets {met} of {len(found)} targets."
    rows = tuple((one.name, one.wanted, one.measured or MISSING, one.verdict) for one in found)
    table = Table(
        "What speculation should bring", ("target", "wanted", "measured", "verdict"), rows
    )
    return Chapter("targets", "Targets", finding, (table,))


def steadiness(results: Results) -> Chapter | None:
    """The speed of plain decoding of one text, repeated over the run."""
    both = zip(results.drift.at_s, results.drift.tokens_per_second, strict=False)
    spots = [Spot(at, value) for at, value in both]
    if len(spots) < 2:
        return None
    plot = Lines([(0, "plain", spots)], "seconds into the run", "tokens/s of plain decoding")
    finding = results.drift.words or "Plain decoding of one text was repeated during the run."
    table = tables.of_drift(results)
    return Chapter("drift", "How steady the machine was", finding, (table,), plot)
