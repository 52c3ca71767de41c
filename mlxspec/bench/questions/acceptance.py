"""How many proposals of each drafter a target keeps, by kind of text.

    python -m mlxspec.bench acceptance --target FOLDER --draft FOLDER --draft history
    python -m mlxspec.bench acceptance --pair NAME --json FILE

The target writes every text greedily and plainly, until it ends it. One pass of a draft model over
the text then shows what rounds of any K would have kept, and text drafters propose along it. So the
figures depend on the models alone, on no machine's speed. Where a prompt names a text to be edited,
`prediction` is that text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.control import replay
from mlxspec.control.replay import Proposed
from mlxspec.decode.engine import Engine
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.drafters.history import Prediction
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.errors import NothingDrafts
from mlxspec.measure.acceptance import agreement
from mlxspec.pairs.loading import load
from mlxspec.pairs.table import Pair

COUNTS = (1, 3, 5)
SHOWN = 3  # the K of the table that is printed
PREDICTION = "prediction"

SOURCE = """def total(prices):
    total = 0
    for price in prices:
        total += price
    return total


def average(prices):
    return total(prices) / len(prices)
"""
LETTER = """The library opens at nine on weekdays and at ten on Saturdays. Books may be kept for
three weeks, and films for one. Whoever loses a book pays for it. The reading room is closed in
August.
"""


class Task(NamedTuple):
    """A prompt, and the text that its answer is expected to resemble, if there is one."""

    prompt: str
    expected: str = ""


TASKS = {
    "chat": (
        Task("Explain in two sentences why the sky is blue."),
        Task("Name three countries in South America, with one fact about each."),
    ),
    "code": (
        Task("Write a Python function that reverses a linked list."),
        Task("Write an SQL query that counts the orders of each customer in May."),
    ),
    "JSON": (
        Task('Write a JSON list of five fruits, each with "name" and "colour", and nothing else.'),
        Task('Write a JSON object with "name", "born" and "works" for Jane Austen.'),
    ),
    "edit": (
        Task(f"{SOURCE}\nRename `prices` to `costs` in this code. Write the code alone.", SOURCE),
        Task(f"{LETTER}\nRepeat this text, but with eleven in place of ten.", LETTER),
    ),
    "languages": (
        Task("Translate into French: The library is closed today, because it is snowing. ❄️"),
        Task("请用中文介绍一下北京。🎉"),
    ),
}


class Written(NamedTuple):
    """What a target wrote for a task, and what was expected, as token ids."""

    prompt: list[int]
    text: list[int]
    expected: list[int]


def written(engine: Engine, task: Task, max_tokens: int) -> Written:
    """The target's own greedy text, from plain decoding."""
    request = engine.request(
        task.prompt, max_tokens=max_tokens, draft_tokens=0, prediction=task.expected or None
    )
    text = engine.generate(request).tokens
    return Written(list(request.tokens), text, list(request.prediction))


def along(engine: Engine, name: str, one: Written) -> list[Proposed]:
    """The proposals of a drafter at each place of a text; K is limited later."""
    most = max(COUNTS)
    if name in engine.drafts:
        cached = engine.models[1 + list(engine.drafts).index(name)]
        return replay.along_model(agreement(cached, (one.prompt, one.text)), most)
    return replay.along_text(_makers(engine, one)[name](), one.prompt, one.text, most)


def counted(places: Sequence[Sequence[Proposed]], count: int) -> dict[str, float]:
    """The rounds with up to `count` proposals along some texts, added up."""
    sizes = range(1, count + 1)
    rounds = [one for text in places for one in replay.rounds(text, sizes)]
    drafted, accepted = sum(one.tokens for one in rounds), sum(one.right for one in rounds)
    return {
        "rounds": len(rounds),
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "tokens_per_round": 1 + accepted / len(rounds) if rounds else 1.0,
    }


def measure(
    engine: Engine, tasks: Mapping[str, Sequence[Task]], max_tokens: int
) -> dict[str, dict[str, Any]]:
    """Figures by kind of text, drafter and K, as `--json` writes them."""
    found: dict[str, dict[str, Any]] = {}
    for kind, some in tasks.items():
        texts = [written(engine, task, max_tokens) for task in track(some, kind, transient=True)]
        names = [*engine.drafts, *_makers(engine, texts[0])]
        found[kind] = {"tokens": sum(len(one.text) for one in texts)}
        for name in names:
            places = [along(engine, name, one) for one in texts]
            found[kind][name] = {str(count): counted(places, count) for count in COUNTS}
    return found


def _makers(engine: Engine, one: Written) -> dict[str, Callable[[], TextDrafter]]:
    """What makes each text drafter, by name."""
    makers: dict[str, Callable[[], TextDrafter]] = {make().name: make for make in engine.texts}
    if one.expected:
        makers[PREDICTION] = lambda: Prediction(one.expected)
    return makers


def show(found: dict[str, dict[str, Any]], console: Console) -> None:
    """Print the acceptance rates and the tokens per round at K = SHOWN."""
    console.print(f"acceptance rate, and tokens per round, at K = {SHOWN}; greedy")
    names = dict.fromkeys(name for kind in found.values() for name in kind if name != "tokens")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column(no_wrap=True)
    for kind in found:
        table.add_column(kind)
    for name in names:
        cells = [kind[name][str(SHOWN)] if name in kind else None for kind in found.values()]
        table.add_row(name, *("" if cell is None else _cell(cell) for cell in cells))
    console.print(table)


def _cell(figures: dict[str, float]) -> str:
    if not figures["drafted"]:
        return "nothing proposed"
    return f"{figures['acceptance_rate']:.2f}, {figures['tokens_per_round']:.2f}"


def main(
    pair: PairOption = DEFAULT_PAIR,
    target: Annotated[str | None, typer.Option(help="A target in place of a pair's.")] = None,
    draft: Annotated[list[str] | None, typer.Option(help="Its drafts, or `history`.")] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text at most.")] = 64,
    output: JsonFile = None,
) -> None:
    """Count the proposals that a target keeps of each drafter."""
    chosen = pair if target is None else Pair(target, target, tuple(draft or ("history",)))
    engine = load(chosen)
    if not (engine.drafts or engine.texts):
        raise NothingDrafts
    found = measure(engine, TASKS, max_tokens)
    show(found, Console())
    name = pair if target is None else Path(target).name
    write({"target": name, "max_tokens": max_tokens, "kinds": found}, output)
