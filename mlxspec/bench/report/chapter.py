"""A chapter of a report: one question with its answer. No MLX."""

from __future__ import annotations

from dataclasses import dataclass

from mlxspec.bench.cells import Cell, Question
from mlxspec.bench.report.plots import Plot
from mlxspec.bench.report.tables import Table
from mlxspec.bench.results import Results


@dataclass(frozen=True)
class Chapter:
    """A question with its answer.

    Args:
        key: unique in a report, for links.
        finding: one sentence, which the plot and the tables bear out.
    """

    key: str
    title: str
    finding: str
    tables: tuple[Table, ...]
    plot: Plot | None = None


def measured(results: Results, question: Question) -> list[Cell]:
    """The cells of a question with at least one sample."""
    return [cell for cell in results.of(question) if cell.samples]
