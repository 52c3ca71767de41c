"""`mlxspec generate` and `mlxspec audit`."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from mlxspec.cli import engines, options, streams
from mlxspec.cli.batching import BatchOptions
from mlxspec.cli.cascade import UpstreamOptions, cascade_of
from mlxspec.cli.checks import CheckOptions
from mlxspec.cli.grouping import grouped
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.logprobs import LogprobsOptions
from mlxspec.cli.options import ModelOptions, OutputOptions, ReasoningOptions, TextOptions
from mlxspec.cli.output import Output
from mlxspec.cli.sampling import SamplingOptions
from mlxspec.cli.summary import Both
from mlxspec.control import records
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError
from mlxspec.pairs.table import Pair
from mlxspec.spelling import Spelling

if TYPE_CHECKING:
    from mlxspec.cascade.cascade import Cascade, Policy
    from mlxspec.cascade.decision import Decision
    from mlxspec.cli.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.decode.request import Request
    from mlxspec.decode.run import Run
    from mlxspec.measure.audit import Audit
    from mlxspec.metrics import Generation

EXAMPLES = """
Examples:
  mlxspec generate 'def fibonacci(n):' --compare
  git diff | mlxspec generate --pair qwen3-8b 'Review this change.' > review.md
  mlxspec generate --target ./model --draft ./small-model 'Hello' --temp 0.7 --seed 1
"""


@grouped
def generate(
    prompt: options.PromptArgument = None,
    *,
    models: ModelOptions,
    text: TextOptions,
    sampling: SamplingOptions,
    checks: CheckOptions,
    output: OutputOptions,
    shown: ReasoningOptions,
    likely: LogprobsOptions,
    upstream: UpstreamOptions,
    many: BatchOptions,
) -> None:
    """Write text after a prompt, several tokens per pass of the target."""
    out = Output(output.as_json, output.quiet, shown.reasoning)
    many.require_alone(
        **{"A prompt": prompt, "--audit": checks.audit, "--compare": checks.compare},
        **{"--cache": text.cache, "--prediction": text.prediction},
    )
    upstream.require_place(
        **{"--batch": many.batch, "--audit": checks.audit, "--compare": checks.compare},
        **{"--raw": text.raw},
    )
    checks.require_use(models, output)
    likely.require_place(in_json=output.as_json or many.batch is not None)
    if many.batch is not None:
        _write_many(many, text, models, sampling, out, likely.logprobs)
        return
    policy = upstream.policy()
    _write(prompt, text, models, sampling, out, checks, likely.logprobs, policy, shown=True)


@grouped
def audit_text(
    prompt: options.PromptArgument = None,
    *,
    models: ModelOptions,
    text: TextOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Write a text and prove it: compare every token with plain decoding.

    When sampling, with the coupled rule, whose text depends on the seed alone. Exits with 1 where
    a difference is more than rounding.
    """
    out = Output(output.as_json, output.quiet)
    _write(prompt, text, models, sampling, out, CheckOptions(audit=True), shown=False)


def _write_many(
    many: BatchOptions,
    text: TextOptions,
    models: ModelOptions,
    sampling: SamplingOptions,
    out: Output,
    logprobs: int | None,
) -> None:
    """Write a text for every line of a file."""
    from mlxspec.cli.many import Many, work_of, write_many

    pair = models.chosen()
    text.require_free()
    usual = {
        "max_tokens": text.max_tokens,
        "draft_tokens": models.draft_tokens,
        "sampling": sampling.params(pair.sampling),
        "raw": text.raw,
        "logprobs": logprobs,
        **text.texts(pair),
    }
    streams.exactly()
    work = work_of(many)
    out = replace(out, as_json=True)
    with out.display(text=False) as display:
        engine = engines.load_engine(pair, models, display, [], quiet=out.quiet)
        usual["sampling"] = sampling.recommended(engine, pair, display.note)
        request = engine.request([0], draft_tokens=models.draft_tokens, sampling=usual["sampling"])
        record = engines.recall(pair, engine, display) if request.auto else None
        engines.build_kernels(engine, request, display, beside=many.rows > 1)
        drafts = pair.draft_name if engine.drafts or engine.heads else None
        about = {"pair": pair.name, "target": pair.target, "draft": drafts}
        lines = Many(engine, usual, work, many, out, about)
        try:
            write_many(lines, display, out)
        finally:
            if record is not None:
                records.remember(replace(record, learned=engine.learned), display.note)


@dataclass(frozen=True)
class _Result:
    """A text and what its checks found."""

    run: Run
    interrupted: bool
    both: Both | None = None
    report: Audit | None = None
    decision: Decision | None = None


def _write(
    prompt: str | None,
    text: TextOptions,
    models: ModelOptions,
    sampling: SamplingOptions,
    out: Output,
    checks: CheckOptions,
    logprobs: int | None = None,
    policy: Policy | None = None,
    *,
    shown: bool,
) -> None:
    """Generate, show what is to be shown, and check."""
    from mlxspec.cli.prompts import read_prompt, read_text

    pair = models.chosen()
    text.require_free()
    params = sampling.params(pair.sampling)  # what is wrong with it is said before anything loads
    options = {
        "max_tokens": text.max_tokens,
        "draft_tokens": models.draft_tokens,
        "raw": text.raw,
        "cache": text.cache_file(),
        "logprobs": logprobs,
        **text.texts(pair),
    }
    if text.prediction is not None and (expected := read_text(text.prediction)):
        options["prediction"] = expected if models.speculates else None
    streams.exactly()
    stdin = None if text.no_stdin else sys.stdin.buffer
    words = read_prompt(prompt, stdin, default=pair.prompt, tell=out.tell)
    with out.display(text=shown) as display:
        if words == pair.prompt and prompt is None:
            display.note(f"the pair's own prompt:\n{words}")
        notes: list[str] = []
        engine = engines.load_engine(pair, models, display, notes, quiet=out.quiet)
        params = sampling.recommended(engine, pair, display.note)
        params = params.auditable() if checks.audit else params
        request = engine.request(words, sampling=params, **options)
        cascade = None
        if policy is not None:
            cascade = cascade_of(policy, engine, request, words, options, pair)
        run = cascade.run if cascade else engine.run(request)
        run.generation.notes += notes
        result = _run(pair, engine, run, cascade, display, checks, out, shown=shown)
    _print(pair, engine, result, out, shown=shown)


def _run(
    pair: Pair,
    engine: Engine,
    run: Run,
    cascade: Cascade | None,
    display: Display,
    checks: CheckOptions,
    out: Output,
    *,
    shown: bool,
) -> _Result:
    """Show a run on a display, remember what it learned, and check its text."""
    record = engines.recall(pair, engine, display) if run.request.auto else None
    engines.build_kernels(engine, run.request, display)
    leaves = leaving(lambda: _end(pair, engine, run, display, out))
    with leaves, display.told("writing the text"):
        interrupted = _show(cascade or run, run.generation, display)
    if record is not None:
        records.remember(replace(record, learned=engine.learned), display.note)
    if interrupted:
        display.finish(run.generation, None)
        return _Result(run, interrupted)
    if cascade is not None and cascade.decision is not None:
        display.note(cascade.decision.line())
    with leaving(lambda: _end(pair, engine, run, display, out)):
        result = _compared(engine, run, display, checks, with_split=shown and not out.quiet)
    if cascade is not None:
        return replace(result, decision=cascade.decision)
    if result.interrupted or not checks.audit:
        return result
    return _audited(pair, engine, result, display, out, shown=shown)


def _compared(
    engine: Engine, run: Run, display: Display, checks: CheckOptions, *, with_split: bool
) -> _Result:
    """Sum up a whole text; a comparison that a person ends takes nothing from it."""
    both = split = None
    display.close()
    try:
        if checks.compare:
            with display.status("decoding again, with and without speculation", aloud=True):
                both = _both(engine, run.request)
        if with_split:
            with display.status("timing the parts of a round"):
                split = _split(run)
    except KeyboardInterrupt:
        display.finish(run.generation, split, both)
        return _Result(run, True, both)
    display.finish(run.generation, split, both)
    return _Result(run, False, both)


def _audited(
    pair: Pair, engine: Engine, result: _Result, display: Display, out: Output, *, shown: bool
) -> _Result:
    """Audit a text; a person who ends that gets a report on the tokens until then."""
    from mlxspec.measure.audit import Auditing

    auditing = Auditing(engine, result.run)

    def audited(*, interrupted: bool) -> _Result:
        return replace(result, interrupted=interrupted, report=auditing.report)

    def last_words() -> None:
        display.close()
        _tell(pair, engine, audited(interrupted=True), out, shown=shown)

    with leaving(last_words):
        interrupted = display.follow(auditing)
    return audited(interrupted=interrupted)


def _show(events: Run | Cascade, generation: Generation, display: Display) -> bool:
    """Show a run to its end; True when a person ended it."""
    with closing(events), display.running():
        try:
            for event in events:
                display.show(event, generation, generation.timing.decode_s)
        except KeyboardInterrupt:
            return True
    return False


def _end(pair: Pair, engine: Engine, run: Run, display: Display, out: Output) -> None:
    """Sum up a run that ends in the middle of a round."""
    display.finish(run.generation, None)
    if out.as_json:
        out.object(_as_dict(pair, engine, _Result(run, interrupted=True)))


def _both(engine: Engine, request: Request) -> Both:
    """The request again, now that its rounds are traced, and without speculation."""
    again = replace(request, cache=None)
    plain = replace(again, draft_tokens=0, auto=False)
    return Both(engine.generate(again), engine.generate(plain))


def _split(run: Run) -> Any:
    from mlxspec.measure.timing import measure_split

    if run.session is None:
        return None
    # A draft reads the text between rounds: that is no round's time, and not the host's.
    rounds_s = run.generation.timing.decode_s - run.session.draft_reading_s
    return measure_split(run.session, rounds_s / run.generation.speculation.rounds)


def _print(pair: Pair, engine: Engine, result: _Result, out: Output, *, shown: bool) -> None:
    """Print what is left to print, and exit as the result asks for."""
    _tell(pair, engine, result, out, shown=shown)
    if result.report is not None and result.report.outcome == "defect":
        raise typer.Exit(MlxspecError.exit_code)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _tell(pair: Pair, engine: Engine, result: _Result, out: Output, *, shown: bool) -> None:
    """Print a result's object, or the report of its audit."""
    report = result.report
    if out.as_json:
        out.object(_as_dict(pair, engine, result))
    elif report is not None and not (shown and out.quiet):
        tokenizer = engine.tokenizer
        line = report.described(lambda token: str(tokenizer and tokenizer.decode([token])))
        (out.tell if shown else out.line)(line)


def _as_dict(pair: Pair, engine: Engine, result: _Result) -> dict[str, Any]:
    generation = result.run.generation
    speculates = generation.speculation.enabled
    values = {
        "pair": pair.name,
        "target": pair.target,
        "draft": pair.draft_name if speculates and (engine.drafts or engine.heads) else None,
        **generation.as_dict(),
    }
    if result.run.request.logprobs is not None:
        values["logprobs"] = Spelling(engine.tokenizer).as_dicts(generation.logprobs)
    if result.both is not None:
        values["compared"] = {name: one.as_dict() for name, one in result.both._asdict().items()}
    if result.report is not None:
        values["audit"] = result.report.as_dict()
    if result.decision is not None:
        values |= result.decision.as_dict()
    return values
