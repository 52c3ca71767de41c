"""What a probe and a tuning found, for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxspec.probe import WORTH_IT, Option, Probe
from mlxspec.tuning import Verdict

WITHIN = 0.1  # how far a prediction may be off


def show_probe(found: Probe, console: Console) -> None:
    """The cost curve, what is expected of every K, and the verdict."""
    console.print(_curve(found))
    console.print(
        f"plain round {1e3 * found.plain_s:.2f} ms · draft step {1e3 * found.draft_s:.2f} ms · "
        f"host {1e3 * found.host_s:+.2f} ms of a round, less what overlaps"
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
    console.print(str(Verdict(best.draft_tokens, best.speed_up)), style="bold")


def show_trial(predicted: Option, measured: Mapping[int, float], console: Console) -> None:
    """What was predicted beside what came."""
    came = measured[predicted.draft_tokens] / measured[0]
    off = predicted.speed_up / came - 1
    remark = "" if abs(off) <= WITHIN else ": texts differ, or the machine was busy"
    console.print(
        f"predicted {predicted.speed_up:.2f} x, measured {came:.2f} x "
        f"({measured[predicted.draft_tokens]:.0f} against {measured[0]:.0f} tokens/s), "
        f"off by {off:+.0%}{remark}"
    )


def show_speeds(measured: Mapping[int, float], console: Console) -> None:
    """Tokens per second with each K."""
    table = Table("draft tokens", "tokens/s", "x plain", box=SIMPLE_HEAD, padding=(0, 1))
    for count, speed in measured.items():
        table.add_row(str(count), f"{speed:.0f}", f"{speed / measured[0]:.2f}")
    console.print(table)


def _curve(found: Probe) -> Table:
    """T(M)/T(1) as bars."""
    first = found.pass_s[1]
    largest = max(found.pass_s.values()) / first
    table = Table("rows", "T(M)/T(1)", "", box=SIMPLE_HEAD, padding=(0, 1))
    for rows, seconds in found.pass_s.items():
        ratio = seconds / first
        table.add_row(str(rows), f"{ratio:.2f}", Bar(largest, 0, ratio, width=40))
    table.title = Text("what the target takes for several rows, beside one")
    return table


def _expected(found: Probe) -> Table:
    table = Table(
        "draft tokens",
        "last accepted",
        "tokens per round",
        "a round takes",
        "x plain",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    best = found.best().draft_tokens
    for option in found.options():
        k = option.draft_tokens
        style = "bold" if k == best else "" if option.speed_up >= WORTH_IT else "dim"
        table.add_row(
            str(k),
            f"{found.acceptance[k - 1][-1]:.0%}" if k else "",
            f"{option.tokens:.2f}",
            f"{1e3 * option.seconds:.2f} ms",
            f"{option.speed_up:.2f}",
            style=style,
        )
    table.title = Text("what is expected of each number of draft tokens")
    return table
