"""`mlxspec bench --shape`: what rounds of models cost that nobody needs to download."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from mlxspec.cli.arguments.options import ModelOptions
from mlxspec.cli.costs import made, require_no_models, resolved, show
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.screen.output import Output
from mlxspec.defaults import INTERRUPTED

if TYPE_CHECKING:
    from mlxspec.bench.results import Results, Shape
    from mlxspec.cli.screen.display import Display
    from mlxspec.measure.costing import Costing
    from mlxspec.pairs.shapes import ShapePair


def measure_shapes(
    names: Sequence[str],
    models: ModelOptions,
    minutes: float,
    out: Output,
    finish: Callable[[Results, Callable[[], None]], object],
    *,
    mlx_lm: bool,
) -> None:
    """Measure shapes one after the other.

    Args:
        minutes: for all of them. finish: called once with the results, also where a person ends the
            measurement, and with what prints them. mlx_lm: whether its rounds take turns with ours.
    """
    require_no_models(models)
    created, started = datetime.now(UTC), time.perf_counter()
    interrupted = False
    with out.display(text=False) as display:
        pairs = resolved(names, display)
        from mlxspec.bench.environment import concerns, environment
        from mlxspec.bench.shapes import results_of_shapes, shape_of

        before = environment()
        for words in concerns(before):
            display.note(words)
        found: list[tuple[ShapePair, Costing]] = []

        def print_all() -> None:
            for pair, costing in found:
                enough = costing.enough * len(pairs) / 60
                show(pair, costing, out, f"--minutes {enough:.1f}")

        def end() -> None:
            """Write and print what is there; also from a thread, where MLX keeps this one."""
            display.close()
            shapes: list[Shape] = [shape for one in found if (shape := shape_of(*one)) is not None]
            results = results_of_shapes(
                shapes,
                created=created,
                seconds=time.perf_counter() - started,
                finished=not interrupted,
                settings={"shape": list(names), "minutes": minutes, "mlx_lm": mlx_lm},
                before=before,
                after=environment(),
            )
            finish(results, print_all)

        with leaving(end):
            for pair in pairs:
                costing = _begun(pair, models, 60 * minutes / len(pairs), display, mlx_lm=mlx_lm)
                found.append((pair, costing))
                interrupted = display.follow(costing)
                if interrupted:
                    break
        end()
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _begun(
    pair: ShapePair, models: ModelOptions, budget_s: float, display: Display, *, mlx_lm: bool
) -> Costing:
    from mlxspec.bench.shapes import rounds_of_mlx_lm
    from mlxspec.measure.costing import Costing

    engines = made(pair, models, display)
    return Costing(
        engines,
        pair.target.layers,
        budget_s=budget_s,
        others=rounds_of_mlx_lm if mlx_lm else None,
    )
