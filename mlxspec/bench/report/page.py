"""`report.html`: one file that needs no network and no script. No MLX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from mlxspec.bench.report import about
from mlxspec.bench.report.chapter import Chapter
from mlxspec.bench.report.chapters import chapters
from mlxspec.bench.report.figures import MISSING
from mlxspec.bench.report.plots import NARROW, WIDE, Plot
from mlxspec.bench.report.svg import tag
from mlxspec.bench.report.tables import Table
from mlxspec.bench.results import Results
from mlxspec.files import page_style

LONG_TABLE = 12  # rows from which a table is folded
SMALL = 52  # letters in a row of a table that fits on a narrow page
LONG = 20  # letters from which a column holds words, and no figures


def html(results: Results) -> str:
    """The page."""
    name = escape(about.title(results))
    style = page_style(Path(__file__).with_name("page.css"))
    told = chapters(results)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} · mlxspec bench</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="product">mlxspec bench</p>
<h1>{name}</h1>
{_pairs(about.facts(results), "facts")}
</header>
<main>
{_verdict(results)}
{_contents(told)}
{"".join(map(_section, told))}
<section id="conditions" aria-labelledby="conditions-title">
<h2 id="conditions-title">How it was measured</h2>
{_pairs(about.conditions(results), "conditions")}
</section>
</main>
</body>
</html>
"""


def _verdict(results: Results) -> str:
    warned = "".join(f"<li>{_prose(one.words)}</li>" for one in results.warnings)
    figures = about.headline(results)
    return (
        f'<p class="verdict">{_prose(about.verdict(results))}</p>\n'
        + (_pairs(figures, "headline") if figures else "")
        + (f'<ul class="warnings" aria-label="Warnings">{warned}</ul>\n' if warned else "")
    )


def _prose(text: str) -> str:
    """A sentence; commands and options in it are code, which no line breaks."""
    return re.sub(
        r"`([^`]+)`|(?<![\w-])(--[a-z][a-z-]+)",
        lambda found: f"<code>{found[1] or found[2]}</code>",
        escape(text, quote=False),
    )


def _contents(told: Iterable[Chapter]) -> str:
    links = "".join(f'<li><a href="#{one.key}">{escape(one.title)}</a></li>' for one in told)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if links else ""


def _pairs(pairs: Iterable[tuple[str, str]], kind: str) -> str:
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs
    )
    return f'<dl class="{kind}">{inner}</dl>\n'


def _section(chapter: Chapter) -> str:
    key = chapter.key
    return (
        f'<section id="{key}" aria-labelledby="{key}-title">\n'
        f'<h2 id="{key}-title">{escape(chapter.title)}</h2>\n'
        f'<p class="finding">{_prose(chapter.finding)}</p>\n'
        + ("" if chapter.plot is None else _figure(chapter, chapter.plot))
        + "".join(map(_table, chapter.tables))
        + "</section>\n"
    )


def _figure(chapter: Chapter, plot: Plot) -> str:
    """The plot for both widths; the page shows one of them."""
    made = ""
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        name = f"{chapter.key}-{kind}"
        height, inner = plot.draw(width, name)
        made += tag(
            "svg",
            tag("title", escape(chapter.title), id=f"{name}-title"),
            tag(
                "desc",
                escape(f"{chapter.finding} The table below has all values."),
                id=f"{name}-desc",
            ),
            inner,
            viewBox=f"0 0 {width} {height:.0f}",
            class_=kind,
            role="img",
            aria_labelledby=f"{name}-title {name}-desc",
        )
    return f"<figure>{made}</figure>\n"


def _table(table: Table) -> str:
    """A table; on a narrow page each row becomes a list of its names and figures.

    Roles are written out, because a browser forgets those of a table that is laid out as a list.
    """
    head = "".join(
        tag("th", escape(name), scope="col", role="columnheader", class_=_kind(place, table))
        for place, name in enumerate(table.header)
    )
    body, before = "", ""
    for row in table.rows:
        again = "again" if row[0] == before and table.labels > 1 else None
        body += tag("tr", *_cells(row, table), role="row", class_=again) + "\n"
        before = row[0]
    columns = zip(table.header, *table.rows, strict=True)
    small = sum(max(map(len, column)) + 1 for column in columns) <= SMALL
    kind = ' class="small"' if small else ""
    made = (
        f'<table role="table"{kind}><caption>{escape(table.caption)}</caption>\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{body}</tbody></table>\n'
    )
    if len(table.rows) <= LONG_TABLE:
        return made
    told = f"Table of {len(table.rows)} rows: {table.caption}"
    return f"<details><summary>{escape(told)}</summary>\n{made}</details>\n"


def _cells(row: Sequence[str], table: Table) -> Iterator[str]:
    for place, (name, text) in enumerate(zip(table.header, row, strict=True)):
        if place < table.labels:
            yield tag("th", escape(text), scope="row", role="rowheader")
        else:
            kinds = [_kind(place, table), "missing" if text == MISSING else None]
            kind = " ".join(filter(None, kinds)) or None
            yield tag("td", escape(text), role="cell", class_=kind, data_name=name)


def _kind(place: int, table: Table) -> str | None:
    """Whether a column holds words, which stand to the left, or figures, to the right."""
    long = any(len(row[place]) > LONG for row in table.rows)
    return "words" if long or place < table.labels else None
