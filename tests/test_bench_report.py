"""The report of a benchmark: what it says, and that it stands on its own."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from stat import S_IMODE
from xml.etree import ElementTree

import pytest
from benchmarked import ARMS, NONE, TYPES, acceptance, cell, cells, peers, results, shape

from mlxspec.bench.cells import Configuration
from mlxspec.bench.report import svg
from mlxspec.bench.report.about import date, verdict
from mlxspec.bench.report.chapters import chapters
from mlxspec.bench.report.figures import duration, in_bytes, in_share, in_time
from mlxspec.bench.report.markdown import markdown
from mlxspec.bench.report.page import html
from mlxspec.bench.report.plots import NARROW, WIDE, Forest, Lines, Point, Spot, Stacks
from mlxspec.bench.report.writing import write_report
from mlxspec.bench.results import Drift, Remark, of_json, read
from mlxspec.bench.statistics import Interval
from mlxspec.files import replacing

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """A page's elements with their attributes and texts; fails where tags do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def by_key(made):
    return {one.key: one for one in chapters(made)}


def drawn(plot, width=WIDE):
    """The drawing as XML."""
    height, markup = plot.draw(width, "p")
    return height, ElementTree.fromstring(f"<svg>{markup}</svg>")


def said(plot, width=WIDE):
    return [one.text for one in drawn(plot, width)[1].iter("text")]


# --- the files ---


def test_a_report_is_three_files_and_the_results_are_read_again(tmp_path):
    made = results()
    before = os.umask(0o027)
    try:
        written = write_report(made, tmp_path / "new" / "folder")
        with replacing(tmp_path / "private", private=True):
            pass
    finally:
        os.umask(before)
    modes = {path.name: S_IMODE(path.stat().st_mode) for path in written}
    assert modes == dict.fromkeys(("results.json", "report.md", "report.html"), 0o640)
    assert S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    written[0].chmod(0o604)
    assert [one.name for one in written] == ["results.json", "report.md", "report.html"]
    assert read(written[0]) == made
    assert written[1].read_text() == markdown(made)
    assert written[2].read_text() == html(made)
    write_report(replace(made, finished=False), tmp_path / "new" / "folder")
    assert S_IMODE(written[0].stat().st_mode) == 0o604  # as its owner left it
    assert "not finished" in written[2].read_text()


def test_the_page_needs_nothing_but_itself():
    page = Outline(html(results()))
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), tag
        assert not any(name.startswith("on") for name in attributes)
    for place in re.findall(r"url\(([^)]*)\)", html(results())):
        assert place.startswith("#")
    assert "@import" not in html(results())


def test_names_on_the_page_are_unique_and_every_reference_finds_one():
    page = Outline(html(results()))
    names = [one["id"] for _, one in page.elements if "id" in one]
    assert len(names) == len(set(names))
    for _, one in page.elements:
        for name in (one.get("aria-labelledby") or "").split():
            assert name in names
        if one.get("href"):
            assert one["href"][1:] in names
        if (one.get("fill") or "").startswith("url(#"):
            assert one["fill"][5:-1] in names


def test_every_plot_is_described_and_has_a_table():
    told = chapters(results())
    assert all(one.tables and all(table.rows for table in one.tables) for one in told)
    page = Outline(html(results()))
    plots = page.all("svg")
    assert len(plots) == 2 * sum(one.plot is not None for one in told)
    assert all(one["role"] == "img" and len(one["aria-labelledby"].split()) == 2 for one in plots)
    assert len(page.all("title")) == len(plots) + 1
    assert len(page.all("desc")) == len(plots)
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(one["scope"] in ("row", "col") for one in page.all("th"))


@pytest.mark.parametrize("one", chapters(results()), ids=lambda one: one.key)
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_drawings_stay_within_their_frame(one, width):
    if one.plot is None:
        return
    height, root = drawn(one.plot, width)
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert -1 <= float(element.get(name, 0)) <= width + 1
        for name in ("y", "y1", "y2", "cy"):
            assert -12 <= float(element.get(name, 0)) <= height + 1


def test_what_comes_from_outside_is_escaped():
    evil = "<script>alert('x')</script> & \"more\" | `code`"
    arm = Configuration(name=evil, draft_tokens=3)
    made = results(
        pair={"name": evil, "target": evil},
        machine={"processor": evil, evil: evil},
        cells=(
            cell("configs", NONE),
            cell("configs", arm, 2.0),
            cell("prompts", NONE, prompt_type=evil),
            cell("prompts", arm, 2.0, prompt_type=evil),
        ),
        warnings=(Remark(kind="slow", words=evil),),
        peers=(replace(peers()[0], name=evil, words=evil),),
        shape=(replace(shape(), target=evil),),
        drift=Drift(at_s=(0.0, 1.0), tokens_per_second=(1.0, 2.0), words=evil),
        created=evil,
        prompts_hash=evil,
    )
    page = html(made)
    assert not Outline(page).all("script")
    assert evil in Outline(page).text
    for line in markdown(made).splitlines():
        assert "<script" not in re.sub(r"\\.", "", line)


# --- what is missing ---


def test_one_configuration_is_reported_without_a_comparison():
    made = results(cells=(cell("configs", NONE),), recommendation=None, peers=(), shape=())
    (first, steady) = chapters(made)
    assert first.plot is None
    assert first.finding.startswith("Plain decoding alone was measured")
    assert first.tables[0].rows[0][:2] == ("plain", "40")
    assert steady.key == "drift"
    assert verdict(made) == "There is no recommendation: too little was measured."
    assert "There is no recommendation" in Outline(html(made)).text
    markdown(made)


def test_a_run_in_which_nothing_was_finished_is_reported():
    made = results(
        cells=tuple(replace(one, samples=(), speedup=None, acceptance=None) for one in cells()),
        finished=False,
        recommendation=None,
        peers=(),
        shape=(),
        drift=Drift(),
    )
    assert chapters(made) == []
    assert verdict(made) == "No measurement was finished."
    page = Outline(html(made))
    assert "not finished" in page.text
    assert not page.all("svg")
    assert not page.all("nav")
    assert "No measurement was finished" in markdown(made)
    assert of_json(made.as_json()) == made


def test_questions_that_were_not_asked_have_no_chapter():
    some = tuple(one for one in cells() if one.question in ("configs", "context"))
    made = results(cells=some, peers=(), shape=(), drift=Drift())
    assert list(by_key(made)) == ["configs", "acceptance", "costs", "rounds", "context", "targets"]


def test_an_interrupted_question_shows_what_there_is():
    some = [one for one in cells() if one.question == "prompts"]
    half = [replace(one, samples=(), speedup=None) for one in some[7:]]
    made = results(cells=(*some[:7], *half))
    found = by_key(made)["prompts"]
    assert {row[0] for row in found.tables[0].rows} == {TYPES[0], TYPES[1]}
    assert TYPES[0] in found.finding


def test_one_turn_has_a_median_and_no_interval():
    arms = [cell("configs", NONE), cell("configs", ARMS[1])]
    arms[1] = replace(arms[1], speedup=Interval(median=1.5, low=0.01, high=90.0))
    found = by_key(results(cells=tuple(arms)))["configs"]
    assert "1.50 x (from too few turns)" in found.finding
    assert found.tables[0].rows[1][2] == "1.50"
    assert "interval" not in found.tables[0].header
    assert max(map(float, re.findall(r"\d\.\d+", " ".join(said(found.plot))))) < 5


def test_too_few_turns_are_said_to_be_too_few():
    some = (*cells()[:5], *(one for one in cells() if one.question == "prompts"))
    made = results(cells=tuple(replace(one, speedup=None) for one in some), recommendation=None)
    found = by_key(made)
    for key in ("configs", "prompts"):
        assert found[key].finding == "Too few texts were written to tell a speed-up."
        assert found[key].plot is None
    assert "costs" not in found
    html(made)


def test_positions_that_few_rounds_proposed_are_not_drawn():
    few = replace(
        acceptance(3),
        drafted_by_position=(400, 300, 9, 400),
        accepted_by_position=(300, 150, 9, 400),
    )
    made = results(cells=(cells()[0], replace(cells()[1], acceptance=few)))
    found = by_key(made)["acceptance"]
    assert found.finding == "With 3, 75% of the first proposals are kept, and 50% at position 2."
    assert found.tables[0].rows == (("3", "75%", "50%", "100%", "100%"),)
    rare = replace(few, drafted_by_position=(9,), accepted_by_position=(9,))
    made = results(cells=(cells()[0], replace(cells()[1], acceptance=rare)))
    assert by_key(made)["acceptance"].plot is None


def test_commands_in_sentences_are_code():
    words = "Give it more --minutes, or run `mlxspec bench --full`; auto - or 3 -- is <fine>."
    page = html(results(warnings=(Remark(kind="unfinished", words=words),)))
    assert (
        "more <code>--minutes</code>, or run <code>mlxspec bench --full</code>; "
        "auto - or 3 -- is &lt;fine&gt;."
    ) in page


def test_programs_that_failed_are_named_with_the_reason():
    found = by_key(results(peers=peers()[1:]))["peers"]
    assert found.plot is None
    assert found.finding.startswith("None of the other programs")
    words = [row[-1] for row in found.tables[0].rows]
    assert words == [one.words for one in peers()[1:]]
    assert "The stream ended after 31 tokens" in Outline(html(results())).text


def test_a_shape_alone_makes_a_report():
    made = results(cells=(), peers=(), recommendation=None, drift=Drift(), pair={})
    assert [one.key for one in chapters(made)] == ["shape-0"]
    assert "1 draft token pays first: from an acceptance of 18% on" in chapters(made)[0].finding
    assert "<h1>llama-8b:4bit</h1>" in html(made)


# --- what it says ---


def test_the_sentences_say_what_the_tables_bear_out():
    found = by_key(results())
    assert found["configs"].finding == (
        "The fastest is auto: 2.04 x (1.92–2.16) plain decoding, 81 tokens/s."
    )
    assert found["prompts"].finding == (
        "Speculation gains most with code (auto: 2.75 x (2.45–3.06)), and least with chat "
        "(auto: 1.29 x (1.14–1.43))."
    )
    assert found["acceptance"].finding == (
        "With 7, 78% of the first proposals are kept, and 18% at position 7."
    )
    assert found["costs"].finding == (
        "A round of 5 proposals costs 1.82 plain rounds and brings 3.52 tokens: more than it costs."
    )
    assert found["rows"].finding == (
        "auto writes 84 tokens/s with 1 text at a time, and 305 tokens/s with 16 texts at a time."
    )
    assert found["peers"].finding == (
        "On the same prompts, mlxspec is 1.47 x (1.40–1.55) as fast as mlx-lm, 3 draft tokens."
    )


def test_a_cost_is_what_a_round_brings_over_its_speed_up():
    rows = by_key(results())["costs"].tables[0].rows
    assert rows[0] == ("0", "1.00", "1.00", "1.00", "1.00")
    _, cost, predicted, brings, gain = map(float, rows[2])
    assert cost == pytest.approx(brings / gain, abs=0.01)
    assert predicted == pytest.approx(cost / 1.04, abs=0.01)


def test_plots_show_the_numbers_of_their_tables():
    for key in ("configs", "prompts", "system", "sampling"):
        found = by_key(results())[key]
        at = found.tables[0].header.index("x plain")
        gains = {row[at] for row in found.tables[0].rows} - {"–"}
        for width in (WIDE, NARROW):
            assert gains <= set(said(found.plot, width)), key


def test_markdown_has_whole_tables():
    text = markdown(results())
    for block in text.split("\n\n"):
        if block.startswith("|"):
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(counts) == 1
    assert text.startswith("# demo\n\n**Use auto: 2.04 x plain decoding")
    assert "| code | auto | 111 | 2.75 | 2.45–3.06 |" in text


@pytest.mark.parametrize(
    ("share", "words"),
    [(None, "–"), (0, "0%"), (1, "100%"), (0.999999, "99.9%"), (0.0001, "0.1%"), (0.5, "50%")],
)
def test_a_share_that_is_not_all_never_reads_as_all(share, words):
    assert in_share(share) == words


def test_figures_have_the_unit_that_suits_them():
    assert [in_time(one) for one in (None, 0.00123, 0.0123, 0.123, 1.23, 12.3, 123)] == (
        ["–", "1.23 ms", "12.3 ms", "123 ms", "1.23 s", "12.3 s", "123 s"]
    )
    assert [in_bytes(one) for one in (None, 5e6, 2.5e9)] == ["–", "5.0 MB", "2.50 GB"]
    assert [duration(one) for one in (0, 59.6, 61, 120, 3661)] == (
        ["0 s", "1 min", "1 min 1 s", "2 min", "1 h 1 min"]
    )
    assert date("2026-03-02T09:30:00+00:00") == "2 March 2026, 09:30 UTC"
    assert date("once") == "once"


# --- drawing ---


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (1, 2.2, [1, 1.2, 1.4, 1.6, 1.8, 2, 2.2]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.93, 1.04, [0.92, 0.94, 0.96, 0.98, 1, 1.02, 1.04]),
        (5, 5, [5, 6]),
        (0, 80_000, [0, 20_000, 40_000, 60_000, 80_000]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, wanted):
    assert svg.steps(low, high, 6) == wanted


def test_names_at_the_ends_of_lines_never_touch():
    assert svg.apart([10, 11, 12], 17, 0, 200) == [10, 27, 44]
    assert svg.apart([190, 195, 60], 17, 0, 200) == [183, 200, 60]
    moved = svg.apart([5.0] * 6, 17, 0, 100)
    assert min(b - a for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False)) == 17


def test_series_differ_by_more_than_colour():
    looks = set()
    for series in range(len(svg.SHAPES)):
        shape = svg.marker(series, 0, 0)
        looks.add(re.sub(r"s\d", "", shape))
    assert len(looks) == len(svg.SHAPES)
    assert len({svg.dash(one) for one in range(4)}) == 4
    stacks = Stacks([("a", [1, 2, 3])], ("x", "y", "z"), "ms")
    patterns = [
        re.sub(r"s\d", "", ElementTree.tostring(one[0]).decode())
        for one in drawn(stacks)[1].iter("pattern")
    ]
    assert len(set(patterns)) == 3


def test_lines_that_end_apart_are_named_above_and_others_at_their_ends():
    ends = Lines([(0, "a", [Spot(1, 1), Spot(2, 2)]), (1, "b", [Spot(1, 1)])], "x", "y")
    together = Lines([(0, "a", [Spot(1, 1), Spot(2, 2)]), (1, "b", [Spot(2, 1)])], "x", "y")
    place = {}
    for name, plot in (("above", ends), ("beside", together)):
        place[name] = next(one for one in drawn(plot)[1].iter("text") if one.text == "b")
    assert float(place["above"].get("x")) < 100
    assert float(place["beside"].get("x")) > WIDE - 100


def test_an_interval_that_is_cut_off_has_no_cap():
    rows = [("a", [Point(0, 1.5, 1.4, 1.6)]), ("b", [Point(0, 1.5, 0.2, 60.0)])]
    _, root = drawn(Forest(rows, ["a"]))
    caps = [one for one in root.iter("line") if one.get("class") == "stroke s0"]
    assert len(caps) == 2 + 2  # each interval, and the caps of the first


def test_the_results_of_this_file_keep_to_the_schema():
    made = results()
    assert of_json(made.as_json()) == made
    assert json.loads(made.as_json())["schema"] == 1
