"""`mlxspec bench`: which setting is best here, for which texts, and how sure that is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from mlxspec.cli import engines
from mlxspec.cli.arguments.grouping import grouped
from mlxspec.cli.arguments.help import Group
from mlxspec.cli.arguments.options import ModelOptions
from mlxspec.cli.bench import results as bench_results
from mlxspec.cli.bench.options import BenchOptions
from mlxspec.cli.bench.peers import PeerOptions
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.screen.output import Output
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import UsageError
from mlxspec.files import expanded, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mlxspec.bench.arms import OwnArm
    from mlxspec.bench.measuring import Run
    from mlxspec.bench.plan import Group as Arms
    from mlxspec.bench.plan import Settings
    from mlxspec.bench.prompt_sets import Prompt
    from mlxspec.bench.results import Results
    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.pairs.table import Pair

EXAMPLES = """
Examples:
  mlxspec bench --quick                              # half a minute on the embedded pair
  mlxspec bench --pair qwen3-8b --report results     # tables here, and a page to keep
  mlxspec bench --configs none,3,history:5,auto --types code,edit
  mlxspec bench --contexts 1024,4096 --types none    # long prompts alone
  mlxspec bench --pair qwen3-8b --against mlx-lm --server http://localhost:1234
  mlxspec bench --shape llama-8b:4bit+llama-1b:4bit  # random weights: nothing is downloaded
"""

bench_app = typer.Typer(cls=Group, invoke_without_command=True, epilog=EXAMPLES)


@bench_app.callback()
@grouped
def bench(
    ctx: typer.Context, *, options: BenchOptions, others: PeerOptions, models: ModelOptions
) -> None:
    """Measure which setting is fastest here, for which kind of text, and how sure that is."""
    if ctx.invoked_subcommand is None:
        measure(options, others, models)


def measure(options: BenchOptions, others: PeerOptions, models: ModelOptions) -> None:
    """Measure, print the tables and write the files; also what there is when Ctrl-C is pressed."""
    if models.draft_tokens is not None:
        raise UsageError(
            "--draft-tokens has no place here: several are compared.",
            hint=f"Write --configs none,{models.draft_tokens}.",
        )
    others.require_sense()
    if options.shape:
        _measure_shapes(options, others, models)
        return
    settings = options.settings()
    prompts = options.prompt_set(settings)
    _require_places(options)
    pair, out = models.chosen(), Output(quiet=options.quiet)
    created = datetime.now(UTC)
    notes: list[str] = []
    with out.display(text=False) as display:
        engine = engines.load_engine(pair, models, display, notes, quiet=out.quiet)
        from mlxspec.bench.concluding import about_pair, results_of
        from mlxspec.bench.environment import environment

        run, before = _prepared(engine, pair, settings, prompts, others, models, display)
        about = about_pair(pair, engine)

        def end() -> bool:
            """Write and print what is there; also from a thread, where MLX keeps this one.

            False where a target was asked for and missed.
            """
            display.close()
            results = results_of(
                run,
                created=created,
                pair=about,
                prompts=prompts,
                before=before,
                after=environment(),
            )
            return _finish(results, options, out)

        with leaving(end):
            interrupted = _follow(run, display, out)
        passed = end()
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not passed:
        raise typer.Exit(1)


def _measure_shapes(options: BenchOptions, others: PeerOptions, models: ModelOptions) -> None:
    """Measure what rounds of shapes cost."""
    from mlxspec.cli.bench.shapes import measure_shapes

    for option, value in options.of_texts().items():
        if value is not None:
            raise UsageError(
                f"--shape measures what does not depend on a text, so {option} has no place.",
                hint="Leave one of them out.",
            )
    if others.server:
        raise UsageError(
            "A server cannot take part in a measurement of random weights.",
            hint="Leave out --server; --against mlx-lm can.",
        )
    _require_places(options)
    out = Output(quiet=options.quiet)
    measure_shapes(
        options.shape or [],
        models,
        options.settings().minutes,
        out,
        lambda results, show: _finish(results, options, out, show),
        mlx_lm=bool(others.against),
    )


def _require_places(options: BenchOptions) -> None:
    """Raise UsageError where results could not be written once they are there."""
    file, folder = options.json_file, options.report
    if file is not None and str(file) != "-":
        parent = expanded(file).absolute().parent
        if expanded(file).is_dir() or not parent.is_dir():
            raise UsageError(
                f"The results cannot be written to {file}.",
                hint="Name a file in a folder that is there.",
            )
    if folder is not None and expanded(folder).exists() and not expanded(folder).is_dir():
        raise UsageError(f"{folder} is no folder.", hint="Name a folder for the report.")


def _prepared(
    engine: Engine,
    pair: Pair,
    settings: Settings,
    prompts: Sequence[Prompt],
    others: PeerOptions,
    models: ModelOptions,
    display: Display,
) -> tuple[Run, Mapping[str, object]]:
    """A run whose kernels are built, and the environment; says what would spoil the figures."""
    from mlxspec.bench.arms import own_arms
    from mlxspec.bench.environment import concerns, environment
    from mlxspec.bench.measuring import Run
    from mlxspec.bench.plan import configurations, planned, without_systems
    from mlxspec.decode.alone import drafters_of
    from mlxspec.text import is_raw

    assert engine.tokenizer is not None
    chosen = configurations(settings.configs, drafters_of(engine))
    if not drafters_of(engine):
        chosen = chosen[:1]
    usual = {"template_args": dict(pair.template_args)} if pair.template_args else {}
    arms = own_arms(engine, chosen, usual, compiled=models.compiled)
    groups = planned(settings, chosen, prompts)
    if is_raw(engine.tokenizer, False) and settings.systems != ("none",):
        display.note("the model has no chat template: system prompts are left out")
        groups = without_systems(groups)
    if not groups:
        raise UsageError(
            "There is nothing to measure.",
            hint="Leave out --types none, or add --contexts, --rows, --temps or --system.",
        )
    before = environment()
    for words in concerns(before):
        display.note(words)
    peers = others.arms(arms, pair.target_name)
    _build_kernels(arms, groups, display)
    return Run(arms, groups, prompts, settings, peers=peers, tell=display.note), before


def _build_kernels(arms: Mapping[str, OwnArm], groups: Sequence[Arms], display: Display) -> None:
    from mlxspec.bench.arms import Asked

    kinds = {(one.temperature, "rows" in one.questions, one.arms) for one in groups}
    for temperature, beside, some in sorted(kinds, key=lambda kind: kind[:2]):
        for arm in some:
            messages = [[{"role": "user", "content": "Hello"}]]
            asked = Asked(prompt="", messages=messages, max_tokens=8, temperature=temperature)
            own = arms[arm.name]
            engines.build_kernels(own.engine, own.requests(asked)[0], display, beside=beside)


def _follow(run: Run, display: Display, out: Output) -> bool:
    """Show a run to its end; True where a person ended it."""
    from mlxspec.cli.bench.live import Watched

    watched = Watched(run)
    if not out.quiet and watched.is_shown:
        with watched:
            return watched.follow()
    return display.follow(run)


def _finish(
    results: Results,
    options: BenchOptions,
    out: Output,
    show: Callable[[], None] | None = None,
) -> bool:
    """Write the files, and print the tables unless stdout has the results.

    Args:
        show: prints them; None prints those of a run.

    Returns:
        False where the targets were asked for, and one is missed.
    """
    from mlxspec.bench.targets import targets

    on_stdout = options.json_file is not None and str(options.json_file) == "-"
    text = options.format.text(results)
    written: list[str] = []
    if options.json_file is not None and not on_stdout:
        write_whole(expanded(options.json_file), text)
        written.append(str(options.json_file))
    if options.report is not None:
        from mlxspec.bench.report.writing import write_report

        written += map(str, write_report(results, expanded(options.report)))
    if on_stdout:
        out.line(text.rstrip("\n"))
    elif show is not None:
        show()
    else:
        from mlxspec.cli.bench import tables as bench_tables

        bench_tables.show(results, out.console())
    for name in written:
        out.tell(f"written: {name}")
    if not options.targets:
        return True
    aims = targets(results)
    if not on_stdout:
        bench_results.show_targets(aims, out)
    return all(one.is_met for one in aims)
