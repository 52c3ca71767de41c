"""The outcomes of `mlxspec cascade eval`, for people and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mlxspec.cascade.evaluation import ALL, Outcome, Setting, cost_of, outcomes, rules_of
from mlxspec.cascade.gathering import Case, Gathering
from mlxspec.cascade.rules import Thresholds
from mlxspec.cascade.upstreams import Upstream
from mlxspec.cli.screen.output import Output

_ROOMY = 72  # columns from which the table has wider gaps
_UNKNOWN = "–"


@dataclass
class Shown:
    """Shows, once, what is known of the answers to prompts.

    Args:
        thresholds, off: what holds. upstream: None where none was asked. answers: their file.
    """

    gathering: Gathering
    thresholds: Thresholds
    off: frozenset[str]
    upstream: Upstream | None
    answers: Path
    _is_over: bool = field(default=False, init=False)

    def on(self, out: Output) -> None:
        """Write a table, or an object, and lines for people."""
        if self._is_over:
            return
        self._is_over = True
        cases = [case for case in self.gathering.cases if case.local is not None]
        found = outcomes(cases, self.thresholds, self.off, self.upstream)
        if out.as_json:
            out.object(self._as_dict(cases, found))
        elif found:
            roomy = out.console().width >= _ROOMY
            out.show(_table(found, self.upstream, gap=2 if roomy else 1), "", self._legend())
        for line in self._lines(cases):
            out.tell(line)

    def _legend(self) -> str:
        if self.upstream is None:
            return "* holds now. asked: the share of prompts that would be sent"
        name = self.upstream.name
        return (
            f"* holds now. asked: the share of prompts that would be sent to {name}; alike: both "
            f"answers to these; used: the share whose answer would be {name}'s; missed: the share "
            "that would stay local although the answers differ; s: mean seconds to an answer"
        )

    def _lines(self, cases: list[Case]) -> list[str]:
        here, count = len(cases), len(self.gathering.cases)
        told = f"{here} of {count} prompts are" if here < count else f"{count} prompts are"
        lines = [f"{told} answered; the answers are kept in {self.answers}"]
        if self.upstream is None:
            return [*lines, "no upstream was asked: --upstream NAME compares its answers"]
        lacking = [case.fault for case in cases if case.fault is not None]
        for why, times in Counter(lacking).most_common():
            lines.append(f"{self.upstream.name} {why}: {times} prompts without its answer")
        if any(case.reply is None for case in self.gathering.cases):
            lines.append("run it again to ask for what is missing")
        return lines

    def _as_dict(self, cases: list[Case], found: list[Outcome]) -> dict[str, Any]:
        return {
            "upstream": self.upstream and self.upstream.name,
            "prompts": len(self.gathering.cases),
            "answered": len(cases),
            "compared": sum(case.similarity is not None for case in cases),
            "answers": str(self.answers),
            "outcomes": [one.as_dict() for one in found],
            "cases": [self._case(case) for case in cases],
        }

    def _case(self, case: Case) -> dict[str, Any]:
        assert case.local is not None, "cases with an answer are shown"
        draft = case.local.draft(self.thresholds.max_draft_tokens)
        setting = Setting(name=ALL, thresholds=self.thresholds, off=self.off)
        return {
            "prompt": case.prompt,
            "rules": list(rules_of(case.local, setting)),
            "draft": draft.text,
            "logprob": draft.logprob,
            "entropy": draft.entropy,
            "similarity": case.similarity,
            "cost": self.upstream and cost_of(case, self.upstream),
            "local_s": case.local.whole_s,
            "upstream_s": case.reply and case.reply.seconds,
            "fault": case.fault,
        }


def _table(found: list[Outcome], upstream: Upstream | None, *, gap: int) -> Table:
    """A row for each setting; a threshold's values stand below its name."""
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    columns = ["asked"]
    if upstream is not None:
        columns += ["alike", "used", "missed"]
        columns += ["cost"] if upstream.price_in is not None else []
        columns += ["s"]
    for title in columns:
        table.add_column(title, justify="right")
    name = ""
    for one in found:
        if one.value is None:
            label = Text(one.name, "bold")
        else:
            if one.name != name:
                table.add_row(Text(one.name, "bold"))
            value = one.value if isinstance(one.value, str) else f"{one.value:g}"
            label = Text(f"  {value}{' *' if one.is_set else ''}")
        name = one.name
        cells = {
            "asked": f"{one.asked:.0%}",
            "alike": _share(one.similarity),
            "used": _share(one.used),
            "missed": _share(one.missed),
            "cost": _UNKNOWN if one.cost is None else f"{one.cost:.4f}",
            "s": _UNKNOWN if one.latency_s is None else f"{one.latency_s:.2f}",
        }
        table.add_row(label, *(Text(cells[title]) for title in columns))
    return table


def _share(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0%}"
