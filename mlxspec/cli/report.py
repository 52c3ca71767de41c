"""The findings of a probe and of a tuning, for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxspec.control.records import Recommendation
from mlxspec.defaults import MODEL
from mlxspec.measure.forecast import PLAIN_DECODING, WORTH_IT, Contender, Forecast

COLUMNS = 80  # that the tables need
WITHIN = 0.1  # how far a prediction may be off


def show_probe(found: Forecast, console: Console) -> None:
    """The cost curve, what is expected of every drafter's K, and the verdict."""
    console.print(_curve(found))
    console.print(f"plain round {1e3 * found.plain_s:.2f} ms")
    for name, drafting in found.drafters.items():
        if drafting.is_model:
            console.print(
                f"{name}: draft step {1e3 * drafting.step_s:.2f} ms · "
                f"host {1e3 * drafting.host_s:+.2f} ms of a round, less what overlaps"
            )
    console.print(_expected(found))
    if found.is_noisy:
        console.print(
            f"This machine is too busy to tell: the same pass varies by {found.noise:.0%}. "
            "Close other programs and probe again.",
            style="bold",
        )
        return
    best = found.best()
    drafter = "" if best.drafter == MODEL else best.drafter
    console.print(str(Recommendation(best.draft_tokens, best.speed_up, drafter)), style="bold")


def show_trial(found: Forecast, measured: Mapping[Contender, float], console: Console) -> None:
    """The forecast beside the measurement, in tokens per second and times plain decoding."""
    expected = {Contender(one.drafter, one.draft_tokens): one.speed_up for one in found.options()}
    table = Table("tried", "tokens/s", "x plain", "expected", "", box=SIMPLE_HEAD, padding=(0, 1))
    for contender, speed in measured.items():
        came, remark = speed / measured[PLAIN_DECODING], ""
        predicted = expected.get(contender)
        if predicted is not None and contender != PLAIN_DECODING:
            off = predicted / came - 1
            remark = f"off by {off:+.0%}"
            remark += "" if abs(off) <= WITHIN else ": texts differ, or the machine was busy"
        table.add_row(
            described(contender),
            f"{speed:.0f}",
            f"{came:.2f}",
            "" if predicted is None else f"{predicted:.2f}",
            remark,
        )
    console.print(table)


def described(contender: Contender) -> str:
    """A way to decode in words."""
    if contender == PLAIN_DECODING:
        return "plain"
    return f"{contender.drafter} {contender.draft_tokens}".strip()


def _curve(found: Forecast) -> Table:
    """T(M)/T(1) as bars."""
    first = found.pass_s[1]
    largest = max(found.pass_s.values()) / first
    table = Table("rows", "T(M)/T(1)", "", box=SIMPLE_HEAD, padding=(0, 1))
    for rows, seconds in found.pass_s.items():
        ratio = seconds / first
        table.add_row(str(rows), f"{ratio:.2f}", Bar(largest, 0, ratio, width=40))
    table.title = Text("what the target takes for several rows, beside one")
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
    best = found.best()
    for option in found.options():
        name, count = option.drafter, option.draft_tokens
        rates = found.drafters[name].acceptance(count) if name else ()
        style = "bold" if option == best else "" if option.speed_up >= WORTH_IT else "dim"
        table.add_row(
            name or "plain",
            str(count),
            f"{rates[0]:.0%} … {rates[-1]:.0%}" if rates else "",
            f"{option.tokens:.2f} tokens",
            f"{1e3 * option.seconds:.2f} ms",
            f"{option.speed_up:.2f}",
            style=style,
        )
    table.title = Text("what is expected; of a round's tokens the first and the last are accepted")
    return table
