"""From a run, whole or interrupted, to its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from mlxspec.bench import statistics
from mlxspec.bench.cells import BASELINE, Cell, Question
from mlxspec.bench.environment import concerns
from mlxspec.bench.group_run import GroupRun
from mlxspec.bench.judging import recommendation, remarks
from mlxspec.bench.measuring import Run
from mlxspec.bench.prompt_sets import Prompt, hash_of
from mlxspec.bench.results import Drift, Peer, Remark, Results
from mlxspec.bench.summing import FEWEST, cell_of, joined
from mlxspec.decode.engine import Engine
from mlxspec.pairs.loading import bytes_of, setting_of
from mlxspec.pairs.table import Pair

ORDER: tuple[Question, ...] = ("configs", "prompts", "system", "sampling", "context", "rows")


def results_of(
    run: Run,
    *,
    created: datetime,
    pair: Mapping[str, Any],
    prompts: Sequence[Prompt],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Results:
    """The results so far.

    Args:
        created: when the run began. pair: see `about_pair`.
        before, after: the environments.
    """
    cells = tuple(_cells(run))
    drift, best = drift_of(run.reference), recommendation(cells)
    remarked = remarks(cells, best, drift, concerns(before, after))
    return Results(
        created=created.astimezone(UTC).isoformat(timespec="seconds"),
        finished=run.is_over,
        seconds=run.seconds,
        machine=before,
        settings=_plain(asdict(run.settings)),
        prompts_hash=hash_of(prompts),
        pair=pair,
        drift=drift,
        cells=cells,
        peers=tuple(_peers(run)),
        recommendation=best,
        warnings=(*remarked, *_left_out(run)),
    )


def _cells(run: Run) -> Iterator[Cell]:
    """The cells of each question; the configurations' own sum up the types of prompts."""
    for question in ORDER:
        some = [one for one in run.groups if question in one.group.questions]
        if question == "configs" and some:
            yield from _of_groups(question, some)
        else:
            for one in some:
                yield from _of_groups(question, [one])


def _of_groups(question: Question, some: Sequence[GroupRun]) -> Iterator[Cell]:
    base = joined(one.series[BASELINE] for one in some)
    for arm in some[0].group.arms:
        yield cell_of(
            question,
            arm,
            [one.group for one in some],
            joined(one.series[arm.name] for one in some),
            base,
            finished=all(one.finished for one in some),
        )


def _peers(run: Run) -> Iterator[Peer]:
    """Each program on prompts of all types, and under every other condition that it met."""
    main = [one for one in run.groups if "configs" in one.group.questions]
    asked: list[tuple[Question, list[GroupRun]]] = [("configs", main)] if main else []
    asked += [
        (question, [one])
        for question in ORDER[2:]
        for one in run.groups
        if question in one.group.questions
    ]
    for question, some in asked:
        ours = {
            arm.name: joined(one.series[arm.name] for one in some).samples
            for arm in some[0].group.arms
        }
        for peer in run.asked_peers:
            series = joined(one.theirs[peer.name] for one in some)
            errors = [error for one in some for error in one.errors[peer.name]]
            if series.samples or errors or question == "configs":
                found = peer.result(series, errors, ours)
                yield replace(found, question=question, row=some[0].group.of(question))


def drift_of(reference: Sequence[tuple[float, float]]) -> Drift:
    """The machine's own drift, from times and speeds of the same text."""
    at_s, speeds = tuple(at for at, _ in reference), tuple(one for _, one in reference)
    if len(reference) < FEWEST:
        words = "unknown: the run was too short to decode the same text several times."
        return Drift(at_s=at_s, tokens_per_second=speeds, words=words)
    found = statistics.drift(at_s, speeds)
    return Drift(
        at_s=at_s,
        tokens_per_second=speeds,
        spread=found.noise if found.is_known else None,
        trend=1 + found.change if found.is_known else None,
        noisy=found.is_too_noisy,
        words=f"The same text, decoded plainly {len(speeds)} times: {found}.",
    )


def _left_out(run: Run) -> Iterator[Remark]:
    for one in run.groups:
        if one.left_out:
            count = len(one.left_out)
            what = f"{one.left_out[0]} is" if count == 1 else f"{count} prompts are"
            yield Remark(
                kind="unfinished",
                words=f"{one.group.in_words()}: {what} left out: {one.why_left_out}",
            )


def about_pair(pair: Pair, engine: Engine) -> dict[str, Any]:
    """Which models were measured, and their size."""
    setting = setting_of(pair, engine)
    return {
        "name": pair.name,
        "target": setting.target,
        "draft": setting.draft,
        "quantisation": setting.quantisation,
        "bytes": {
            "target": bytes_of(engine.target),
            **{name: bytes_of(model) for name, model in engine.drafts.items()},
        },
        "compiled": engine.compiles,
        "context": engine.context,
        "template_args": dict(pair.template_args),
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as they are read again."""
    return {name: list(one) if isinstance(one, tuple) else one for name, one in values.items()}
