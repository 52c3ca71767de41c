"""What rounds of a shape cost, with random weights, as `results.json` keeps it; mlx-lm beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step

from mlxspec.bench.environment import concerns
from mlxspec.bench.results import Cost, Remark, Results, Shape
from mlxspec.decode.engine import Engine
from mlxspec.measure.break_even import pays_above
from mlxspec.measure.costing import Costing
from mlxspec.measure.costs import Costs
from mlxspec.pairs.shapes import ShapePair


def rounds_of_mlx_lm(
    engine: Engine, start: Sequence[int], counts: Sequence[int], rounds: int
) -> dict[int, Callable[[], float]]:
    """For each K a callable that runs mlx-lm's rounds, and returns the seconds of one.

    Args:
        start: the prompt. counts: values of K, 0 for plain decoding.
    """
    return {count: partial(_round_of_mlx_lm, engine, start, count, rounds) for count in counts}


def _round_of_mlx_lm(engine: Engine, start: Sequence[int], count: int, rounds: int) -> float:
    """The first round reads the prompt. A round ends with the target's own token."""
    prompt, most, draft = mx.array(list(start)), (rounds + 1) * (count + 1), engine.draft
    if count == 0 or draft is None:
        steps: Any = ((0, 0, False) for _ in generate_step(prompt, engine.target, max_tokens=most))
    else:
        steps = speculative_generate_step(
            prompt, engine.target, draft, num_draft_tokens=count, max_tokens=most
        )
    own = (time.perf_counter() for _, _, from_draft in steps if not from_draft)
    first, *_, last = islice(own, rounds + 1)
    return (last - first) / rounds


def shape_of(pair: ShapePair, costing: Costing) -> Shape | None:
    """What was measured of a pair of shapes; None before a turn was over."""
    costs = costing.costs
    if costs is None:
        return None
    known = {0, *costs.rounds, *(rows - 1 for rows in costs.pass_s)}
    return Shape(
        target=str(pair.target),
        draft="" if pair.draft is None else str(pair.draft),
        context=costing.start,
        plain_s=costs.plain_s,
        costs=tuple(_cost(costs, count) for count in sorted(known)),
        target_bytes=pair.target.size,
        draft_bytes=0 if pair.draft is None else pair.draft.size,
        peak_bytes=costs.peak_bytes,
        layers=pair.target.layers,
        measured_layers=pair.depths,
        noise=costs.noise,
        words=pair.words,
    )


def _cost(costs: Costs, count: int) -> Cost:
    one, verify_s = costs.rounds.get(count), costs.pass_s[count + 1]
    round_s = costs.plain_s if count == 0 else None if one is None else one.round_s
    over = None if round_s is None else round_s / costs.plain_s
    return Cost(
        draft_tokens=count,
        verify_s=verify_s,
        over_plain=verify_s / costs.pass_s[1],
        draft_s=None if one is None else one.draft_s,
        host_s=None if one is None else one.host_s,
        round_s=round_s,
        expected_s=None if one is None else one.expected_s,
        round_over_plain=over,
        pays_above=pays_above(over, count) if over is not None and count else None,
        text_pays_above=pays_above(verify_s / costs.plain_s, count) if count else None,
        mlx_lm_s=costs.others.get(count),
    )


def results_of_shapes(
    shapes: Sequence[Shape],
    *,
    created: datetime,
    seconds: float,
    finished: bool,
    settings: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Results:
    """The results of a run that measured shapes alone.

    Args:
        before, after: the environments.
    """
    remarks = [Remark(kind="machine", words=words) for words in concerns(before, after)]
    remarks += [
        Remark(kind="drift", words=f"{one.target}: the same measurement varies by {one.noise:.0%}.")
        for one in shapes
        if one.is_noisy
    ]
    return Results(
        created=created.astimezone(UTC).isoformat(timespec="seconds"),
        finished=finished,
        seconds=seconds,
        machine=before,
        settings=settings,
        prompts_hash="",
        pair={},
        shape=tuple(shapes),
        warnings=tuple(remarks),
    )
