"""From samples to the figures of a cell. No MLX."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from statistics import fmean, median
from typing import TYPE_CHECKING

from mlxspec.bench import statistics
from mlxspec.bench.cells import (
    Acceptance,
    Cell,
    Configuration,
    Question,
    Round,
    Sample,
    Source,
)
from mlxspec.bench.plan import Group
from mlxspec.bench.statistics import Interval
from mlxspec.metrics import SpeculationStats

if TYPE_CHECKING:
    from mlxspec.bench.arms import Written

FEWEST = 3  # values that an interval is made of
CONFIDENT = 1.96  # standard errors on either side that 95% of estimates lie within


@dataclass
class Series:
    """What one configuration wrote in one group, turn by turn.

    seconds: of decoding, in all. splits: shares of drafting, verifying and the host in a round.
    """

    samples: list[Sample] = field(default_factory=list)
    speculation: list[SpeculationStats] = field(default_factory=list)
    seconds: float = 0.0
    splits: list[tuple[float, float, float]] = field(default_factory=list)
    rule: str = "greedy"
    exact: bool = True

    def add(self, written: Written, identical: bool | None = None) -> None:
        """Add what was written in a turn, and whether it is the text of plain decoding."""
        self.samples.append(replace(written.sample, identical=identical))
        self.speculation += written.speculation
        self.seconds += written.seconds
        self.rule, self.exact = written.rule, written.exact

    @property
    def rounds(self) -> int:
        return sum(one.rounds for one in self.speculation)


def joined(some: Iterable[Series]) -> Series:
    """Several series as one."""
    whole = Series()
    for one in some:
        whole.samples += one.samples
        whole.speculation += one.speculation
        whole.seconds += one.seconds
        whole.splits += one.splits
        whole.rule, whole.exact = one.rule, one.exact
    return whole


def speedup_of(over: Sequence[Sample], under: Sequence[Sample]) -> Interval | None:
    """How many times as fast `over` is, or None where there are too few ratios to tell.

    The samples of one prompt and one turn are paired. The median of a prompt's ratios stands for
    it, because they say more of that prompt and nothing of others; where there are fewer than
    FEWEST prompts, every turn counts.
    """
    by_prompt = _ratios(over, under)
    values = [median([ratio for _, ratio in some]) for some in by_prompt.values()]
    if len(values) < FEWEST:
        values = [ratio for some in by_prompt.values() for _, ratio in some]
    if len(values) < FEWEST:
        return None
    found = statistics.interval(values)
    return found if found.is_known else None


def is_settled(over: Sequence[Sample], under: Sequence[Sample], precision: float) -> bool:
    """Whether more turns would tell nothing more.

    Either the interval is narrow enough, or the ratio of each prompt is known as well as that: what
    is left of the interval's width is how much prompts differ.
    """
    found = speedup_of(over, under)
    if found is None:
        return False
    return found.precision <= precision or error_of(over, under) <= precision


def error_of(over: Sequence[Sample], under: Sequence[Sample]) -> float:
    """Half the interval of one prompt's ratio, as a fraction; infinity where none was repeated."""
    by_prompt = _ratios(over, under)
    repeats = min((len(some) for some in by_prompt.values()), default=0)
    if repeats < 2:
        return float("inf")
    ratios = [(at, ratio, name) for name, some in by_prompt.items() for at, ratio in some]
    at_s, values, names = zip(*ratios, strict=True)
    return CONFIDENT * statistics.drift(at_s, values, names).noise / sqrt(repeats)


def _ratios(
    over: Sequence[Sample], under: Sequence[Sample]
) -> dict[str, list[tuple[float, float]]]:
    """When each ratio was measured, and the ratio itself, by prompt."""
    speeds = {(one.prompt, one.turn): one.tokens_per_second for one in under}
    found = defaultdict(list)
    for one in over:
        base = speeds.get((one.prompt, one.turn))
        if base and one.tokens_per_second:
            found[one.prompt].append((one.at_s, one.tokens_per_second / base))
    return found


def acceptance_of(some: Sequence[SpeculationStats]) -> Acceptance | None:
    """The counts of several texts together; None where there was no full round."""
    full = sum(one.full_rounds for one in some)
    if not full:
        return None
    drafted, accepted = sum(one.drafted for one in some), sum(one.accepted for one in some)
    sources: dict[str, list[int]] = {}
    for one in some:
        for name, source in one.by_source.items():
            counts = sources.setdefault(name, [0, 0, 0])
            for at, count in enumerate((source.rounds, source.drafted, source.accepted)):
                counts[at] += count
    return Acceptance(
        rounds=full,
        drafted=drafted,
        accepted=accepted,
        rate=accepted / drafted if drafted else None,
        tokens_per_round=1 + accepted / full,
        drafted_by_position=_added(one.drafted_by_position for one in some),
        accepted_by_position=_added(one.accepted_by_position for one in some),
        by_source={
            name: Source(rounds=counts[0], drafted=counts[1], accepted=counts[2])
            for name, counts in sources.items()
        },
    )


def _added(columns: Iterable[Sequence[int]]) -> tuple[int, ...]:
    found: list[int] = []
    for one in columns:
        found += [0] * (len(one) - len(found))
        for at, count in enumerate(one):
            found[at] += count
    return tuple(found)


def round_of(series: Series) -> Round | None:
    """The mean round; None where its parts were not timed."""
    if not series.splits or not series.rounds:
        return None
    round_s = series.seconds / series.rounds
    draft, verify, host = (fmean(part) for part in zip(*series.splits, strict=True))
    return Round(
        round_s=round_s, draft_s=draft * round_s, verify_s=verify * round_s, host_s=host * round_s
    )


def cell_of(
    question: Question,
    configuration: Configuration,
    groups: Sequence[Group],
    series: Series,
    base: Series,
    *,
    finished: bool,
) -> Cell:
    """A cell of one configuration.

    Args:
        groups: that it sums up. series, base: of the configuration and of plain decoding in them.
    """
    first = groups[0]
    plain = configuration.is_baseline
    acceptance, parts = acceptance_of(series.speculation), round_of(series)
    predicted = None
    if parts and acceptance and acceptance.tokens_per_round and base.rounds:
        plain_s = base.seconds / base.rounds
        predicted = acceptance.tokens_per_round * plain_s / (parts.draft_s + parts.verify_s)
    same = [one.identical for one in series.samples if one.identical is not None]
    return Cell(
        question=question,
        configuration=configuration,
        prompt_type=first.prompt_type if question == "prompts" else "",
        system=first.system,
        temperature=first.temperature,
        context=first.context,
        rows=first.rows,
        rule=series.rule,
        exact=series.exact,
        samples=tuple(series.samples),
        acceptance=None if plain else acceptance,
        round=parts,
        speedup=None if plain else speedup_of(series.samples, base.samples),
        predicted=predicted,
        identical=fmean(same) if same else None,
        memory_ratio=_memory_ratio(series.samples, base.samples),
        finished=finished,
    )


def _memory_ratio(over: Sequence[Sample], under: Sequence[Sample]) -> float | None:
    peaks = {(one.prompt, one.turn): one.peak_bytes for one in under}
    ratios = [
        one.peak_bytes / base
        for one in over
        if one.peak_bytes and (base := peaks.get((one.prompt, one.turn)))
    ]
    return median(ratios) if ratios else None


def speed_of(samples: Sequence[Sample]) -> float | None:
    """The median of the samples' tokens per second."""
    speeds = [one.tokens_per_second for one in samples if one.tokens_per_second]
    return median(speeds) if speeds else None
