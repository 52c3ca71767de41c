"""What rounds cost: the chapters about their parts, measured and predicted. No MLX."""

from __future__ import annotations

from typing import NamedTuple

from mlxspec.bench.cells import Cell
from mlxspec.bench.report import tables
from mlxspec.bench.report.chapter import Chapter, measured
from mlxspec.bench.report.figures import brought, in_ratio, in_share, in_time
from mlxspec.bench.report.plots import Lines, Spot, Stacks
from mlxspec.bench.report.tables import Table
from mlxspec.bench.results import Results, Shape

FEW = 10  # draft tokens that an axis has a tick for each of


class Spent(NamedTuple):
    """A round of one K: what it costs, in rounds of plain decoding, and the tokens it brings.

    A round that brings N tokens at S times the speed costs N / S: `cost` where S was measured, with
    the limits of its interval, and `predicted` where S is what the round's parts add up to.
    """

    draft_tokens: int
    brings: float
    cost: float
    low: float | None
    high: float | None
    predicted: float | None

    @property
    def speedup(self) -> float:
        return self.brings / self.cost


def costs(results: Results) -> Chapter | None:
    spent = sorted(one for cell in measured(results, "configs") if (one := _spent(cell)))
    if not any(one.draft_tokens for one in spent):
        return None
    spent.insert(0, Spent(0, 1.0, 1.0, None, None, 1.0))
    best = max(spent[1:], key=lambda one: one.speedup)
    more = "more" if best.speedup > 1 else "no more"
    finding = (
        f"A round of {best.draft_tokens} proposals costs {best.cost:.2f} plain rounds and brings "
        f"{best.brings:.2f} tokens: {more} than it costs."
    )
    series = [
        (1, "brings", [Spot(one.draft_tokens, one.brings) for one in spent]),
        (4, "costs", [Spot(one.draft_tokens, one.cost, one.low, one.high) for one in spent]),
    ]
    predicted = [(one.draft_tokens, one.predicted) for one in spent if one.predicted]
    if len(predicted) > 1:
        series.append((3, "predicted", [Spot(*one) for one in predicted]))
    table = Table(
        "A round, in rounds of plain decoding, and the tokens that it brings",
        ("draft tokens", "costs", "predicted cost", "brings", "x plain"),
        tuple(
            (
                str(one.draft_tokens),
                in_ratio(one.cost),
                in_ratio(one.predicted),
                in_ratio(one.brings),
                in_ratio(one.speedup),
            )
            for one in spent
        ),
    )
    plot = Lines(
        series, "draft tokens in a round", "plain rounds, or tokens", ticks=_whole(spent[-1][0])
    )
    return Chapter("costs", "What a round costs", finding, (table,), plot)


def _spent(cell: Cell) -> Spent | None:
    """What a fixed K of the pair's own drafters costs; None for anything else."""
    one, found, brings = cell.configuration, cell.speedup, brought(cell)
    if one.is_baseline or one.auto or one.drafter or one.rule or found is None or not brings:
        return None
    return Spent(
        one.draft_tokens,
        brings,
        brings / found.median,
        brings / found.high,
        brings / found.low if found.low else None,
        brings / cell.predicted if cell.predicted else None,
    )


def rounds(results: Results) -> Chapter | None:
    found = [
        (cell.configuration.name, cell.round)
        for cell in measured(results, "configs")
        if cell.round is not None
    ]
    if not found:
        return None
    name, longest = max(found, key=lambda one: one[1].round_s)
    finding = (
        f"A round takes longest with {name}: {in_time(longest.round_s)}, of which "
        f"{in_share(longest.draft_s / longest.round_s)} are drafting, "
        f"{in_share(longest.verify_s / longest.round_s)} verifying, and "
        f"{in_share(longest.host_s / longest.round_s)} the host's."
    )
    rows = [
        (name, [1e3 * t for t in (one.draft_s, one.verify_s, one.host_s)]) for name, one in found
    ]
    plot = Stacks(rows, ("drafting", "verifying", "host"), "milliseconds of a round")
    return Chapter("rounds", "Where a round's time goes", finding, (tables.of_rounds(found),), plot)


def shape(found: Shape, place: int) -> Chapter | None:
    """The costs of rounds with random weights of a shape."""
    if not found.costs:
        return None
    series: dict[str, list[float | None]] = {
        "a pass": [one.over_plain for one in found.costs],
        "a round": [one.round_over_plain for one in found.costs],
        "expected of a round": [_over(one.expected_s, found) for one in found.costs],
        "mlx-lm's round": [_over(one.mlx_lm_s, found) for one in found.costs],
    }
    most = max((one.draft_tokens for one in found.costs if one.round_s is not None), default=0)
    most = most or found.costs[-1].draft_tokens
    counts = [one.draft_tokens for one in found.costs if one.draft_tokens <= most]
    lines = [
        (
            number,
            name,
            [Spot(at, over) for at, over in zip(counts, some, strict=False) if over is not None],
        )
        for number, (name, some) in enumerate(series.items())
    ]
    last = found.costs[-1]
    finding = (
        f"A pass over {last.draft_tokens + 1} rows takes {last.over_plain:.2f} times as long as "
        "one over a single row."
    )
    paying = [(one.pays_above, one.draft_tokens) for one in found.costs if one.pays_above]
    if paying:
        least, count = min(paying)
        what = "1 draft token pays" if count == 1 else f"{count} draft tokens pay"
        finding += f" {what} first: from an acceptance of {in_share(least)} on."
    if found.words:
        finding += f" {found.words}."
    if found.is_noisy:
        finding += f" The same measurement varies by {in_share(found.noise)}: too much to tell."
    plot = Lines(
        [one for one in lines if one[2]],
        "draft tokens in a round",
        "times a plain one",
        ticks=_whole(most) if most <= FEW else None,
    )
    name = found.target + (f" + {found.draft}" if found.draft else "")
    table = tables.of_shape(found)
    return Chapter(f"shape-{place}", f"The shape {name}", finding, (table,), plot)


def _over(seconds: float | None, found: Shape) -> float | None:
    """Over a plain round of ours."""
    return None if seconds is None else seconds / found.plain_s


def _whole(last: int) -> list[float]:
    return [float(one) for one in range(max(last, 1) + 1)]
