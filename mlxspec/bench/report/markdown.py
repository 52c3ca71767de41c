"""`report.md`: the sentences and the tables of the report. No MLX."""

from __future__ import annotations

from collections.abc import Iterable

from mlxspec.bench.report import about
from mlxspec.bench.report.chapters import chapters
from mlxspec.bench.report.tables import Table
from mlxspec.bench.results import Results


def markdown(results: Results) -> str:
    """The report in GitHub's Markdown."""
    parts = [
        f"# {_words(about.title(results))}",
        f"**{_words(about.verdict(results))}**",
        _list(about.facts(results)),
    ]
    if figures := about.headline(results):
        parts.append(_list(figures))
    if results.warnings:
        parts.append("\n".join(f"> {_words(one.words)}  " for one in results.warnings))
    for chapter in chapters(results):
        parts += [f"## {_words(chapter.title)}", _words(chapter.finding)]
        for table in chapter.tables:
            parts += [f"*{_words(table.caption)}*", _table(table)]
    parts += ["## How it was measured", _list(about.conditions(results))]
    return "\n\n".join(parts) + "\n"


def _list(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {_words(name)}: {_words(text)}" for name, text in pairs)


def _table(table: Table) -> str:
    """A pipe table; figures stand to the right."""
    rule = [":--" if place < table.labels else "--:" for place in range(len(table.header))]
    rows = [map(_words, table.header), rule, *(map(_words, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(text: str) -> str:
    """Text that Markdown takes for text, on one line."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
