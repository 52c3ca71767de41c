"""What cells come to: the configuration to use, its best and worst use, and what to beware of.

No MLX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxspec.bench.cells import Cell
from mlxspec.bench.plan import PLAIN
from mlxspec.bench.results import Drift, Recommendation, Remark
from mlxspec.bench.statistics import Interval
from mlxspec.bench.summing import speed_of
from mlxspec.metrics import speed

WORTH_IT = 1.02  # times plain decoding from which on a configuration is recommended
SLOW = 10.0  # tokens per second that a person can hardly wait for
HIGH = 0.6  # an acceptance rate of which one expects a gain
GAIN = 1.05


def times(found: Interval) -> str:
    """A speed-up with its interval, in words."""
    if found.precision > 1:
        return f"{found.median:.2f} x (from too few turns)"
    return f"{found.median:.2f} x ({found.low:.2f}–{found.high:.2f})"


def recommendation(cells: Sequence[Cell]) -> Recommendation | None:
    """The fastest configuration; plain decoding where none is faster beyond doubt."""
    compared = [
        one
        for one in cells
        if one.question == "configs" and one.speedup and not one.configuration.cold
    ]
    if not compared:
        return None
    best = max(compared, key=lambda one: _of(one).median)
    found = _of(best)
    if found.median < WORTH_IT or found.high < 1:
        words = f"Do not speculate: the fastest configuration, {best.configuration.name}, is "
        return Recommendation(
            configuration=PLAIN,
            speedup=None,
            words=f"{words}{times(found)} plain decoding.",
        )
    name = best.configuration.name
    words = f"Use {name}: {times(found)} plain decoding"
    if found.low < 1:
        words += ", which this run cannot tell from no gain; give it more --minutes"
    near = [
        one.configuration.name
        for one in compared
        if one is not best and _of(one).high >= found.low and _of(one).median >= WORTH_IT
    ]
    if near:
        words += f"; {_listed(near)} may be as fast"
    uses = _uses(cells, name)
    return Recommendation(
        configuration=best.configuration,
        speedup=found,
        words=f"{words}.",
        best=uses[0].prompt_type if uses else "",
        worst=uses[-1].prompt_type if len(uses) > 1 else "",
    )


def _uses(cells: Sequence[Cell], name: str) -> list[Cell]:
    """The prompt types with a configuration, the one that gains most first."""
    some = [
        one
        for one in cells
        if one.question == "prompts" and one.configuration.name == name and one.speedup
    ]
    return sorted(some, key=lambda one: -_of(one).median)


def remarks(
    cells: Sequence[Cell], best: Recommendation | None, drift: Drift, concerns: Sequence[str]
) -> tuple[Remark, ...]:
    """What a reader should know before quoting a figure."""
    found = [Remark(kind="machine", words=words) for words in concerns]
    if drift.noisy:
        found.append(Remark(kind="drift", words=drift.words))
    found += [*_slower(cells), *_slow(cells, best), *_no_gain(cells), *_different(cells)]
    found += _unfinished(cells)
    return tuple(found)


def _slower(cells: Sequence[Cell]) -> Iterator[Remark]:
    """Configurations that are slower than plain decoding, with the conditions."""
    places: dict[str, list[Cell]] = {}
    for one in cells:
        if one.question != "configs" and one.speedup and one.speedup.high < 1:
            places.setdefault(one.configuration.name, []).append(one)
    for name, some in places.items():
        worst = min(some, key=lambda one: _of(one).median)
        where = _listed([f"{one.row} ({_LABELS[one.question]})" for one in some])
        yield Remark(
            kind="slower",
            words=f"{name} is slower than plain decoding with {where}: "
            f"{times(_of(worst))} with {worst.row}.",
        )


_LABELS = {
    "prompts": "type of prompt",
    "system": "system prompt",
    "sampling": "temperature",
    "context": "tokens of context",
    "rows": "rows",
}


def _slow(cells: Sequence[Cell], best: Recommendation | None) -> Iterator[Remark]:
    name = best.configuration.name if best else PLAIN.name
    for one in cells:
        if one.question == "configs" and one.configuration.name == name:
            found = speed_of(one.samples)
            if found is not None and found < SLOW:
                yield Remark(
                    kind="slow",
                    words=f"The fastest configuration writes {speed(found)} tokens/s, and a person "
                    f"who reads along needs about {SLOW:.0f}: take a smaller target, or one in "
                    "fewer bits.",
                )


def _no_gain(cells: Sequence[Cell]) -> Iterator[Remark]:
    """Configurations whose proposals are kept and which gain nothing, and where the time goes."""
    plain = next((one for one in cells if one.configuration.is_baseline), None)
    base = speed_of(plain.samples) if plain else None
    for one in cells:
        kept, parts = one.acceptance, one.round
        if one.question != "configs" or one.speedup is None or kept is None:
            continue
        if (kept.rate or 0.0) < HIGH or one.speedup.median >= GAIN or not kept.tokens_per_round:
            continue
        words = (
            f"{one.configuration.name} keeps {kept.rate:.0%} of its proposals, "
            f"{kept.tokens_per_round:.2f} tokens a round, and is {times(one.speedup)} plain "
            "decoding"
        )
        if parts is not None and base:
            per_token = [part * base for part in (parts.draft_s, parts.verify_s, parts.host_s)]
            draft, verify, host = (f"{value:.1f}" for value in per_token)
            words += (
                f": a round takes {parts.round_s * base:.1f} times as long as a plain token, "
                f"{verify} of it verifying, {draft} drafting and {host} the host"
            )
        yield Remark(kind="no_gain", words=f"{words}.")


def _different(cells: Sequence[Cell]) -> Iterator[Remark]:
    for one in cells:
        known = [sample for sample in one.samples if sample.identical is not None]
        wrong = [sample for sample in known if not sample.identical]
        if wrong and one.question != "prompts":
            yield Remark(
                kind="different",
                words=f"{len(wrong)} of {len(known)} texts of {one.configuration.name} differ from "
                f"plain decoding ({_LABELS.get(one.question, 'all prompts')} {one.row}, such as "
                f"{wrong[0].prompt}); `mlxspec generate --audit` tells whether rounding explains "
                "it.",
            )


def _unfinished(cells: Sequence[Cell]) -> Iterator[Remark]:
    open_ones = [one for one in cells if not one.finished and not one.configuration.is_baseline]
    if open_ones:
        yield Remark(
            kind="unfinished",
            words=f"{len(open_ones)} of {len(cells)} figures are not as narrow as was asked for: "
            "give the run more --minutes, or a larger --precision.",
        )


def _listed(names: Sequence[str]) -> str:
    """Some names, and the number of the others."""
    if len(names) <= 3:
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"{', '.join(names[:2])} and {len(names) - 2} others"


def _of(cell: Cell) -> Interval:
    assert cell.speedup is not None
    return cell.speedup
