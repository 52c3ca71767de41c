"""`mlxspec probe --shape`: what rounds of models cost that nobody needs to download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec.cli import engines
from mlxspec.cli.arguments.options import ModelOptions
from mlxspec.cli.disk import require_mlx
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.screen.output import Output
from mlxspec.defaults import AUTO, INTERRUPTED
from mlxspec.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.measure.costing import Costing
    from mlxspec.measure.costs import Costs
    from mlxspec.pairs.memory import MemorySum
    from mlxspec.pairs.shapes import ShapePair

ShapeOption = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="TARGET[:BITS][+DRAFT[:BITS]]",
        help="In place of models, random weights of a shape, such as llama-8b:4bit+llama-1b:4bit. "
        "A folder or a repository with a config.json is a shape too.",
    ),
]
_COLUMNS = 96  # that the tables need
_NEVER = "never"


def probe_shape(shape: str, models: ModelOptions, budget_s: float, out: Output) -> None:
    """Measure and print what rounds of a shape cost."""
    require_no_models(models)
    with out.display(text=False) as display:
        (pair,) = resolved([shape], display)
        from mlxspec.measure.costing import Costing

        costing = Costing(made(pair, models, display), pair.target.layers, budget_s=budget_s)

        def end() -> None:
            """Print what is found; also from a thread, where MLX keeps this one."""
            display.close()
            show(pair, costing, out)

        with leaving(end):
            interrupted = display.follow(costing)
        end()
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def require_no_models(models: ModelOptions) -> None:
    """Raise UsageError where options name models, too."""
    named = {
        "--pair": models.pair,
        "--target": models.target,
        "--draft": models.draft,
        "--adapter": models.adapter,
        "--revision": models.revision,
        "--models": models.models,
    }
    for option, value in named.items():
        if value is not None:
            raise UsageError(
                f"--shape makes models of its own, and {option} names others.",
                hint="Leave one out; a draft's shape follows a plus: --shape TARGET+DRAFT.",
            )


def resolved(names: Iterable[str], display: Display) -> list[ShapePair]:
    """The pairs of shapes that names mean; all of them before the first is measured."""
    with display.status("starting", aloud=False):
        require_mlx()
        from mlxspec.pairs.shapes import pair_of

        return [pair_of(name) for name in names]


def made(pair: ShapePair, models: ModelOptions, display: Display) -> dict[int, Engine]:
    """Engines with random weights, ready to be timed."""
    from mlxspec.models.scales import why_slow

    if pair.words:
        display.note(pair.words)
    with display.status(f"making random weights of {pair.name}", timed=True):
        found = pair.engines(compiled=models.compiled, kv=models.kv())
    deepest = found[max(found)]
    if why := why_slow([deepest.target, *deepest.drafts.values()]):
        display.note(why)
    engines.build_kernels(deepest, deepest.request([0], draft_tokens=AUTO), display)
    return found


def show(pair: ShapePair, costing: Costing, out: Output, more: str = "--budget {}") -> None:
    """Everything that was measured, and the verdict last.

    Args:
        more: the option that gives a measurement so many seconds.
    """
    costs = costing.costs
    both, alone = pair.memory()
    if out.as_json:
        out.object(
            {
                "shape": pair.as_dict(),
                **(costs.as_dict() if costs is not None else {}),
                "memory": both.as_dict(),
                "memory_of_target": alone.as_dict(),
                "left_out": costing.left_out,
                "verdict_in_words": verdict(costs),
            }
        )
        return
    if costs is not None:
        from mlxspec.cli.screen.report import curve

        console = out.console(least=_COLUMNS)
        console.print(curve(costs.pass_s))
        console.print(_rounds(costs))
        console.print(_best(costs))
        if pair.words:
            console.print(f"{pair.words}.", soft_wrap=True)
        if costing.left_out:
            console.print(
                f"Measured to stay within the budget: {'; '.join(costing.left_out)}. "
                f"{more.format(costing.enough)} leaves the time to measure all.",
                soft_wrap=True,
            )
        console.print(_memory(both, alone), soft_wrap=True)
    out.console().print(verdict(costs), style="bold", soft_wrap=True)


def verdict(costs: Costs | None) -> str:
    """What it comes to, in one line."""
    from mlxspec.measure.break_even import best, pays_above

    if costs is None:
        return "interrupted before a turn was over"
    if costs.is_noisy:
        return (
            f"this machine is too busy to tell: the same measurement varies by {costs.noise:.0%}; "
            "close other programs and measure again"
        )
    over = costs.over_plain()
    lowest = {count: pays_above(cost, count) for count, cost in over.items()}
    paying = {count: rate for count, rate in lowest.items() if rate is not None}
    if not paying:
        return "no K pays here, however many of its proposals are accepted"
    count = min(paying, key=lambda one: paying[one])
    usual, speed_up = best(over, 0.7)
    gain = f"K = {usual} brings {speed_up:.2f} x plain" if usual else "none of them pays"
    return f"K = {count} pays above an acceptance rate of {paying[count]:.0%}; at 70% {gain}"


def _rounds(costs: Costs) -> Table:
    """What a round takes by K, and from which acceptance rate on it pays."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from mlxspec.measure.break_even import pays_above

    columns = ["K", "ms", "expected", "drafts", "verifies", "host", "x plain", "pays above"]
    columns += ["from text", *(["mlx-lm"] if costs.others else [])]
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1))
    over, text = costs.over_plain(), costs.text_over_plain()
    rows = {0: ["0", _ms(costs.plain_s), "", "", "", "", "1.00", "", ""]}
    for count in sorted({*costs.rounds} or {*text}):
        one = costs.rounds.get(count)
        parts = (one.round_s, one.expected_s, one.draft_s, one.verify_s, one.host_s) if one else ()
        cells = [_ms(seconds) for seconds in parts]
        cells = cells or ["", "", "", _ms(costs.pass_s[count + 1]), ""]
        own = _rate(pays_above(over[count], count)) if one else ""
        of_text = _rate(pays_above(text[count], count))
        rows[count] = [str(count), *cells, f"{over[count]:.2f}", own, of_text]
    for count, cells in rows.items():
        theirs = costs.others.get(count)
        more = [_ms(theirs) if theirs is not None else ""] if costs.others else []
        table.add_row(*cells, *more)
    table.title = Text("what a round takes, in ms, and the acceptance rate above which it pays")
    return table


def _best(costs: Costs) -> Table:
    """The best K by acceptance rate."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from mlxspec.measure.break_even import best
    from mlxspec.measure.costs import RATES

    over = costs.over_plain()
    table = Table("acceptance rate", "best K", "x plain", box=SIMPLE_HEAD, padding=(0, 1))
    for rate in RATES:
        count, speed_up = best(over, rate)
        table.add_row(f"{rate:.0%}", str(count), f"{speed_up:.2f}")
    return table


def _memory(both: MemorySum, alone: MemorySum) -> str:
    from mlxspec.pairs.pull import gigabytes

    ratio = both.total / alone.total
    draft = (
        f", {ratio:.2f} x the target alone" if both.weights.keys() != alone.weights.keys() else ""
    )
    return f"A text of {both.context:,} tokens needs {gigabytes(both.total)}{draft}."


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _rate(rate: float | None) -> str:
    return _NEVER if rate is None else f"{rate:.0%}"
