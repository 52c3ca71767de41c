"""The findings of a probe and of a tuning, for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxspec.measure.findings import Findings, described
from mlxspec.measure.forecast import PLAIN_DECODING, WORTH_IT, Contender, Forecast
from mlxspec.measure.plan import enough
from mlxspec.metrics import speed

COLUMNS = 80  # that the tables need
WITHIN = 0.1  # how far a prediction may be off


def show(findings: Findings, console: Console) -> None:
    """All that was measured, and what was left out; but for the verdict."""
    found = findings.forecast
    if found is None:
        return
    console.print(curve(found.pass_s))
    if found.drafters:
        _show_expected(found, console)
    if findings.tried:
        console.print(_trial(found, findings.tried))
    if not findings.is_over:
        console.print("The measurement was ended before it was complete.")
    elif findings.left_out:
        console.print(
            f"Measured to stay within {findings.budget_s:.0f} s: {'; '.join(findings.left_out)}. "
            f"--budget {enough(findings.whole_s)} leaves the time to measure all.",
            soft_wrap=True,
        )


def _show_expected(found: Forecast, console: Console) -> None:
    console.print(f"plain round {1e3 * found.plain_s:.2f} ms")
    for name, drafting in found.drafters.items():
        if drafting.is_model:
            first, step = f"{1e3 * drafting.first_s:.2f} ms", f"{1e3 * drafting.step_s:.2f} ms"
            drafts = f"first draft step {first} · each other {step}"
            if drafting.at_once:
                drafts = f"one pass drafts all tokens, {first}"
            console.print(
                f"{name}: {drafts} · host {1e3 * drafting.host_s:+.2f} ms of a round, less what "
                "overlaps",
                soft_wrap=True,
            )
    console.print(_expected(found))


def _trial(found: Forecast, tried: Mapping[Contender, float]) -> Table:
    """The forecast beside the measurement, in tokens per second and times plain decoding."""
    expected = {Contender(one.drafter, one.draft_tokens): one.speed_up for one in found.options()}
    table = Table("tried", "tokens/s", "x plain", "expected", "", box=SIMPLE_HEAD, padding=(0, 1))
    for contender, tokens_per_second in tried.items():
        came, remark = tokens_per_second / tried[PLAIN_DECODING], ""
        predicted = expected.get(contender)
        if predicted is not None and contender != PLAIN_DECODING:
            off = predicted / came - 1
            remark = f"off by {off:+.0%}"
            remark += "" if abs(off) <= WITHIN else ": texts differ, or the machine was busy"
        table.add_row(
            described(contender),
            speed(tokens_per_second),
            f"{came:.2f}",
            "" if predicted is None else f"{predicted:.2f}",
            remark,
        )
    return table


def curve(pass_s: Mapping[int, float]) -> Table:
    """T(M)/T(1) as bars.

    Args:
        pass_s: seconds by rows.
    """
    first = pass_s[1]
    largest = max(pass_s.values()) / first
    table = Table("rows", "time", "x one row", "", box=SIMPLE_HEAD, padding=(0, 1))
    for rows, seconds in pass_s.items():
        ratio = seconds / first
        bar = Bar(largest, 0, ratio, width=40)
        table.add_row(str(rows), f"{1e3 * seconds:.2f} ms", f"{ratio:.2f}", bar)
    table.title = Text("what a pass of the target over several rows takes")
    return table


def _expected(found: Forecast) -> Table:
    table = Table(
        "drafter",
        "draft tokens",
        "accepted",
        "a round brings",
        "takes",
        "x plain",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for option in found.options():
        name, count = option.drafter, option.draft_tokens
        rates = found.drafters[name].acceptance(count) if name else ()
        table.add_row(
            name or "plain",
            str(count),
            f"{rates[0]:.0%} … {rates[-1]:.0%}" if rates else "",
            f"{option.tokens:.2f} tokens",
            f"{1e3 * option.seconds:.2f} ms",
            f"{option.speed_up:.2f}",
            style="" if option.speed_up >= WORTH_IT else "dim",
        )
    table.title = Text("what is expected; of a round's tokens the first and the last are accepted")
    return table
