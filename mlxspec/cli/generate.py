"""`mlxspec generate` and `mlxspec audit`."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from mlxspec.cli import engines
from mlxspec.cli.arguments import options
from mlxspec.cli.arguments.grouping import grouped
from mlxspec.cli.arguments.options import ModelOptions, OutputOptions, ReasoningOptions, TextOptions
from mlxspec.cli.arguments.sampling import SamplingOptions
from mlxspec.cli.batching import BatchOptions
from mlxspec.cli.cascade import UpstreamOptions, cascade_of
from mlxspec.cli.checks import CheckOptions
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.screen import streams
from mlxspec.cli.screen.logprobs import LogprobsOptions
from mlxspec.cli.screen.output import Output
from mlxspec.cli.screen.summary import Both
from mlxspec.control import records
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Split
from mlxspec.pairs.table import Pair
from mlxspec.spelling import Spelling

if TYPE_CHECKING:
    from mlxspec.cascade.cascade import Cascade, Policy
    from mlxspec.cascade.decision import Decision
    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.decode.run import Run
    from mlxspec.measure.audit import Audit

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
    """What was found of a text by the checks behind it."""

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
    from mlxspec.cli.arguments.prompts import read_prompt, read_text

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
        writing = _Writing(pair, engine, run, cascade, display, checks, out, shown)
        result = writing.written()
    writing.tell(result)
    if result.report is not None and result.report.outcome == "defect":
        raise typer.Exit(MlxspecError.exit_code)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


@dataclass(frozen=True)
class _Writing:
    """A text that is written, shown and checked.

    Args:
        cascade: the run with an upstream behind it, where there is one.
        shown: whether the text itself is what a person waits for.
    """

    pair: Pair
    engine: Engine
    run: Run
    cascade: Cascade | None
    display: Display
    checks: CheckOptions
    out: Output
    shown: bool

    def written(self) -> _Result:
        """Show the run, remember what it learned, and check its text."""
        pair, engine, run, display = self.pair, self.engine, self.run, self.display
        record = engines.recall(pair, engine, display) if run.request.auto else None
        engines.build_kernels(engine, run.request, display)
        with leaving(self._end), display.told("writing the text"):
            interrupted = self._show()
        if record is not None:
            records.remember(replace(record, learned=engine.learned), display.note)
        if interrupted:
            display.finish(run.generation, None)
            return _Result(interrupted)
        decision = None if self.cascade is None else self.cascade.decision
        if decision is not None:
            display.note(decision.line())
        with leaving(self._end):
            result = self._compared()
        if self.cascade is not None:
            return replace(result, decision=decision)
        return result if result.interrupted or not self.checks.audit else self._audited(result)

    def _show(self) -> bool:
        """Show the run to its end; True when a person ended it."""
        generation, events = self.run.generation, self.cascade or self.run
        with closing(events), self.display.running():
            try:
                for event in events:
                    self.display.show(event, generation, generation.timing.decode_s)
            except KeyboardInterrupt:
                return True
        return False

    def _end(self) -> None:
        """Sum up a run that ends in the middle of a round."""
        self.display.finish(self.run.generation, None)
        if self.out.as_json:
            self.out.object(self._as_dict(_Result(interrupted=True)))

    def _compared(self) -> _Result:
        """Sum up a whole text; a comparison that a person ends takes nothing from it."""
        both = split = None
        interrupted = False
        self.display.close()
        try:
            if self.checks.compare:
                words = "decoding again, with and without speculation"
                with self.display.status(words, aloud=True):
                    both = self._both()
            if self.shown and not self.out.quiet:
                with self.display.status("timing the parts of a round"):
                    split = self._split()
        except KeyboardInterrupt:
            interrupted = True
        self.display.finish(self.run.generation, split, both)
        return _Result(interrupted, both)

    def _both(self) -> Both:
        """The request again, now that its rounds are traced, and without speculation."""
        again = replace(self.run.request, cache=None)
        plain = replace(again, draft_tokens=0, auto=False)
        return Both(self.engine.generate(again), self.engine.generate(plain))

    def _split(self) -> Split | None:
        from mlxspec.measure.timing import measure_split

        session, generation = self.run.session, self.run.generation
        if session is None:
            return None
        # A draft reads the text between rounds: that is no round's time, and not the host's.
        rounds_s = generation.timing.decode_s - session.draft_reading_s
        return measure_split(session, rounds_s / generation.speculation.rounds)

    def _audited(self, result: _Result) -> _Result:
        """Audit a text; a person who ends that gets a report on the tokens until then."""
        from mlxspec.measure.audit import Auditing

        auditing = Auditing(self.engine, self.run)

        def audited(*, interrupted: bool) -> _Result:
            return replace(result, interrupted=interrupted, report=auditing.report)

        def last_words() -> None:
            self.display.close()
            self.tell(audited(interrupted=True))

        with leaving(last_words):
            interrupted = self.display.follow(auditing)
        return audited(interrupted=interrupted)

    def tell(self, result: _Result) -> None:
        """Print a result's object, or the report of its audit."""
        report, tokenizer = result.report, self.engine.tokenizer
        if self.out.as_json:
            self.out.object(self._as_dict(result))
        elif report is not None and not (self.shown and self.out.quiet):
            line = report.described(lambda token: str(tokenizer and tokenizer.decode([token])))
            (self.out.tell if self.shown else self.out.line)(line)

    def _as_dict(self, result: _Result) -> dict[str, Any]:
        pair, engine, generation = self.pair, self.engine, self.run.generation
        speculates = generation.speculation.enabled
        values = {
            "pair": pair.name,
            "target": pair.target,
            "draft": pair.draft_name if speculates and (engine.drafts or engine.heads) else None,
            **generation.as_dict(),
        }
        if self.run.request.logprobs is not None:
            values["logprobs"] = Spelling(engine.tokenizer).as_dicts(generation.logprobs)
        if result.both is not None:
            values["compared"] = {
                name: one.as_dict() for name, one in result.both._asdict().items()
            }
        if result.report is not None:
            values["audit"] = result.report.as_dict()
        if result.decision is not None:
            values |= result.decision.as_dict()
        return values
